"""Clients that try to crash, exhaust or bypass the server. Each test fails if its protection is removed."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import random
import resource
import signal
import socket as sockets
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
import pytest
import soundfile
from riva.client.proto import riva_asr_pb2 as messages
from riva.client.proto import riva_asr_pb2_grpc as calls
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from nemostream.errors import AudioError, OptionError
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.serving.network import connections
from nemostream.serving.network.access import key_number
from nemostream.serving.settings import read_settings
from nemostream.serving.uploads import decoder_process, decoding
from nemostream.serving.uploads.decoding import DecoderPool

EDGE = "AaB03x"


def form(data: bytes, name: str = "a.wav", **fields: str) -> bytes:
    """Return the body of an upload."""
    parts = [
        f'--{EDGE}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()
    ]
    head = "".join(parts) + f'--{EDGE}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    return head.encode() + data + f"\r\n--{EDGE}--\r\n".encode()


def upload_head(size: int, host: str = "localhost") -> bytes:
    return (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n"
        f"Content-Type: multipart/form-data; boundary={EDGE}\r\n\r\n"
    ).encode()


def bare(running: Any) -> sockets.socket:
    client = sockets.create_connection(("127.0.0.1", running.http))
    client.settimeout(30)
    return client


def read_response(client: sockets.socket) -> bytes:
    """Return all data until the server closes the connection, or one complete response."""
    data = b""
    with suppress(OSError):
        while received := client.recv(65536):
            data += received
            head, _, body = data.partition(b"\r\n\r\n")
            sizes = [line[16:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")]
            if sizes and len(body) >= int(sizes[0]):
                break
    return data


def slow_flac(seconds: int = 1) -> bytes:
    """Return a file that libsndfile decodes slowly: eight channels of noise at the highest rate of FLAC."""
    noise = np.random.default_rng(0).integers(-(2**23), 2**23, (655350 * seconds, 8)).astype(np.int32) << 8
    file = io.BytesIO()
    soundfile.write(file, noise, 655350, format="FLAC", subtype="PCM_24")
    return file.getvalue()


def quiet_flac(hours: float) -> bytes:
    """Return a long recording of silence as a small file."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 4000, 1, format="FLAC") as out:
        for _ in range(int(hours * 360)):
            out.write(np.zeros(40000, np.int16))
    return file.getvalue()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)


def memory(running: Any) -> float:
    """Return the resident memory of the server's process in MiB."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


# -- native code -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clients_that_disconnect_while_a_file_is_decoded(serve_process: Any, spoken: Any) -> None:
    """SSE uploads and gRPC calls are cancelled at random times; the process survives and serves further requests."""
    data, chance = slow_flac(), random.Random(0)
    body = form(data, "a.flac", stream="true")
    small = form(spoken[0].path.read_bytes(), "a.flac", stream="true")
    with serve_process("--no-measure", PYTHONFAULTHANDLER="1") as running:
        channel = grpc.insecure_channel(running.address, options=[("grpc.max_send_message_length", -1)])
        stub = calls.RivaSpeechRecognitionStub(channel)
        for turn in range(120):
            sent = small if turn % 2 else body
            with suppress(OSError), bare(running) as client:
                client.sendall(upload_head(len(sent)) + sent)
                client.recv(100)
                time.sleep(0.1 * chance.random())
            if turn % 8 == 0:
                call = stub.Recognize.future(messages.RecognizeRequest(audio=data[: 8 << 20]))
                time.sleep(0.2 * chance.random())
                call.cancel()
            assert running.process.poll() is None, running.log[-20:]
        wait_until(lambda: json.loads(running.get("/readyz")[1])["uploads"] == 0)
        with bare(running) as client:
            whole = form(spoken[0].path.read_bytes(), "a.flac", response_format="text")
            client.sendall(upload_head(len(whole)) + whole)
            assert spoken[0].text.encode() in read_response(client)


def test_cancelling_listen_does_not_crash_the_process(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(slow_flac())
    code = """
