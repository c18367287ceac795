"""A server with transport processes, as users start it: equality with one process, limits, crashes, draining."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import riva.client
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

SENTENCE = "the engine process ended unexpectedly and is started again; open a new stream."


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)
    return found


class Stream:
    """A live stream, and the transport that serves it."""

    def __init__(self, running: Any, query: str = "", **options: Any) -> None:
        self._log, known = running.log, len(running.log)
        self.socket: ClientConnection = connect(f"{running.socket}/v1/stream?{query}", ping_interval=None, **options)
        self.ready = json.loads(self.socket.recv())
        self.transport: str = wait_until(lambda: self._opened_by(known))

    def _opened_by(self, known: int) -> str:
        return next(
            (str(line["worker"]) for line in self._log[known:] if line.get("stream") == self.ready["stream"]), ""
        )

    def send(self, pcm: bytes) -> None:
        self.socket.send(pcm)

    def finish(self) -> list[dict[str, Any]]:
        """Finish the stream and return its events."""
        self.socket.send(json.dumps({"type": "finish"}))
        return [json.loads(event) for event in self.socket]

    def text(self) -> str:
        return str(self.finish()[-1]["text"])

    def last_event(self) -> dict[str, Any]:
        """Return the last event before the connection is closed, {} if there is none."""
        event: dict[str, Any] = {}
        with suppress(ConnectionClosed):
            while True:
                event = json.loads(self.socket.recv(timeout=30))
        return event


@dataclass(frozen=True)
class Process:
    pid: int

    @property
    def name(self) -> str:
        """The last argument of its command line, "" once it has ended."""
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode().rstrip("\0").rpartition("\0")[2]
        except OSError:
            return ""

    @property
    def files(self) -> int:
        """Number of its open file descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def audio_memories(self) -> int:
        """Number of links whose memory is mapped."""
        return Path(f"/proc/{self.pid}/maps").read_text().count("memfd:nemostream-audio")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def children(running: Any) -> dict[str, Process]:
    """Return the processes of a server by name."""
    path = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    processes = [Process(int(pid)) for pid in path.read_text().split()]
    return {name: process for process in processes if (name := process.name)}


def stream_at(running: Any, transport: str, query: str = "", tries: int = 200) -> Stream:
    """Return a stream that a certain transport serves: the system chooses one for each connection."""
    for _ in range(tries):
        stream = Stream(running, query)
        if stream.transport == transport:
            return stream
        stream.finish()
        stream.socket.close()
    raise AssertionError(f"no connection was accepted by {transport}")


def gone(processes: Any) -> bool:
    return not any(process.name for process in processes)  # a zombie has no command line


@pytest.fixture(scope="module")
def two(serve_process: Any) -> Iterator[Any]:
    """A server with two transports, for tests that use it only as clients."""
    with serve_process("--transports", "2", "--max-streams", "64", "--no-measure", "--idle-seconds", "60") as running:
        yield running


# -- equality with a server of one process -----------------------------------------------------------------------------


def websocket_events(running: Any, clip: Any, query: str) -> list[dict[str, Any]]:
    stream = Stream(running, query) if running.log and "worker" in running.log[0] else None
    socket = stream.socket if stream else connect(f"{running.socket}/v1/stream?{query}", ping_interval=None)
    if stream is None:
        socket.recv()
    for begin in range(0, len(clip.pcm), 3200):
        socket.send(clip.pcm[begin : begin + 3200])
    half = len(clip.pcm) // 4 * 2
    socket.send(json.dumps({"type": "commit"}))
    socket.send(clip.pcm[:half])
    socket.send(json.dumps({"type": "configure", "chunk_ms": 160}))
    socket.send(clip.pcm[half:])
    socket.send(json.dumps({"type": "finish"}))
    return [json.loads(event) for event in socket]


