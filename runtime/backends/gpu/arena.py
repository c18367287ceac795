"""Device memory of the GPU backend: the slots of all streams, weights, step buffers, and host buffers.

Everything is allocated once. Slot arrays are layer first, [L, slots, ...] (`kernels/slots.cu`). Phrase automata are
kept in a pool, one copy per distinct phrase list, as long as any slot uses it.
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

Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, np.dtype]]  # shape and type of each array, by name

PHRASE_POOL_BYTES = 32 << 20  # automata of 1.6 million tokens
_RESERVED_BYTES = 512 << 20  # device memory left to the encoder
_BY_LAYER = ("k", "v", "conv")  # slot arrays whose first axis is the layer

_INT32, _INT64, _FLOAT32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
_NO_TOKENS = np.zeros(0, np.int32)
_NO_FRAMES = np.zeros(0, np.int64)
_NO_SCORES = np.zeros(0, np.float32)


class Arena:
    """All memory of a backend. `step` is the kernels' argument struct with its addresses filled in.

    Raises `BackendError` if the device does not have enough free memory, with a capacity that would fit.
    """

    def __init__(
        self, bundle: Bundle, device: Device, cache_dtype: str, capacity: int, max_batch: int, chunks: list[ChunkConfig]
    ) -> None:
        manifest = self._manifest = bundle.manifest
        # numpy has no bfloat16; its bits are stored.
        self._cache_dtype = np.dtype({"float32": "f4", "float16": "f2", "bfloat16": "u2"}[cache_dtype])
        self._device = device
        self._max_rows = -(-max_batch // 4) * 4
        self._max_frames = max(chunk.frames for chunk in chunks)
        self._max_samples = max(chunk.samples for chunk in chunks)
        self._max_tokens = self._max_rows * self._max_frames * manifest.decoder.max_symbols
        self.slot_bytes = {name: capacity * size for name, size in _sizes(self._slot_layout()).items()}
        buffers = _sizes(self._step_layout())
        buffers |= {"slot_automaton": capacity * _INT32.itemsize, "phrase_pool": PHRASE_POOL_BYTES}
        self._check_memory(buffers, capacity, max_batch)

        arrays = kernels.weights(bundle, cache_dtype) | kernels.start_state(bundle)
        sizes = self.slot_bytes | buffers | {name: array.nbytes for name, array in arrays.items()}
        self.step = np.zeros(1, kernels.STEP)[0]
        for name, size in sizes.items():
            self.step[name] = device.allocate(size)
        for name, array in arrays.items():
            self.write(name, array)
        rows = (self._max_rows,)
        self._inputs = _HostBuffers(
            device,
            {
                "slots": (rows, _INT32),
                "lengths": (rows, _INT32),
                "audio": ((self._max_rows * self._max_samples,), _FLOAT32),
            },
        )
        self._outputs = _HostBuffers(
            device,
            {
                "token_count": ((1,), _INT32),
                "undecided": ((1,), _INT32),
                "padding": ((2,), _INT32),
                "failed": (rows, _INT32),
                "tokens": ((self._max_tokens,), kernels.TOKEN),
            },
        )
        resets = device.allocate_host(capacity * _INT32.itemsize)
        self.reset_slots = resets[: capacity * _INT32.itemsize].view(np.int32)
        self.step["host_input"], self.step["host_input_bytes"] = self._inputs.address, self._inputs.nbytes
        self.step["host_output"], self.step["host_output_bytes"] = self._outputs.address, self._outputs.nbytes
        self.step["reset_slots"] = resets.ctypes.data
        self.step["slots"], self.step["max_rows"] = capacity, self._max_rows
        self.step["max_pairs"] = self._max_rows * self._max_frames
        self.step["lstm_words"] = arrays["lstm_weight"].shape[1]

        self._phrases: dict[int, Boosting] = {}  # by slot
        self._pool: dict[bytes, tuple[int, int]] = {}  # by digest: first byte in the pool, and the end
        self._users: Counter[bytes] = Counter()  # by digest: slots that use the phrases

    def _check_memory(self, buffers: Mapping[str, int], capacity: int, max_batch: int) -> None:
        """Raise `BackendError` if slots and buffers do not fit in the device's free memory."""
        slots, others = sum(self.slot_bytes.values()), sum(buffers.values()) + _RESERVED_BYTES
        free = self._device.free_bytes
        if slots + others <= free:
            return
        fit = (free - others) * capacity // slots
        raise BackendError(
            f"{capacity} streams in batches of {max_batch} need {(slots + others) / 1e9:.1f} GB of memory on "
            f"{self._device.name}, {free / 1e9:.1f} GB are free; "
            + (f"load the model with capacity={fit} or less." if fit > 0 else "choose a smaller max_batch.")
        )

    def _slot_layout(self) -> Layout:
        """Arrays of one slot."""
        spec, net = self._manifest.encoder, self._manifest.decoder
        ring = (spec.layers, spec.heads, spec.cache, spec.d_model // spec.heads)
        return {
            "k": (ring, self._cache_dtype),
            "v": (ring, self._cache_dtype),
            "conv": ((spec.layers, spec.d_model, spec.conv_cache), self._cache_dtype),
            "mel_cache": ((spec.mel_cache, self._manifest.features.mels), _FLOAT32),
            "tail": ((self._manifest.features.tail,), _FLOAT32),
            "predicted": ((net.joint,), _FLOAT32),
            "h": ((net.layers, net.hidden), _FLOAT32),
            "c": ((net.layers, net.hidden), _FLOAT32),
            "node": ((), _INT32),
            "position": ((), _INT64),
        }

    def _step_layout(self) -> Layout:
        """Buffers of a step besides the slots, for the largest batch and the longest chunk."""
        manifest, rows, frames, cache = self._manifest, self._max_rows, self._max_frames, self._cache_dtype
        spec, net, mels = manifest.encoder, manifest.decoder, manifest.features.mels
        d_k, tiles = spec.d_model // spec.heads, kernels.tiles(net.vocabulary + 1)
        ring = (spec.layers, rows, spec.heads, spec.cache, d_k)
        new = (spec.layers, rows, spec.heads, frames, d_k)
        conv = (spec.layers, rows, spec.d_model, spec.conv_cache)
        words = ("slot", "length", "count", "failed", "frame", "end", "label_frame", "symbols", "label", "automaton")
        return {
            **{f"row_{word}": ((rows,), _INT32) for word in words},
            "row_position": ((rows,), _INT64),
            "row_valid": ((rows,), _INT64),
            "waveform": ((rows, manifest.features.tail + self._max_samples), _FLOAT32),
            "mel": ((rows, spec.subsampling * frames, mels), _FLOAT32),
            "row_mel_cache": ((rows, spec.mel_cache, mels), _FLOAT32),
            "mel_cache_next": ((rows, spec.mel_cache, mels), _FLOAT32),
            "row_k": (ring, cache),
            "row_v": (ring, cache),
            "row_conv": (conv, cache),
            "k_new": (new, cache),
            "v_new": (new, cache),
            "conv_next": (conv, cache),
            "encoded": ((rows, frames, net.joint), _FLOAT32),
            "control": ((len(kernels.CONTROL),), _INT32),
            "list_rows": ((2, rows), _INT32),
            "list_first": ((2, rows), _INT32),
            "list_pairs": ((2, rows * frames), _INT32),
            "partial": ((rows * frames, tiles, 4), _FLOAT32),
            "boosted": ((rows * frames, tiles, 4), _FLOAT32),
            "bias": ((rows, net.vocabulary), _FLOAT32),
            "emitted": ((rows,), _INT32),
            "h_next": ((rows, net.layers, net.hidden), _FLOAT32),
            "tokens": ((self._max_tokens,), kernels.TOKEN),
        }

    def read(self, name: str, array: NDArray[Any]) -> None:
        """Fill an array from the start of a device buffer, a field of `kernels.FIELDS`, when queued work is done."""
        self._device.read(int(self.step[name]), array)

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Copy an array to the start of a device buffer, a field of `kernels.FIELDS`."""
        self._device.write(int(self.step[name]), array)

    def arguments(self, chunk: ChunkConfig, rows: int, in_place: bool) -> np.void:
        """Return the kernels' argument for steps of a chunk size with `rows` rows."""
        step = self.step.copy()
        step["rows"], step["frames"], step["samples"] = rows, chunk.frames, chunk.samples
        step["in_place"] = in_place
        return step

    def encoder_addresses(self, step: np.void, in_place: bool) -> dict[str, int]:
        """Return the address of each encoder input and output, by its name in the graph."""
        fields = {
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
        addresses = {name: int(step[field]) for name, field in fields.items()}
        slot_bytes, layers = _sizes(self._slot_layout()), self._manifest.encoder.layers
        slots = int(step["slots"] if in_place else step["rows"])
        for name in _BY_LAYER:
            start, layer_bytes = int(step[name if in_place else f"row_{name}"]), slots * slot_bytes[name] // layers
            for layer in range(layers):
                addresses[f"{name}_cache.{layer}"] = start + layer * layer_bytes
        return addresses

    # -- host buffers --------------------------------------------------------------------------------------------------

    def input_slots(self, buffer_index: int) -> NDArray[np.int32]:
        """Slot of each row [max_rows] in an input buffer, -1 for an idle row."""
        return self._inputs.arrays["slots"][buffer_index]

    def input_lengths(self, buffer_index: int) -> NDArray[np.int32]:
        """Samples of each row [max_rows] in an input buffer that belong to its stream."""
        return self._inputs.arrays["lengths"][buffer_index]

    def input_audio(self, buffer_index: int) -> NDArray[np.float32]:
        """Audio in an input buffer, flat: a step of B rows of N samples uses the first B * N."""
        return self._inputs.arrays["audio"][buffer_index]

    def undecided(self, buffer_index: int) -> bool:
        """Return whether the decoding loop ended before all rows were decided."""
        return bool(self._outputs.arrays["undecided"][buffer_index, 0])

    def emissions(self, buffer_index: int, rows: Any, bucket: int) -> Emissions:
        """Copy the results of `rows` of a step of `bucket` rows out of an output buffer.

        Tokens are ordered by iteration, so a stable sort by row keeps the order within each row.
        """
        out = {name: array[buffer_index] for name, array in self._outputs.arrays.items()}
        failed = out["failed"][rows] != 0
        emitted = out["tokens"][: int(out["token_count"][0])]
        emitted = emitted[np.argsort(emitted["row"], kind="stable")]
        counts = np.bincount(emitted["row"], minlength=bucket)
        ends = np.cumsum(counts)
        tokens, frames = [_NO_TOKENS] * len(rows), [_NO_FRAMES] * len(rows)
        scores, sum_p_alpha = [_NO_SCORES] * len(rows), [_NO_SCORES] * len(rows)
        for index in np.flatnonzero(counts[rows]).tolist():
            row = rows[index]
            part = emitted[ends[row] - counts[row] : ends[row]]
            tokens[index], frames[index] = part["token"].astype(np.int32), part["frame"].astype(np.int64)
            scores[index] = part["score"].astype(np.float32)
            sum_p_alpha[index] = part["sum_p_alpha"].astype(np.float32)
        return Emissions(tuple(tokens), tuple(frames), tuple(scores), tuple(sum_p_alpha), failed)

    # -- phrases -------------------------------------------------------------------------------------------------------

    def set_phrases(self, slot: int, phrases: Boosting | None) -> int:
        """Assign phrases to a slot and return the position of their automaton in the pool, in words; -1 for None.

        Raises `CapacityError` if the pool has no room; the slot then keeps its previous phrases.
        """
        if phrases is not None:
            image, digest = kernels.automaton(phrases), phrases.digest.tobytes()
            if digest not in self._pool:
                begin = self._find_gap(image.nbytes)
                self._device.write(int(self.step["phrase_pool"]) + begin, image)
                self._pool[digest] = (begin, begin + image.nbytes)
            self._users[digest] += 1
        if previous := self._phrases.pop(slot, None):
            old = previous.digest.tobytes()
            self._users[old] -= 1
            if not self._users[old]:
                del self._users[old], self._pool[old]
        if phrases is None:
            return -1
        self._phrases[slot] = phrases
        return self._pool[digest][0] // 4

    def _find_gap(self, size: int) -> int:
        """Return the first byte of a free range of the pool. Raises `CapacityError` if there is none."""
        begin = 0
        for start, end in sorted(self._pool.values()):
            if begin + size <= start:
                break
            begin = end
        if begin + size > PHRASE_POOL_BYTES:
            used = sum(end - start for start, end in self._pool.values())
            raise CapacityError(
                f"these phrases need {size} bytes of the {PHRASE_POOL_BYTES} in the device's phrase pool, of which "
                f"{used} are in use; set fewer phrases, or share one list among streams."
            )
        return begin

    # -- save and load -------------------------------------------------------------------------------------------------

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        """See `Backend.save`."""
        state = {name: np.empty(shape, dtype) for name, (shape, dtype) in self._slot_layout().items()}
        for address, part in self._parts(slot, state):
            self._device.read(address, part)
        phrases = self._phrases.get(slot)
        return {**state, "phrases": NO_PHRASES if phrases is None else phrases.digest}

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Backend.load`."""
        check_state(state, self.save(slot))
        for address, part in self._parts(slot, state):
            self._device.write(address, part)

    def _parts(self, slot: int, state: Mapping[str, NDArray[Any]]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the address and array of each contiguous part of a slot: one layer of a cache, or a whole array."""
        slots = int(self.step["slots"])
        for name in self._slot_layout():
            for layer, part in enumerate(state[name] if name in _BY_LAYER else [state[name]]):
                yield int(self.step[name]) + (layer * slots + slot) * part.nbytes, part


class _HostBuffers:
    """Two host buffers of the same layout that kernels access; `arrays` are [2, *shape], one per buffer."""

    def __init__(self, device: Device, layout: Layout) -> None:
        sizes = _sizes(layout)
        self.nbytes = sum(sizes.values())  # of one buffer
        memory = device.allocate_host(2 * self.nbytes)
        self.address = memory.ctypes.data
        buffers = memory[: 2 * self.nbytes].reshape(2, self.nbytes)
        self.arrays: dict[str, NDArray[Any]] = {}
        begin = 0
        for name, (shape, dtype) in layout.items():
            end = begin + sizes[name]
            self.arrays[name] = buffers[:, begin:end].view(dtype).reshape(2, *shape)
            begin = end


def _sizes(layout: Layout) -> dict[str, int]:
    """Bytes of each array."""
    return {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}