import asyncio, random, sys, nemostream
async def main():
    chance, cancelled = random.Random(0), 0
    with nemostream.load() as model:
        async def listen():
            async for event in model.listen(sys.argv[1]): pass
        for _ in range(60):
            task = asyncio.create_task(listen())
            await asyncio.sleep(0.1 * chance.random())
            task.cancel()
            try: await task
            except asyncio.CancelledError: cancelled += 1
    print(cancelled)
asyncio.run(main())
"""
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, str(tmp_path / "a.flac")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) >= 30


@pytest.fixture
def pool() -> Iterator[Callable[..., Any]]:
    """Return a function that runs a coroutine function with a new pool of decoders in a new event loop."""

    def run(work: Callable[[DecoderPool], Any], max_seconds: float = 7200) -> Any:
        async def main() -> Any:
            decoders = DecoderPool(16000, max_seconds)
            try:
                return await work(decoders)
            finally:
                decoders.close()

        return asyncio.run(main())

    yield run


async def samples(decoders: DecoderPool, path: Path) -> Any:
    with path.open("rb") as file:
        async with decoders.decode(file.fileno(), path.name) as recording:
            decoded = [block async for block in recording]
            return np.concatenate(decoded), recording.seconds


@pytest.mark.parametrize("rate, channels", [(16000, 1), (44100, 2), (8000, 1)])
def test_a_decoder_process_gives_the_same_samples_as_the_library(
    pool: Any, tmp_path: Path, rate: int, channels: int
) -> None:
    from nemostream.runtime.audio.files import AudioFile
    from nemostream.runtime.audio.preprocessor import AudioPreprocessor

    noise = np.random.default_rng(1).uniform(-0.5, 0.5, (rate * 9, channels)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", noise, rate)
    decoded, seconds = pool(lambda decoders: samples(decoders, tmp_path / "a.flac"))
    preprocessor = AudioPreprocessor(rate, channels, 16000)
    with AudioFile(tmp_path / "a.flac") as recording:
        wanted = [block for part in recording.blocks() for block in preprocessor.push(part)]
    np.testing.assert_array_equal(decoded, np.concatenate([*wanted, preprocessor.finish()]))
    assert seconds == 9.0


def test_a_crashed_decoder_process_fails_only_its_own_recording(pool: Any, tmp_path: Path, spoken: Any) -> None:
    (tmp_path / "a.flac").write_bytes(slow_flac(3))

    async def work(decoders: DecoderPool) -> Any:
        with (tmp_path / "a.flac").open("rb") as file:
            with pytest.raises(AudioError, match="decoder process ended"):
                async with decoders.decode(file.fileno(), "a.flac") as recording:
                    async for _ in recording:
                        assert recording._process is not None
                        recording._process._process.send_signal(signal.SIGSEGV)
            other = await samples(decoders, spoken[0].path)
        return other

    decoded, seconds = pool(work)
    assert seconds == pytest.approx(spoken[0].seconds) and len(decoded) == len(spoken[0].pcm) // 2


def test_an_abandoned_recording_returns_its_process_to_the_pool(pool: Any, tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(slow_flac(3))

    async def work(decoders: DecoderPool) -> Any:
        pids = set()
        for _ in range(3):
            with (tmp_path / "a.flac").open("rb") as file:
                async with decoders.decode(file.fileno(), "a.flac") as recording:
                    async for _ in recording:
                        break
                    pids.add(recording._process._process.pid)  # type: ignore[union-attr]
            await asyncio.gather(*decoders._tasks)
        return pids

    assert len(pool(work)) == 1


def test_decoding_has_time_and_duration_limits(pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.flac").write_bytes(quiet_flac(0.5))
    with pytest.raises(AudioError, match="may last 60 s"):
        pool(lambda decoders: samples(decoders, tmp_path / "long.flac"), max_seconds=60)
    # A file whose header has no duration, or a wrong one, is stopped during decoding.
    ogg = io.BytesIO()
    soundfile.write(ogg, np.zeros(16000 * 90, np.int16), 16000, format="OGG")
    (tmp_path / "long.ogg").write_bytes(ogg.getvalue())
    with pytest.raises(AudioError, match="may last 60 s"):
        pool(lambda decoders: samples(decoders, tmp_path / "long.ogg"), max_seconds=60)

    async def stalled(decoders: DecoderPool) -> Any:
        await samples(decoders, tmp_path / "long.ogg")  # starts a process
        os.kill(decoders._idle[0]._process.pid, signal.SIGSTOP)
        return await samples(decoders, tmp_path / "long.ogg")

    monkeypatch.setattr(decoding, "BLOCK_SECONDS", 0.5)
    with pytest.raises(AudioError, match="to decode"):
        pool(stalled)


def limited(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process with the limits of a decoder."""
    head = "import signal, numpy as np\nfrom nemostream.serving.uploads import decoder_process as d\nd._set_limits()\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60)


