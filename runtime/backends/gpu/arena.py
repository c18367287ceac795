"""Device memory of the GPU backend: the slots of all streams, weights, step buffers, and host buffers.

Everything is allocated once, as `memory.MemoryLayout` describes. Slot arrays are layer first, [L, slots, ...]
(`kernels/slots.cu`). Phrase automata are kept in a pool, one copy per distinct phrase list, as long as any slot uses
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError, CapacityError
from nemostream.runtime.backends.base import Emissions, check_state
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.device import Device, OutOfMemory
from nemostream.runtime.backends.gpu.memory import (
    BY_LAYER,
    PHRASE_POOL_BYTES,
    RESERVED_BYTES,
    Layout,
    MemoryLayout,
    array_bytes,
)
from nemostream.runtime.decoding.boosting import NO_PHRASES, Boosting

_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


class Arena:
    """All memory of a backend. `step` is the kernels' argument struct with the addresses of the arrays in `layout`.

    `encoder_bytes` returns the memory that the encoders allocate later for a batch size. Raises `BackendError` if the
    device does not have enough free memory, with a capacity that would fit.
    """

    def __init__(
        self, bundle: Bundle, device: Device, layout: MemoryLayout, encoder_bytes: Callable[[int], int]
    ) -> None:
        self.layout, self._device = layout, device
        arrays = kernels.weights(bundle, layout.cache_dtype) | kernels.start_state(bundle)
        weights = {name: array.nbytes for name, array in arrays.items()}
        self.step = np.zeros(1, kernels.STEP)[0]
        self._allocate(layout.slot_bytes() | layout.buffer_bytes() | weights, encoder_bytes)
        for name, array in arrays.items():
            self.write(name, array)
        capacity, rows = layout.capacity, (layout.max_rows,)
        self._inputs = _HostBuffers(
            device,
            {
                "slots": (rows, _INT32),
                "lengths": (rows, _INT32),
                "prompts": (rows, _INT32),
                "audio": ((layout.max_rows * layout.max_samples,), _FLOAT32),
            },
        )
        self._outputs = _HostBuffers(
            device,
            {
                "token_count": ((1,), _INT32),
                "undecided": ((1,), _INT32),
                "padding": ((2,), _INT32),
                "failed": (rows, _INT32),
                "tokens": ((layout.max_tokens,), kernels.TOKEN),
            },
        )
        resets = device.allocate_host(capacity * _INT32.itemsize)
        self.reset_slots = resets[: capacity * _INT32.itemsize].view(np.int32)
        self.step["host_input"], self.step["host_input_bytes"] = self._inputs.address, self._inputs.nbytes
        self.step["host_output"], self.step["host_output_bytes"] = self._outputs.address, self._outputs.nbytes
        self.step["reset_slots"] = resets.ctypes.data
        self.step["slots"], self.step["max_rows"] = capacity, layout.max_rows
        self.step["max_pairs"] = layout.max_rows * layout.max_frames
        self.step["lstm_words"] = arrays["lstm_weight"].shape[1]

        self._phrases: dict[int, Boosting] = {}  # by slot
        self._pool: dict[bytes, tuple[int, int]] = {}  # by digest: first byte in the pool, and the end
        self._users: Counter[bytes] = Counter()  # by digest: slots that use the phrases

    def _allocate(self, sizes: Mapping[str, int], encoder_bytes: Callable[[int], int]) -> None:
        """Allocate the arrays if they, and then the encoders, fit in the device's free memory."""
        layout, free = self.layout, self._device.free_bytes
        encoders = encoder_bytes(layout.max_batch) + RESERVED_BYTES
        needed = sum(sizes.values()) + encoders
        if needed > free:
            raise BackendError(
                f"{layout.capacity} streams in batches of {layout.max_batch} need {needed / 1e9:.1f} GB of memory on "
                f"{self._device.name}, {free / 1e9:.1f} GB are free; {self._remedy(free, encoder_bytes)}"
            )
        allocated = 0
        for name, size in sizes.items():
            try:
                self.step[name] = self._device.allocate(size)
            except OutOfMemory as error:
                raise self._out_of_memory(error, allocated, encoder_bytes) from error
            allocated += size

    def out_of_memory(self, error: OutOfMemory, encoder_bytes: Callable[[int], int]) -> BackendError:
        """Return the error for an allocation that failed after those of the arena, with a capacity that fits."""
        return self._out_of_memory(error, self.layout.nbytes, lambda rows: max(error.size, encoder_bytes(rows)))

    def _out_of_memory(self, error: OutOfMemory, allocated: int, encoder_bytes: Callable[[int], int]) -> BackendError:
        layout, available = self.layout, allocated + self._device.free_bytes
        return BackendError(
            f"{error.amount} cannot be allocated on {self._device.name} for {layout.capacity} streams in "
            f"batches of {layout.max_batch}; {self._remedy(available, encoder_bytes)}"
        )

    def _remedy(self, available: int, encoder_bytes: Callable[[int], int]) -> str:
        """Return how to fit in `available` bytes; the memory is known not to suffice for these options."""
        layout, available = self.layout, available - RESERVED_BYTES
        capacity = min(layout.largest_capacity(available - encoder_bytes(layout.max_batch)), layout.capacity - 1)
        if capacity >= layout.max_batch:
            return f"load the model with capacity={capacity} or less."
        if capacity := layout.largest_single_batch(available, encoder_bytes):
            return f"load the model with capacity={capacity} or less."
        return "free memory on this GPU, or use one with more."

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
        """Return the address of each encoder input and output, by its name in the graph.

        Only the graphs of prompted models have the input `prompt`.
        """
        fields = {
            "mel": "mel",
            "mel_cache": "row_mel_cache",
            "position": "row_position",
            "valid": "row_valid",
            "prompt": "row_prompt",
            "encoded_joint": "encoded",
            "mel_cache_next": "mel_cache_next",
            "k_new": "k_new",
            "v_new": "v_new",
            "conv_next": "conv_next",
        }
        addresses = {name: int(step[field]) for name, field in fields.items()}
        rows = int(step["slots"] if in_place else step["rows"])
        for name in BY_LAYER:
            start, layer_bytes = int(step[name if in_place else f"row_{name}"]), self.layout.layer_bytes(name, rows)
            for layer in range(self.layout.manifest.encoder.layers):
                addresses[f"{name}_cache.{layer}"] = start + layer * layer_bytes
        return addresses

    # -- host buffers --------------------------------------------------------------------------------------------------

    def input_slots(self, buffer_index: int) -> NDArray[np.int32]:
        """Slot of each row [max_rows] in an input buffer, -1 for an idle row."""
        return self._inputs.arrays["slots"][buffer_index]

    def input_lengths(self, buffer_index: int) -> NDArray[np.int32]:
        """Samples of each row [max_rows] in an input buffer that belong to its stream."""
        return self._inputs.arrays["lengths"][buffer_index]

    def input_prompts(self, buffer_index: int) -> NDArray[np.int32]:
        """Prompt id of each row [max_rows] in an input buffer, idle rows included."""
        return self._inputs.arrays["prompts"][buffer_index]

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
        index = np.full(bucket, -1)  # of each row in the batch; idle rows are not in it
        index[rows] = np.arange(len(rows))
        index = index[emitted["row"]]
        order = np.argsort(index, kind="stable")[np.count_nonzero(index < 0) :]
        emitted = emitted[order]
        return Emissions(
            np.bincount(index[order], minlength=len(rows)),
            emitted["token"].astype(np.int32),
            emitted["frame"].astype(np.int64),
            emitted["score"].astype(np.float32),
            emitted["sum_p_alpha"].astype(np.float32),
            failed,
        )

    # -- phrases -------------------------------------------------------------------------------------------------------

    def set_phrases(self, slot: int, phrases: Boosting | None) -> int:
        """Assign phrases to a slot and return the position of their automaton in the pool, in words; -1 for None.

        Raises `CapacityError` if the pool has no room; the slot then keeps its previous phrases.
        """
        if phrases is not None:
            digest = phrases.digest.tobytes()
            if digest not in self._pool:
                image = kernels.automaton(phrases)
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

    def copy_phrases(self, source: int, target: int) -> None:
        """Assign the phrases of one slot to another. Nothing is written: the pool has their automaton."""
        self.set_phrases(target, self._phrases.get(source))

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
        state = {name: np.empty(shape, dtype) for name, (shape, dtype) in self.layout.slot().items()}
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
        layout = self.layout
        for name in layout.slot():
            start = int(self.step[name])
            if name in BY_LAYER:
                layer_bytes = layout.layer_bytes(name, layout.capacity)
                for layer, part in enumerate(state[name]):
                    yield start + layer * layer_bytes + slot * part.nbytes, part
            else:
                yield start + slot * state[name].nbytes, state[name]


class _HostBuffers:
    """Two host buffers of the same layout that kernels access; `arrays` are [2, *shape], one per buffer."""

    def __init__(self, device: Device, layout: Layout) -> None:
        sizes = array_bytes(layout)
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
