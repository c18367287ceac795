"""GPU backend: all stream state on the device, one launch per step; only results are copied back.

The step of B streams is captured once per chunk size, bucket (B rounded up) and cache access, and then launched as one
CUDA graph::

    begin      read slots, lengths, prompt ids and PCM from host memory
    features   compute log-mel
    gather     copy the rows' caches together, unless row b is slot b: then the encoder reads the slots in place
    (encoder)  the engine of `nemostream build`, TensorRT or ONNX Runtime
    scatter    write T new rows of K and V, the other caches, and the audio tail to the slots
    start, then [join, decide, lstm, project] while any row has frames left, then finish: tokens to host memory

Host input and output are double-buffered: the host fills one buffer, launches, and waits for the step's event when it
needs the result; meanwhile it can fill the other buffer and launch the next step. Rows of the bucket beyond B are idle.

The decoding loop is a WHILE node of the graph. If that is not available it is unrolled: a few iterations are captured,
and the host launches them again until all rows are decided. If graphs are not available at all, the same kernels are
launched one by one.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError, OptionError
from nemostream.plans import missing_engine_error
from nemostream.runtime.backends.base import DEFAULT_MAX_BATCH, Batch, Emissions, at_least_one, check_copy
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.arena import Arena
from nemostream.runtime.backends.gpu.device import Device, DeviceEvent, OutOfMemory
from nemostream.runtime.backends.gpu.memory import MemoryLayout
from nemostream.runtime.decoding.boosting import Boosting

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
log = logging.getLogger(__name__)

Work = Callable[[], None]  # queues work on the device

LOOPS = ("while", "unrolled", "eager")  # kinds of decoding loop, in order of preference
UNROLLED_ITERATIONS = 3  # captured in an unrolled loop: two labels per row, and the check for a third
_MAX_ROW_BLOCKS = 64  # blocks along the rows of a decoding product; the kernels loop over the remaining rows


class StepEncoder(Protocol):
    """The encoder step of one chunk size on the device, built by `nemostream build`."""

    cache_dtype: str  # type of the caches: "float32", "float16" or "bfloat16"

    @property
    def capturable(self) -> bool:
        """Whether the work of the last `bind` can be captured. Read after this work has run once."""
        ...

    def memory_bytes(self, rows: int) -> int:
        """Return the device memory that `bind` allocates for batches of up to `rows`; an upper bound or an estimate."""
        ...

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Work:
        """Bind inputs and outputs for batches of `rows` and return a function that enqueues the encoder.

        `addresses` has every input and output of the graph (`export.encoder`) except `encoded`. It also has `prompt`,
        an input of the graphs of prompted models only. Called before anything is captured.
        """
        ...

    def close(self) -> None:
        """Release the engine."""
        ...


@dataclass(frozen=True)
class StepLaunches:
    """What a step launches, to be launched repeatedly. See `GpuBackend.launches`."""

    encoder: list[Work]
    undecoded: list[Work]  # the step without decoding
    whole: list[Work] | None  # None if the host takes part in the decoding loop


class GpuBackend:
    """A bundle on a GPU. Opened, called and closed on one thread: the engines may keep data per thread.

    `encoders` has the encoder of each chunk size (ms), all with the same type of caches. `loop` is the first kind of
    `LOOPS` to try. All steps are captured by the constructor.

    Raises `BackendError` if the device cannot hold `capacity` streams, with a capacity that fits, or if the kernels do
    not support the model's sizes.
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
        cache_dtypes = {encoder.cache_dtype for encoder in encoders.values()}
        if len(cache_dtypes) != 1:
            raise OptionError(
                f"the engines have caches of {' and '.join(sorted(cache_dtypes)) or 'no type'}; all must have the same."
            )
        self.manifest = bundle.manifest
        self.capacity = capacity
        self.max_batch = min(max_batch or DEFAULT_MAX_BATCH, capacity)
        self.buckets = buckets(self.max_batch)
        self.device = device
        self._chunks = {ms: self.manifest.chunk(ms) for ms in encoders}
        self._encoders = dict(encoders)
        (self.cache_dtype,) = cache_dtypes
        self._default_prompt = self.manifest.languages.prompt(None)
        macros = kernels.macros(self.manifest, self.cache_dtype, conditional=loop == "while")
        device.make_current()
        self._kernels = device.kernels(macros, kernels.entries(self.manifest))
        layout = MemoryLayout(self.manifest, self.cache_dtype, capacity, self.max_batch, tuple(self._chunks.values()))
        self.bytes_per_stream = layout.bytes_per_stream  # device memory of one slot
        self.arena = Arena(bundle, device, layout, self._encoder_bytes)
        self._buffer_index = 0  # of the host buffers for the next step
        self._pending: list[_PendingStep | None] = [None, None]  # by buffer
        self._reset_event: DeviceEvent | None = None
        self.reset(np.arange(capacity))
        self._captured: dict[tuple[int, int, bool], _CapturedStep] = {}
        self.failures = self._kernels.failures[:]  # errors of preferred kernel variants and loops
        try:
            self.loop = self._capture_all(loop)
        except OutOfMemory as error:
            raise self.arena.out_of_memory(error, self._encoder_bytes) from error
        if self.loop != loop:
            log.warning("steps run on the GPU with the slower loop %r: %s", self.loop, " ".join(self.failures))

    def reset(self, slots: Ints) -> None:
        self._finish_host_loops()
        if self._reset_event:
            self._reset_event.wait()  # the kernel reads the slots from host memory
        self.arena.reset_slots[: len(slots)] = slots
        self._kernels.launch("reset", (len(slots), self.manifest.encoder.layers, 1), self.arena.step)
        self._reset_event = self.device.record_event()
        for slot in slots.tolist():
            self.arena.set_phrases(slot, None)

    def reset_decoder(self, slots: Ints) -> None:
        self._finish_host_loops()
        for slot in slots.tolist():
            self._launch_for_slot("reset_decoder", slot)

    def set_phrases(self, slot: int, phrases: Boosting | None) -> None:
        self._finish_host_loops()
        self._launch_for_slot("set_phrases", slot, self.arena.set_phrases(slot, phrases))

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        self._finish_host_loops()
        return self.arena.save(slot)

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        self._finish_host_loops()
        self.arena.load(slot, state)

    def copy(self, sources: Ints, targets: Ints) -> None:
        check_copy(sources, targets, self.capacity)
        self._finish_host_loops()
        for first in range(0, len(sources), kernels.COPY_SLOTS):
            some = slice(first, first + kernels.COPY_SLOTS)
            # The slots are in the argument, not in host memory, so that a copy need not wait for the one before it.
            arguments, count = self.arena.step.copy(), len(sources[some])
            arguments["sources"][:count], arguments["targets"][:count] = sources[some], targets[some]
            grid = (count, self.manifest.encoder.layers, kernels.GATHER_BLOCKS)
            self._kernels.launch("copy", grid, arguments)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.arena.copy_phrases(source, target)

    def submit(self, batch: Batch) -> _PendingStep:
        self.device.make_current()
        captured, rows = self._prepare(batch)
        step = _PendingStep(self, captured, rows, self._buffer_index)
        self._pending[self._buffer_index] = step
        _run(captured.launches)
        step.event = self.device.record_event()
        self._switch_buffers()
        return step

    def encode(self, batch: Batch) -> tuple[Floats, Ints]:
        """Run the step without decoding, not captured. Returns `encoded_joint` [B, T, J] and the frames of each row."""
        self.device.make_current()
        captured, rows = self._prepare(batch)
        _run(captured.stages.values())
        self._switch_buffers()
        encoded = np.empty((captured.rows, batch.chunk.frames, self.manifest.decoder.joint), np.float32)
        counts = np.empty(captured.rows, np.int32)
        self.arena.read("encoded", encoded)
        self.arena.read("row_count", counts)
        return encoded[rows], counts[rows].astype(np.int64)

    def stages(self, batch: Batch) -> dict[str, Work]:
        """Prepare a step without decoding and return its stages, to time each of them.

        The stages are begin, features, gather, encoder, scatter and finish. Run all of them in this order before any
        other step.
        """
        self.device.make_current()
        captured, _ = self._prepare(batch)
        self._switch_buffers()
        return captured.stages

    def launches(self, batch: Batch) -> StepLaunches:
        """Prepare steps of one batch that can be launched repeatedly, to time them back to back.

        Launch the whole step, or the step without decoding, an even number of times: they alternate between the two
        host buffers, which both have the batch.
        """
        self.device.make_current()
        for _ in range(2):
            captured, _ = self._prepare(batch)
            self._switch_buffers()
        whole = captured.launches if self.loop == "while" else None
        return StepLaunches(captured.capture_encoder(), captured.capture_undecoded(), whole)

    def close(self) -> None:
        self.device.make_current()
        self._captured.clear()
        for encoder in self._encoders.values():
            encoder.close()
        self.device.close()

    def _encoder_bytes(self, rows: int) -> int:
        """Return the memory that all encoders allocate for batches of up to `rows` rows."""
        return sum(encoder.memory_bytes(rows) for encoder in self._encoders.values())

    def _launch_for_slot(self, entry: str, slot: int, automaton: int = -1) -> None:
        """Queue a kernel that changes one slot."""
        arguments = self.arena.step.copy()
        arguments["slot"], arguments["automaton"] = slot, automaton
        self._kernels.launch(entry, (1, 1, 1), arguments)

    def _finish_host_loops(self) -> None:
        """Complete submitted steps whose decoding loop needs the host, so that work queued next runs after them."""
        self.device.make_current()
        for step in self._pending:
            if step and self.loop != "while":
                step.collect()

    def _switch_buffers(self) -> None:
        self._buffer_index = 1 - self._buffer_index

    def _prepare(self, batch: Batch) -> tuple[_CapturedStep, Ints]:
        """Fill the current input buffer. Returns the step to launch and the row of each stream of the batch."""
        if batch.chunk.ms not in self._chunks:
            raise missing_engine_error(batch.chunk.ms, self._chunks)
        prompts = batch.prompt_ids(self.manifest.languages)
        for step in self._pending:
            # The last step with this buffer must be complete; if the host takes part in the loop, every step before.
            if step and (step.buffer_index == self._buffer_index or self.loop != "while"):
                step.collect()
        bucket = self._bucket(len(batch.slots))
        used_slots = int(batch.slots.max()) + 1
        # In place, nothing is copied, but rows between the batch's slots are computed needlessly: allowed only if the
        # bucket stays the same.
        in_place = used_slots <= self.max_batch and self._bucket(used_slots) == bucket
        rows = batch.slots if in_place else np.arange(len(batch.slots))
        slots, audio = self.arena.input_slots(self._buffer_index), self.arena.input_audio(self._buffer_index)
        slots[:bucket] = -1
        slots[rows] = batch.slots
        self.arena.input_lengths(self._buffer_index)[rows] = batch.lengths
        row_prompts = self.arena.input_prompts(self._buffer_index)
        row_prompts[:bucket] = self._default_prompt  # of idle rows, which the encoder computes too
        row_prompts[rows] = prompts
        audio[: bucket * batch.chunk.samples].reshape(bucket, -1)[rows] = batch.audio
        return self._captured[batch.chunk.ms, bucket, in_place], rows

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def _capture_all(self, loop: str) -> str:
        """Capture every step with the first kind of loop that works, and return that kind."""
        if loop == "while" and not self._kernels.conditional:
            loop = "unrolled"
        for kind in LOOPS[LOOPS.index(loop) :]:
            try:
                for key in itertools.product(self._chunks, reversed(self.buckets), (False, True)):
                    step = self._captured.get(key) or self._bind_step(*key)
                    step.capture(kind)
                    self._captured[key] = step
                return kind
            except OutOfMemory:
                raise
            except BackendError as error:
                self.failures.append(f"{kind}: {error}")
                if kind == LOOPS[-1]:
                    reasons = " ".join(self.failures)
                    raise BackendError(
                        f"no step can be run on {self.device.name}: {reasons} Run `nemostream doctor` for details."
                    ) from error
        raise AssertionError("the last kind either works or raises")

    def _bind_step(self, chunk_ms: int, rows: int, in_place: bool) -> _CapturedStep:
        """Bind a step and run it once without capture and decoding, all rows idle: libraries initialise lazily."""
        step = _CapturedStep(self, self._chunks[chunk_ms], rows, in_place)
        self.arena.input_slots(self._buffer_index)[:] = -1
        _run(step.stages.values())
        self.device.record_event().wait()
        step.capturable = self._encoders[chunk_ms].capturable
        self._switch_buffers()
        return step


