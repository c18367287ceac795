"""CPU time of the layers between audio and events, without a model and without sockets.

Streams are run in sweeps: one chunk of every stream. The clock of a thread is read once per sweep, and in the
scheduler's thread five times per step, so measuring takes no noticeable time itself. The remaining CPU time of the
process is the part `other`.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.harness.null_backend import NullBackend, script
from nemostream.benchmarks.harness.null_device import NullDevice, NullEncoder
from nemostream.benchmarks.harness.timed import blocked
from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.runtime.backends.base import Backend, Batch, Emissions
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.scheduler import Scheduler
from nemostream.runtime.streaming.session import SessionContext, StreamSession
from nemostream.runtime.streaming.state import StreamState
from nemostream.runtime.text.endpointing import Endpoint, Endpointer, RepetitionGuard
from nemostream.runtime.text.tokenizer import Tokenizer

ENDPOINT = Endpoint(800, 300_000)  # the rules of `nemostream serve`
WARM_UP = 5  # sweeps that are not measured
_AMPLITUDE = 3000  # of the noise that the streams receive, which has no digital silence

Clock = Callable[[], float]
_Stream = tuple[Callable[[NDArray[np.int16]], object], Callable[[], object]]  # accepts a block, collects the results


class StepMeter:
    """A backend wrapper that divides the CPU time of the scheduler's thread into parts.

    The clock is read when the backend is called, when it returns, and in `on_step`. `assembly` is the time before a
    call of the backend, in which a batch is assembled, and `landing` the time between a result and `on_step`, in which
    the result is added to the streams. `on_step` must be set as the scheduler's.
    """

    def __init__(self, backend: Backend, clock: Clock = time.thread_time) -> None:
        self._backend, self._clock = backend, clock
        self._last: float | None = None
        self.seconds = {"assembly": 0.0, "backend": 0.0, "landing": 0.0}
        self.steps = self.rows = 0
        self.on_rows: Callable[[int], None] = lambda rows: None  # called after each step with its number of rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def clear(self) -> None:
        """Set all figures to 0. No step may be running."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.steps = self.rows = 0

    def submit(self, batch: Batch) -> Any:
        self._add("assembly")
        self.steps += 1
        self.rows += len(batch.slots)
        pending = self._backend.submit(batch)
        self._add("backend")
        return _MeteredStep(self, pending)

    def result(self, pending: Any) -> Emissions:
        self._add("assembly")
        emissions: Emissions = pending.result()
        self._add("backend")
        return emissions

    def on_step(self, chunk: ChunkConfig, rows: int, seconds: float) -> None:
        self._add("landing")
        self.on_rows(rows)

    def _add(self, part: str) -> None:
        """Add the time since the last call to a part."""
        now = self._clock()
        if self._last is not None:
            self.seconds[part] += now - self._last
        self._last = now


@dataclass(frozen=True)
class _MeteredStep:
    meter: StepMeter
    pending: Any

    def result(self) -> Emissions:
        return self.meter.result(self.pending)


class Sweeps:
    """A scheduler with a null backend, whose `streams` streams receive one chunk each per sweep.

    The scheduler is stopped while the chunks are accepted. Every step then has as many rows as possible, and the
    threads do not compete.
    """

    def __init__(
        self,
        bundle: Bundle,
        streams: int,
        max_batch: int,
        *,
        asynchronous: bool = True,
        thread_clock: Clock = time.thread_time,
        process_clock: Clock = time.process_time,
    ) -> None:
        self._thread_clock, self._process_clock = thread_clock, process_clock
        backend = NullBackend(
            bundle.manifest, script(bundle), streams, max_batch, asynchronous=asynchronous, spread=True
        )
        self.meter = StepMeter(backend, thread_clock)
        self.meter.on_rows = self._count
        self.scheduler = Scheduler(bundle.manifest, self.meter)
        self.scheduler.on_step = self.meter.on_step
        self._streams, self._missing, self._done = streams, 0, threading.Event()

    def run(self, sweeps: int, accept: Callable[[], None], collect: Callable[[], None]) -> dict[str, float]:
        """Return the microseconds of each part per stream and chunk; the part "other" is what is left of the process.

        `accept` must accept one chunk of every stream, `collect` the results.
        """
        accepting = collecting = start = 0.0
        for sweep in range(-WARM_UP, sweeps):
            if not sweep:
                self.meter.clear()
                accepting = collecting = 0.0
                start = self._process_clock()
            self._missing = self._streams
            self._done.clear()
            with blocked(self.scheduler):
                begin = self._thread_clock()
                accept()
                accepting += self._thread_clock() - begin
            self._done.wait()
            begin = self._thread_clock()
            collect()
            collecting += self._thread_clock() - begin
        total = self._process_clock() - start
        parts = {"accept": accepting, **self.meter.seconds, "collect": collecting}
        parts["other"] = total - sum(parts.values())
        return {name: 1e6 * seconds / (sweeps * self._streams) for name, seconds in parts.items()}

    @property
    def rows_per_step(self) -> float:
        """Mean number of rows of a step in the measured sweeps."""
        return self.meter.rows / self.meter.steps

    def close(self) -> None:
        self.scheduler.close()

    def _count(self, rows: int) -> None:
        self._missing -= rows
        if self._missing <= 0:
            self._done.set()


