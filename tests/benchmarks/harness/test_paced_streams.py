"""The load generator of `bench load`: servers with known delays, in virtual time; and its processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("websockets", reason="needs the serve extra")

from nemostream.benchmarks.harness import paced_streams
from nemostream.benchmarks.harness.paced_streams import Generator, Job, Recording, RunResult, run_streams
from nemostream.benchmarks.harness.targets import Update
from nemostream.errors import BackendError, StreamError

RATE = 1000  # Hz
RECORDING = Recording(bytes(2 * RATE), 0.8)  # 1 s
# When the server has received so many seconds of audio (None: the end), it sends an update after a delay.
SCRIPT = [(0.35, 0.05, Update(0, "one")), (0.6, 0.1, Update(0, "one two")), (None, 0.2, Update(0, "One two.", True))]


class Server:
    """A target that follows a script."""

    sample_rate = RATE

    def __init__(self, script: list[Any] = SCRIPT, opening: float = 0.0) -> None:
        self.script, self.opening, self.streams = script, opening, list[ServerStream]()
        self.begin_send = lambda stream: None

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[ServerStream]:
        await asyncio.sleep(self.opening)
        self.streams.append(ServerStream(self))
        yield self.streams[-1]


class ServerStream:
    def __init__(self, server: Server) -> None:
        self.server, self.pending, self.loop = server, list(server.script), asyncio.get_running_loop()
        self.received: list[tuple[float, int]] = []
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.waits: dict[int, float] = {}  # seconds that the server takes to accept a message, by its number

    async def send(self, pcm: bytes) -> None:
        self.received.append((self.loop.time(), len(pcm)))
        self.server.begin_send(self)
        await asyncio.sleep(self.waits.get(len(self.received), 0.0))
        seconds = sum(size for _, size in self.received) / (2 * RATE)
        while self.pending and self.pending[0][0] is not None and self.pending[0][0] <= seconds + 1e-9:
            _, delay, event = self.pending.pop(0)
            self.loop.call_later(delay, self.events.put_nowait, event)

    async def finish(self) -> None:
        for _, delay, event in self.pending:
            self.loop.call_later(delay, self.events.put_nowait, event)
        end = max((delay for _, delay, _ in self.pending), default=0.0) + 1e-9  # after the last update
        self.loop.call_later(end, self.events.put_nowait, None)

    async def updates(self) -> AsyncIterator[Update]:
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event


def job(streams: int = 1, seconds: float = 10.0, **options: Any) -> Job:
    return Job(streams, seconds, 0.1, begin=1000.5, **options)


def run_once(server: Server, recordings: int = 1) -> Any:
    return run_streams(server, [RECORDING] * recordings, job(once=True), [0])


def test_times_of_a_stream(run_virtual: Any) -> None:
    """Packets of 100 ms are sent when their last sample exists; texts have the time of their arrival."""
    server = Server(opening=0.3)
    result: RunResult = run_virtual(run_once(server))
    (stream,) = result.streams
    assert stream.error == "" and stream.start == pytest.approx(0.3)
    sent = [at - 1000.8 for at, _ in server.streams[0].received]
    assert sent == pytest.approx([0.1 * (number + 1) for number in range(10)])
    assert {size for _, size in server.streams[0].received} == {200} and result.audio_seconds == pytest.approx(1.0)
    # 0.35 s are complete with the packet at 0.4 s.
    assert [text for _, text in stream.texts] == ["one", "one two", "One two."] and stream.text == "One two."
    assert [at for at, _ in stream.texts] == pytest.approx([0.3 + 0.45, 0.3 + 0.7, 0.3 + 1.2])
    assert (stream.final, stream.ended, stream.finished) == pytest.approx((1.5, 1.5, 1.3))
    assert result.lateness == pytest.approx([0.0] * 10) and result.blocked == [] and result.max_open == 1
    assert len(result.ticks) > 100 and max(result.ticks) == pytest.approx(0)


def test_recordings_of_the_unloaded_run_are_sent_once_in_order(run_virtual: Any) -> None:
    result = run_virtual(run_once(Server(), recordings=3))
    assert [stream.recording for stream in result.streams] == [0, 1, 2]
    assert [stream.start for stream in result.streams] == pytest.approx([0.0, 1.2, 2.4])


def test_utterances_are_joined_and_the_last_final_counts(run_virtual: Any) -> None:
    """A final without text, and a final of an earlier utterance that arrives late, are no later ends."""
    script = [
        (0.2, 0.0, Update("a", "one")),
        (0.3, 0.0, Update("b", "two")),
        (0.4, 0.0, Update("b", "two", True)),
        (0.5, 0.0, Update("a", "one.", True)),
        (0.9, 0.0, Update("c", "", True)),
    ]
    (stream,) = run_virtual(run_once(Server(script))).streams
    assert [text for _, text in stream.texts] == ["one", "one two", "one. two"]
    assert (stream.final, stream.ended) == pytest.approx((0.5, 1.0))


def test_without_a_final_the_end_of_the_stream_counts(run_virtual: Any) -> None:
    (stream,) = run_virtual(run_once(Server([(0.2, 0.0, Update(0, "one")), (None, 0.3, Update(0, "one two"))]))).streams
    assert stream.final == pytest.approx(1.3)
    (stream,) = run_virtual(run_once(Server([(None, 0.3, Update(0, "", True))]))).streams
    assert stream.final is None and stream.text == ""


def test_streams_start_at_random_times_and_repeat(run_virtual: Any) -> None:
    """Each stream sends all recordings before it repeats one; no recording begins after the end."""
    server = Server()
    options = [server, [RECORDING] * 3, job(4, 8.0, seed=1), range(4)]
    result: RunResult = run_virtual(run_streams(*options))  # type: ignore[arg-type]
    starts = sorted(stream.start for stream in result.streams)
    assert starts[0] >= 0 and starts[-1] < 8.0 and result.max_open == 4
    assert len({round(start % 1.2, 6) for start in starts}) == 4
    assert 4 * 5 <= len(result.streams) <= 4 * 7  # a stream takes 1.2 s
    counts = [sum(stream.recording == number for stream in result.streams) for number in range(3)]
    assert max(counts) - min(counts) <= 4
    again: RunResult = run_virtual(run_streams(*options))  # type: ignore[arg-type]
    assert again.streams == result.streams


def test_a_busy_event_loop_is_the_generators_lateness(run_virtual: Any) -> None:
    """The loop is busy from 0.25 s to 0.4 s."""
    server = Server()

    def busy(loop: Any) -> None:
        loop.now += 0.15

    def begin(stream: ServerStream) -> None:
        if len(stream.received) == 1:
            stream.loop.call_later(0.15, busy, stream.loop)

    server.begin_send = begin
    result = run_virtual(run_once(server))
    assert result.lateness == pytest.approx([0.0, 0.0, 0.1, *[0.0] * 7]) and result.blocked == []
    assert max(result.ticks) == pytest.approx(0.15, abs=0.01)


def test_messages_that_wait_for_the_server_are_not_the_generators_lateness(run_virtual: Any) -> None:
    """The third message waits for 250 ms: two packets are late because of it, and the loop is on time."""
    server = Server()

    def wait(stream: ServerStream) -> None:
        stream.waits = {3: 0.25}

    server.begin_send = wait
    result = run_virtual(run_once(server))
    assert result.blocked == pytest.approx([0.15, 0.05, 0.0])
    assert result.lateness == pytest.approx([0.0] * 7) and max(result.ticks) == pytest.approx(0)


@pytest.mark.parametrize(
    ("error", "message", "disconnected"),
    [
        (ConnectionError("gone\nfor ever"), "ConnectionError: gone", True),
        (StreamError("full"), "full", False),
        (KeyError("text"), "KeyError: 'text'", False),
    ],
)
def test_errors_and_disconnects(error: Exception, message: str, disconnected: bool, run_virtual: Any) -> None:
    """The stream ends at the error; the next one begins a second later."""
    result = run_virtual(run_streams(Server([(0.5, 0.0, error)]), [RECORDING], job(seconds=2.0), [0]))
    first, second = result.streams
    assert (first.error, first.disconnected) == (message, disconnected)
    assert second.start - first.start == pytest.approx(1.5)


def test_a_server_that_cannot_be_reached_is_an_error(run_virtual: Any) -> None:
    class Closed(Server):
        @contextlib.asynccontextmanager
        async def connect(self) -> AsyncIterator[Any]:
            raise ConnectionRefusedError("refused")
            yield

    (stream,) = run_virtual(run_once(Closed())).streams
    assert (stream.error, stream.disconnected) == ("ConnectionRefusedError: refused", False)


def test_streams_that_end_too_early_or_never(run_virtual: Any) -> None:
    (stream,) = run_virtual(run_once(Server([(0.5, 0.0, None)]))).streams
    assert stream.error == "ConnectionError: the server ended the stream before the audio" and stream.disconnected
    (stream,) = run_virtual(run_once(Server([(None, 60.0, Update(0, "late", True))]))).streams
    assert stream.error == "no end of the results in 30 s" and not stream.disconnected


# -- processes ---------------------------------------------------------------------------------------------------------

TARGET = """
import asyncio, contextlib, os
from nemostream.benchmarks.harness.targets import Update

