"""Misbehaving clients and engines must not affect other clients."""

from __future__ import annotations

import io
import json
import resource
import socket as sockets
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import riva.client
import schemathesis
import soundfile
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import nemostream
from nemostream.errors import CapacityError
from nemostream.serving import server
from nemostream.serving.client import Client
from nemostream.serving.network import connections

HALF = 2 * 16000 * 2


def open_stream(running: Any, query: str = "") -> ClientConnection:
    # No pings: on a busy machine, the pong waits behind the audio for longer than their timeout.
    socket = connect(f"{running.socket}/v1/stream?{query}", ping_interval=None)
    assert json.loads(socket.recv())["type"] == "ready"
    return socket


def finish(socket: ClientConnection) -> str:
    """Finish a stream and return its text."""
    socket.send(json.dumps({"type": "finish"}))
    *_, last = (json.loads(event) for event in socket)
    assert last["type"] == "done", last
    return str(last["text"])


def transcribe(running: Any, pcm: bytes) -> str:
    """Return the text of `pcm`, sent as a new stream."""
    socket = open_stream(running)
    socket.send(pcm)
    return finish(socket)


def last_event(socket: ClientConnection) -> dict[str, Any]:
    """Return the last event before the connection is closed."""
    event: dict[str, Any] = {}
    with suppress(ConnectionClosed):
        while True:
            event = json.loads(socket.recv(timeout=20))
    return event


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


def free_slots(running: Any) -> int:
    return len(running.service.model._scheduler._free)


def all_slots(running: Any) -> int:
    return int(running.service.model._scheduler._backend.capacity)


def reset(socket: ClientConnection) -> None:
    """Reset the connection without a closing handshake, as a crashed client does."""
    socket.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.shutdown(sockets.SHUT_RDWR)
    socket.socket.close()


def test_a_crashed_client_frees_its_slot(serve_here: Any, spoken: Any) -> None:
    with serve_here(max_streams=4, measure=False) as running:
        healthy = open_stream(running)
        healthy.send(spoken[0].pcm[:HALF])
        for _ in range(3):
            broken = open_stream(running)
            broken.send(spoken[1].pcm[:HALF])
            reset(broken)
        wait_until(lambda: len(running.service.sessions) == 1 and free_slots(running) == all_slots(running) - 1)
        healthy.send(spoken[0].pcm[HALF:])
        assert finish(healthy) == spoken[0].text
        assert running.metric("nemostream_streams_failed_total") == 3
        wait_until(lambda: free_slots(running) == all_slots(running))


@pytest.mark.slow
def test_many_connections_leak_no_memory_or_slots(serve_here: Any, spoken: Any) -> None:
    with serve_here(max_streams=8, measure=False) as running:

        def open_and_close(times: int) -> None:
            for number in range(times):
                socket = open_stream(running)
                socket.send(spoken[1].pcm[: 32 * number % 30_000])
                if number % 3 == 0:
                    reset(socket)
                elif number % 3 == 1:
                    socket.close()
                else:
                    finish(socket)

        def memory() -> int:
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()

        open_and_close(200)
        before = memory()
        open_and_close(1000)
        growth = memory() - before
        wait_until(lambda: not running.service.sessions and free_slots(running) == all_slots(running))
        assert growth < 30e6, f"{growth / 1e6:.1f} MB"
        assert running.metric("nemostream_streams") == 0
        socket = open_stream(running)
        socket.send(spoken[0].pcm)
        assert finish(socket) == spoken[0].text