def pcm(samples: int, streams: int) -> list[NDArray[np.int16]]:
    """Return a block of noise of `samples` samples for each stream, all different."""
    values = np.random.default_rng(0).integers(1, _AMPLITUDE, samples + 4 * streams).astype(np.int16)
    return [values[4 * stream :][:samples] for stream in range(streams)]


@contextmanager
def _frozen_objects() -> Iterator[None]:
    """Exclude all present objects from garbage collection, as the server does with the model and its modules."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def scheduler_layers(
    bundle: Bundle, streams: int, chunk_ms: int, max_batch: int, sweeps: int, *, rules: bool, asynchronous: bool = True
) -> tuple[dict[str, float], float]:
    """Measure the scheduler alone: return the parts of `Sweeps.run`, and the rows of a step.

    With `rules`, streams have an `Endpointer` and a `RepetitionGuard`, as those of sessions.
    """
    manifest = bundle.manifest
    chunk, tokenizer = manifest.chunk(chunk_ms), Tokenizer.of_bundle(bundle)

    def open_streams(scheduler: Scheduler) -> Iterator[_Stream]:
        for _ in range(streams):
            fields = _rules(manifest, tokenizer) if rules else {}
            stream = scheduler.open(Chunker(manifest, chunk), _no_listener, **fields)
            yield partial(scheduler.accept, stream), partial(scheduler.collect, stream)

    return _layers(bundle, streams, chunk, max_batch, sweeps, asynchronous, open_streams)


def session_layers(
    bundle: Bundle, streams: int, chunk_ms: int, max_batch: int, sweeps: int, *, events: bool, asynchronous: bool = True
) -> tuple[dict[str, float], float]:
    """Measure sessions, from PCM to events; without `events` their results are discarded. As `scheduler_layers`."""
    manifest = bundle.manifest
    chunk, rate = manifest.chunk(chunk_ms), manifest.features.sample_rate

    def open_streams(scheduler: Scheduler) -> Iterator[_Stream]:
        context = SessionContext(scheduler, manifest, Tokenizer.of_bundle(bundle), 0)
        for _ in range(streams):
            session = StreamSession(context, rate, 1, chunk=chunk, confidence=Confidence(), endpoint=ENDPOINT)
            session.notify(_no_listener, None)
            yield session.feed, session.events if events else session.discard_results

    return _layers(bundle, streams, chunk, max_batch, sweeps, asynchronous, open_streams)


def _layers(
    bundle: Bundle,
    streams: int,
    chunk: ChunkConfig,
    max_batch: int,
    sweeps: int,
    asynchronous: bool,
    open_streams: Callable[[Scheduler], Iterator[_Stream]],
) -> tuple[dict[str, float], float]:
    """Return the parts of `Sweeps.run` with the streams that `open_streams` opens, and the rows of a step."""
    run = Sweeps(bundle, streams, max_batch, asynchronous=asynchronous)
    try:
        opened = list(open_streams(run.scheduler))
        feeds = [(feed, block) for (feed, _), block in zip(opened, pcm(chunk.samples, streams), strict=True)]

        def accept() -> None:
            for feed, block in feeds:
                feed(block)

        def collect() -> None:
            for _, results in opened:
                results()

        with _frozen_objects():
            return run.run(sweeps, accept, collect), run.rows_per_step
    finally:
        run.close()


def gpu_backend_layers(
    bundle: Bundle, streams: int, chunk_ms: int, max_batch: int, steps: int, clock: Clock = time.thread_time
) -> tuple[dict[str, float], float]:
    """Return microseconds per row of `GpuBackend` on a device that computes nothing, and the rows of a step.

    The parts: `prepare` (filling the input buffer), `launch` (everything after the call of the driver) and `read` (the
    results). Two steps are in flight, and each step has random slots, as with many live streams.
    """
    chunk, rng = bundle.manifest.chunk(chunk_ms), np.random.default_rng(0)
    device, rows = NullDevice(clock), min(max_batch, streams)
    backend = GpuBackend(bundle, device, {chunk_ms: NullEncoder()}, streams, max_batch)
    audio = np.stack(pcm(chunk.samples, rows)).astype(np.float32) / np.float32(32768)
    lengths = np.full(rows, chunk.samples, np.int64)
    parts = {"prepare": 0.0, "launch": 0.0, "read": 0.0}
    pending: Any = None
    try:
        for step in range(-WARM_UP, steps):
            slots = np.sort(rng.choice(streams, rows, replace=False))
            batch, own = Batch(chunk, slots, audio, lengths), device.seconds
            begin = clock()
            submitted = backend.submit(batch)
            end = clock()
            found = {"prepare": device.launched - begin, "launch": end - device.launched - (device.seconds - own)}
            if pending is not None:
                begin = clock()
                pending.result()
                found["read"] = clock() - begin
            pending = submitted
            if step >= 0:
                for name, seconds in found.items():
                    parts[name] += seconds
        pending.result()
    finally:
        backend.close()
    return {name: 1e6 * seconds / (steps * rows) for name, seconds in parts.items()}, float(rows)


def _rules(manifest: Manifest, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "endpointer": Endpointer.of_tokenizer(ENDPOINT, manifest, tokenizer),
        "guard": RepetitionGuard(manifest),
    }


def _no_listener(streams: list[StreamState]) -> None:
    """Do nothing: results are collected after each sweep."""
