"""The load generator of `bench host`: its frames, checked with the package `websockets`, and its measurements."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading

import numpy as np
import pytest

pytest.importorskip("websockets", reason="needs the serve extra")
pytest.importorskip("grpc", reason="needs the serve extra")

from websockets.extensions import Extension
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.streams import StreamReader

from nemostream.benchmarks.harness import paced_clients
from nemostream.benchmarks.harness.paced_clients import Load, audio_position, messages, run_sockets, take_frames

NO_EXTENSIONS: list[Extension] = []


def parsed(data: bytes) -> Frame:
    """Return a client's frame as a server reads it."""
    reader = StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    parsing = Frame.parse(reader.read_exact, mask=True, max_size=None, extensions=NO_EXTENSIONS)
    try:
        next(parsing)
    except StopIteration as result:
        assert reader.at_eof
        return result.value
    raise AssertionError("the frame is not complete")


@pytest.mark.parametrize("part", [1, 3, 7, 1 << 20])
def test_frames_of_servers(part: int) -> None:
    payloads = [b"a", b"b" * 125, b"c" * 126, b"d" * 66000, b""]
    data = b"".join(Frame(Opcode.TEXT, payload).serialize(mask=False) for payload in payloads)
    found, rest = [], b""
    step = part if part > 100 else 997 * part
    for begin in range(0, len(data), step):
        frames, rest = take_frames(rest + data[begin : begin + step])
        found += frames
    assert found == [(Opcode.TEXT, payload) for payload in payloads] and rest == b""
    assert take_frames(data[:1]) == ([], data[:1]) and take_frames(data[3:6]) == ([], data[3:6])


def test_messages() -> None:
    """80 ms each: 1280 samples at 16 kHz, or 1920 at 24 kHz."""
    streams, realtime, riva = (messages(protocol, 0.08) for protocol in ("websocket", "realtime", "riva"))
    assert {len(parsed(each).data) for each in streams} == {2560} and len(set(streams)) == len(streams) > 1
    event = json.loads(parsed(realtime[0]).data)
    assert event["type"] == "input_audio_buffer.append" and len(base64.b64decode(event["audio"])) == 3840
    assert parsed(realtime[0]).opcode is Opcode.TEXT
    samples = np.frombuffer(riva[0], "<i2")
    assert len(samples) == 1280 and 1000 < samples.std() < 2500


@pytest.mark.parametrize(
    ("event", "position"),
    [
        ({"type": "partial", "text": 'say "audio": 7', "audio": 12.345, "chunk_ms": 80}, 12.345),
        ({"type": "end", "audio": 3.0}, 3.0),
        ({"type": "ready", "chunk_ms": 80}, None),
    ],
)
def test_position_of_an_event(event: dict[str, object], position: float | None) -> None:
    assert audio_position(json.dumps(event).encode()) == position


def run(protocol: str, port: int) -> tuple[paced_clients.ClientFigures, list[str]]:
    """Return the figures of one client, and the events that the parent process reads."""
    load, events = Load(port, 1, 0.02, 0.1, 0.0), list[str]()
    if protocol == "riva":
        return asyncio.run(paced_clients.run_riva(load, events.append)), events
    return run_sockets(protocol, load, events.append), events


class Peer:
    """A server for one connection: it answers the handshake and `events` messages, and closes the connection."""

    def __init__(self, accept: bool = True, events: int = 0) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self._accept, self._events = accept, events
        self.received = b""
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        connection, _ = self.listening.accept()
        with self.listening, connection:
            protocol = ServerProtocol()
            requests: list[Request] = []
            while not requests:
                protocol.receive_data(connection.recv(1 << 16))
                requests = [event for event in protocol.events_received() if isinstance(event, Request)]
            response = protocol.accept(requests[0]) if self._accept else protocol.reject(503, "full")
            protocol.send_response(response)
            connection.sendall(b"".join(protocol.data_to_send()))
            for number in range(self._events):
                while len(self.received) < (number + 1) * len(messages("websocket", 0.02)[0]):
                    if not (data := connection.recv(1 << 16)):
                        return
                    self.received += data
                event = json.dumps({"type": "partial", "audio": round(0.02 * (number + 1), 3)})
                connection.sendall(Frame(Opcode.TEXT, event.encode()).serialize(mask=False))


def test_a_client_measures_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paced_clients, "_GRACE", 0.0)
    peer, stages = Peer(events=1000), list[str]()
    figures = run_sockets("websocket", Load(peer.port, 1, 0.02, 0.2, 0.0), stages.append)
    peer.thread.join()
    assert stages == ["connected", "begin", "end"]
    assert figures.messages == len(figures.lateness) > 0 and figures.events == len(figures.latencies) > 0
    assert all(latency > 0 for latency in figures.latencies) and figures.seconds >= 0.2
    assert parsed(peer.received[: len(messages("websocket", 0.02)[0])]).data  # what the peer received are its messages


def test_a_rejected_client() -> None:
    """The parent process reads the same events, and the result has the reason."""
    peer = Peer(accept=False)
    figures, stages = run("websocket", peer.port)
    peer.thread.join()
    assert figures.errors == ["ConnectionError: the server rejected a connection: HTTP/1.1 503 Service Unavailable"]
    assert figures.seconds == 0
    assert stages == ["connected", "begin", "end"]


@pytest.mark.parametrize(("protocol", "reason"), [("websocket", "TimeoutError: timed out"), ("riva", "TimeoutError: ")])
def test_a_server_that_does_not_answer(protocol: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No client is measured, and the error is part of the result."""
    monkeypatch.setattr(paced_clients, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        figures, stages = run(protocol, listening.getsockname()[1])
    assert figures == paced_clients.ClientFigures(errors=[reason])
    assert stages == ["connected", "begin", "end"]


@pytest.mark.parametrize(("protocol", "reason"), [("websocket", "ConnectionRefusedError: "), ("riva", "UNAVAILABLE: ")])
def test_no_server(protocol: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    figures, stages = run(protocol, port)
    assert (
        len(figures.errors) == 1 and figures.errors[0].startswith(reason) and len(figures.errors[0].splitlines()) == 1
    )
    assert figures.seconds == 0 and stages == ["connected", "begin", "end"]


def test_errors_after_connecting_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("a fault of the load generator")

    monkeypatch.setattr(paced_clients, "_run_sockets", broken)
    peer = Peer()
    with pytest.raises(OSError, match="a fault"):
        run("websocket", peer.port)
    peer.thread.join()


def test_a_connection_that_the_server_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paced_clients, "_GRACE", 0.0)
    peer = Peer(events=2)
    figures = run_sockets("websocket", Load(peer.port, 1, 0.02, 0.2, 0.0), lambda event: None)
    peer.thread.join()
    assert len(figures.errors) == 1
    summary = figures.summary()
    assert summary["errors"] == figures.errors and summary["messages"] == figures.messages


def test_all_errors_are_reported() -> None:
    errors = [f"error {n}" for n in range(2400)]
    summary = paced_clients.ClientFigures(latencies=[0.1234567], errors=errors).summary()
    assert summary["errors"] == errors
    assert summary["latencies"] == [0.123457]