class _CapturedStep:
    """The step of one chunk size, bucket and cache access: its stages, and the launches they are captured into."""

    def __init__(self, backend: GpuBackend, chunk: ChunkConfig, rows: int, in_place: bool) -> None:
        manifest, encoder = backend.manifest, backend._encoders[chunk.ms]
        layers, net = manifest.encoder.layers, manifest.decoder
        self.rows = rows
        self._device = backend.device
        self.capturable = False  # whether the encoder can be captured: known after it has run once
        self._arguments = backend.arena.arguments(chunk, rows, in_place)
        enqueue = encoder.bind(rows, backend.arena.encoder_addresses(self._arguments, in_place))

        def kernel(entry: str, *grid: int) -> Work:
            x, y, z = (*grid, 1, 1)[:3]
            return functools.partial(backend._kernels.launch, entry, (x, y, z), self._arguments)

        # Without decoding. Each can be run alone; in this order they are a step.
        self.stages: dict[str, Work] = {
            "begin": kernel("begin", rows, -(-chunk.samples // (8 * kernels.BLOCK))),
            "features": kernel("features", manifest.encoder.subsampling * chunk.frames, rows),
            "gather": kernel("gather", rows, layers, kernels.GATHER_BLOCKS),
            "encoder": enqueue,
            "scatter": kernel("scatter", rows, layers),
            "finish": kernel("finish", min(rows, 32)),
        }
        pair_blocks = min(-(-rows * chunk.frames // kernels.TILE_ROWS), _MAX_ROW_BLOCKS)
        row_blocks = min(-(-rows // kernels.TILE_ROWS), _MAX_ROW_BLOCKS)
        self._start = kernel("start", rows)
        self._iteration = [
            kernel("join", pair_blocks, kernels.tiles(net.vocabulary + 1)),
            kernel("decide", -(-rows // 8)),
            *(kernel(f"lstm_{layer}", row_blocks, net.hidden // 8) for layer in range(net.layers)),
            kernel("project", row_blocks, kernels.tiles(net.joint)),
        ]
        self._loop = LOOPS[-1]
        self.launches: list[Work] = []  # the whole step
        self.relaunch: Work | None = None  # continues the decoding loop, if the host takes part in it

    def capture(self, loop: str) -> None:
        """Make the launches of the whole step, with one kind of `LOOPS`.

        Raises `BackendError` if it is not possible.
        """
        self._loop = loop
        self._arguments["looping"], self._arguments["condition"] = loop == "while", 0
        self.launches = self._capture_with([self.stages["scatter"], self._decode])
        if loop == "while":
            self.relaunch = None
        elif loop == "unrolled":
            self.relaunch = self._device.capture(self._iterate).launch
        else:
            self.relaunch = self._iterate

    def capture_undecoded(self) -> list[Work]:
        """Return the launches of the step without decoding."""
        return self._capture_with([self.stages["scatter"], self.stages["finish"]])

    def capture_encoder(self) -> list[Work]:
        """Return the launch of the encoder alone."""
        enqueue = self.stages["encoder"]
        if self._loop == "eager" or not self.capturable:
            return [enqueue]
        return [self._device.capture(enqueue).launch]

    def _capture_with(self, after: Sequence[Work]) -> list[Work]:
        """Return the launches of a step that ends with `after`: as few as the loop and the encoder allow."""
        before, enqueue = [self.stages[name] for name in ("begin", "features", "gather")], self.stages["encoder"]
        if self._loop == "eager":
            return [*before, enqueue, *after]
        if self.capturable:
            return [self._device.capture(lambda: _run([*before, enqueue, *after])).launch]
        captured = [self._device.capture(functools.partial(_run, part)).launch for part in (before, after)]
        return [captured[0], enqueue, captured[1]]

    def _decode(self) -> None:
        """Queue the decoding loop from its start."""
        if self._loop == "while":
            self._arguments["condition"] = self._device.condition()
        self._start()
        self._iterate()

    def _iterate(self) -> None:
        """Queue decoding iterations and `finish`: all of them in a WHILE node, otherwise a fixed number."""
        if self._loop == "while":
            self._device.loop(int(self._arguments["condition"]), lambda: _run(self._iteration))
        else:
            _run(self._iteration * UNROLLED_ITERATIONS)
        self.stages["finish"]()


class _PendingStep:
    """A submitted step that uses one of the two host buffers."""

    def __init__(self, backend: GpuBackend, captured: _CapturedStep, rows: Ints, buffer_index: int) -> None:
        self._backend, self._captured, self._rows = backend, captured, rows
        self.buffer_index = buffer_index
        self.event: DeviceEvent | None = None  # the end of its first launch; None if the launch failed
        self._emissions: Emissions | None = None
        self._error: BackendError | None = None

    @property
    def launches(self) -> int:
        """Number of launches of the step, without those that continue its decoding loop."""
        return len(self._captured.launches)

    def result(self) -> Emissions:
        self.collect()
        if self._error:
            raise self._error
        assert self._emissions is not None
        return self._emissions

    def collect(self) -> None:
        """Wait for the step and copy its result out of the host buffer, before another step uses the buffer."""
        backend, captured = self._backend, self._captured
        if backend._pending[self.buffer_index] is not self:
            return
        backend._pending[self.buffer_index] = None
        try:
            if self.event is None:
                raise BackendError("the step could not be started.")
            backend.device.make_current()
            self.event.wait()
            while backend.arena.undecided(self.buffer_index) and captured.relaunch:
                captured.relaunch()
                backend.device.record_event().wait()
            self._emissions = backend.arena.emissions(self.buffer_index, self._rows, captured.rows)
        except BackendError as error:
            self._error = error


def _run(work: Iterable[Work]) -> None:
    for queue in work:
        queue()


def buckets(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes to capture: powers of two, from 16 on also the sizes halfway, and `max_batch`."""
    sizes = []
    power = 1
    while power < max_batch:
        sizes.append(power)
        if power >= 16 and power * 3 // 2 < max_batch:
            sizes.append(power * 3 // 2)
        power *= 2
    return (*sizes, max_batch)