@pytest.mark.parametrize(
    "query",
    [
        "words=1",
        "words=1&chunk_ms=80&endpoint_ms=160&decoder=reset",
        "words=1&chunk_ms=1120&max_utterance_ms=1000&phrases=[%22twenty%22]",
        "words=1&chunk_ms=80&endpoint_ms=-1",
    ],
)
def test_websockets_get_the_same_events(server: Any, two: Any, spoken: Any, query: str) -> None:
    """Texts, tokens' times and confidence, ends of utterances and their order."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda clip: websocket_events(two, clip, query), spoken[:4]))
    for clip, events in zip(spoken, found, strict=False):
        assert events == websocket_events(server, clip, query)
        assert events[-1]["type"] == "done" and len(events) > 6


def test_accurate_lanes_have_the_finals_of_one_process(server: Any, two: Any, spoken: Any) -> None:
    """Clients of both transports. Partials depend on how far the accurate lane is, finals do not."""
    query = "words=1&chunk_ms=80&final_chunk_ms=1120&endpoint_ms=400"
    audio = b"".join(clip.pcm + bytes(25_600) for clip in spoken[:3])

    def finals(socket: ClientConnection) -> list[dict[str, Any]]:
        for begin in range(0, len(audio), 3200):
            socket.send(audio[begin : begin + 3200])
        socket.send(json.dumps({"type": "finish"}))
        events = [json.loads(event) for event in socket]
        return [event for event in events if event["type"] in ("final", "end", "done")]

    with connect(f"{server.socket}/v1/stream?{query}", ping_interval=None) as socket:
        assert json.loads(socket.recv())["final_chunk_ms"] == 1120
        expected = finals(socket)
    fallbacks = two.metric("nemostream_final_fallbacks_total")
    streams = [stream_at(two, f"transport-{index}", query, tries=1000) for index in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(finals, [stream.socket for stream in streams]))
    assert [event["chunk_ms"] for event in expected if event["type"] == "final"].count(1120) >= 3
    for events in found:
        assert events == expected
    assert two.metric("nemostream_final_fallbacks_total") == fallbacks


def realtime_events(running: Any, clip: Any) -> list[Any]:
    client = openai.OpenAI(base_url=running.url + "/v1", api_key="any")
    found: list[Any] = []
    with client.realtime.connect(model="any", extra_query={"intent": "transcription"}) as connection:
        session = {
            "type": "transcription",
            "audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}, "turn_detection": None}},
        }
        connection.session.update(session=session)  # type: ignore[arg-type]
        samples = np.repeat(np.frombuffer(clip.pcm, np.int16), 3)[::2].tobytes()
        for begin in range(0, len(samples), 48_000):
            audio = base64.b64encode(samples[begin : begin + 48_000]).decode()
            connection.input_audio_buffer.append(audio=audio)
        connection.input_audio_buffer.commit()
        for event in connection:
            if event.type.startswith("conversation.item.input_audio_transcription."):
                found.append((event.type, getattr(event, "delta", None), getattr(event, "transcript", None)))
            if event.type.endswith("completed"):
                return found
    return found


def test_openai_realtime_gets_the_same_deltas(server: Any, two: Any, spoken: Any) -> None:
    for clip in spoken[:3]:
        events = realtime_events(two, clip)
        assert events == realtime_events(server, clip) and len(events) > 2 and events[-1][2]


def riva_results(running: Any, clip: Any) -> list[Any]:
    service = riva.client.ASRService(riva.client.Auth(uri=running.address))
    config = riva.client.RecognitionConfig(
        encoding=riva.client.AudioEncoding.LINEAR_PCM,
        sample_rate_hertz=16000,
        language_code="en-US",
        enable_word_time_offsets=True,
    )
    streaming = riva.client.StreamingRecognitionConfig(config=config, interim_results=True)
    chunks = [clip.pcm[begin : begin + 3200] for begin in range(0, len(clip.pcm), 3200)]
    responses = list(service.streaming_response_generator(chunks, streaming))
    return [result for response in responses for result in response.results]


def test_riva_gets_the_same_results(server: Any, two: Any, spoken: Any) -> None:
    for clip in spoken[:3]:
        results = riva_results(two, clip)
        assert results == riva_results(server, clip) and results[-1].is_final and len(results) > 2


def test_uploads_get_the_same_words(server: Any, two: Any, spoken: Any) -> None:
    def words(running: Any, clip: Any) -> Any:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
        return client.audio.transcriptions.create(
            model="any", file=clip.path, response_format="verbose_json", timestamp_granularities=["word", "segment"]
        )

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda clip: words(two, clip), spoken[:4]))
    for clip, transcription in zip(spoken, found, strict=False):
        assert transcription == words(server, clip) and transcription.text == clip.text


def test_both_transports_serve_clients_and_report_the_same_state(two: Any, spoken: Any) -> None:
    streams = [stream_at(two, f"transport-{index}") for index in range(2)]
    for _ in range(8):  # every connection may be served by another transport
        state = json.loads(two.get("/readyz")[1])
        assert (state["status"], state["streams"], state["max_streams"]) == ("ready", 2, 64)
        assert (state["http_port"], state["grpc_port"], state["model"]) == (two.http, two.grpc, "demo")
    for stream in streams:
        stream.send(spoken[0].pcm)
        assert stream.text() == spoken[0].text


def test_metrics_are_the_sums_of_all_processes(two: Any, spoken: Any) -> None:
    names = ["streams_opened_total", "audio_seconds_total", "utterances_total", "latency_seconds_count"]
    before = {name: two.metric(f"nemostream_{name}") for name in names}
    steps = two.metric("nemostream_step_seconds_count")
    streams = [stream_at(two, f"transport-{index}", "endpoint_ms=-1", tries=1000) for index in range(2)]
    opened = two.metric("nemostream_streams_opened_total")
    for _ in range(4):
        assert two.metric("nemostream_streams") == 2 and two.metric("nemostream_max_streams") == 64
    for stream in streams:
        stream.send(spoken[1].pcm)
        assert stream.text() == spoken[1].text
    wait_until(lambda: two.metric("nemostream_streams") == 0)
    after = {name: two.metric(f"nemostream_{name}") for name in names}
    assert two.metric("nemostream_streams_opened_total") == opened >= before["streams_opened_total"] + 2
    assert after["audio_seconds_total"] - before["audio_seconds_total"] == pytest.approx(2 * spoken[1].seconds)
    assert after["utterances_total"] - before["utterances_total"] == 2
    assert two.metric("nemostream_step_seconds_count") > steps
    text = two.get("/metrics")[1]
    assert 'nemostream_streams{transport="websocket"} 0.0' in text and "pid=" not in text


# -- limits ------------------------------------------------------------------------------------------------------------


def rejection(running: Any, query: str = "", **options: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        connect(f"{running.socket}/v1/stream?{query}", **options)
    return caught.value.response.status_code, json.loads(caught.value.response.body)["error"]["message"]


def test_streams_are_limited_over_all_transports(serve_process: Any, spoken: Any) -> None:
    with serve_process("--transports", "2", "--max-streams", "3", "--no-measure") as running, ExitStack() as stack:
        streams = [stream_at(running, f"transport-{index}") for index in (0, 1, 1)]
        for stream in streams:
            stack.enter_context(stream.socket)
        for _ in range(8):
            assert rejection(running) == (429, "all 3 streams are in use; try again in a few seconds.")
        assert running.metric("nemostream_streams_rejected_total") == 8
        streams[0].send(spoken[0].pcm)
        assert streams[0].text() == spoken[0].text
        wait_until(lambda: json.loads(running.get("/readyz")[1])["streams"] == 2)
        another = Stream(running)
        assert rejection(running)[0] == 429
        for stream in (streams[1], streams[2], another):
            stream.send(spoken[1].pcm)
            assert stream.text() == spoken[1].text


@pytest.mark.slow
def test_streams_at_once_never_exceed_the_limit(serve_process: Any) -> None:
    """Many clients compete for few streams, at all transports."""
    with serve_process("--transports", "3", "--max-streams", "4", "--no-measure") as running:

        def try_to_open(_: int) -> Any:
            try:
                return connect(f"{running.socket}/v1/stream", ping_interval=None)
            except InvalidStatus as error:
                return error.response.status_code

        for _ in range(3):
            with ThreadPoolExecutor(16) as pool:
                found = list(pool.map(try_to_open, range(40)))
            opened = [one for one in found if one != 429]
            assert len(opened) == 4 and found.count(429) == 36
            for socket in opened:
                socket.close()
            wait_until(lambda: json.loads(running.get("/readyz")[1])["streams"] == 0)


@pytest.mark.slow
def test_clients_are_limited_over_all_transports(serve_process: Any) -> None:
    arguments = ["--transports", "2", "--no-measure", "--max-streams-per-client", "2", "--api-keys", "one,two"]
    with serve_process(*arguments) as running, ExitStack() as stack:
        keys = [{"additional_headers": {"Authorization": f"Bearer {key}"}} for key in ("one", "two")]
        transports: set[str] = set()
        while len(transports) < 2:  # the two streams of the first client are served by different transports
            streams = [Stream(running, **keys[0]) for _ in range(2)]
            transports = {stream.transport for stream in streams}
            if len(transports) < 2:
                for stream in streams:
                    stream.finish()
        for _ in range(4):
            status, message = rejection(running, **keys[0])
            assert (
                status == 429 and message == "this client has 2 open streams, the maximum per client; close one first."
            )
        for _ in range(2):
            stack.enter_context(Stream(running, **keys[1]).socket)
        for stream in streams:
            stream.socket.close()


def test_slots_of_accurate_lanes_are_limited_over_all_transports(serve_process: Any, spoken: Any) -> None:
    message = (
        "all 6 slots are in use or reserved: a stream with final_chunk_ms takes two, and one of 16 is reserved; "
        "try again in a few seconds, or without final_chunk_ms."
    )
    query = "chunk_ms=80&final_chunk_ms=1120"
    with serve_process("--transports", "2", "--max-streams", "6", "--no-measure") as running:
        streams = [stream_at(running, f"transport-{index}", query) for index in range(2)]
        for _ in range(8):
            assert rejection(running, query) == (429, message)
        plain = Stream(running, "chunk_ms=80")
        assert rejection(running) == (429, message)
        for stream in (*streams, plain):
            stream.send(spoken[0].pcm)
            assert stream.text()
        wait_until(lambda: json.loads(running.get("/readyz")[1])["streams"] == 0)
        assert running.metric("nemostream_final_fallbacks_total") == 0
        Stream(running, query).socket.close()


def test_uploads_are_limited_over_all_transports(serve_process: Any, spoken: Any) -> None:
    with serve_process("--transports", "2", "--no-measure", "--max-uploads", "2") as running, ExitStack() as stack:
        import http.client

        slow = []
        for _ in range(2):  # admitted when the head was received, before their bodies
            request = http.client.HTTPConnection("127.0.0.1", running.http, timeout=30)
            stack.callback(request.close)
            request.putrequest("POST", "/v1/audio/transcriptions")
            request.putheader("Content-Type", "multipart/form-data; boundary=x")
            request.putheader("Content-Length", "1000")
            request.endheaders()
            request.send(b"--x")
            slow.append(request)
        wait_until(lambda: json.loads(running.get("/readyz")[1])["uploads"] == 2)
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
        for _ in range(6):
            with pytest.raises(openai.RateLimitError, match="all 2 slots for recordings are in use"):
                client.audio.transcriptions.create(model="any", file=spoken[0].path)
        assert running.metric("nemostream_uploads") == 2
        slow[0].close()
        wait_until(lambda: json.loads(running.get("/readyz")[1])["uploads"] == 1)
        assert client.audio.transcriptions.create(model="any", file=spoken[0].path).text == spoken[0].text


@pytest.mark.slow
def test_connections_are_limited_over_all_transports(serve_process: Any) -> None:
    arguments = ["--transports", "2", "--no-measure", "--max-connections", "12", "--max-connections-per-client", "12"]
    with serve_process(*arguments) as running, ExitStack() as stack:
        streams = [stack.enter_context(Stream(running).socket) for _ in range(12)]
        for _ in range(6):
            assert not health(running.http).startswith(b"HTTP/1.1 200")
        streams[0].close()
        wait_until(lambda: health(running.http).startswith(b"HTTP/1.1 200"))


def health(port: int) -> bytes:
    """Return the response to a request on a new connection. A connection that is rejected needs no request."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with suppress(OSError):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        with suppress(ConnectionResetError):
            return connection.recv(4096)
    return b""


