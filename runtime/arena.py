"""The device's memory: every stream's slot, the weights, the buffers of a step, the lanes between host and device.

Allocated once; nothing grows. The slots are laid out layer first, [L, slots, ...] (`kernels/slots.cu`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import BackendError
from nemostream.runtime import kernels as sources
from nemostream.runtime.device import Device
from nemostream.spec import Bundle, Chunk

_RESERVE = 512 << 20  # bytes of device memory left to the encoder's own needs


class Arena:
    """All memory there is, and `step`, the struct that tells the kernels where.

    Raises `BackendError` if the device has not that much free, naming a capacity that would fit.
    """

    def __init__(
        self, bundle: Bundle, device: Device, cell: str, capacity: int, max_batch: int, chunks: list[Chunk]
    ) -> None:
        manifest = self._manifest = bundle.manifest
        self._cell_bytes = 4 if cell == "float32" else 2
        self._rows = -(-max_batch // 4) * 4
        self._most_frames = max(chunk.frames for chunk in chunks)
        self._most_samples = max(chunk.samples for chunk in chunks)
        self._records = self._rows * self._most_frames * manifest.decoder.max_symbols
        self.slot_bytes = self._arena(capacity)
        buffers = self._buffers()
        needed = sum(self.slot_bytes.values()) + sum(buffers.values()) + _RESERVE
        if needed > device.free_bytes:
            others = sum(buffers.values()) + _RESERVE
            fit = (device.free_bytes - others) * capacity // sum(self.slot_bytes.values())
            raise BackendError(
                f"{capacity} streams in batches of {max_batch} need {needed / 1e9:.1f} GB of {device.name}'s memory, "
                f"{device.free_bytes / 1e9:.1f} GB are free; "
                + (f"load the model with capacity={fit} or less." if fit > 0 else "choose a smaller max_batch.")
            )
        self.step = np.zeros(1, sources.STEP)[0]
        arrays = sources.weights(bundle, cell) | sources.start_state(bundle)
        for name, size in (self.slot_bytes | buffers | {name: a.nbytes for name, a in arrays.items()}).items():
            self.step[name] = device.allocate(size)
        for name, array in arrays.items():
            device.write(int(self.step[name]), array)
        self.step["lstm_words"] = arrays["lstm_weight"].shape[1]
        self._in_bytes = 8 * self._rows + 4 * self._rows * self._most_samples
        self._out_bytes = 4 * (4 + self._rows) + sources.RECORD.itemsize * self._records
        self._in, self._out = device.allocate_host(2 * self._in_bytes), device.allocate_host(2 * self._out_bytes)
        resets = device.allocate_host(4 * capacity)
        self.reset_slots = resets[: 4 * capacity].view(np.int32)
        for name, host in (("host_in", self._in), ("host_out", self._out), ("reset_slots", resets)):
            self.step[name] = host.ctypes.data
        self.step["host_in_bytes"], self.step["host_out_bytes"] = self._in_bytes, self._out_bytes
        self.step["slots"], self.step["most_rows"] = capacity, self._rows
        self.step["most_pairs"] = self._rows * self._most_frames

    def _arena(self, slots: int) -> dict[str, int]:
        spec, net, cell = self._manifest.encoder, self._manifest.decoder, self._cell_bytes
        ring = spec.layers * spec.cache * spec.d_model * cell
        return {
            "k": slots * ring,
            "v": slots * ring,
            "conv": slots * spec.layers * spec.d_model * spec.conv_cache * cell,
            "mel_cache": slots * spec.mel_cache * self._manifest.features.mels * 4,
            "tail": slots * self._manifest.features.tail * 4,
            "predicted": slots * net.joint * 4,
            "h": slots * net.layers * net.hidden * 4,
            "c": slots * net.layers * net.hidden * 4,
            "position": slots * 8,
        }

    def _buffers(self) -> dict[str, int]:
        """Bytes of what a step needs beside the arena, for the most rows and the longest chunk."""
        manifest, rows = self._manifest, self._rows
        spec, net, frames = manifest.encoder, manifest.decoder, self._most_frames
        gathered = self._arena(rows)
        words = ("slot", "length", "count", "failed", "at", "end", "last", "symbols", "label")
        return {
            **{f"row_{word}": 4 * rows for word in words},
            "row_position": 8 * rows,
            "row_valid": 8 * rows,
            "wave": 4 * rows * (manifest.features.tail + self._most_samples),
            "mel": 4 * rows * spec.subsampling * frames * manifest.features.mels,
            "row_mel_cache": gathered["mel_cache"],
            "mel_cache_next": gathered["mel_cache"],
            "row_k": gathered["k"],
            "row_v": gathered["v"],
            "row_conv": gathered["conv"],
            "k_new": gathered["k"] // spec.cache * frames,
            "v_new": gathered["v"] // spec.cache * frames,
            "conv_next": gathered["conv"],
            "encoded": 4 * rows * frames * net.joint,
            "control": 4 * len(sources.CONTROL),
            "list_rows": 8 * rows,
            "list_first": 8 * rows,
            "list_pairs": 8 * rows * frames,
            "partial": 16 * rows * frames * sources.tiles(net.vocabulary + 1),
            "emitted": 4 * rows,
            "h_next": gathered["h"],
            "records": sources.RECORD.itemsize * self._records,
        }

    def view(self, chunk: Chunk, rows: int, in_place: bool) -> np.void:
        """The kernels' argument for a step of that chunk size and so many rows."""
        step = self.step.copy()
        step["rows"], step["frames"], step["samples"] = rows, chunk.frames, chunk.samples
        step["in_place"] = in_place
        return step

    def addresses(self, step: np.void, in_place: bool) -> dict[str, int]:
        """Where the encoder finds its inputs and leaves its outputs, by the names of its graph."""
        names = {
            "mel": "mel",
            "mel_cache": "row_mel_cache",
            "position": "row_position",
            "valid": "row_valid",
            "encoded_joint": "encoded",
            "mel_cache_next": "mel_cache_next",
            "k_new": "k_new",
            "v_new": "v_new",
            "conv_next": "conv_next",
        }
        addresses = {name: int(step[field]) for name, field in names.items()}
        one = self._arena(1)  # bytes of all layers of one slot
        slots = int(step["slots"] if in_place else step["rows"])
        for kind in ("k", "v", "conv"):
            start, layer = int(step[kind if in_place else f"row_{kind}"]), slots * one[kind]
            for index in range(self._manifest.encoder.layers):
                addresses[f"{kind}_cache.{index}"] = start + index * layer // self._manifest.encoder.layers
        return addresses

    # -- the lanes -----------------------------------------------------------------------------------------------------

    def rows_of(self, lane: int) -> NDArray[np.int32]:
        return self._in[lane * self._in_bytes :][: 4 * self._rows].view(np.int32)

    def lengths_of(self, lane: int) -> NDArray[np.int32]:
        return self._in[lane * self._in_bytes + 4 * self._rows :][: 4 * self._rows].view(np.int32)

    def audio_of(self, lane: int) -> NDArray[np.float32]:
        return self._in[lane * self._in_bytes + 8 * self._rows : (lane + 1) * self._in_bytes].view(np.float32)

    def undecided(self, lane: int) -> bool:
        """Whether the step's loop ended before its rows did."""
        return bool(self._out[lane * self._out_bytes :][4:8].view(np.int32)[0])

    def answer(self, lane: int) -> tuple[NDArray[np.int32], Any]:
        """Which rows failed, and the records. Copies."""
        out = self._out[lane * self._out_bytes : (lane + 1) * self._out_bytes]
        said, start = int(out[:4].view(np.int32)[0]), 16 + 4 * self._rows
        failed = out[16:start].view(np.int32).copy()
        return failed, out[start:][: sources.RECORD.itemsize * said].view(sources.RECORD).copy()
