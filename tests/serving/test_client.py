"""`nemostream.client` and `transcribe --server` with real servers. tests/test_client.py has the order of messages."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

import nemostream
from nemostream.client import AsyncStream, Event, Rejected, Stream, StreamLost
from nemostream.errors import AudioError


def speech(spoken: Any, pause: float = 1.0) -> bytes:
    """Return recordings with pauses that end utterances, as 16 kHz 16-bit PCM: about 25 s."""
    return b"".join(clip.pcm + bytes(round(32000 * pause)) for clip in spoken[:5])


def transcribed(url: str, pcm: bytes, **options: Any) -> list[Event]:
    """Return the events of a stream that is not interrupted."""
    with Stream(url, **options) as stream:
        stream.send(pcm)
        stream.finish()
        return list(stream)


def comparable(events: list[Event], options: dict[str, Any]) -> list[Event]:
    """Return what does not depend on when messages arrive: events without `audio`.

    With two lanes, partials depend on which of them is ahead; then only the others are returned.
    """
    if "final_chunk_ms" in options:
        results = [event for event in events if event.type != "partial"]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        return [replace(event, audio=0.0, sequence=None) for event in results]
    return [replace(event, audio=0.0) for event in events]


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"chunk_ms": 560}, {"chunk_ms": 80, "final_chunk_ms": 1120}])
def test_the_text_is_that_of_transcribe(server: Any, spoken: Any, options: dict[str, int]) -> None:
    with nemostream.load(chunk_ms=options.get("final_chunk_ms", options["chunk_ms"])) as model:
        expected = model.transcribe(spoken[0].path)
    with Stream(server.url, words=True, endpoint_ms=-1, **options) as stream:
        stream.send(np.frombuffer(spoken[0].pcm, np.int16))
        stream.finish()
        events = list(stream)
    assert stream.text == events[-1].text == expected.text and events[-1].type == "done"
    (final,) = (event for event in events if event.type == "final")
    assert final.text == expected.text and final.language == "en"
    assert [(word.text, word.start, word.end) for word in final.words] == [
        (word.text, pytest.approx(word.start, abs=1e-3), pytest.approx(word.end, abs=1e-3)) for word in expected.words
    ]
    words: list[Any] = []
    for event in events[:-1]:
        words = [*words[: event.words_from], *event.words]
        assert " ".join(word.text for word in words) == event.text
    assert events[-1].audio == pytest.approx(spoken[0].seconds, abs=1e-3)


def test_controls(server: Any, spoken: Any) -> None:
    async def main() -> None:
        async with AsyncStream(server.url, chunk_ms=80, encoding="pcm_f32le") as stream:
            await stream.send(np.frombuffer(spoken[0].pcm, np.int16).astype(np.float32) / 32768)
            await stream.commit()
            events = [event async for event in up_to(stream, "committed")]
            assert events[-2].type == "final" and events[-2].chunk_ms == 80
            await stream.configure(chunk_ms=560)
            await stream.configure(chunk_ms=100)
            await stream.send(np.frombuffer(spoken[1].pcm, np.int16).astype(np.float32) / 32768)
            await stream.finish()
            events = [event async for event in stream]
            (rejected,) = (event for event in events if event.type == "rejected")
            assert "100" in (rejected.reason or "")
            assert {event.chunk_ms for event in events if event.type == "final"} == {560}

    asyncio.run(main())


async def up_to(stream: AsyncStream, kind: str) -> AsyncIterator[Event]:
    """Yield events up to the first of a type."""
    while (event := await anext(stream)).type != kind:
        yield event
    yield event


def test_errors_of_the_client(server: Any) -> None:
    with pytest.raises(Rejected, match="HTTP 400, chunk_ms is 100"), Stream(server.url, chunk_ms=100):
        pass
    with Stream(server.url, encoding="pcm_f32le") as stream, pytest.raises(AudioError, match="NaN"):
        stream.send(np.full(1600, np.nan, np.float32))
        list(stream)


def test_a_url_with_another_path(server: Any) -> None:
    with (
        pytest.raises(Rejected, match="HTTP 404, there is no WebSocket at /asr/v1/stream;"),
        Stream(f"{server.url}/asr"),
    ):
        pass


def test_an_api_key(serve_here: Callable[..., Any]) -> None:
    with serve_here(api_keys=["secret-key-of-a-client"], measure=False) as running:
        with pytest.raises(Rejected, match="HTTP 401, a valid API key is required: set api_key"), Stream(running.url):
            pass
        with pytest.raises(Rejected, match="HTTP 401, a valid API key"), Stream(running.url, api_key="another"):
            pass
        with Stream(running.url, api_key="secret-key-of-a-client") as stream:
            stream.finish()
            assert [event.type for event in stream] == ["done"]


# -- command line ------------------------------------------------------------------------------------------------------


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a local model was loaded")

    monkeypatch.setattr(nemostream, "load", load)


@pytest.fixture
def no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send recordings at once instead of in real time."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None)
    monkeypatch.setattr("nemostream.cli.transcription.time", clock)


@pytest.fixture
def recording(spoken: Any, tmp_path: Path) -> Path:
    """Two utterances at 44.1 kHz in stereo."""
    pcm = np.frombuffer(spoken[0].pcm[:64000] + bytes(48000) + spoken[1].pcm[:64000], np.int16) / 32768
    samples = soxr.resample(pcm, 16000, 44100)
    soundfile.write(tmp_path / "call.wav", np.stack([samples, 0.5 * samples], axis=1), 44100)
    return tmp_path / "call.wav"


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "json"),
        ("--format", "srt", "--chunk-ms", 80, "--final-chunk-ms", 1120),
        ("--format", "json", "--endpoint-ms", 480, "--decoder", "reset", "--language", "en", "--channel", 2),
        ("--endpoint-ms", 480, "--phrases", "nine:5"),
    ],
)
def test_the_output_is_that_of_a_local_model(
    server: Any, run: Run, recording: Path, options: Any, no_pace: None
) -> None:
    local = run(recording, *options)
    code, out, err = run(recording, "--realtime", "--server", server.url, *options)
    assert (code, err) == (local[0], local[2]) == (0, "")
    if "json" not in options:
        assert out == local[1] and len(out) > 50
        return
    found, expected = json.loads(out), json.loads(local[1])
    assert found.pop("tokens") == [] and expected.pop("tokens")
    assert found.pop("duration") == pytest.approx(expected.pop("duration"), abs=1e-3)
    assert len(expected.get("utterances", "12")) == 2
    assert found == expected


def test_several_files_without_a_local_model(server: Any, run: Run, spoken: Any, no_model: None, no_pace: None) -> None:
    names = [str(clip.path) for clip in spoken[:2]]
    code, out, err = run(*names, "--realtime", "--server", server.url)
    assert (code, err) == (0, "")
    assert out == "".join(f"{name}: {clip.text}\n" for name, clip in zip(names, spoken[:2], strict=True))


def test_standard_input(server: Any, run: Run, spoken: Any, monkeypatch: pytest.MonkeyPatch, no_model: None) -> None:
    read_end, write_end = os.pipe()

    def write() -> None:
        with open(write_end, "wb") as pipe:
            pipe.write(spoken[0].pcm)

    writer = threading.Thread(target=write)
    writer.start()
    with open(read_end) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert run("-", "--server", server.url) == (0, spoken[0].text + "\n", "")
    writer.join()


def kill_after(running: Any, seconds: float) -> None:
    """Kill a server after it has received this many seconds of audio."""
    while running.metric("nemostream_audio_seconds_total") < seconds:
        time.sleep(0.05)
    running.process.kill()


def test_failures(server: Any, run: Run, spoken: Any, no_model: None) -> None:
    clip = spoken[0].path
    code, out, err = run(clip, "--realtime", "--server", "http://127.0.0.1:1")
    assert (code, out) == (9, "") and "no server accepted the stream: http://127.0.0.1:1: Connection refused" in err
    code, out, err = run(clip, "--realtime", "--server", server.url, "--chunk-ms", 100)
    assert (code, out) == (2, "") and "chunk_ms is 100" in err
    code, out, err = run(clip, "--realtime", "--server", "host:8000")
    assert (code, out) == (2, "") and "'host:8000' is not the URL of a server" in err


def test_a_lost_stream_leaves_its_text(
    serve_process: Callable[..., Any], run: Run, spoken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed, and nothing continues its stream."""
    monkeypatch.setitem(Stream.__init__.__kwdefaults__, "max_reconnect_seconds", 0.5)
    words = spoken[0].text.split()
    with serve_process("--no-measure") as running:
        watching = threading.Thread(target=kill_after, args=(running, spoken[0].seconds - 1))
        watching.start()
        code, out, err = run(spoken[0].path, "--realtime", "--server", running.url)
        watching.join()
    assert code == 9 and err.startswith("nemostream: ") and err.count("\n") == 1
    assert out.split() and out.split()[:-1] == words[: len(out.split()) - 1]


