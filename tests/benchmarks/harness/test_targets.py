"""Clients of speech servers: against real servers, and scripted ones for their messages."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream import Endpoint
from nemostream.bundle import Bundle
from nemostream.clips import read_clip
from nemostream.errors import OptionError, StreamError

pytest.importorskip("fastapi", reason="needs the serve extra")

from websockets.asyncio.server import serve as serve_websockets

from nemostream.benchmarks.harness import targets
from nemostream.benchmarks.harness.server_process import server_process
from nemostream.benchmarks.harness.targets import Update, create_target

PACKET = 3200  # bytes


def pcm(rate: int = 16000) -> bytes:
    """The packaged clip, and a second of silence."""
    clip = np.concatenate([read_clip("clip", rate), np.zeros(rate, np.float32)])
    return (32767 * clip).astype("<i2").tobytes()


async def exchange(target: Any, audio: bytes, pause: float = 0.0) -> list[Update]:
    """Send audio as fast as the server accepts it, after `pause` seconds, and return all updates."""
    found: list[Update] = []

    async def read(stream: Any) -> None:
        async for update in stream.updates():
            found.append(update)

    async with target.connect() as stream:
        reading = asyncio.create_task(read(stream))
        if pause:
            await asyncio.wait([reading], timeout=pause)
        for offset in range(0, len(audio), PACKET):
            await stream.send(audio[offset : offset + PACKET])
        await stream.finish()
        await asyncio.wait_for(reading, 60)
    return found


def text_of(updates: list[Update]) -> str:
    texts: dict[Any, str] = {}
    for update in updates:
        texts[update.utterance] = update.text
    return " ".join(filter(None, texts.values()))


@pytest.fixture(scope="module")
def server(demo_bundle: Bundle) -> Iterator[dict[str, str]]:
    """Addresses of a running server by the scheme of the target."""
    command = [sys.executable, "-m", "nemostream", "serve", "--bundle", str(demo_bundle.path), "--no-measure"]
    with server_process([*command, "--port", "0", "--grpc-port", "0"]) as (_, url):
        with urllib.request.urlopen(f"{url}/readyz") as response:
            grpc_port = json.load(response)["grpc_port"]
        host = url.removeprefix("http://")
        yield {"riva": f"127.0.0.1:{grpc_port}"} | dict.fromkeys(
            ("nemostream+ws", "openai-realtime+ws", "openai+http"), host
        )


@pytest.fixture(scope="module")
def expected(demo_bundle: Bundle) -> dict[str, str]:
    """The text of the clip with the ends of utterances of the server, and without."""
    samples = np.frombuffer(pcm(), "<i2").astype(np.float32) / 32768
    with nemostream.load(demo_bundle.path, 560) as model:
        finals = [each.text for each in model.listen(samples, endpoint=Endpoint()) if each.kind == "final"]
        return {"stream": " ".join(finals), "recording": model.transcribe(samples).text}


@pytest.mark.parametrize("options", ["", "?rate=16000&language=en-US&silence_ms=800"])
@pytest.mark.parametrize("scheme", ["nemostream+ws", "riva", "openai-realtime+ws", "openai+http"])
def test_text_of_the_server(scheme: str, options: str, server: Any, expected: dict[str, str]) -> None:
    if options and scheme != "openai-realtime+ws":
        options = {"riva": "?chunk_ms=560", "openai+http": "?chunk_ms=560&language=en"}.get(scheme, "?chunk_ms=560")
    target = create_target(f"{scheme}://{server[scheme]}{options}")
    assert target.sample_rate == (24000 if scheme == "openai-realtime+ws" and not options else 16000)
    updates = asyncio.run(exchange(target, pcm(target.sample_rate)))
    assert text_of(updates) == expected["recording" if scheme == "openai+http" else "stream"]
    partials = [update for update in updates if not update.final]
    assert len(partials) > 2 and len({update.utterance for update in updates if update.text}) >= 1
    for utterance in {update.utterance for update in updates if update.text}:
        own = [update for update in updates if update.utterance == utterance]
        assert [update.final for update in own] == [False] * (len(own) - 1) + [True]
        assert all(after.text.startswith(before.text) for before, after in pairwise(own))


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("nemostream+ws", "?chunk_ms=3", "400"),
        ("riva", "?chunk_ms=3", "INVALID_ARGUMENT: .*chunk"),
        ("openai-realtime+ws", "?language=xx", "language"),
        ("openai+http", "?colour=red", "HTTP 400: .*colour"),
        ("openai+http", "?stream=false&chunk_ms=3", "HTTP 400: .*chunk"),
    ],
)
def test_a_rejected_stream_is_an_error(scheme: str, options: str, message: str, server: Any) -> None:
    target = create_target(f"{scheme}://{server[scheme]}{options}")
    with pytest.raises(Exception, match=message) as raised:
        # gRPC replaces the reason of the server by its own if a message is written before it has read the reason.
        asyncio.run(exchange(target, pcm(target.sample_rate), pause=5.0 if scheme == "riva" else 0.0))
    assert not isinstance(raised.value, OSError)


def test_http_without_events(server: Any, expected: dict[str, str]) -> None:
    target = create_target(f"openai+http://{server['openai+http']}/v1?stream=false&response_format=json")
    assert asyncio.run(exchange(target, pcm())) == [Update(0, expected["recording"], True)]


def test_api_key(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-secret-secret\n")
    command = [sys.executable, "-m", "nemostream", "serve", "--no-measure", "--port", "0", "--grpc-port", "0"]
    with server_process([*command, "--api-keys-file", str(keys)]) as (_, url):
        with urllib.request.urlopen(f"{url}/readyz") as response:
            grpc_port = json.load(response)["grpc_port"]
        for address in (f"nemostream+ws{url[4:]}", f"openai+http{url[4:]}", f"riva://127.0.0.1:{grpc_port}"):
            monkeypatch.setenv(targets.API_KEY, "wrong")
            with pytest.raises(Exception, match=r"401|UNAUTHENTICATED|the server ended the call"):
                asyncio.run(exchange(create_target(address), pcm()[:PACKET]))
            monkeypatch.setenv(targets.API_KEY, "secret-secret-secret")
            asyncio.run(exchange(create_target(address), pcm()[:PACKET]))


# -- scripted servers --------------------------------------------------------------------------------------------------

Handler = Callable[[Any, list[Any]], Any]


def scripted(scheme: str, handler: Handler, options: str = "", audio: bytes = b"\0\0" * 3200) -> Any:
    """Return the updates of an exchange with a WebSocket server, and the messages that it received."""
    received: list[Any] = []

    async def run() -> list[Update]:
        async def handle(connection: Any) -> None:
            received.append(connection.request.path)
            await handler(connection, received)

        async with serve_websockets(handle, "127.0.0.1", 0) as running:
            port = running.sockets[0].getsockname()[1]
            return await exchange(create_target(f"{scheme}://127.0.0.1:{port}{options}"), audio)

    return asyncio.run(run()), received


def test_messages_of_vllm() -> None:
    """Source: vllm/entrypoints/openai/realtime/connection.py."""

    async def serve(connection: Any, received: list[Any]) -> None:
        await connection.send('{"type": "session.created", "id": "s", "created": 1}')
        async for message in connection:
            received.append(json.loads(message))
            if received[-1].get("final"):
                for event in (
                    {"type": "transcription.delta", "delta": " Hello"},
                    {"type": "transcription.delta", "delta": " world"},
                    {"type": "transcription.done", "text": " Hello world.", "usage": {}},
                ):
                    await connection.send(json.dumps(event))

    audio = np.arange(3200, dtype="<i2").tobytes()
    updates, (path, session, begin, *appends, end) = scripted("vllm+ws", serve, "?model=voxtral", audio)
    assert updates == [Update(0, "Hello"), Update(0, "Hello world"), Update(0, "Hello world.", True)]
    assert path == "/v1/realtime" and session == {"type": "session.update", "model": "voxtral"}
    assert begin == {"type": "input_audio_buffer.commit", "final": False}
    assert end == {"type": "input_audio_buffer.commit", "final": True}
    assert {each["type"] for each in appends} == {"input_audio_buffer.append"}
    assert b"".join(base64.b64decode(each["audio"]) for each in appends) == audio


def test_error_of_vllm() -> None:
    async def serve(connection: Any, received: list[Any]) -> None:
        await connection.send('{"type": "session.created"}')
        await connection.send('{"type": "error", "error": "no such model", "code": "x"}')
        await connection.wait_closed()

    with pytest.raises(StreamError, match="no such model"):
        scripted("vllm+ws", serve, "?model=none")


SHERPA = {
    # Source: sherpa-onnx/csrc/online-websocket-server-impl.cc
    "C++": [
        {"text": " one", "segment": 0, "is_final": False, "is_eof": False},
        {"text": " one two", "segment": 0, "is_final": True, "is_eof": False},
        {"text": "", "segment": 1, "is_final": False, "is_eof": False},
        {"text": "three", "segment": 1, "is_final": False, "is_eof": False},
        {"text": "three", "segment": 1, "is_final": True, "is_eof": True},
    ],
    # Source: python-api-examples/streaming_server.py
    "Python": [
        {"text": "one", "segment": 0},
        {"text": "one two", "segment": 0},
        {"text": "", "segment": 1},
        {"text": "three", "segment": 1},
    ],
}


@pytest.mark.parametrize("kind", SHERPA)
def test_messages_of_sherpa(kind: str) -> None:
    async def serve(connection: Any, received: list[Any]) -> None:
        async for message in connection:
            received.append(message)
            if message == "Done":
                for result in SHERPA[kind]:
                    await connection.send(json.dumps(result))
                await connection.send("Done!")

    audio = np.array([0, 16384, -32768, 32767], "<i2").tobytes()
    updates, (_, samples, end) = scripted("sherpa+ws", serve, audio=audio)
    assert np.array_equal(np.frombuffer(samples, "<f4"), [0, 0.5, -1, 32767 / 32768]) and end == "Done"
    finals = [Update(0, "one two", True), Update(1, "three", True)]
    assert [update for update in updates if update.final] == finals
    assert updates[0] == Update(0, "one") and updates[-2] == Update(1, "three") and updates[-1] == finals[-1]


def test_items_of_realtime_sessions_are_completed_in_any_order() -> None:
    """The answer to the client's commit can be an error, and items that are still open are awaited."""

    async def serve(connection: Any, received: list[Any]) -> None:
        transcription = "conversation.item.input_audio_transcription"
        await connection.send('{"type": "session.created"}')
        async for message in connection:
            received.append(json.loads(message))
            if received[-1]["type"] == "session.update":
                await connection.send('{"type": "session.updated"}')
            if received[-1]["type"] == "input_audio_buffer.commit":
                for event in (
                    {"type": f"{transcription}.delta", "item_id": "a", "delta": "one"},
                    {"type": "input_audio_buffer.committed", "item_id": "a"},
                    {"type": f"{transcription}.delta", "item_id": "b", "delta": "two"},
                    {"type": "input_audio_buffer.committed", "item_id": "b"},
                    {"type": "error", "error": {"code": "input_audio_buffer_commit_empty", "message": "empty"}},
                    {"type": f"{transcription}.completed", "item_id": "b", "transcript": "Two."},
                    {"type": f"{transcription}.completed", "item_id": "a", "transcript": "One."},
                ):
                    await connection.send(json.dumps(event))

    updates, (path, update, *_) = scripted("openai-realtime+ws", serve, "?model=m&silence_ms=500")
    assert path == "/v1/realtime?intent=transcription"
    assert update["session"]["audio"]["input"] == {
        "format": {"type": "audio/pcm", "rate": 24000},
        "transcription": {"model": "m"},
        "turn_detection": {"type": "server_vad", "silence_duration_ms": 500},
    }
    assert [update for update in updates if update.final] == [Update("b", "Two.", True), Update("a", "One.", True)]
    assert text_of(updates) == "One. Two."


