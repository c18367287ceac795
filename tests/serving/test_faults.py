"""Clients and engines that misbehave: whoever did not must notice nothing."""

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


def opened(running: Any, query: str = "") -> ClientConnection:
    socket = connect(f"{running.socket}/v1/stream?{query}")
    assert json.loads(socket.recv())["type"] == "ready"
    return socket


def done(socket: ClientConnection) -> str:
    """End a stream; its text."""
    socket.send(json.dumps({"type": "finish"}))
    *_, last = (json.loads(event) for event in socket)
    assert last["type"] == "done", last
    return str(last["text"])


def done_with(running: Any, pcm: bytes) -> str:
    """The text of a stream of its own."""
    socket = opened(running)
    socket.send(pcm)
    return done(socket)


def failure(socket: ClientConnection) -> dict[str, Any]:
    """The error that ends a stream."""
    event: dict[str, Any] = {}
    with suppress(ConnectionClosed):
        while True:
            event = json.loads(socket.recv(timeout=20))
    return event


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


def free(running: Any) -> int:
    return len(running.service.model._scheduler._free)


def slots(running: Any) -> int:
    return int(running.service.model._scheduler._backend.capacity)


def kill(socket: ClientConnection) -> None:
    """End the connection as a crashed client does: no closing handshake, a reset."""
    socket.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.shutdown(sockets.SHUT_RDWR)
    socket.socket.close()


def test_a_client_killed_in_mid_word_frees_its_slot_and_harms_nobody(serve_here: Any, spoken: Any) -> None:
    with serve_here(max_streams=4, measure=False) as running:
        well = opened(running)
        well.send(spoken[0].pcm[:HALF])
        for _ in range(3):
            sick = opened(running)
            sick.send(spoken[1].pcm[:HALF])
            kill(sick)
        eventually(lambda: len(running.service.sessions) == 1 and free(running) == slots(running) - 1)
        well.send(spoken[0].pcm[HALF:])
        assert done(well) == spoken[0].text
        assert running.metric("nemostream_streams_failed_total") == 3
        eventually(lambda: free(running) == slots(running))


def test_a_thousand_connections_leave_nothing_behind(serve_here: Any, spoken: Any) -> None:
    with serve_here(max_streams=8, measure=False) as running:

        def come_and_go(times: int) -> None:
            for number in range(times):
                socket = opened(running)
                socket.send(spoken[1].pcm[: 32 * number % 30_000])
                if number % 3 == 0:
                    kill(socket)
                elif number % 3 == 1:
                    socket.close()
                else:
                    done(socket)

        def memory() -> int:
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()

        come_and_go(200)
        before = memory()
        come_and_go(1000)
        grown = memory() - before
        eventually(lambda: not running.service.sessions and free(running) == slots(running))
        assert grown < 30e6, f"{grown / 1e6:.1f} MB"
        assert running.metric("nemostream_streams") == 0
        socket = opened(running)
        socket.send(spoken[0].pcm)
        assert done(socket) == spoken[0].text


def test_a_silent_client_and_one_that_stays_too_long(serve_here: Any, spoken: Any) -> None:
    with serve_here(idle_seconds=1, max_seconds=3, measure=False) as running:
        silent = opened(running)
        assert failure(silent)["code"] == "expired" and silent.close_code == 1008
        alive = opened(running)
        for _ in range(4):  # as long as it says that it is there, silence does not matter
            alive.send(json.dumps({"type": "keepalive"}))
            time.sleep(0.5)
        alive.send(spoken[1].pcm)
        with suppress(ConnectionClosed):
            while True:
                alive.send(json.dumps({"type": "keepalive"}))
                time.sleep(0.2)
        assert "longest allowed" in failure(alive)["message"]
        assert running.metric("nemostream_timeouts_total") == 2
        eventually(lambda: free(running) == slots(running))


