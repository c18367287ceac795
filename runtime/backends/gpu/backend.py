"""The GPU backend: every stream's state on the device, one launch a step, nothing fetched but what was said.

A step of B streams is recorded once for each chunk size, bucket (B rounded up) and way of reading the caches, and
launched as one CUDA graph afterwards::

    begin      slots, lengths and PCM, from the host's memory
    features   log-mel
    gather     the rows' caches, unless row b is slot b: then the encoder reads the arena in place
    (encoder)  whatever `nemostream build` made, TensorRT or ONNX Runtime
    scatter    T new rows of K and V into the rings, the small caches, the audio tail
    start, [join, decide, lstm, project] as long as anybody speaks, finish: tokens to the host's memory

The host writes one of two lanes of input, launches, and waits for the step's mark when it wants the answer; meanwhile
it can prepare and launch the next step on the other lane. Rows that a bucket has too many are idle.

The loop is a WHILE node of the graph. Where that cannot be had it is unrolled: a few iterations are recorded, and the
host launches them again until nobody speaks; without graphs at all the same kernels are launched one by one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError, OptionError
from nemostream.plans import no_engine
from nemostream.runtime.backends.base import Batch, Emissions, at_least_one
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.arena import Arena
from nemostream.runtime.backends.gpu.device import Device, DeviceEvent
from nemostream.runtime.decoding.boosting import Boosting

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

# Kinds of decoding loop, the best first; the first that can be recorded is used.
LOOPS = ("while", "unrolled", "eager")
UNROLLED = 3  # iterations recorded where the device cannot end the loop itself: two labels, and the verdict
_WIDE = 64  # blocks along the rows of a decoding product: what is beyond is met by looping


class StepEncoder(Protocol):
    """The encoder step of one chunk size on the device, built by `nemostream build`."""

    cache_dtype: str  # type of the caches: "float32", "float16" or "bfloat16"
    capturable: bool  # whether `enqueue` may be part of a recording

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        """For batches of `rows`, with every input and output of the graph at its address: a function that enqueues.

        Rows are those of the graph's shapes (`export.encoder`), without `encoded`. Called before anything is recorded.
        """
        ...

    def close(self) -> None: ...


class GpuBackend:
    """A bundle on a GPU. Called by one thread at a time, as the seam demands.

    `encoders` gives the encoder of each chunk size (ms); all must keep their caches in the same type. `loop` is the
    first kind of `LOOPS` to be tried. Everything is recorded here, so that nothing has to be while serving.

    Raises `BackendError` if the device cannot hold `capacity` streams, naming how many it could, or if a model's sizes
    are beyond the kernels.
    """

    asynchronous = True

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        encoders: Mapping[int, StepEncoder],
        capacity: int = 64,
        max_batch: int | None = None,
        loop: str = "while",
    ) -> None:
        at_least_one(capacity=capacity, max_batch=max_batch)
        if loop not in LOOPS:
            raise OptionError(f"loop is {loop!r}; choose one of {', '.join(LOOPS)}.")
        cells = {encoder.cache_dtype for encoder in encoders.values()}
        if len(cells) != 1:
            raise OptionError(f"the engines keep their caches as {' and '.join(sorted(cells)) or 'none'}, not alike.")
        self.manifest = bundle.manifest
        self.capacity = capacity
        self.max_batch = min(max_batch or 64, capacity)
        self.buckets = buckets(self.max_batch)
        self._chunks = {ms: self.manifest.chunk(ms) for ms in encoders}
        self._encoders = dict(encoders)
        self._device = device
        (self.cache_dtype,) = cells
        macros = kernels.macros(self.manifest, self.cache_dtype, conditional=loop == "while")
        device.make_current()
        self._kernels = device.kernels(macros, kernels.entries(self.manifest))
        self._memory = Arena(bundle, device, self.cache_dtype, capacity, self.max_batch, list(self._chunks.values()))
        self._lane = 0
        self._pending: list[_Step | None] = [None, None]
        self._resetting: DeviceEvent | None = None
        self.reset(np.arange(capacity))
        self._recordings: dict[tuple[int, int, bool], _Recording] = {}
        self.failures = self._kernels.failures[:]  # why better kinds of kernels or of loop are not used
        self.loop = self._record_all(loop)

    @property
    def bytes_per_stream(self) -> int:
        """Device memory of one slot."""
        return sum(self._memory.slot_bytes.values()) // self.capacity

    def reset(self, slots: Ints) -> None:
        self._settle()
        if self._resetting:
            self._resetting.wait()  # the kernel reads the host's list
        self._memory.reset_slots[: len(slots)] = slots
        self._kernels.launch("reset", (len(slots), self.manifest.encoder.layers, 1), self._memory.step)
        self._resetting = self._device.mark()
        for slot in slots.tolist():
            self._memory.place(slot, None)

    def reset_decoder(self, slots: Ints) -> None:
        self._settle()
        for slot in slots.tolist():
            self._tell("forget", slot)

    def set_phrases(self, slot: int, phrases: Boosting | None) -> None:
        self._settle()
        self._tell("boost", slot, self._memory.place(slot, phrases))

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        self._settle()
        return self._memory.save(slot)

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        self._settle()
        self._memory.load(slot, state)

    def submit(self, batch: Batch) -> _Step:
        self._device.make_current()
        recording, rows = self._prepare(batch)
        step = _Step(self, recording, rows, self._lane)
        self._pending[self._lane] = step
        _all(recording.stages)
        step.mark = self._device.mark()
        self._lane = 1 - self._lane
        return step

    def encode(self, batch: Batch) -> tuple[Floats, Ints]:
        """The step without decoding, not recorded: `encoded_joint` [B, T, J], and how many frames each row has."""
        self._device.make_current()
        recording, rows = self._prepare(batch)
        _all(recording.undecoded)
        self._device.mark().wait()
        self._lane = 1 - self._lane
        memory, chunk = self._memory, batch.chunk
        encoded = np.empty((recording.rows, chunk.frames, self.manifest.decoder.joint), np.float32)
        counts = np.empty(recording.rows, np.int32)
        self._device.read(int(memory.step["encoded"]), encoded)
        self._device.read(int(memory.step["row_count"]), counts)
        return encoded[rows], counts[rows].astype(np.int64)

    def close(self) -> None:
        self._device.make_current()
        self._recordings.clear()
        for encoder in self._encoders.values():
            encoder.close()
        self._device.close()

    def _tell(self, entry: str, slot: int, automaton: int = -1) -> None:
        """Queue a kernel that is about one slot."""
        step = self._memory.step.copy()
        step["slot"], step["automaton"] = slot, automaton
        self._kernels.launch(entry, (1, 1, 1), step)

    def _settle(self) -> None:
        """What is queued from here on comes after every step submitted, also where the host has a part in its loop."""
        self._device.make_current()
        for step in self._pending:
            if step and self.loop != "while":
                step.collect()

    # -- recording -----------------------------------------------------------------------------------------------------

    def _record_all(self, loop: str) -> str:
        """Record every step with the first kind of loop that works; which one that was."""
        if loop == "while" and not self._kernels.conditional:
            loop = "unrolled"
        for kind in LOOPS[LOOPS.index(loop) :]:
            try:
                for ms, rows, in_place in itertools.product(self._chunks, reversed(self.buckets), (False, True)):
                    self._recordings[ms, rows, in_place] = self._record(self._chunks[ms], rows, in_place, kind)
                return kind
            except BackendError as error:
                self.failures.append(f"{kind}: {error}")
                if kind == LOOPS[-1]:
                    reasons = " ".join(self.failures)
                    raise BackendError(f"no step can be run on {self._device.name}: {reasons}") from error
        raise AssertionError("the last kind either works or raises")

    def _record(self, chunk: ChunkConfig, rows: int, in_place: bool, kind: str) -> _Recording:
        old = self._recordings.get((chunk.ms, rows, in_place))
        encoder, step = self._encoders[chunk.ms], self._memory.view(chunk, rows, in_place)
        enqueue = old.enqueue if old else encoder.bind(rows, self._memory.addresses(step, in_place))
        manifest, launch = self.manifest, self._kernels.launch
        layers, mel_frames = manifest.encoder.layers, manifest.encoder.subsampling * chunk.frames
        wide = min(-(-rows * chunk.frames // kernels.TILE_ROWS), _WIDE)
        tall = min(-(-rows // kernels.TILE_ROWS), _WIDE)

        def call(entry: str, *grid: int) -> Callable[[], None]:
            return lambda: launch(entry, (*grid, 1, 1)[:3], step)  # type: ignore[arg-type]

        before = [
            call("begin", rows, -(-chunk.samples // (8 * kernels.BLOCK))),
            call("features", mel_frames, rows),
            call("gather", rows, layers, kernels.PIECES),
        ]
        scatter = [call("scatter", rows, layers)]
        iteration = [
            call("join", wide, kernels.tiles(manifest.decoder.vocabulary + 1)),
            call("decide", -(-rows // 8)),
            *(call(f"lstm_{i}", tall, manifest.decoder.hidden // 8) for i in range(manifest.decoder.layers)),
            call("project", tall, kernels.tiles(manifest.decoder.joint)),
        ]
        start, finish = call("start", rows), call("finish", min(rows, 32))

        def decode() -> None:
            if kind == "while":
                step["condition"], step["looping"] = self._device.condition(), 1
            start()
            again()

        def again() -> None:
            if kind == "while":
                self._device.loop(int(step["condition"]), lambda: _all(iteration))
            else:
                _all(iteration * UNROLLED)
            finish()

        undecoded = [*before, enqueue, *scatter, finish]
        # Once without recording, all rows idle: libraries set themselves up in their first run.
        if old is None:
            self._memory.rows_of(self._lane)[:] = -1
            _all(undecoded)
            self._device.mark().wait()
            self._lane = 1 - self._lane
        stages = self._staged(chunk, [*before, enqueue, *scatter, decode], enqueue, kind)
        more = self._device.record(again).launch if kind == "unrolled" else again
        return _Recording(rows, enqueue, undecoded, stages, None if kind == "while" else more)

    def _staged(
        self, chunk: ChunkConfig, work: list[Callable[[], None]], enqueue: Callable[[], None], kind: str
    ) -> list[Callable[[], None]]:
        """Work with `enqueue`, the encoder, in it, in as few launches as that kind of loop and encoder allow."""
        if kind == "eager":
            return work
        if self._encoders[chunk.ms].capturable:
            return [self._device.record(lambda: _all(work)).launch]
        place = work.index(enqueue)
        parts = work[:place], work[place + 1 :]
        before, after = (self._device.record(functools.partial(_all, part)).launch for part in parts)
        return [before, enqueue, after]

    # -- a step --------------------------------------------------------------------------------------------------------

    def _prepare(self, batch: Batch) -> tuple[_Recording, Ints]:
        """Fill the lane; the recording to run, and the row of each of the batch's streams."""
        if batch.chunk.ms not in self._chunks:
            raise no_engine(batch.chunk.ms, self._chunks)
        for step in self._pending:
            # The lane's last step must be over; where the host takes part in the loop, any step before.
            if step and (step.buffer_index == self._lane or self.loop != "while"):
                step.collect()
        bucket = self._bucket(len(batch.slots))
        top = int(batch.slots.max()) + 1
        # In place nothing is copied, and rows that are not in the batch are computed for nothing: no more of them than
        # the bucket would have anyway.
        in_place = top <= self.max_batch and self._bucket(top) == bucket
        rows = batch.slots if in_place else np.arange(len(batch.slots))
        memory = self._memory
        slots, lengths, audio = memory.rows_of(self._lane), memory.lengths_of(self._lane), memory.audio_of(self._lane)
        slots[:bucket] = -1
        slots[rows] = batch.slots
        lengths[rows] = batch.lengths
        audio[: bucket * batch.chunk.samples].reshape(bucket, -1)[rows] = batch.audio
        return self._recordings[batch.chunk.ms, bucket, in_place], rows

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= rows)