# -- crashes -----------------------------------------------------------------------------------------------------------


def test_a_killed_transport_loses_only_its_clients(serve_process: Any, spoken: Any) -> None:
    with serve_process("--transports", "2", "--max-streams", "4", "--no-measure") as running:
        half = len(spoken[0].pcm) // 4 * 2
        victim, other = stream_at(running, "transport-0"), stream_at(running, "transport-1")
        before = children(running)
        files = {name: before[name].files for name in ("engine", "transport-1")}
        files["supervisor"] = Process(running.process.pid).files
        for stream in (victim, other):
            stream.send(spoken[0].pcm[:half])
        opened = running.metric("nemostream_streams_opened_total")
        for _ in range(3):
            restart(running, "transport-0")
            wait_until(lambda: accepts(running, "transport-0"))
        assert victim.last_event().get("type") != "done"
        other.send(spoken[0].pcm[half:])
        assert other.text() == spoken[0].text
        after = children(running)
        assert {name: after[name].pid for name in ("engine", "transport-1")} == {
            name: before[name].pid for name in ("engine", "transport-1")
        }
        # Its streams count no more, their slots are free, and counters did not start again.
        wait_until(lambda: json.loads(running.get("/readyz")[1])["streams"] == 0)
        wait_until(lambda: running.metric("nemostream_streams") == 0)
        assert running.metric("nemostream_streams_opened_total") > opened
        streams = [Stream(running) for _ in range(4)]
        for stream in streams:
            stream.send(spoken[1].pcm)
        assert [stream.text() for stream in streams] == [spoken[1].text] * 4
        for stream in streams:
            stream.socket.close()
        ended = [line for line in running.log if line["event"] == "process ended"]
        assert [(line["process_name"], line["reason"]) for line in ended] == [("transport-0", "signal SIGKILL")] * 3

        def same_files() -> bool:
            found = {name: after[name].files for name in ("engine", "transport-1")}
            found["supervisor"] = Process(running.process.pid).files
            return all(found[name] <= files[name] for name in files)

        wait_until(same_files)
        wait_until(lambda: after["engine"].audio_memories == 2)