def test_idle_timeout_and_maximum_duration(serve_here: Any, spoken: Any) -> None:
    with serve_here(idle_seconds=1, max_seconds=3, measure=False) as running:
        silent = open_stream(running)
        assert last_event(silent)["code"] == "expired" and silent.close_code == 1008
        alive = open_stream(running)
        for _ in range(4):  # keepalive messages prevent the idle timeout
            alive.send(json.dumps({"type": "keepalive"}))
            time.sleep(0.5)
        alive.send(spoken[1].pcm)
        with suppress(ConnectionClosed):
            while True:
                alive.send(json.dumps({"type": "keepalive"}))
                time.sleep(0.2)
        assert "longest allowed" in last_event(alive)["message"]
        assert running.metric("nemostream_timeouts_total") == 2
        wait_until(lambda: free_slots(running) == all_slots(running))


@pytest.mark.parametrize("size", [64_000, 2560])  # longer than a second, and short: received with and without a task
def test_a_client_that_does_not_read_is_disconnected(
    serve_here: Any, spoken: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    listen = server.listen

    def listen_with_small_buffers(settings: Any) -> sockets.socket:
        listening = listen(settings)
        listening.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 4096)  # accepted sockets inherit it
        return listening

    monkeypatch.setattr(server, "listen", listen_with_small_buffers)
    monkeypatch.setattr(connections, "_MAX_UNREAD_BYTES", 1024)
    with serve_here(send_seconds=1, max_streams=4, measure=False) as running:
        healthy = open_stream(running)
        healthy.send(spoken[0].pcm[:HALF])
        # A socket with a small receive buffer, so that the buffers fill up quickly.
        bare = sockets.socket()
        bare.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        bare.connect(("127.0.0.1", running.http))
        bare.sendall(
            b"GET /v1/stream?chunk_ms=80&endpoint_ms=-1 HTTP/1.1\r\n"
            b"Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        audio = spoken[0].pcm[:64_000]  # 25 chunks; the text grows, and with it the events
        parts = [audio[start : start + size] for start in range(0, len(audio), size)]
        frames = [bytes([0x82, 0x80 | 126, *len(part).to_bytes(2, "big"), 0, 0, 0, 0]) + part for part in parts]
        bare.settimeout(60)
        with pytest.raises(ConnectionError):  # the connection is closed, so that it holds no memory
            while True:
                bare.sendall(b"".join(frames))
        wait_until(lambda: running.metric("nemostream_timeouts_total") == 1)
        healthy.send(spoken[0].pcm[HALF:])
        assert finish(healthy) == spoken[0].text


def test_garbage_on_the_ports(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False) as running:
        rng = np.random.default_rng(0)
        for port in (running.http, running.grpc):
            for size in (0, 1, 100, 100_000):
                with sockets.create_connection(("127.0.0.1", port)) as bare, suppress(OSError):
                    bare.sendall(rng.bytes(size))
        assert transcribe(running, spoken[0].pcm) == spoken[0].text


def test_half_open_sockets(serve_here: Any, spoken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that stop sending: before a request, within a request, and within a stream of either protocol."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    with serve_here(measure=False, idle_seconds=1.5, max_uploads=64) as running:
        beginnings = [
            b"",
            b"GET /v1/stream HTTP/1.1\r\nHost:",
            b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n--x\r\n",
        ]
        connections_held = [sockets.create_connection(("127.0.0.1", running.http)) for _ in range(60)]
        for number, bare in enumerate(connections_held):
            bare.sendall(beginnings[number % 3])
        streams = [open_stream(running) for _ in range(5)]
        service = riva.client.ASRService(riva.client.Auth(uri=running.address))
        config = riva.client.StreamingRecognitionConfig(
            config=riva.client.RecognitionConfig(sample_rate_hertz=16000, encoding=riva.client.AudioEncoding.LINEAR_PCM)
        )
        stop = threading.Event()

        def stalled_audio() -> Any:
            yield spoken[0].pcm[:3200]
            stop.wait(20)

        with pytest.raises(grpc.RpcError) as ended:
            list(service.streaming_response_generator(stalled_audio(), config))
        stop.set()
        assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        for stream in streams:
            assert last_event(stream)["code"] == "expired"
        for bare in connections_held:  # closed, with a response if a request was started
            bare.settimeout(20)
            response = b""
            while data := bare.recv(4096):
                response += data
            assert response == b"" or b" 408 " in response, response
        assert transcribe(running, spoken[0].pcm) == spoken[0].text
        wait_until(lambda: free_slots(running) == all_slots(running))


def test_backpressure_on_a_fast_client(serve_here: Any, spoken: Any) -> None:
    """The server buffers the chunks of a single message per stream; further audio stays with the client."""
    with serve_here(measure=False) as running:
        scheduler = running.service.model._scheduler
        backend = scheduler._backend
        submit, queue_lengths = backend.submit, [0]

        def slow_submit(batch: Any) -> Any:
            time.sleep(0.05)
            queue_lengths.append(max(len(stream.items) for stream in list(scheduler._streams.values())))
            return submit(batch)

        backend.submit = slow_submit
        pcm, message = spoken[0].pcm * 40, 32_000  # two minutes, a second at a time
        bare = open_stream(running, "chunk_ms=80&endpoint_ms=-1")
        sent = 0

        def send() -> None:
            nonlocal sent
            for start in range(0, len(pcm), message):
                bare.send(pcm[start : start + message])
                sent += message

        sender = threading.Thread(target=send)
        sender.start()
        wait_until(lambda: len(queue_lengths) > 40)
        assert max(queue_lengths) <= 1 + message / 2 / 1280
        processed = running.metric("nemostream_audio_seconds_total")
        assert processed < len(pcm) / 32_000 / 2  # most of it has not been read
        backend.submit = submit
        sender.join(60)
        assert finish(bare).startswith(spoken[0].text.split()[0]) and sent >= len(pcm)
        assert running.metric("nemostream_audio_seconds_total") == pytest.approx(len(pcm) / 32_000, abs=1e-3)


def test_an_engine_error_ends_only_the_streams_of_its_step(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_streams=8) as running:
        backend = running.service.model._scheduler._backend
        submit = backend.submit
        with ExitStack() as stack:
            small = stack.enter_context(open_stream(running, "chunk_ms=160"))
            large = stack.enter_context(open_stream(running, "chunk_ms=560"))
            small.send(spoken[0].pcm[:HALF])
            large.send(spoken[0].pcm[:HALF])
            wait_until(lambda: running.metric("nemostream_audio_seconds_total") == 2 * HALF / 32000)

            def failing_submit(batch: Any) -> Any:
                if batch.chunk.ms == 160:
                    raise RuntimeError("the step failed")
                return submit(batch)

            backend.submit = failing_submit
            small.send(spoken[0].pcm[HALF:])
            large.send(spoken[0].pcm[HALF:])
            error = last_event(small)
            assert error["code"] == "model" and "the step failed" in error["message"] and small.close_code == 1011
            assert finish(large) == spoken[0].text
        assert running.get("/healthz")[0] == 200
        for _ in range(5):  # repeated failures without a successful step
            with open_stream(running, "chunk_ms=160") as small:
                small.send(spoken[0].pcm[:HALF])
                last_event(small)
        assert running.get("/healthz")[0] == 503 and json.loads(running.get("/readyz")[1])["status"] == "failed"
        backend.submit = submit
        with open_stream(running, "chunk_ms=160") as again:
            again.send(spoken[0].pcm)
            assert finish(again).split()
        assert running.get("/healthz")[0] == 200 and running.get("/readyz")[0] == 200
        wait_until(lambda: free_slots(running) == all_slots(running))


def test_nan_in_one_stream_does_not_affect_others(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_streams=8) as running:
        model = running.service.model
        with ExitStack() as stack:
            healthy = [stack.enter_context(open_stream(running)) for _ in range(3)]
            broken = stack.enter_context(open_stream(running))
            for socket in (*healthy, broken):
                socket.send(spoken[0].pcm[:HALF])
            wait_until(lambda: running.metric("nemostream_audio_seconds_total") == 4 * HALF / 32000)
            (session,) = [s for s in running.service.sessions if s is newest(running)]
            model._scheduler._backend._state.v[:, session._stream.session._stream.slot] = np.nan
            for socket in (*healthy, broken):
                socket.send(spoken[0].pcm[HALF:])
            assert "not finite" in last_event(broken)["message"]
            assert [finish(socket) for socket in healthy] == [spoken[0].text] * 3
        for _ in range(all_slots(running)):  # the slot has been reset for the next stream
            socket = open_stream(running)
            socket.send(spoken[0].pcm)
            assert finish(socket) == spoken[0].text


def newest(running: Any) -> Any:
    return max(running.service.sessions, key=lambda session: session._opened_at)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_the_byte_rate_is_limited_without_loss(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_bytes_per_second=64_000) as running:
        socket, start_time = open_stream(running), time.monotonic()
        for start in range(0, len(spoken[0].pcm), 3200):
            socket.send(spoken[0].pcm[start : start + 3200])
        assert finish(socket) == spoken[0].text
        # The first two seconds' worth of bytes is not limited.
        assert time.monotonic() - start_time >= len(spoken[0].pcm) / 64_000 - 2.1


@pytest.mark.parametrize("protocol", ["stream", "realtime"])
def test_the_rate_of_commits_and_updates_is_limited(serve_here: Any, protocol: str) -> None:
    """Each commit costs a step of the model, and each update a new stream, whatever its size."""
    with serve_here(measure=False) as running, connect(f"{running.socket}/v1/{protocol}") as socket:
        start_time = time.monotonic()
        for number in range(80):
            if protocol == "stream":
                socket.send('{"type": "commit"}')
                continue
            detection = {"type": "server_vad", "silence_duration_ms": 500 + number % 2}
            update = {"audio": {"input": {"turn_detection": detection}}}
            socket.send(json.dumps({"type": "session.update", "session": update}))
        answers = 0
        while answers < 80:
            answers += json.loads(socket.recv(timeout=30))["type"] in ("committed", "session.updated")
        assert time.monotonic() - start_time >= 80 * 0.05 - 2.1  # the first two seconds' worth is not limited


def test_latency_is_measured_for_messages_of_several_chunks(serve_here: Any, spoken: Any) -> None:
    """Messages of 200 ms with chunks of 80 ms count; audio sent faster than real time does not."""
    with serve_here(measure=False, chunk_ms=80) as running:
        socket = open_stream(running)
        for start in range(0, 10 * 6400, 6400):
            socket.send(spoken[0].pcm[start : start + 6400])
        finish(socket)
        assert running.metric("nemostream_latency_seconds_count") > 5
        socket = open_stream(running)
        before = running.metric("nemostream_latency_seconds_count")
        socket.send(4 * spoken[0].pcm[:64000])  # eight seconds at once: not live audio
        finish(socket)
        assert running.metric("nemostream_latency_seconds_count") == before


def test_decoding_stops_when_the_client_disconnects(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False) as running:
        seconds, edge = 1800, "AaB03x"
        wav = io.BytesIO()
        soundfile.write(wav, np.resize(np.frombuffer(spoken[0].pcm, np.int16), 8000 * seconds), 8000, format="WAV")
        head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
        body = head + wav.getvalue() + f"\r\n--{edge}--\r\n".encode()
        with sockets.create_connection(("127.0.0.1", running.http)) as client:
            client.sendall(
                f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1:{running.http}\r\nContent-Length: "
                f"{len(body)}\r\nContent-Type: multipart/form-data; boundary={edge}\r\n\r\n".encode()
                + body
            )
            wait_until(lambda: running.metric("nemostream_audio_seconds_total") > 10)
        wait_until(lambda: not running.service.sessions)
        assert 10 < running.metric("nemostream_audio_seconds_total") < seconds / 2
        wait_until(lambda: free_slots(running) == all_slots(running))
        assert transcribe(running, spoken[0].pcm) == spoken[0].text


def test_an_upload_that_is_too_large(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_upload_bytes=100_000) as running:
        edge = "AaB03x"
        body = (
            f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
            + bytes(200_000)
            + f"\r\n--{edge}--\r\n".encode()
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        for extra_headers in ({"Content-Length": str(len(body))}, {"Transfer-Encoding": "chunked"}):
            request = urllib.request.Request(
                running.url + "/v1/audio/transcriptions",
                iter([body]) if "Transfer-Encoding" in extra_headers else body,
                headers | extra_headers,
                method="POST",
            )
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            assert caught.value.code == 413 and "larger than" in json.loads(caught.value.read())["error"]["message"]


def test_the_number_of_streams_is_limited(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_streams=2) as running:
        first, second = open_stream(running), open_stream(running)
        with pytest.raises(InvalidStatus) as rejected:
            open_stream(running)
        assert rejected.value.response.status_code == 429 and rejected.value.response.headers["Retry-After"] == "2"
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
        assert client.audio.transcriptions.create(model="any", file=spoken[0].path).text == spoken[0].text
        with ExitStack() as uploads:
            for _ in range(running.service.settings.max_uploads):
                uploads.enter_context(running.service.uploads.admit(1, Client()))
            with pytest.raises(openai.RateLimitError, match="try again") as limited:
                client.audio.transcriptions.create(model="any", file=spoken[0].path)
        assert limited.value.response.headers["retry-after"] == "2"
        status, body = running.get("/readyz")
        assert status == 200 and json.loads(body)["streams"] == 2
        reset(first)
        wait_until(lambda: len(running.service.sessions) == 1)
        third = open_stream(running)
        for socket in (second, third):
            socket.send(spoken[0].pcm)
            assert finish(socket) == spoken[0].text


def test_the_stream_limit_is_measured(serve_here: Any) -> None:
    with serve_here(max_streams=100) as running:
        assert 1 <= running.service.max_streams <= 100
        assert running.service.describe()["max_streams"] == running.metric("nemostream_max_streams")


def manual_load(running: Any) -> Callable[[float], None]:
    """Disable the automatic load updates and return `update_load` for manual calls."""
    update_load: Callable[[float], None] = running.service.update_load
    running.service.update_load = lambda latency: None
    return update_load


def test_overload_degrades_and_recovers(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, degrade=True, chunk_ms=80) as running:
        service, update_load = running.service, manual_load(running)
        socket = open_stream(running, "chunk_ms=160")
        large = open_stream(running, "chunk_ms=1120")
        assert not service.overloaded and service.degradation_level == 0
        update_load(1.5)
        update_load(0.1)  # a single good second
        update_load(1.5)
        assert service.degradation_level == 0
        update_load(1.5)
        update_load(1.5)
        assert service.degradation_level == 1  # three bad ones in a row
        socket.send(spoken[0].pcm)
        large.send(spoken[0].pcm)
        socket.send(json.dumps({"type": "finish"}))
        events = [json.loads(event) for event in socket]
        assert {event["chunk_ms"] for event in events if "chunk_ms" in event} == {560}
        with nemostream.load(chunk_ms=1120) as model:
            assert finish(large) == model.transcribe(spoken[0].path).text  # there is no larger chunk size
        for _ in range(9):
            update_load(0.1)
        assert service.degradation_level == 1
        update_load(0.1)
        assert service.degradation_level == 0
        again = open_stream(running, "chunk_ms=160")
        again.send(spoken[0].pcm)
        again.send(json.dumps({"type": "finish"}))
        assert {event["chunk_ms"] for event in map(json.loads, again) if "chunk_ms" in event} == {160}


def finals_of(socket: ClientConnection, pcm: bytes) -> list[tuple[str, int]]:
    """Send audio and end the utterance. Return the text and the chunk size of its finals."""
    socket.send(pcm)
    socket.send(json.dumps({"type": "commit"}))
    finals = []
    while (event := json.loads(socket.recv()))["type"] != "committed":
        if event["type"] == "final":
            finals.append((event["text"], event["chunk_ms"]))
    return finals


def test_overload_disables_accurate_lanes(serve_here: Any, spoken: Any) -> None:
    """And enables them again; the text is always that of the chunk size. New streams have no such lane meanwhile."""
    texts = {}
    for ms in (80, 1120):
        with nemostream.load(chunk_ms=ms) as model:
            texts[ms] = [model.transcribe(clip.path).text for clip in spoken]
    pcm, small, large = next(
        (clip.pcm, *pair) for clip, *pair in zip(spoken, texts[80], texts[1120], strict=True) if pair[0] != pair[1]
    )
    with serve_here(measure=False, chunk_ms=80, final_chunk_ms=1120) as running:
        update_load = manual_load(running)

        def load(latency: float, seconds: int) -> None:
            done = threading.Event()
            for _ in range(seconds):
                running.loop.call_soon_threadsafe(update_load, latency)
            running.loop.call_soon_threadsafe(done.set)
            assert done.wait(10)

        socket = open_stream(running, "endpoint_ms=-1")
        assert finals_of(socket, pcm) == [(large, 1120)]
        load(1.5, 3)
        assert finals_of(socket, b"") == [] and finals_of(socket, pcm) == [(small, 80)]
        new = open_stream(running, "endpoint_ms=-1")
        assert finals_of(new, pcm) == [(small, 80)]
        assert running.metric("nemostream_lanes_shed_total") == 2
        load(0.1, 10)
        for one in (socket, new):
            finals_of(one, b"")  # lanes begin with the next utterance
            assert finals_of(one, pcm) == [(large, 1120)]
            assert finish(one)
        assert running.metric("nemostream_lanes_shed_total") == 2
        assert running.metric("nemostream_final_fallbacks_total") == 0


def test_a_final_without_its_accurate_lane_is_counted(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, chunk_ms=80) as running:
        scheduler = running.service.model.context.scheduler

        def fail(sources: Any, targets: Any) -> None:
            raise RuntimeError("the copy failed")

        pcm = spoken[0].pcm + bytes(64000)  # an utterance that ends by silence: a copy completes the accurate lane
        socket, other = open_stream(running, "final_chunk_ms=1120"), open_stream(running)
        copy = scheduler.call(lambda backend: backend.copy)
        scheduler.call(lambda backend: setattr(backend, "copy", fail))
        assert [chunk_ms for _, chunk_ms in finals_of(socket, pcm)] == [80]
        assert finals_of(other, pcm) and running.metric("nemostream_final_fallbacks_total") == 1
        scheduler.call(lambda backend: setattr(backend, "copy", copy))
        assert [chunk_ms for _, chunk_ms in finals_of(socket, pcm)] == [1120]
        assert running.metric("nemostream_final_fallbacks_total") == 1
        assert finish(socket) and finish(other)
        assert running.metric("nemostream_streams_failed_total") == 0


def test_an_overloaded_server_rejects_streams(serve_here: Any) -> None:
    with serve_here(measure=False) as running:
        service, update_load = running.service, manual_load(running)
        for _ in range(3):
            update_load(2.0)
        with pytest.raises(CapacityError, match="overloaded"):
            service.open("test")
        assert service.degradation_level == 0  # degradation is off by default
        update_load(0.2)
        service.open("test").close()


# -- any request -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openapi_schema(server: Any) -> Any:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def test_http_responses_conform_to_the_openapi_schema(openapi_schema: Any) -> None:
    paths = []
    for result in openapi_schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            # A form with a file of random bytes is well-formed but not a recording.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
        paths.append(operation.path)
    assert "/v1/audio/transcriptions" in paths and "/readyz" in paths