# -- resumption --------------------------------------------------------------------------------------------------------


class Proxy:
    """Forwards TCP connections to a server, and cuts them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self.connections = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        upstream, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, to_server]

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(1 << 16):
                    target.write(data)
                    await target.drain()
                target.write_eof()

        await asyncio.gather(copy(reader, to_server), copy(upstream, writer))
        for one in (writer, to_server):
            one.close()

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    @asynccontextmanager
    async def run(self) -> AsyncIterator[str]:
        listener = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        async with listener:
            yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            self.cut()


@pytest.mark.parametrize("options", [{"chunk_ms": 160}, {"chunk_ms": 80, "final_chunk_ms": 1120, "words": True}])
def test_cut_connections_change_no_event(server: Any, spoken: Any, options: Any) -> None:
    pcm = speech(spoken)
    expected = transcribed(server.url, pcm, **options)
    assert sum(event.type == "final" for event in expected) >= 4

    async def main() -> None:
        proxy = Proxy(server.http)
        async with proxy.run() as url, AsyncStream(url, **options) as stream:

            async def send() -> None:
                for number, start in enumerate(range(0, len(pcm), 6400)):
                    await stream.send(pcm[start : start + 6400])
                    await asyncio.sleep(0.01)
                    if number % 40 == 20:
                        proxy.cut()
                await stream.finish()

            sending = asyncio.create_task(send())
            events = [event async for event in stream]
            await sending
            assert comparable(events, options) == comparable(expected, options)
            # A connection that is cut before `ready` is not a reconnection.
            assert stream.reconnects >= 2 and proxy.connections >= stream.reconnects + 1
            assert len(stream.gaps) >= 1

    asyncio.run(main())


@contextmanager
def two_servers(serve_process: Callable[..., Any], store: Path) -> Iterator[list[Any]]:
    """Run two servers that share a store."""
    options = ("--no-measure", "--state-store", str(store), "--state-seconds", "0.2")
    with ExitStack() as stack:
        yield [stack.enter_context(serve_process(*options)) for _ in range(2)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_another_server_continues_the_stream(
    serve_process: Callable[..., Any],
    spoken: Any,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nemostream.client._PING_SECONDS", 1.0)  # the server is frozen for SIGSTOP
    pcm = speech(spoken)
    with two_servers(serve_process, tmp_path / "states") as servers:
        expected = transcribed(servers[1].url, pcm, chunk_ms=160)
        with Stream([one.url for one in servers], chunk_ms=160) as stream:
            half = len(pcm) // 4 * 2
            assert stream.resumable
            stream.send(pcm[:half])
            events = [next(stream)]
            while events[-1].type != "final":
                events.append(next(stream))
            servers[0].process.send_signal(number)
            limit = time.monotonic() + 60
            while not stream.reconnects and time.monotonic() < limit:
                time.sleep(0.05)
            stream.send(pcm[half:])
            stream.finish()
            events += stream
            assert stream.reconnects == 1
        if number == signal.SIGSTOP:
            servers[0].process.send_signal(signal.SIGCONT)
        limit = time.monotonic() + 10
        while (states := [*(tmp_path / "states").rglob("*.state")]) and time.monotonic() < limit:
            time.sleep(0.05)
        assert states == []  # deleted after `done`
    assert comparable(events, {}) == comparable(expected, {})


def test_servers_without_a_shared_store(serve_process: Callable[..., Any], spoken: Any) -> None:
    with serve_process("--no-measure") as first, serve_process("--no-measure") as second:
        with Stream([first.url, second.url], max_reconnect_seconds=1) as stream:
            stream.send(spoken[0].pcm)
            event = next(stream)
            first.process.kill()
            with pytest.raises(StreamLost) as caught:
                while True:
                    next(stream)
        assert caught.value.text.startswith(event.stable) and second.url in str(caught.value)


def test_the_command_line_leaves_nothing_behind(serve_process: Callable[..., Any], spoken: Any, run: Run) -> None:
    """It checks its options with a stream that ends as every other."""
    with serve_process("--no-measure", "--max-streams", "1") as server:
        assert run(spoken[0].path, "--realtime", "--server", server.url) == (0, spoken[0].text + "\n", "")
        assert server.metric("nemostream_streams_opened_total") == 2
        assert server.metric("nemostream_streams_failed_total") == 0


def test_the_command_line_continues_on_another_server(
    serve_process: Callable[..., Any], spoken: Any, run: Run, tmp_path: Path, no_model: None
) -> None:
    with two_servers(serve_process, tmp_path / "states") as servers:
        watching = threading.Thread(target=kill_after, args=(servers[0], spoken[0].seconds / 2))
        watching.start()
        urls = [argument for one in servers for argument in ("--server", one.url)]
        assert run(spoken[0].path, "--realtime", *urls) == (0, spoken[0].text + "\n", "")
        watching.join()