def restart(running: Any, name: str) -> None:
    """Kill a process of a server, and wait for its successor."""
    killed = children(running)[name]
    killed.kill()
    wait_until(lambda: children(running).get(name) not in (None, killed))


def accepts(running: Any, transport: str) -> bool:
    """Whether a transport serves new streams."""
    try:
        stream_at(running, transport, tries=4).socket.close()
    except (AssertionError, InvalidStatus, OSError, ConnectionClosed):
        return False
    return True


def test_a_killed_engine_ends_streams_with_an_error_and_is_started_again(serve_process: Any, spoken: Any) -> None:
    with serve_process("--transports", "2", "--max-streams", "8", "--no-measure") as running:
        before = children(running)
        transports = {name: process.pid for name, process in before.items() if name != "engine"}
        files = {name: before[name].files for name in transports}
        supervisor = Process(running.process.pid)
        supervisor_files = supervisor.files
        for _ in range(2):
            streams = [stream_at(running, f"transport-{index}", "endpoint_ms=-1") for index in range(2)]
            half = len(spoken[0].pcm) // 4 * 2
            for stream in streams:
                stream.send(spoken[0].pcm[:half])
                assert json.loads(stream.socket.recv(timeout=30))["type"] == "partial"
            restart(running, "engine")
            for stream in streams:
                with suppress(ConnectionClosed):
                    stream.send(spoken[0].pcm[half:])
                event = stream.last_event()
                assert (event["type"], event["code"], event["message"]) == ("error", "model", SENTENCE)
                assert stream.socket.close_code == 1011
            wait_until(lambda: all_ready(running))
            for stream in [stream_at(running, f"transport-{index}") for index in range(2)]:
                stream.send(spoken[0].pcm)
                assert stream.text() == spoken[0].text
                stream.socket.close()
        assert {name: process.pid for name, process in children(running).items() if name != "engine"} == transports
        assert json.loads(running.get("/readyz")[1])["streams"] == 0 and running.get("/healthz")[0] == 200
        assert running.metric("nemostream_streams_failed_total") == 4
        wait_until(lambda: all(before[name].files <= files[name] for name in transports))
        wait_until(lambda: all(before[name].audio_memories == 1 for name in transports))
        wait_until(lambda: supervisor.files <= supervisor_files)