@dataclass(frozen=True)
class _Recording:
    """The step of one chunk size, bucket and way of reading the caches."""

    rows: int
    enqueue: Callable[[], None]  # the encoder
    undecoded: list[Callable[[], None]]  # the step without decoding, kernel by kernel
    stages: list[Callable[[], None]]  # the whole step
    again: Callable[[], None] | None  # more iterations, where the device cannot loop


class _Step:
    """A step under way on one of the two lanes."""

    def __init__(self, backend: GpuBackend, recording: _Recording, rows: Ints, buffer_index: int) -> None:
        self._backend, self._recording, self._rows = backend, recording, rows
        self.buffer_index = buffer_index
        self.mark: DeviceEvent | None = None
        self._emissions: Emissions | None = None
        self._error: BackendError | None = None

    def result(self) -> Emissions:
        self.collect()
        if self._error:
            raise self._error
        assert self._emissions is not None
        return self._emissions

    def collect(self) -> None:
        """Wait, and take the answer out of the lane before another step needs it."""
        backend = self._backend
        if backend._pending[self.buffer_index] is not self:
            return
        backend._pending[self.buffer_index] = None
        try:
            if self.mark is None:
                raise BackendError("the step could not be started.")
            backend._device.make_current()
            self.mark.wait()
            while backend._memory.undecided(self.buffer_index) and self._recording.again:
                self._recording.again()
                backend._device.mark().wait()
            self._emissions = backend._memory.emissions(self.buffer_index, self._rows, self._recording.rows)
        except BackendError as error:
            self._error = error


def _all(work: list[Callable[[], None]]) -> None:
    for run in work:
        run()


def buckets(most: int) -> tuple[int, ...]:
    """Batch sizes that are recorded: powers of two and, from 16 on, the ones halfway; `most` is the last."""
    sizes = itertools.takewhile(
        lambda size: size < most, (size for sum_p_alpha in itertools.count() for size in _between(1 << sum_p_alpha))
    )
    return (*sizes, most)


def _between(sum_p_alpha: int) -> tuple[int, ...]:
    return (sum_p_alpha,) if sum_p_alpha < 16 else (sum_p_alpha, sum_p_alpha * 3 // 2)
