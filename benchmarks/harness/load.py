"""Load generator: live streams pushed in real time, with the latency of every chunk.

One thread pushes the packets of all streams when they are due. Results are recorded on the scheduler's thread as they
arrive. If the pushing thread itself is late (`lateness`), the machine is too busy for the load generator and the other
figures are not valid.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import NemostreamError
from nemostream.runtime.backends.base import Backend, Batch, Emissions
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.session import Options, StreamSession
from nemostream.runtime.streaming.state import StreamState

Floats = NDArray[np.float32]

PACKET = 0.02  # seconds of audio per push, as sent by telephones and browsers
SEARCH_RESOLUTION = 0.05  # relative resolution of the search for the maximum number of streams


@dataclass
class LoadResult:
    """Measurements of a load test, in seconds. Times of day are relative to the start."""

    results: list[tuple[int, float, float]] = field(default_factory=list)  # chunk ms, time its audio ended, latency
    finals: list[float] = field(default_factory=list)  # from the last sample of a clip to its final result
    lateness: list[float] = field(default_factory=list)  # of each push of the load generator
    texts: list[tuple[int, str]] = field(default_factory=list)  # clip index, final text
    errors: list[str] = field(default_factory=list)
    overdue: int = 0  # chunks without a result more than a chunk duration after their audio ended
    audio_seconds: float = 0.0  # audio pushed
    seconds: float = 0.0  # duration of the test


def run_load(
    model: Model,
    clips: Sequence[Floats],
    streams: int,
    chunk_ms: Sequence[int],
    *,
    seconds: float = float("inf"),
    total_clips: int | None = None,
    random_phase: bool = True,
    seed: int = 0,
    options: Options | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> LoadResult:
    """Push `streams` concurrent streams, each one clip after another, for `seconds` or until `total_clips` are pushed.

    The streams use the chunk sizes in turn, and have the other `options`. With `random_phase` they start at random
    times within a chunk, otherwise all at once. `clock` and `sleep` are in seconds.
    """
    rng, result = np.random.default_rng(seed), LoadResult()
    start = clock() + 0.05
    order = iter(range(total_clips)) if total_clips is not None else iter(lambda: int(rng.integers(1 << 30)), None)
    sizes = [chunk_ms[index % len(chunk_ms)] for index in range(streams)]
    clients = [_Client(model, clips, order, ms, result, start, clock, options) for ms in sizes]
    due = [(start + (rng.uniform(0, c.chunk_ms / 1000) if random_phase else 0.0), i) for i, c in enumerate(clients)]
    heapq.heapify(due)
    try:
        while due and due[0][0] < start + seconds:
            due_time, index = heapq.heappop(due)
            sleep(max(0.0, due_time - clock()))
            result.lateness.append(clock() - due_time)
            next_time = clients[index].advance(due_time)
            if next_time is not None:
                heapq.heappush(due, (next_time, index))
        result.seconds = clock() - start
        result.overdue = sum(client.overdue(clock()) for client in clients)
    finally:
        for client in clients:
            client.close()
    return result


class _Client:
    """Pushes one live stream after another, never two at the same time."""

    def __init__(
        self,
        model: Model,
        clips: Sequence[Floats],
        order: Iterator[int],
        chunk_ms: int,
        result: LoadResult,
        start: float,
        clock: Callable[[], float] = time.perf_counter,
        options: Options | None = None,
    ) -> None:
        self._model, self._clips, self._order, self.chunk_ms = model, clips, order, chunk_ms
        self._options: Options = {**(options or {}), "chunk_ms": chunk_ms}
        self._result, self._start, self._clock = result, start, clock
        self._rate, self._lead = model.manifest.features.sample_rate, model.manifest.lead
        self._samples = model.manifest.chunk(chunk_ms).samples
        self._stream: StreamSession | None = None
        self._lock = threading.RLock()  # of the stream, which is used by the pushing thread and the scheduler's
        self._pending: deque[float] = deque()  # end times of the audio of chunks without a result
        self.done = threading.Event()  # no stream is open
        self.done.set()

    def advance(self, now: float) -> float | None:
        """Push the packet that is due at `now`. Return the time of the next call, or None after the last clip."""
        try:
            if self._stream is None:
                return self._start_stream(now)
            if self._sent == len(self._audio):  # the end of the clip is still being processed
                if not self.done.is_set():
                    return now + PACKET
                self._stream = None
                return self._start_stream(now)
            self._push(self._stream)
        except NemostreamError as error:
            self._result.errors.append(str(error))
            self.close()
            self._stream = None
        return now + PACKET

    def overdue(self, now: float) -> int:
        """Return the number of chunks without a result more than a chunk duration after their audio ended."""
        return sum(audio_end < now - self.chunk_ms / 1000 for audio_end in self._pending)

    def close(self) -> None:
        self.done.set()  # before closing: the error that closing causes in `on_step` is not a failure
        if self._stream:
            self._stream.close()

    def _start_stream(self, now: float) -> float | None:
        clip = next(self._order, None)
        if clip is None:
            return None
        self._clip = clip % len(self._clips)
        self._audio, self._sent, self._stream_start = self._clips[self._clip], 0, now
        self._pending.clear()
        self._stream = self._model.open_session(self._rate, 1, **self._options)
        self._stream.notify(_on_step, self)
        self.done.clear()
        return now + PACKET

    def _push(self, stream: StreamSession) -> None:
        packet = self._audio[self._sent :][: round(PACKET * self._rate)]
        chunks = (self._sent + self._lead) // self._samples
        self._sent += len(packet)
        self._result.audio_seconds += len(packet) / self._rate
        for chunk in range(chunks, (self._sent + self._lead) // self._samples):
            end_sample = (chunk + 1) * self._samples - self._lead  # the lead is shorter than a chunk
            self._pending.append(self._stream_start + end_sample / self._rate)
        with self._lock:
            stream.feed(packet)
            if self._sent == len(self._audio):
                stream.finish()

    def on_step(self) -> None:
        """Record results; called on the scheduler's thread after each step."""
        stream, now = self._stream, self._clock()
        if stream is None or self.done.is_set():
            return
        with self._lock:
            try:
                for _ in stream.collect():
                    if self._pending:  # the steps that flush the stream belong to its final result
                        audio_end = self._pending.popleft()
                        self._result.results.append((self.chunk_ms, audio_end - self._start, now - audio_end))
                if stream.ended and stream.settled():
                    self._result.finals.append(now - self._stream_start - self._sent / self._rate)
                    self._result.texts.append((self._clip, stream.final().text))
                    self.done.set()
            except NemostreamError as error:
                if not self.done.is_set():
                    self._result.errors.append(str(error))
                    self.done.set()


def _on_step(streams: list[StreamState]) -> None:
    """The listener of all clients' streams."""
    for stream in streams:
        stream.consumer.on_step()


class StepRecorder:
    """A backend wrapper that records chunk size, rows and duration of every step."""

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.perf_counter) -> None:
        self._backend, self.clock = backend, clock
        self.steps: list[tuple[int, int, float]] = []  # chunk ms, rows, ms

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def submit(self, batch: Batch) -> Any:
        start = self.clock()
        return _RecordedStep(self, batch, start, self._backend.submit(batch))


@dataclass(frozen=True)
class _RecordedStep:
    recorder: StepRecorder
    batch: Batch
    start: float
    pending: Any

    def result(self) -> Emissions:
        emissions = self.pending.result()
        elapsed = 1000 * (self.recorder.clock() - self.start)
        self.recorder.steps.append((self.batch.chunk.ms, len(self.batch.slots), elapsed))
        return emissions
