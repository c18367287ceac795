"""People talking: live streams fed in real time, each chunk's result timed from the moment its last sample was spoken.

One thread pushes packets of all streams when they are due; results are noted on the scheduler's thread as they come. If
the pusher itself comes too late (`lateness`), machine and load generator share too little, and nothing else holds.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import NemostreamError
from nemostream.runtime.backends.base import Backend, Batch, Emissions
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.session import StreamSession

Floats = NDArray[np.float32]

PACKET = 0.02  # seconds of audio pushed at a time, as telephones and browsers send it


@dataclass
class Heard:
    """What came of it. Times in seconds; moments count from the start."""

    results: list[tuple[int, float, float]] = field(default_factory=list)  # chunk ms, moment it was spoken, latency
    finals: list[float] = field(default_factory=list)  # last sample spoken until the final result
    lateness: list[float] = field(default_factory=list)  # of the pusher
    texts: list[tuple[int, str]] = field(default_factory=list)  # clip, final text
    errors: list[str] = field(default_factory=list)
    waiting: int = 0  # chunks that were spoken a whole chunk ago and had no result when it ended
    audio: float = 0.0  # seconds pushed
    seconds: float = 0.0  # that it took


def talk(
    model: Model,
    clips: Sequence[Floats],
    streams: int,
    chunk_ms: Sequence[int],
    *,
    seconds: float = float("inf"),
    calls: int | None = None,
    phases: bool = True,
    seed: int = 0,
) -> Heard:
    """`streams` callers, of chunk sizes in turn, each saying one clip after another, until the time is up or `calls`
    clips were said. With `phases` their chunks begin at random moments, otherwise all at once.
    """
    rng, heard = np.random.default_rng(seed), Heard()
    start = time.perf_counter() + 0.05
    order = iter(range(calls)) if calls is not None else iter(lambda: int(rng.integers(1 << 30)), None)
    callers = [_Caller(model, clips, order, chunk_ms[index % len(chunk_ms)], heard, start) for index in range(streams)]
    due = [(start + (rng.uniform(0, c.chunk_ms / 1000) if phases else 0.0), i) for i, c in enumerate(callers)]
    heapq.heapify(due)
    try:
        while due and due[0][0] < start + seconds:
            moment, index = heapq.heappop(due)
            time.sleep(max(0.0, moment - time.perf_counter()))
            heard.lateness.append(time.perf_counter() - moment)
            following = callers[index].go_on(moment)
            if following is not None:
                heapq.heappush(due, (following, index))
        while calls is not None and not all(caller.done.wait(0.01) for caller in callers):
            pass
        heard.seconds = time.perf_counter() - start
        heard.waiting = sum(caller.overdue(time.perf_counter()) for caller in callers)
    finally:
        for caller in callers:
            caller.close()
    return heard


class _Caller:
    """One live stream after another, never two at once."""

    def __init__(
        self, model: Model, clips: Sequence[Floats], order: Iterator[int], chunk_ms: int, heard: Heard, start: float
    ) -> None:
        self._model, self._clips, self._order, self.chunk_ms = model, clips, order, chunk_ms
        self._heard, self._start = heard, start
        self._rate, self._lead = model.manifest.features.sample_rate, model.manifest.lead
        self._samples = model.manifest.chunk(chunk_ms).samples
        self._stream: StreamSession | None = None
        self._spoken: deque[float] = deque()  # moments of the chunks that have no result yet
        self.done = threading.Event()  # nothing is being said or recognised
        self.done.set()

    def go_on(self, moment: float) -> float | None:
        """Push what was spoken up to `moment`; when to be called next, or never."""
        try:
            if self._stream is None:
                return self._begin(moment)
            if self._sent == len(self._audio):  # its last words are still being recognised
                if not self.done.is_set():
                    return moment + PACKET
                self._stream = None
                return self._begin(moment)
            self._push(self._stream)
        except NemostreamError as error:
            self._heard.errors.append(str(error))
            self.close()
            self._stream = None
        return moment + PACKET

    def overdue(self, now: float) -> int:
        """Chunks spoken more than a chunk's length ago that have no result."""
        return sum(spoken < now - self.chunk_ms / 1000 for spoken in self._spoken)

    def close(self) -> None:
        self.done.set()  # first: what is heard from now on, that the stream was closed for one, is no result
        if self._stream:
            self._stream.close()

    def _begin(self, moment: float) -> float | None:
        clip = next(self._order, None)
        if clip is None:
            return None
        self._clip = clip % len(self._clips)
        self._audio, self._sent, self._began = self._clips[self._clip], 0, moment
        self._spoken.clear()
        self._stream = self._model.open_session(self._rate, 1, self._listen, chunk_ms=self.chunk_ms)
        self.done.clear()
        return moment + PACKET

    def _push(self, stream: StreamSession) -> None:
        piece = self._audio[self._sent :][: round(PACKET * self._rate)]
        chunks = (self._sent + self._lead) // self._samples
        self._sent += len(piece)
        self._heard.audio += len(piece) / self._rate
        for chunk in range(chunks, (self._sent + self._lead) // self._samples):
            self._spoken.append(self._began + max((chunk + 1) * self._samples - self._lead, 0) / self._rate)
        stream.feed(piece)
        if self._sent == len(self._audio):
            stream.finish()

    def _listen(self) -> None:
        """On the scheduler's thread, after each step."""
        stream, now = self._stream, time.perf_counter()
        if stream is None or self.done.is_set():
            return
        try:
            for _ in stream.collect():
                if self._spoken:  # the steps that end a stream belong to its final result
                    spoken = self._spoken.popleft()
                    self._heard.results.append((self.chunk_ms, spoken - self._start, now - spoken))
            if stream.ended and stream.settled():
                self._heard.finals.append(now - self._began - self._sent / self._rate)
                self._heard.texts.append((self._clip, stream.final().text))
                self.done.set()
        except NemostreamError as error:
            if not self.done.is_set():
                self._heard.errors.append(str(error))
                self.done.set()


class Watched:
    """A backend whose steps are timed: milliseconds of each by chunk size, and how many rows it had."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.steps: list[tuple[int, int, float]] = []  # chunk ms, rows, ms

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def submit(self, batch: Batch) -> Any:
        start = time.perf_counter()
        return _Watching(self, batch, start, self._backend.submit(batch))


@dataclass(frozen=True)
class _Watching:
    watched: Watched
    batch: Batch
    start: float
    pending: Any

    def result(self) -> Emissions:
        emissions = self.pending.result()
        elapsed = 1000 * (time.perf_counter() - self.start)
        self.watched.steps.append((self.batch.chunk.ms, len(self.batch.slots), elapsed))
        return emissions