def test_a_decoder_process_has_the_documented_limits(tmp_path: Path) -> None:
    too_much = limited(f"np.ones(({decoder_process.MAX_MEMORY} + (64 << 20)) // 8)")
    assert too_much.returncode == 1 and "MemoryError" in too_much.stderr
    assert limited(f"np.ones({decoder_process.MAX_MEMORY} // 16)").returncode == 0
    written = limited(f"open({str(tmp_path / 'file')!r}, 'wb', 0).write(b'x')")
    assert "File too large" in written.stderr
    busy = limited("signal.setitimer(signal.ITIMER_PROF, 0.2)\nwhile True: pass")
    assert busy.returncode == -signal.SIGPROF


@pytest.mark.parametrize("kind", ["IRCAM", "NIST", "VOC", "SVX", "MAT5", "PAF", "AVR", "HTK", "MPC2K"])
def test_formats_beyond_the_documented_ones_are_rejected(pool: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.wav"  # the file name is ignored
    with path.open("wb") as file:
        soundfile.write(file, np.zeros(16000, np.int16), 16000, format=kind, subtype="PCM_16")
    with pytest.raises(AudioError, match=r"WAV, FLAC"):
        pool(lambda decoders: samples(decoders, path))


def test_decoders_do_not_inherit_secrets(serve_process: Any, spoken: Any) -> None:
    with serve_process("--no-measure", NEMOSTREAM_API_KEYS="hidden-key", SECRET="hidden-too") as running:
        body = form(spoken[0].path.read_bytes(), "a.flac")
        with bare(running) as client:
            client.sendall(upload_head(len(body)).replace(b"\r\n\r\n", b"\r\nX-Api-Key: hidden-key\r\n\r\n") + body)
            assert b" 200 " in read_response(client)
        processes = [Path(f"/proc/{running.process.pid}")]
        for process in processes:  # grows: descendants too
            children = [pid for task in process.glob("task/*/children") for pid in task.read_text().split()]
            processes += [Path(f"/proc/{pid}") for pid in children]
        decoders = [path for path in processes if b"decoder_process" in (path / "cmdline").read_bytes()]
        assert decoders
        assert all(b"hidden" not in (path / "environ").read_bytes() for path in decoders)


# -- HTTP and WebSocket connections ------------------------------------------------------------------------------------


def test_the_size_of_a_request_head_is_limited(serve_process: Any) -> None:
    lines = b"".join(b"x%d: %s\r\n" % (number, b"a" * 40) for number in range(50_000))
    floods = {
        "headers": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + lines,
        "url": b"GET /?" + b"a" * (4 << 20),
        "header": b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * (4 << 20),
        "small headers": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 2000 + b"\r\n",
    }
    with serve_process("--no-measure") as running:
        before = memory(running)
        for name, flood in floods.items():
            with bare(running) as client, pytest.raises(OSError):  # closed while the client sends
                for _ in range(64):
                    client.sendall(flood)
                    time.sleep(0.02)
                pytest.fail(name)
        assert memory(running) < before + 32
        with bare(running) as client:  # a head just below the limit is accepted
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 60_000 + b"\r\n\r\n")
            assert b" 200 " in read_response(client)