def all_ready(running: Any) -> bool:
    return all(running.get("/readyz")[0] == 200 for _ in range(8))


@pytest.mark.slow
def test_clients_of_other_protocols_get_the_error_of_a_killed_engine(serve_process: Any, spoken: Any) -> None:
    with serve_process("--transports", "1", "--no-measure") as running:
        service = riva.client.ASRService(riva.client.Auth(uri=running.address))
        config = riva.client.RecognitionConfig(
            encoding=riva.client.AudioEncoding.LINEAR_PCM, sample_rate_hertz=16000, language_code="en-US"
        )
        streaming = riva.client.StreamingRecognitionConfig(config=config, interim_results=True)

        def audio() -> Iterator[bytes]:
            yield spoken[0].pcm[:64_000]
            wait_until(lambda: running.metric("nemostream_audio_seconds_total") > 0)
            children(running)["engine"].kill()
            wait_until(lambda: running.get("/readyz")[0] == 503)
            yield spoken[0].pcm[64_000:]

        import grpc

        with pytest.raises(grpc.RpcError) as caught:
            list(service.streaming_response_generator(audio(), streaming))
        assert caught.value.code() == grpc.StatusCode.INTERNAL and SENTENCE in caught.value.details()
        wait_until(lambda: running.get("/readyz")[0] == 200)
        assert "".join(
            result.alternatives[0].transcript for result in riva_results(running, spoken[0]) if result.is_final
        )


