"""Load generator of `bench load` and `bench serve`: streams of a target, paced in real time, in processes of their own.

The server cannot delay the generator unnoticed: a packet is late relative to the time at which its last sample exists.
Packets after a `send` that waited for the server, until the stream is on time again, are counted separately, because
the server delayed them. All times are those of the event loop, `time.monotonic` except in tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any

import numpy as np

from nemostream.benchmarks.harness.targets import Stream, Target, create_target
from nemostream.errors import BackendError, NemostreamError

MAX_LATENESS = 0.02  # seconds: the p99 of the generator's lateness beyond which its figures are not valid
_TICK = 0.01  # seconds between two measurements of the event loop's lateness
_RESULT_SECONDS = 30.0  # for the results of a stream after its last audio
_RETRY_SECONDS = 1.0  # after an error, before the next stream
_SPREAD = 2.0  # seconds in which the first streams start, at random times
_LEAD = 0.5  # seconds for all processes to receive a job
_PRIORITY = -10  # niceness of the processes, where the system permits it
_BYTES_PER_SAMPLE = 2


@dataclass(frozen=True)
class Recording:
    """Audio of a stream: 16-bit samples at the target's rate, and where speech ends in seconds."""

    pcm: bytes
    speech_end: float


@dataclass(frozen=True)
class Job:
    """What the streams of a run do. With `once`, one stream sends each recording once, in order."""

    streams: int
    seconds: float  # recordings begin in this time; they are sent to their end
    packet: float  # seconds of audio in a message
    begin: float  # time of the loop
    seed: int = 0
    once: bool = False


@dataclass
class StreamResult:
    """What happened to a stream. Times are seconds since the beginning of the run."""

    recording: int
    start: float = 0.0  # at which the first sample exists
    finished: float = 0.0  # at which the end of the audio was sent
    texts: list[tuple[float, str]] = field(default_factory=list)  # the whole text after each change, and its time
    final: float | None = None  # at which the last utterance with text became final; None without text
    ended: float = 0.0  # at which the server had sent everything
    error: str = ""
    disconnected: bool = False  # the error is the loss of an open connection

    @property
    def text(self) -> str:
        """The text at the end."""
        return self.texts[-1][1] if self.texts else ""