def test_every_request_of_a_connection_has_a_deadline(serve_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    with serve_here(measure=False, body_seconds=2, idle_seconds=20) as running:
        held = {}
        for kind in ("first", "second", "body", "drip", "upgrade"):
            client = held[kind] = bare(running)
            if kind == "first":
                client.sendall(b"GET /healthz HTTP/1.1\r\nHo")
            elif kind == "second":
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b" 200 " in read_response(client)
                client.sendall(b"G")
            elif kind == "body":  # the response does not wait for the body
                client.sendall(
                    b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
                )
            elif kind == "drip":
                client.sendall(upload_head(1000) + b"--")
            else:
                client.sendall(
                    b"POST /v1/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
                )
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.2):
                for kind in ("drip", "body"):
                    with suppress(OSError):
                        held[kind].sendall(b"1\r\na\r\n" if kind == "body" else b"-")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            for client in held.values():
                client.settimeout(15)
                with suppress(ConnectionError):
                    while client.recv(65536):
                        pass  # a TimeoutError here means that the connection is still open
                client.close()
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("idle", [b"", b"GET /healthz HTTP/1.1\r\nHost:"])
def test_health_is_served_despite_many_connections(serve_process: Any, idle: bytes) -> None:
    with serve_process("--no-measure") as running, ExitStack() as held:
        resource.prlimit(
            running.process.pid, resource.RLIMIT_NOFILE
        )  # raises if the process does not belong to this user
        for _ in range(2000):
            with suppress(OSError):
                client = held.enter_context(bare(running))
                client.sendall(idle)
        assert running.get("/healthz")[0] == 200


def test_connections_are_limited_by_available_file_descriptors(tmp_path: Path) -> None:
    code = (
        "from nemostream.serving.network.connections import available_connections; print(available_connections(1024))"
    )
    limits = (128, 128)
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
    )
    assert 8 <= int(run.stdout) <= 70
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert 0 <= hard < 4096 or int(here.stdout) == 1024  # the soft limit is raised


def test_connections_per_address_are_limited(serve_here: Any) -> None:
    with serve_here(measure=False, max_connections=12, max_connections_per_client=6) as running, ExitStack() as open_:
        for _ in range(6):
            socket = open_.enter_context(connect(f"{running.socket}/v1/stream"))
            assert json.loads(socket.recv())["type"] == "ready"
        with bare(running) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 503 " in read_response(client)
        open_.close()
        wait_until(lambda: not running.service.sessions)
        assert running.get("/healthz")[0] == 200


UPGRADES = [
    {"protocol": "\xe9"},
    {"method": "POST"},
    {"version": "12"},
    {"key": "x"},
    {"key": ""},
    {"extra": "X-A: \xff\xfe\r\n"},
    {"extra": "Content-Length: 5\r\n"},
    {"extra": "Transfer-Encoding: chunked\r\n"},
    {"target": "/v1/stream?%ff=\x01"},
]


@pytest.mark.parametrize("change", UPGRADES, ids=[json.dumps(change) for change in UPGRADES])
def test_malformed_upgrades_leak_no_streams(serve_process: Any, change: dict[str, str]) -> None:
    head = (
        f"{change.get('method', 'GET')} {change.get('target', '/v1/stream')} HTTP/1.1\r\nHost: localhost\r\n"
        f"Sec-WebSocket-Protocol: {change.get('protocol', 'nemostream')}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\n{change.get('extra', '')}Sec-WebSocket-Key: "
        f"{change.get('key', 'AAAAAAAAAAAAAAAAAAAAAA==')}\r\n"
        f"Sec-WebSocket-Version: {change.get('version', '13')}\r\n\r\n"
    ).encode("latin-1")
    with serve_process("--no-measure") as running:
        for _ in range(20):
            with bare(running) as client:
                client.sendall(head)
                response = read_response(client)
                assert response.startswith(b"HTTP/1.1 4") or response == b"", response
        wait_until(lambda: json.loads(running.get("/readyz")[1])["streams"] == 0)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
    assert not [line for line in running.log if "Traceback" in json.dumps(line)]