def test_a_killed_supervisor_leaves_no_process_and_no_file(serve_process: Any, tmp_path: Path) -> None:
    with serve_process("--transports", "2", "--no-measure", TMPDIR=str(tmp_path)) as running:
        processes = list(children(running).values())
        assert len(processes) == 3 and len(list(tmp_path.iterdir())) == 1  # the temporary folder
        running.process.kill()
        wait_until(lambda: gone(processes))
        assert not list(tmp_path.iterdir())


# -- start and stop ----------------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_streams_of_all_transports(serve_process: Any, spoken: Any, tmp_path: Path) -> None:
    arguments = ["--transports", "2", "--no-measure", "--drain-seconds", "30"]
    with serve_process(*arguments, TMPDIR=str(tmp_path)) as running:
        half = len(spoken[0].pcm) // 4 * 2
        streams = [stream_at(running, f"transport-{index}") for index in range(2)]
        for stream in streams:
            stream.send(spoken[0].pcm[:half])
        processes = list(children(running).values())
        assert len(processes) == 3 and len(list(tmp_path.iterdir())) == 1  # the temporary folder
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: running.get("/readyz")[0] == 503)
        wait_until(lambda: all(running.get("/readyz")[0] == 503 for _ in range(8)))
        assert json.loads(running.get("/readyz")[1])["status"] == "draining"
        for _ in range(4):
            assert rejection(running)[0] == 503
        for stream in streams:  # the second transport finishes later: the first one still answers
            stream.send(spoken[0].pcm[half:])
            assert stream.text() == spoken[0].text
            stream.socket.close()
        assert running.process.wait(30) == 0
        assert gone(processes) and not list(tmp_path.iterdir())
    assert [line["event"] for line in running.log if line["event"] in ("draining", "stopped")] == [
        "draining",
        "stopped",
    ]