@dataclass
class RunResult:
    """Measurements of a run, in seconds."""

    streams: list[StreamResult] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)  # of the packets that only the generator can delay
    ticks: list[float] = field(default_factory=list)  # lateness of the event loop
    blocked: list[float] = field(default_factory=list)  # lateness of packets after a send that waited for the server
    audio_seconds: float = 0.0  # sent
    cpu_seconds: float = 0.0  # of the generator
    max_open: int = 0  # connections at the same time

    def add(self, other: RunResult) -> None:
        """Add the measurements of another process."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


async def run_streams(target: Target, recordings: Sequence[Recording], job: Job, indices: Sequence[int]) -> RunResult:
    """Run the streams `indices` of a job and return their measurements."""
    run = _Run(target, recordings, job)
    cpu, ticker = time.process_time(), asyncio.create_task(run.tick())
    try:
        async with asyncio.TaskGroup() as group:
            for index in indices:
                group.create_task(run.once() if job.once else run.client(index))
    finally:
        ticker.cancel()
    run.result.cpu_seconds = time.process_time() - cpu
    return run.result


class _Run:
    """The streams of one process."""

    def __init__(self, target: Target, recordings: Sequence[Recording], job: Job) -> None:
        self._target, self._recordings, self._job = target, recordings, job
        self._clock = asyncio.get_running_loop().time
        self._open = 0
        self.result = RunResult()

    async def tick(self) -> None:
        """Measure the lateness of the event loop."""
        due = self._clock()
        while True:
            due = max(due + _TICK, self._clock())
            await self._sleep_until(due)
            self.result.ticks.append(self._clock() - due)

    async def once(self) -> None:
        await self._sleep_until(self._job.begin)
        for recording in range(len(self._recordings)):
            await self._stream(recording)

    async def client(self, index: int) -> None:
        """Stream recordings in random order until the time has passed."""
        job, rng = self._job, np.random.default_rng([self._job.seed, self._job.streams, index])
        order: list[int] = []
        await self._sleep_until(job.begin + rng.uniform(0, min(_SPREAD, job.seconds / 4)))
        while self._clock() < job.begin + job.seconds:
            order = order or rng.permutation(len(self._recordings)).tolist()
            if (await self._stream(order.pop())).error:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _stream(self, recording: int) -> StreamResult:
        """Stream a recording and wait for its last result."""
        result = StreamResult(recording)
        self.result.streams.append(result)
        opened = False
        try:
            async with self._target.connect() as stream:
                opened = True
                self._open += 1
                self.result.max_open = max(self.result.max_open, self._open)
                try:
                    await self._exchange(stream, self._recordings[recording], result)
                finally:
                    self._open -= 1
        except TimeoutError:
            result.error = f"no end of the results in {_RESULT_SECONDS:.0f} s" if opened else "no connection in time"
        except Exception as error:
            text = str(error).strip().partition("\n")[0][:300]
            result.error = text if isinstance(error, NemostreamError) else f"{type(error).__name__}: {text}"
            result.disconnected = opened and isinstance(error, OSError)
        return result

    async def _exchange(self, stream: Stream, recording: Recording, result: StreamResult) -> None:
        start = self._clock()
        result.start = start - self._job.begin
        reading = asyncio.create_task(self._read(stream, result))
        writing = asyncio.create_task(self._write(stream, recording, start, result))
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():  # the audio is sent, or sending failed: the reason is in the results
                async with asyncio.timeout(_RESULT_SECONDS):
                    await reading
            reading.result()
            if not writing.done():
                raise ConnectionError("the server ended the stream before the audio")
            writing.result()
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _write(self, stream: Stream, recording: Recording, start: float, result: StreamResult) -> None:
        rate = _BYTES_PER_SAMPLE * self._target.sample_rate
        size = _BYTES_PER_SAMPLE * round(self._job.packet * self._target.sample_rate)
        behind = False  # because of the server
        for offset in range(0, len(recording.pcm), size):
            packet = recording.pcm[offset : offset + size]
            due = start + (offset + len(packet)) / rate  # its last sample exists
            await self._sleep_until(due)
            sending = self._clock()
            late = sending - due
            (self.result.blocked if behind else self.result.lateness).append(late)
            await stream.send(packet)
            self.result.audio_seconds += len(packet) / rate
            behind = self._clock() - sending > MAX_LATENESS or (behind and late > MAX_LATENESS)
        result.finished = self._clock() - self._job.begin
        await stream.finish()

    async def _read(self, stream: Stream, result: StreamResult) -> None:
        texts: dict[Hashable, str] = {}
        async for update in stream.updates():
            now = self._clock() - self._job.begin
            texts[update.utterance] = update.text
            text = " ".join(filter(None, texts.values()))
            if text != result.text:
                result.texts.append((now, text))
            if update.text:
                result.final = now if update.final else None
        result.ended = self._clock() - self._job.begin
        if result.text and result.final is None:
            result.final = result.ended

    async def _sleep_until(self, due: float) -> None:
        await asyncio.sleep(max(0.0, due - self._clock()))


class Generator:
    """Processes that run streams of a target. Use as a context manager."""

    def __init__(self, target: str, recordings: Sequence[Recording], packet: float, processes: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._packet, self._workers = packet, list[tuple[Any, Any]]()
        for _ in range(processes):
            connection, child = context.Pipe()
            worker = context.Process(target=_work, args=(child, target, recordings), daemon=True)
            worker.start()
            child.close()
            self._workers.append((worker, connection))

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker, connection in self._workers:
            connection.close()
            worker.join(_RETRY_SECONDS)
            if worker.is_alive():
                worker.terminate()
                worker.join()

    def run(self, streams: int, seconds: float, *, seed: int = 0, once: bool = False) -> RunResult:
        """Run a number of streams and return their measurements. Raises `BackendError` if a process ended."""
        try:
            for _, connection in self._workers:
                connection.recv()  # it has loaded its modules, or done its last job
            job = Job(streams, seconds, self._packet, time.monotonic() + _LEAD, seed, once)
            for number, (_, connection) in enumerate(self._workers):
                connection.send((job, range(number, streams, len(self._workers))))
            total = RunResult()
            for _, connection in self._workers:
                total.add(connection.recv())
        except (EOFError, OSError) as error:
            raise BackendError("a process of the load generator ended; its error is above.") from error
        return total


def _work(connection: Any, target: str, recordings: Sequence[Recording]) -> None:
    """Run the jobs that a process receives, until its connection closes."""
    with contextlib.suppress(OSError):  # a server on the same machine must not delay the generator
        os.nice(_PRIORITY)
    create_target(target)  # loads its modules
    with contextlib.suppress(EOFError, OSError):  # closed
        while True:
            connection.send("ready")
            job, indices = connection.recv()
            connection.send(asyncio.run(_run_target(target, recordings, job, indices)))


async def _run_target(target: str, recordings: Sequence[Recording], job: Job, indices: Sequence[int]) -> RunResult:
    return await run_streams(create_target(target), recordings, job, indices)  # made in the loop that uses it