def test_errors_of_realtime_sessions() -> None:
    """An error is raised after the answer to the client's commit, too."""

    async def serve(connection: Any, received: list[Any]) -> None:
        await connection.send('{"type": "session.created"}')
        await connection.send('{"type": "session.updated"}')
        async for message in connection:
            if json.loads(message)["type"] == "input_audio_buffer.commit":
                await connection.send('{"type": "input_audio_buffer.committed", "item_id": "a"}')
                await connection.send(
                    '{"type": "error", "error": {"code": "server_error", "message": "out of memory"}}'
                )

    with pytest.raises(StreamError, match="out of memory"):
        scripted("openai-realtime+ws", serve)


@pytest.mark.parametrize("scheme", ["nemostream+ws", "sherpa+ws"])
@pytest.mark.parametrize("code", [1000, 1011])
def test_a_lost_connection_is_a_disconnect(scheme: str, code: int) -> None:
    async def serve(connection: Any, received: list[Any]) -> None:
        await connection.send('{"type": "ready"}' if scheme == "nemostream+ws" else '{"text": ""}')
        await connection.recv()
        await connection.close(code)

    with pytest.raises(ConnectionError):
        scripted(scheme, serve, audio=b"\0\0" * 100)


def test_a_call_of_a_stopped_server_is_a_disconnect() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for target in (f"riva://{address}", f"openai+http://{address}"):
        with pytest.raises(ConnectionError):
            asyncio.run(exchange(create_target(target), b"\0\0" * 100))