@pytest.mark.slow
def test_draining_has_a_time_limit(serve_process: Any) -> None:
    with serve_process("--transports", "2", "--no-measure", "--drain-seconds", "1") as running:
        streams = [stream_at(running, f"transport-{index}") for index in range(2)]
        processes = list(children(running).values())
        running.process.send_signal(signal.SIGTERM)
        for stream in streams:
            assert stream.last_event() == {}
        assert running.process.wait(30) == 0 and gone(processes)


def test_the_second_signal_stops_at_once(serve_process: Any, tmp_path: Path) -> None:
    arguments = ["--transports", "2", "--no-measure", "--drain-seconds", "600"]
    with serve_process(*arguments, TMPDIR=str(tmp_path)) as running:
        stream, processes = Stream(running), list(children(running).values())
        running.process.send_signal(signal.SIGINT)
        wait_until(lambda: running.get("/readyz")[0] == 503)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 0 and gone(processes) and not list(tmp_path.iterdir())
        stream.socket.close()


def test_the_second_signal_stops_transports_that_have_not_received_the_first(serve_process: Any) -> None:
    """The system merges two pending signals of one number."""
    with serve_process("--transports", "2", "--no-measure", "--drain-seconds", "600") as running:
        stream, processes = Stream(running), children(running)
        transports = [process.pid for name, process in processes.items() if name.startswith("transport")]
        assert len(transports) == 2
        for pid in transports:
            os.kill(pid, signal.SIGSTOP)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any(line["event"] == "draining" for line in running.log))
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # the supervisor sends the signals on; if it is slower, they are not pending together
        for pid in transports:
            os.kill(pid, signal.SIGCONT)
        assert running.process.wait(30) == 0 and gone(processes.values())
        stream.socket.close()


@contextmanager
def failing(*arguments: str) -> Iterator[tuple[int, str]]:
    command = [sys.executable, "-m", "nemostream", "serve", "--log-format", "json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ.copy(), check=False)
    yield done.returncode, done.stderr.splitlines()[-1]


def test_a_server_that_cannot_start_fails_as_with_one_process(two: Any, tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    broken.mkdir()
    cases = [
        ["--bundle", str(broken), "--port", "0"],
        ["--port", "0", "--grpc-port", "-1", "--device", "cuda"],  # raised in the engine process
    ]
    for arguments in cases:
        with failing(*arguments) as one, failing(*arguments, "--transports", "2") as several:
            assert several == one and one[0] > 1
    ports = {"--port": two.http, "--grpc-port": two.grpc}
    for name, port in ports.items():
        with failing(*(f"{option}={port if option == name else 0}" for option in ports), "--transports=1") as failure:
            assert failure[0] == 7
            assert f"cannot listen at 127.0.0.1:{port} (Address already in use" in failure[1] and name in failure[1]


@pytest.mark.slow
def test_tls(serve_process: Any, spoken: Any, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost -keyout {key} -out {cert}",
        shell=True,
        check=True,
        capture_output=True,
    )
    import ssl

    arguments = ["--transports", "2", "--no-measure", "--tls-cert", str(cert), "--tls-key", str(key)]
    with serve_process(*arguments) as running:
        trust = ssl.create_default_context(cafile=str(cert))
        for _ in range(4):
            with urllib.request.urlopen(f"https://localhost:{running.http}/readyz", context=trust) as answer:
                state = json.loads(answer.read())
        auth = riva.client.Auth(uri=f"localhost:{state['grpc_port']}", use_ssl=True, ssl_root_cert=str(cert))
        config = riva.client.RecognitionConfig(sample_rate_hertz=16000)
        answer = riva.client.ASRService(auth).offline_recognize(spoken[0].pcm, config)
        assert answer.results[0].alternatives[0].transcript.strip() == spoken[0].text
