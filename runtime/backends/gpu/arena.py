"""The device's memory: every stream's slot, the weights, the buffers of a step, the lanes between host and device.

Allocated once; nothing grows. The slots are laid out layer first, [L, slots, ...] (`kernels/slots.cu`). The phrases
that streams are boosted by lie in a pool, each list of them once, for as long as a slot has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError, CapacityError
from nemostream.runtime.backends.base import Emissions, check_state
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.device import Device
from nemostream.runtime.decoding.boosting import NO_PHRASES, Boosting

_RESERVE = 512 << 20  # bytes of device memory left to the encoder's own needs
POOL = 32 << 20  # bytes for phrases: of 1.6 million tokens

_NO_TOKENS = np.zeros(0, np.int32)
_NO_FRAMES = np.zeros(0, np.int64)
_NO_SCORES = np.zeros(0, np.float32)


class Arena:
    """All memory there is, and `step`, the struct that tells the kernels where.

    Raises `BackendError` if the device has not that much free, naming a capacity that would fit.
    """

    def __init__(
        self, bundle: Bundle, device: Device, cache_dtype: str, capacity: int, max_batch: int, chunks: list[ChunkConfig]
    ) -> None:
        manifest = self._manifest = bundle.manifest
        # numpy has no bfloat16: its bits.
        self._cell = np.dtype({"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[cache_dtype])
        self._device = device
        self._rows = -(-max_batch // 4) * 4
        self._most_frames = max(chunk.frames for chunk in chunks)
        self._most_samples = max(chunk.samples for chunk in chunks)
        self._records = self._rows * self._most_frames * manifest.decoder.max_symbols
        self.slot_bytes = self._arena(capacity)
        buffers = self._buffers() | {"boost_at": 4 * capacity, "pool": POOL}
        needed = sum(self.slot_bytes.values()) + sum(buffers.values()) + _RESERVE
        if needed > device.free_bytes:
            others = sum(buffers.values()) + _RESERVE
            fit = (device.free_bytes - others) * capacity // sum(self.slot_bytes.values())
            raise BackendError(
                f"{capacity} streams in batches of {max_batch} need {needed / 1e9:.1f} GB of {device.name}'s memory, "
                f"{device.free_bytes / 1e9:.1f} GB are free; "
                + (f"load the model with capacity={fit} or less." if fit > 0 else "choose a smaller max_batch.")
            )
        self.step = np.zeros(1, kernels.STEP)[0]
        arrays = kernels.weights(bundle, cache_dtype) | kernels.start_state(bundle)
        for name, size in (self.slot_bytes | buffers | {name: a.nbytes for name, a in arrays.items()}).items():
            self.step[name] = device.allocate(size)
        for name, array in arrays.items():
            device.write(int(self.step[name]), array)
        self.step["lstm_words"] = arrays["lstm_weight"].shape[1]
        self._in_bytes = 8 * self._rows + 4 * self._rows * self._most_samples
        self._out_bytes = 4 * (4 + self._rows) + kernels.RECORD.itemsize * self._records
        self._in, self._out = device.allocate_host(2 * self._in_bytes), device.allocate_host(2 * self._out_bytes)
        resets = device.allocate_host(4 * capacity)
        self.reset_slots = resets[: 4 * capacity].view(np.int32)
        for name, host in (("host_in", self._in), ("host_out", self._out), ("reset_slots", resets)):
            self.step[name] = host.ctypes.data
        self.step["host_in_bytes"], self.step["host_out_bytes"] = self._in_bytes, self._out_bytes
        self.step["slots"], self.step["most_rows"] = capacity, self._rows
        self.step["most_pairs"] = self._rows * self._most_frames
        self._phrases: dict[int, Boosting] = {}  # by slot
        self._pool: dict[bytes, tuple[int, int]] = {}  # by digest: first byte, and the one after the last
        self._users: Counter[bytes] = Counter()  # slots that have the list of a digest

    def _slot(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """What a slot is: shape and type of every array."""
        spec, net = self._manifest.encoder, self._manifest.decoder
        ring = (spec.layers, spec.heads, spec.cache, spec.d_model // spec.heads)
        floats = np.dtype(np.float32)
        return {
            "k": (ring, self._cell),
            "v": (ring, self._cell),
            "conv": ((spec.layers, spec.d_model, spec.conv_cache), self._cell),
            "mel_cache": ((spec.mel_cache, self._manifest.features.mels), floats),
            "tail": ((self._manifest.features.tail,), floats),
            "predicted": ((net.joint,), floats),
            "h": ((net.layers, net.hidden), floats),
            "c": ((net.layers, net.hidden), floats),
            "node": ((), np.dtype(np.int32)),
            "position": ((), np.dtype(np.int64)),
        }

    def _arena(self, slots: int) -> dict[str, int]:
        return {name: slots * prod(shape) * dtype.itemsize for name, (shape, dtype) in self._slot().items()}

    def _buffers(self) -> dict[str, int]:
        """Bytes of what a step needs beside the arena, for the most rows and the longest chunk."""
        manifest, rows = self._manifest, self._rows
        spec, net, frames = manifest.encoder, manifest.decoder, self._most_frames
        gathered = self._arena(rows)
        words = ("slot", "length", "count", "failed", "at", "end", "last", "symbols", "label", "boost")
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
            "control": 4 * len(kernels.CONTROL),
            "list_rows": 8 * rows,
            "list_first": 8 * rows,
            "list_pairs": 8 * rows * frames,
            "partial": 16 * rows * frames * kernels.tiles(net.vocabulary + 1),
            "boosted": 16 * rows * frames * kernels.tiles(net.vocabulary + 1),
            "bias": 4 * rows * net.vocabulary,
            "emitted": 4 * rows,
            "h_next": gathered["h"],
            "records": kernels.RECORD.itemsize * self._records,
        }

    def view(self, chunk: ChunkConfig, rows: int, in_place: bool) -> np.void:
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

    def rows_of(self, buffer_index: int) -> NDArray[np.int32]:
        return self._in[buffer_index * self._in_bytes :][: 4 * self._rows].view(np.int32)

    def lengths_of(self, buffer_index: int) -> NDArray[np.int32]:
        return self._in[buffer_index * self._in_bytes + 4 * self._rows :][: 4 * self._rows].view(np.int32)

    def audio_of(self, buffer_index: int) -> NDArray[np.float32]:
        return self._in[buffer_index * self._in_bytes + 8 * self._rows : (buffer_index + 1) * self._in_bytes].view(
            np.float32
        )

    def undecided(self, buffer_index: int) -> bool:
        """Whether the step's loop ended before its rows did."""
        return bool(self._out[buffer_index * self._out_bytes :][4:8].view(np.int32)[0])

    def emissions(self, buffer_index: int, rows: Any, bucket: int) -> Emissions:
        """What a step said, of `rows` of its bucket. Copies.

        Records come in the order of iterations, so a stable sort by row leaves each row's in theirs.
        """
        out = self._out[buffer_index * self._out_bytes : (buffer_index + 1) * self._out_bytes]
        count, start = int(out[:4].view(np.int32)[0]), 16 + 4 * self._rows
        failed = out[16:start].view(np.int32)[rows] != 0
        records = out[start:][: kernels.RECORD.itemsize * count].view(kernels.RECORD)
        said = records[np.argsort(records["row"], kind="stable")]
        counts = np.bincount(said["row"], minlength=bucket)
        ends = np.cumsum(counts)
        tokens, frames = [_NO_TOKENS] * len(rows), [_NO_FRAMES] * len(rows)
        scores, sum_p_alpha = [_NO_SCORES] * len(rows), [_NO_SCORES] * len(rows)
        for index in np.flatnonzero(counts[rows]).tolist():
            row = rows[index]
            part = said[ends[row] - counts[row] : ends[row]]
            tokens[index], frames[index] = part["token"].astype(np.int32), part["frame"].astype(np.int64)
            scores[index], sum_p_alpha[index] = part["score"].astype(np.float32), part["power"].astype(np.float32)
        return Emissions(tuple(tokens), tuple(frames), tuple(scores), tuple(sum_p_alpha), failed)

    # -- phrases -------------------------------------------------------------------------------------------------------

    def place(self, slot: int, phrases: Boosting | None) -> int:
        """Where in the pool the phrases that a slot now has begin, in words; -1 for none.

        Raises `CapacityError` if they find no room, and the slot keeps those it had.
        """
        if phrases is not None:
            image, key = kernels.automaton(phrases), phrases.digest.tobytes()
            if key not in self._pool:
                begin = self._gap(image.nbytes)
                self._device.write(int(self.step["pool"]) + begin, image)
                self._pool[key] = (begin, begin + image.nbytes)
            self._users[key] += 1
        if before := self._phrases.pop(slot, None):
            old = before.digest.tobytes()
            self._users[old] -= 1
            if not self._users[old]:
                del self._users[old], self._pool[old]
        if phrases is None:
            return -1
        self._phrases[slot] = phrases
        return self._pool[key][0] // 4

    def _gap(self, size: int) -> int:
        begin = 0
        for taken, end in sorted(self._pool.values()):
            if begin + size <= taken:
                break
            begin = end
        if begin + size > POOL:
            used = sum(end - start for start, end in self._pool.values())
            raise CapacityError(
                f"these phrases need {size} bytes of the {POOL} that the device has for phrases, and {used} are taken; "
                "give this stream fewer, or share one list among streams."
            )
        return begin

    # -- a slot, saved and restored ------------------------------------------------------------------------------------

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        state = {name: np.empty(shape, dtype) for name, (shape, dtype) in self._slot().items()}
        for address, part in self._parts(slot, state):
            self._device.read(address, part)
        phrases = self._phrases.get(slot)
        return {**state, "phrases": NO_PHRASES if phrases is None else phrases.digest}

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        check_state(state, self.save(slot))
        for address, part in self._parts(slot, state):
            self._device.write(address, part)

    def _parts(self, slot: int, state: Mapping[str, NDArray[Any]]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Where each part of a slot lies, and its array of `state`: a layer's of a cache, or all of anything else."""
        slots = int(self.step["slots"])
        for name in self._slot():
            for layer, part in enumerate(state[name] if name in ("k", "v", "conv") else [state[name]]):
                yield int(self.step[name]) + (layer * slots + slot) * part.nbytes, part