class Target:
    sample_rate = 1000
    def __init__(self, address): self.address = address
    @contextlib.asynccontextmanager
    async def connect(self): yield Stream(self.address)

class Stream:
    def __init__(self, address): self.size, self.end, self.address = 0, asyncio.Event(), address
    async def send(self, pcm):
        if self.address == "exit": os._exit(3)
        self.size += len(pcm)
    async def finish(self): self.end.set()
    async def updates(self):
        await self.end.wait()
        yield Update(0, f"{os.getpid()} {self.size}", True)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "counting_target.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    return "counting_target:Target"


def test_streams_are_divided_among_processes(target: str) -> None:
    recordings = [Recording(bytes(2 * size), 0.01) for size in (20, 30)]
    with Generator(target, recordings, 0.01, processes=2) as generator:
        for _ in range(2):  # jobs of the same processes
            result = generator.run(5, 0.3)
            assert result.max_open == 5 and not any(stream.error for stream in result.streams)
            pids = {stream.text.split()[0] for stream in result.streams}
            assert len(pids) == 2 and str(os.getpid()) not in pids
            sizes = {(stream.recording, stream.text.split()[1]) for stream in result.streams}
            assert sizes == {(0, "40"), (1, "60")} and result.cpu_seconds > 0
        unloaded = generator.run(1, 1.0, once=True)
        assert [stream.recording for stream in unloaded.streams] == [0, 1]


def test_a_process_that_ends_is_an_error(target: str) -> None:
    with (
        Generator(f"{target}@exit", [RECORDING], 0.1) as generator,
        pytest.raises(BackendError, match="a process of the load generator ended"),
    ):
        generator.run(1, 0.1)


def test_the_bound_of_the_lateness_is_documented() -> None:
    from nemostream.benchmarks import load

    assert f"exceeds {1000 * paced_streams.MAX_LATENESS:.0f} ms" in (load.__doc__ or "")