# -- messages ----------------------------------------------------------------------------------------------------------


def frame(kind: int, data: bytes, final: bool = True) -> bytes:
    """Return a masked WebSocket frame."""
    size = len(data)
    head = bytes([(0x80 if final else 0) | kind])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + struct.pack(">H", size)
    else:
        head += bytes([0x80 | 127]) + struct.pack(">Q", size)
    return head + bytes(4) + data


def upgraded(running: Any, path: str = "/v1/stream") -> sockets.socket:
    """Open a WebSocket and leave the server's first message unread: closing the socket then resets the connection."""
    client = bare(running)
    client.sendall(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        byte = client.recv(1)
        assert byte, data
        data += byte
    assert b" 101 " in data, data
    return client


def session_update(number: int) -> bytes:
    detection = {"type": "server_vad", "silence_duration_ms": 500 + number % 2}
    session = {"audio": {"input": {"turn_detection": detection}}}
    return json.dumps({"type": "session.update", "session": session}).encode()


FLOODS = {
    "keepalive": ("/v1/stream", frame(1, b'{"type":"keepalive"}') * 2000),
    "configure": ("/v1/stream", frame(1, b'{"type":"configure","chunk_ms":80}') * 2000),
    "commit": ("/v1/stream", frame(1, b'{"type":"commit"}') * 500),
    "sample and commit": ("/v1/stream", (frame(2, b"ab") + frame(1, b'{"type":"commit"}')) * 200),
    "large JSON": ("/v1/stream", frame(1, b'{"type":"keepalive","x":[' + b"{}," * 349_000 + b"{}]}")),
    "ping": ("/v1/stream", frame(9, b"p" * 125) * 500),
    "pong": ("/v1/stream", frame(10, b"") * 5000),
    "empty fragments": ("/v1/stream", frame(2, b"", False) + frame(0, b"", False) * 20_000),
    "minutes of audio": ("/v1/stream?encoding=mulaw&sample_rate=4000", frame(2, bytes(range(256)) * 4096)),
    "wide audio": ("/v1/stream?encoding=mulaw&sample_rate=768000&channels=64", frame(2, bytes(range(256)) * 4096)),
    "session.update": ("/v1/realtime", b"".join(frame(1, session_update(number)) for number in range(200))),
    "realtime append": (
        "/v1/realtime",
        frame(1, b'{"type":"input_audio_buffer.append","audio":"' + b"A" * (15 << 20) + b'?"}'),
    ),
    "realtime JSON": ("/v1/realtime", frame(1, b'{"type":"session.update","x":[' + b"{}," * 300_000 + b"{}]}")),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_does_not_block_the_event_loop(serve_here: Any, name: str) -> None:
    """During a flood, no iteration of the event loop takes 50 ms of CPU time, independent of the machine's load."""
    path, flood = FLOODS[name]
    with serve_here(measure=False, drain_seconds=0) as running:
        longest, stop = [0.0], threading.Event()

        async def watch() -> None:
            while not stop.is_set():
                before = time.thread_time()
                await asyncio.sleep(0.001)
                longest[0] = max(longest[0], time.thread_time() - before)

        client = upgraded(running, path)
        gc.collect()
        gc.freeze()  # as `nemostream serve` does: garbage collection must not scan the test's own objects
        watching = asyncio.run_coroutine_threadsafe(watch(), running.loop)
        reader = threading.Thread(target=lambda: read_response(client), daemon=True)
        reader.start()
        client.settimeout(0.5)
        end = time.monotonic() + 2
        with suppress(OSError):
            while time.monotonic() < end:
                left = memoryview(flood)
                while len(left) and time.monotonic() < end:
                    with suppress(TimeoutError):
                        left = left[client.send(left) :]
        stop.set()
        watching.result(20)
        gc.unfreeze()
        client.close()
        assert longest[0] < 0.05, f"{1000 * longest[0]:.0f} ms"


def test_unread_pongs_do_not_fill_memory(serve_here: Any) -> None:
    with serve_here(measure=False) as running:
        client = upgraded(running)
        client.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        with pytest.raises(OSError):
            for _ in range(2000):
                client.sendall(frame(9, b"p" * 125) * 500)
        wait_until(lambda: not running.service.sessions)


def test_phrases_are_checked_before_they_are_tokenised(demo_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemostream.runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(demo_bundle.path / "tokenizer.model", demo_bundle.manifest.decoder.vocabulary)
    encoded: list[str] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    for phrases in (
        ["a" * 20_000_000],
        [f"p{number}" for number in range(200_000)],
        [["x"] * 100_000],
        {"a": "x" * 10**6},
    ):
        with pytest.raises(OptionError) as error:
            Boosting.from_phrases(phrases, tokenizer)  # type: ignore[arg-type]
        assert len(str(error.value)) < 400
    assert not encoded


def test_phrases_are_compiled_off_the_event_loop(serve_here: Any) -> None:
    """Phrases are compiled on another thread, so that other clients are not delayed."""
    with serve_here(measure=False) as running:
        threads: set[int] = set()
        compile_phrases = running.service.model.compile_phrases

        def recording_compile(phrases: Any) -> Any:
            threads.add(threading.get_ident())
            return compile_phrases(phrases)

        running.service.model.compile_phrases = recording_compile
        with connect(running.socket + "/v1/stream?phrases=" + quote('["after the tone"]')) as socket:
            assert json.loads(socket.recv())["type"] == "ready"
        config = messages.RecognitionConfig(speech_contexts=[messages.SpeechContext(phrases=["tone"])])
        with grpc.insecure_channel(running.address) as channel:
            stub = calls.RivaSpeechRecognitionStub(channel)
            stub.Recognize(messages.RecognizeRequest(config=config, audio=bytes(3200)))
        assert len(threads) >= 1 and running.thread not in threads


# -- uploads -----------------------------------------------------------------------------------------------------------


def test_upload_slots_are_acquired_before_the_body_is_read(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_uploads=2, max_streams=1) as running, ExitStack() as held:
        for _ in range(2):
            client = held.enter_context(bare(running))
            client.sendall(upload_head(1000) + b"--")
        wait_until(lambda: running.service.uploads.count == 2)
        with bare(running) as client:
            client.sendall(upload_head(200 << 20))  # without any of the body
            assert b" 429 " in read_response(client)
        with connect(f"{running.socket}/v1/stream") as socket:  # live streams have their own limit
            assert json.loads(socket.recv())["type"] == "ready"
        held.close()
        wait_until(lambda: running.service.uploads.count == 0)


def test_total_upload_bytes_are_limited(serve_here: Any) -> None:
    with serve_here(measure=False, max_upload_total_bytes=1 << 20) as running, bare(running) as first:
        first.sendall(upload_head(900_000) + b"--")
        wait_until(lambda: running.service.uploads.count == 1)
        with bare(running) as second:
            second.sendall(upload_head(200_000))
            assert b" 429 " in read_response(second)


def test_the_duration_of_an_upload_is_limited(serve_here: Any) -> None:
    body = form(quiet_flac(1), "a.flac")
    with serve_here(measure=False, max_upload_seconds=600) as running, bare(running) as client:
        client.sendall(upload_head(len(body)) + body)
        response = read_response(client)
        assert b" 400 " in response and b"may last 600 s" in response
        assert running.metric("nemostream_audio_seconds_total") == 0


def test_an_upload_has_one_file_and_a_limited_number_of_fields(serve_here: Any, spoken: Any) -> None:
    clip = spoken[0].path.read_bytes()
    twice = form(clip)[: -len(f"--{EDGE}--\r\n")] + form(clip)
    many = form(clip, **{f"field{number}": "x" for number in range(100)})
    with serve_here(measure=False) as running:
        for body in (twice, many, form(clip, prompt="x" * 200_000)):
            with bare(running) as client:
                client.sendall(upload_head(len(body)) + body)
                assert b" 400 " in read_response(client)
        wait_until(lambda: running.service.uploads.count == 0)


def test_uploads_wait_while_live_streams_are_delayed(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False) as running:
        running.service.update_load = lambda latency: None
        body = form(spoken[0].path.read_bytes(), "a.flac", response_format="text")
        with connect(f"{running.socket}/v1/stream") as live:
            live.recv()
            running.service.load.history.append(2.0)
            with bare(running) as client:
                client.sendall(upload_head(len(body)) + body)
                wait_until(lambda: len(running.service.sessions) == 2)
                client.settimeout(1)
                with pytest.raises(TimeoutError):
                    client.recv(100)
                running.service.load.history.clear()
                client.settimeout(30)
                assert spoken[0].text.encode() in read_response(client)
            live.send(json.dumps({"type": "finish"}))


# -- gRPC --------------------------------------------------------------------------------------------------------------


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code()


def test_no_grpc_message_is_read_without_a_key(serve_process: Any) -> None:
    with serve_process("--no-measure", "--api-keys", "right") as running:
        before = memory(running)
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(running.address, options=options) as channel:
            stub = calls.RivaSpeechRecognitionStub(channel)
            large = messages.RecognizeRequest(audio=bytes(100 << 20))
            peak, done = [before], threading.Event()

            def watch() -> None:
                while not done.wait(0.02):
                    peak[0] = max(peak[0], memory(running))

            watching = threading.Thread(target=watch)
            watching.start()
            for kind in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
                code = code_of(lambda kind=kind: stub.Recognize(large, compression=kind))
                assert code is grpc.StatusCode.UNAUTHENTICATED
            done.set()
            watching.join()
            assert peak[0] < before + 64
            # With a key, the message is too large.
            metadata = [("authorization", "Bearer right")]
            assert code_of(lambda: stub.Recognize(large, metadata=metadata)) is grpc.StatusCode.RESOURCE_EXHAUSTED

            def silent() -> Iterator[Any]:
                threading.Event().wait(20)
                yield from ()

            call = stub.StreamingRecognize(silent())
            assert code_of(lambda: next(call)) is grpc.StatusCode.UNAUTHENTICATED


def test_the_first_grpc_message_has_a_deadline(serve_here: Any) -> None:
    with serve_here(measure=False, idle_seconds=1) as running, grpc.insecure_channel(running.address) as channel:
        stop = threading.Event()

        def silent() -> Iterator[Any]:
            stop.wait(20)
            yield from ()

        call = calls.RivaSpeechRecognitionStub(channel).StreamingRecognize(silent())
        assert code_of(lambda: next(call)) is grpc.StatusCode.DEADLINE_EXCEEDED
        stop.set()


def test_grpc_recordings_need_upload_slots(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_uploads=1) as running, ExitStack() as held:
        client = held.enter_context(bare(running))
        client.sendall(upload_head(1000) + b"--")
        wait_until(lambda: running.service.uploads.count == 1)
        with grpc.insecure_channel(running.address) as channel:
            stub = calls.RivaSpeechRecognitionStub(channel)
            request = messages.RecognizeRequest(audio=spoken[0].pcm)
            assert code_of(lambda: stub.Recognize(request)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            held.close()
            wait_until(lambda: running.service.uploads.count == 0)
            assert stub.Recognize(request).results[0].alternatives[0].transcript.strip()


# -- access ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/sample.flac", "/metrics", "/v1/models", "/v1/audio/transcriptions"])
def test_an_unknown_host_is_denied(serve_here: Any, path: str) -> None:
    with serve_here(measure=False, hosts=["asr.example"]) as running:
        for host, denied in (("rebound.example", True), ("asr.example", False), (f"localhost:{running.http}", False)):
            assert (running.get(path, Host=host)[0] == 403) is denied, host
        with bare(running) as client:
            client.sendall(
                b"GET /v1/stream HTTP/1.1\r\nHost: rebound.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            assert b" 403 " in read_response(client)
        assert running.metric("nemostream_requests_denied_total") == 2


@pytest.mark.parametrize("value", ["", ",", "a,,b", " ", "a, "])
def test_empty_keys_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with pytest.raises(OptionError, match="key is empty"):
        read_settings(["--api-keys", value])
    file = tmp_path / "serve.toml"
    for text in (f'api_keys = "{value}"', f"api_keys = {json.dumps(value.split(','))}", "api_keys = []"):
        file.write_text(text)
        with pytest.raises(OptionError, match="key is empty"):
            read_settings(["--config", str(file)])
    monkeypatch.setenv("NEMOSTREAM_API_KEYS", value)
    with pytest.raises(OptionError, match="key is empty"):
        read_settings([])


def test_non_ascii_keys(serve_here: Any) -> None:
    with serve_here(measure=False, api_keys=["schlüssel-ключ"]) as running:
        key = "schlüssel-ключ".encode()
        for sent, status in ((key, b" 200 "), (key[:-1], b" 401 ")):
            with bare(running) as client:
                client.sendall(
                    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + sent + b"\r\n\r\n"
                )
                assert status in read_response(client)
        with grpc.insecure_channel(running.address) as channel:
            stub = calls.RivaSpeechRecognitionStub(channel)
            request = messages.RivaSpeechRecognitionConfigRequest()
            stub.GetRivaSpeechRecognitionConfig(request, metadata=[("authorization-bin", b"Bearer " + key)])
    assert key_number("\u20ac", [b"x"]) is None


def test_streams_per_client_are_limited(serve_here: Any) -> None:
    with serve_here(measure=False, max_streams_per_client=1, api_keys=["one", "two"]) as running:

        def open_with(key: str) -> Any:
            return connect(f"{running.socket}/v1/stream", additional_headers={"Authorization": f"Bearer {key}"})

        with open_with("one") as first, open_with("two"):
            with pytest.raises(InvalidStatus) as rejected:
                open_with("one")
            assert rejected.value.response.status_code == 429
            first.send(json.dumps({"type": "finish"}))
            with suppress(ConnectionClosed):
                while True:
                    first.recv()
            wait_until(lambda: len(running.service.sessions) == 1)
            with open_with("one"):
                pass


def test_denied_requests_are_logged_with_the_address(serve_process: Any) -> None:
    with serve_process("--no-measure", "--api-keys", "k") as running:
        assert running.get("/v1/models")[0] == 401
        with grpc.insecure_channel(running.address) as channel:
            stub = calls.RivaSpeechRecognitionStub(channel)
            request = messages.RivaSpeechRecognitionConfigRequest()
            assert code_of(lambda: stub.GetRivaSpeechRecognitionConfig(request)) is grpc.StatusCode.UNAUTHENTICATED
        wait_until(lambda: sum(line.get("event") == "request denied" for line in running.log) == 2)
    assert {line["peer"] for line in running.log if line.get("event") == "request denied"} == {"127.0.0.1"}


@pytest.mark.parametrize("end", ["reset", "close"])
def test_the_stream_of_a_disconnected_client_is_freed(serve_here: Any, end: str) -> None:
    """Messages that are still buffered are discarded, because nobody reads their results."""
    with serve_here(measure=False, drain_seconds=0) as running:
        client = upgraded(running)
        client.settimeout(0.5)
        with suppress(TimeoutError):  # until the buffers of both sides are full
            while True:
                client.sendall(frame(1, b'{"type":"keepalive"}') * 1000)
        assert len(running.service.sessions) == 1
        if end == "reset":
            client.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until(lambda: not running.service.sessions)