# -- names of targets --------------------------------------------------------------------------------------------------


def test_a_class_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the documentation: a class in the current folder."""
    (tmp_path / "echo_target.py").write_text(
        "import contextlib\n"
        "from nemostream.benchmarks.harness.targets import Update\n"
        "class Echo:\n"
        "    sample_rate = 8000\n"
        "    def __init__(self, address): self.address, self.size = address, 0\n"
        "    @contextlib.asynccontextmanager\n"
        "    async def connect(self): yield self\n"
        "    async def send(self, pcm): self.size += len(pcm)\n"
        "    async def finish(self): pass\n"
        "    async def updates(self): yield Update(0, f'{self.address} {self.size}', True)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    target = create_target("echo_target:Echo@tcp://host:1")
    assert target.sample_rate == 8000
    ((utterance, text, final),) = asyncio.run(exchange(target, b""))
    assert (utterance, text.split()[0], final) == (0, "tcp://host:1", True)
    assert create_target("echo_target:Echo").address == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://host:1", "'http://host:1' is unknown: it must begin with one of nemostream"),
        ("nemostream+ws://", "no host"),
        ("host:8000", "cannot be loaded: No module named 'host'"),
        ("json:Nothing", "cannot be loaded"),
        ("sherpa+ws://host:1?x=2", "unknown option 'x'"),
        ("vllm+ws://host:1", "needs the name of its model"),
        ("openai-realtime+ws://host:1?rate=fast", "rate of target .* is 'fast'"),
    ],
)
def test_invalid_targets(target: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        create_target(target)


def test_encrypted_targets() -> None:
    assert create_target("sherpa+wss://host:1").url == "wss://host:1"  # type: ignore[attr-defined]
    target: Any = create_target("nemostream+wss://host:1/proxy/v1/stream?chunk_ms=80")
    assert target.url == "wss://host:1/proxy/v1/stream?chunk_ms=80"
    target = create_target("openai+https://host/openai/v1?model=m&temperature=0")
    assert target.url == "https://host/openai/v1/audio/transcriptions"
    assert target.fields == {"model": "m", "stream": "true", "temperature": "0"}


# -- sherpa-onnx -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sherpa_export(demo_bundle: Bundle, shared_folder: Any) -> Path:
    """The demo model as NeMo exports it for sherpa-onnx."""
    nemo = pytest.importorskip("nemostream.benchmarks.harness.nemo")
    pytest.importorskip("nemo", reason="needs the nemo extra")
    checkpoint = Path(__file__).parents[3] / "examples" / "demo_model" / "demo.nemo"

    def make(folder: Path) -> None:
        chunk = demo_bundle.manifest.chunk(560)
        nemo.export_nemo(nemo.load_nemo(checkpoint), demo_bundle.manifest, chunk, folder / "export")

    return Path(shared_folder("sherpa-demo-560", make)) / "export"


@pytest.mark.slow
@pytest.mark.nemo
def test_server_of_sherpa(sherpa_export: Path, tmp_path: Path) -> None:
    """The C++ server: the texts are those of its own recogniser in this process."""
    sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="needs the bench extra")
    program = Path(sys.executable).with_name("sherpa-onnx-online-websocket-server")
    if not program.exists():
        pytest.skip("needs the package sherpa-onnx-bin")
    files = {name: str(sherpa_export / f"{name}.onnx") for name in ("encoder", "decoder", "joiner")}
    tokens = str(sherpa_export / "tokens.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [f"--port={port}", f"--tokens={tokens}", f"--log-file={tmp_path / 'log'}"]
    arguments += [f"--{name}={file}" for name, file in files.items()]
    process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert time.monotonic() < deadline and process.poll() is None
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        updates = asyncio.run(exchange(create_target(f"sherpa+ws://127.0.0.1:{port}"), pcm()))
    finally:
        process.terminate()
        process.wait(30)
    recogniser = sherpa_onnx.OnlineRecognizer.from_transducer(tokens=tokens, **files, num_threads=1)
    stream = recogniser.create_stream()
    samples = np.frombuffer(pcm(), "<i2").astype(np.float32) / 32768
    stream.accept_waveform(16000, np.concatenate([samples, np.zeros(12800, np.float32)]))  # the server pads 0.8 s
    stream.input_finished()
    while recogniser.is_ready(stream):
        recogniser.decode_stream(stream)
    assert text_of(updates) == recogniser.get_result(stream).strip() != ""
    assert updates[-1].final and any(not update.final for update in updates)