def test_a_client_that_does_not_read_is_cut_off(serve_here: Any, spoken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listen = server._listen

    def listen_with_small_buffers(settings: Any) -> sockets.socket:
        listening = listen(settings)
        listening.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 16_384)  # of those that it accepts
        return listening

    monkeypatch.setattr(server, "_listen", listen_with_small_buffers)
    with serve_here(send_seconds=1, max_streams=4, measure=False) as running:
        well = opened(running)
        well.send(spoken[0].pcm[:HALF])
        # A bare socket with a small buffer, so that "not read" is soon felt.
        bare = sockets.socket()
        bare.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        bare.connect(("127.0.0.1", running.http))
        bare.sendall(
            b"GET /v1/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        order = b'{"type": "commit"}'
        frame = bytes([0x81, 0x80 | len(order), 0, 0, 0, 0]) + order
        bare.settimeout(60)
        with pytest.raises(ConnectionError):  # nor is it left open, to hold memory
            while True:
                bare.sendall(frame * 1000)
        assert running.metric("nemostream_timeouts_total") == 1
        well.send(spoken[0].pcm[HALF:])
        assert done(well) == spoken[0].text


def test_garbage_on_the_ports(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False) as running:
        rng = np.random.default_rng(0)
        for port in (running.http, running.grpc):
            for size in (0, 1, 100, 100_000):
                with sockets.create_connection(("127.0.0.1", port)) as bare, suppress(OSError):
                    bare.sendall(rng.bytes(size))
        assert done_with(running, spoken[0].pcm) == spoken[0].text


def test_half_open_sockets(serve_here: Any, spoken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that are there and say nothing: before a request, within one, and within a stream, of either protocol."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    with serve_here(measure=False, idle_seconds=1.5, max_uploads=64) as running:
        begun = [
            b"",
            b"GET /v1/stream HTTP/1.1\r\nHost:",
            b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n--x\r\n",
        ]
        held = [sockets.create_connection(("127.0.0.1", running.http)) for _ in range(60)]
        for number, bare in enumerate(held):
            bare.sendall(begun[number % 3])
        streams = [opened(running) for _ in range(5)]
        service = riva.client.ASRService(riva.client.Auth(uri=running.address))
        config = riva.client.StreamingRecognitionConfig(
            config=riva.client.RecognitionConfig(sample_rate_hertz=16000, encoding=riva.client.AudioEncoding.LINEAR_PCM)
        )
        never = threading.Event()

        def nothing_more() -> Any:
            yield spoken[0].pcm[:3200]
            never.wait(20)

        with pytest.raises(grpc.RpcError) as ended:
            list(service.streaming_response_generator(nothing_more(), config))
        never.set()
        assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        for stream in streams:
            assert failure(stream)["code"] == "expired"
        for bare in held:  # told why, where there is a request to answer; then the connection is over
            bare.settimeout(20)
            answer = b""
            while data := bare.recv(4096):
                answer += data
            assert answer == b"" or b" 408 " in answer, answer
        assert done_with(running, spoken[0].pcm) == spoken[0].text
        eventually(lambda: free(running) == slots(running))


def test_audio_that_comes_faster_than_it_is_served_waits_with_the_client(serve_here: Any, spoken: Any) -> None:
    """The server holds one message's chunks of a stream, however much the client would like to send."""
    with serve_here(measure=False) as running:
        backend = running.service.model._scheduler._backend
        submit, waiting = backend.submit, [0]

        def slow(batch: Any) -> Any:
            time.sleep(0.05)
            waiting.append(max(stream.chunker.queued for stream in running.service.model._scheduler._streams.values()))
            return submit(batch)

        backend.submit = slow
        pcm, message = spoken[0].pcm * 40, 32_000  # two minutes, a second at a time
        bare = opened(running, "chunk_ms=80&endpoint_ms=-1")
        sent = 0

        def send() -> None:
            nonlocal sent
            for start in range(0, len(pcm), message):
                bare.send(pcm[start : start + message])
                sent += message

        sender = threading.Thread(target=send)
        sender.start()
        eventually(lambda: len(waiting) > 40)
        assert max(waiting) <= 1 + message / 2 / 1280
        heard = running.metric("nemostream_audio_seconds_total")
        assert heard < len(pcm) / 32_000 / 2  # most of it is not even read
        backend.submit = submit
        sender.join(60)
        assert done(bare).startswith(spoken[0].text.split()[0]) and sent >= len(pcm)
        assert running.metric("nemostream_audio_seconds_total") == pytest.approx(len(pcm) / 32_000, abs=1e-3)


def test_an_engine_error_ends_the_streams_of_its_step_only(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_streams=8) as running:
        backend = running.service.model._scheduler._backend
        submit = backend.submit
        with ExitStack() as stack:
            small = stack.enter_context(opened(running, "chunk_ms=160"))
            large = stack.enter_context(opened(running, "chunk_ms=560"))
            small.send(spoken[0].pcm[:HALF])
            large.send(spoken[0].pcm[:HALF])
            eventually(lambda: running.metric("nemostream_audio_seconds_total") == 2 * HALF / 32000)

            def failing(batch: Any) -> Any:
                if batch.chunk.ms == 160:
                    raise RuntimeError("the device is on fire")
                return submit(batch)

            backend.submit = failing
            small.send(spoken[0].pcm[HALF:])
            large.send(spoken[0].pcm[HALF:])
            error = failure(small)
            assert error["code"] == "model" and "on fire" in error["message"] and small.close_code == 1011
            assert done(large) == spoken[0].text
        assert running.get("/healthz")[0] == 200
        for _ in range(5):  # and nothing between that worked
            with opened(running, "chunk_ms=160") as small:
                small.send(spoken[0].pcm[:HALF])
                failure(small)
        assert running.get("/healthz")[0] == 503 and json.loads(running.get("/readyz")[1])["status"] == "failed"
        backend.submit = submit
        with opened(running, "chunk_ms=160") as again:
            again.send(spoken[0].pcm)
            assert done(again).split()
        assert running.get("/healthz")[0] == 200 and running.get("/readyz")[0] == 200
        eventually(lambda: free(running) == slots(running))


def test_a_poisoned_stream_never_reaches_its_neighbours(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_streams=8) as running:
        model = running.service.model
        with ExitStack() as stack:
            well = [stack.enter_context(opened(running)) for _ in range(3)]
            sick = stack.enter_context(opened(running))
            for socket in (*well, sick):
                socket.send(spoken[0].pcm[:HALF])
            eventually(lambda: running.metric("nemostream_audio_seconds_total") == 4 * HALF / 32000)
            (session,) = [s for s in running.service.sessions if s is newest(running)]
            model._scheduler._backend._state.v[:, session._stream._session._stream.slot] = np.nan
            for socket in (*well, sick):
                socket.send(spoken[0].pcm[HALF:])
            assert "not finite" in failure(sick)["message"]
            assert [done(socket) for socket in well] == [spoken[0].text] * 3
        for _ in range(slots(running)):  # and the slot is clean for whoever comes next
            socket = opened(running)
            socket.send(spoken[0].pcm)
            assert done(socket) == spoken[0].text


def newest(running: Any) -> Any:
    return max(running.service.sessions, key=lambda session: session._opened_at)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_client_that_sends_too_fast_is_read_more_slowly_and_loses_nothing(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_bytes_per_second=64_000) as running:
        socket, began = opened(running), time.monotonic()
        for start in range(0, len(spoken[0].pcm), 3200):
            socket.send(spoken[0].pcm[start : start + 3200])
        assert done(socket) == spoken[0].text
        # Two seconds' worth may come at once; what is beyond takes its time.
        assert time.monotonic() - began >= len(spoken[0].pcm) / 64_000 - 2.1


def test_messages_of_several_chunks_are_watched_too(serve_here: Any, spoken: Any) -> None:
    """A client that sends 200 ms at a time in chunks of 80 ms has results that can come late."""
    with serve_here(measure=False, chunk_ms=80) as running:
        socket = opened(running)
        for start in range(0, 10 * 6400, 6400):
            socket.send(spoken[0].pcm[start : start + 6400])
        done(socket)
        assert running.metric("nemostream_latency_seconds_count") > 5
        socket = opened(running)
        before = running.metric("nemostream_latency_seconds_count")
        socket.send(4 * spoken[0].pcm[:64000])  # eight seconds at once: nobody talks like that
        done(socket)
        assert running.metric("nemostream_latency_seconds_count") == before


def test_nobody_decodes_for_a_client_that_is_gone(serve_here: Any, spoken: Any) -> None:
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
            eventually(lambda: running.metric("nemostream_audio_seconds_total") > 10)
        eventually(lambda: not running.service.sessions)
        assert 10 < running.metric("nemostream_audio_seconds_total") < seconds / 2
        eventually(lambda: free(running) == slots(running))
        assert done_with(running, spoken[0].pcm) == spoken[0].text


def test_a_recording_that_is_too_large(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_upload_bytes=100_000) as running:
        edge = "AaB03x"
        body = (
            f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
            + bytes(200_000)
            + f"\r\n--{edge}--\r\n".encode()
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        for more in ({"Content-Length": str(len(body))}, {"Transfer-Encoding": "chunked"}):
            request = urllib.request.Request(
                running.url + "/v1/audio/transcriptions",
                iter([body]) if "Transfer-Encoding" in more else body,
                headers | more,
                method="POST",
            )
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            assert caught.value.code == 413 and "larger than" in json.loads(caught.value.read())["error"]["message"]


def test_no_more_streams_than_admitted(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, max_streams=2) as running:
        first, second = opened(running), opened(running)
        with pytest.raises(InvalidStatus) as refused:
            opened(running)
        assert refused.value.response.status_code == 429 and refused.value.response.headers["Retry-After"] == "2"
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
        assert client.audio.transcriptions.create(model="any", file=spoken[0].path).text == spoken[0].text
        with ExitStack() as places:
            for _ in range(running.service.settings.max_uploads):
                places.enter_context(running.service.uploads.admit(1, Client()))
            with pytest.raises(openai.RateLimitError, match="try again") as limited:
                client.audio.transcriptions.create(model="any", file=spoken[0].path)
        assert limited.value.response.headers["retry-after"] == "2"
        status, body = running.get("/readyz")
        assert status == 200 and json.loads(body)["streams"] == 2
        kill(first)
        eventually(lambda: len(running.service.sessions) == 1)
        third = opened(running)
        for socket in (second, third):
            socket.send(spoken[0].pcm)
            assert done(socket) == spoken[0].text


def test_admission_is_measured(serve_here: Any) -> None:
    with serve_here(max_streams=100) as running:
        assert 1 <= running.service.max_streams <= 100
        assert running.service.describe()["max_streams"] == running.metric("nemostream_max_streams")


def alone(running: Any) -> Callable[[float], None]:
    """`update_load` for a test that passes seconds itself: those of the clock do not count."""
    update_load: Callable[[float], None] = running.service.update_load
    running.service.update_load = lambda latency: None
    return update_load


def test_overload_refuses_then_degrades_and_returns(serve_here: Any, spoken: Any) -> None:
    with serve_here(measure=False, degrade=True, chunk_ms=80) as running:
        service, update_load = running.service, alone(running)
        socket = opened(running, "chunk_ms=160")
        large = opened(running, "chunk_ms=1120")
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
            assert done(large) == model.transcribe(spoken[0].path).text  # there is no larger one
        for _ in range(9):
            update_load(0.1)
        assert service.degradation_level == 1
        update_load(0.1)
        assert service.degradation_level == 0
        again = opened(running, "chunk_ms=160")
        again.send(spoken[0].pcm)
        again.send(json.dumps({"type": "finish"}))
        assert {event["chunk_ms"] for event in map(json.loads, again) if "chunk_ms" in event} == {160}


def test_an_overloaded_machine_takes_nobody(serve_here: Any) -> None:
    with serve_here(measure=False) as running:
        service, update_load = running.service, alone(running)
        for _ in range(3):
            update_load(2.0)
        with pytest.raises(CapacityError, match="overloaded"):
            service.open("test")
        assert service.degradation_level == 0  # nothing is degraded unless that was asked for
        update_load(0.2)
        service.open("test").close()


# -- any request -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(server: Any) -> Any:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def test_any_http_request_is_answered_as_described(described: Any) -> None:
    asked = []
    for found in described.get_all_operations():
        operation = found.ok()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            # A file of random bytes is well-formed as a form, and is no recording.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
        asked.append(operation.path)
    assert "/v1/audio/transcriptions" in asked and "/readyz" in asked
