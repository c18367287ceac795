"""Audio without a task (`protocols/direct.py`): clients of a real server get the same messages with and without it."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from nemostream.runtime.text.events import Event
from nemostream.serving.network.connections import Connections, WebSocketProtocol, protocol_classes
from nemostream.serving.protocols import websocket
from nemostream.serving.protocols.http import create_app
from nemostream.serving.session import Session

FINISH = json.dumps({"type": "finish"})
COMMIT = json.dumps({"type": "commit"})


def pieces(pcm: bytes, chance: random.Random) -> list[bytes]:
    """Return audio in messages of any size, odd ones too, with an empty one now and then."""
    messages, position = [], 0
    while position < len(pcm):
        size = chance.choice((0, 1, 641, 2560, 2560, 2560, 3199, 17_920, 40_000))
        messages.append(pcm[position : position + size])
        position += size
    return messages


def count_pushes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the calls of `Session.push`, from tasks, and those of `start_push` that process their audio."""
    counts = {"push": 0, "start_push": 0}
    push, start_push = Session.push, Session.start_push

    async def counted_push(self: Session, data: bytes) -> list[Event]:
        counts["push"] += 1
        return await push(self, data)

    def counted_start_push(self: Session, *arguments: Any) -> bool:
        accepted = start_push(self, *arguments)
        counts["start_push"] += accepted
        return accepted

    monkeypatch.setattr(Session, "push", counted_push)
    monkeypatch.setattr(Session, "start_push", counted_start_push)
    return counts


def without_ids(message: str) -> dict[str, Any]:
    """Return a message without the identifiers that are different in each session."""
    event = json.loads(message)
    for name in ("stream", "event_id", "item_id", "previous_item_id"):
        event.pop(name, None)
    if isinstance(session := event.get("session"), dict):
        session.pop("id")
    return dict(event)


@pytest.mark.parametrize("query", ["", "&words=1", "&endpoint_ms=400&decoder=reset"])
def test_streams_get_the_same_events(serve_here: Any, spoken: Any, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    chance = random.Random(1)
    pcm = spoken[0].pcm + bytes(40_000) + spoken[2].pcm
    messages: list[bytes | str] = [*pieces(pcm, chance), COMMIT, *pieces(spoken[1].pcm, chance), FINISH]

    def events(url: str) -> list[dict[str, Any]]:
        with connect(f"{url}/v1/stream?chunk_ms=80{query}") as client:
            for message in messages:
                client.send(message)
            return [without_ids(str(message)) for message in client]

    with serve_here(measure=False) as running:
        counts = count_pushes(monkeypatch)
        direct = events(running.socket)
        large = sum(isinstance(message, bytes) and len(message) > 32_000 for message in messages)  # over a second
        assert counts == {"push": large, "start_push": len(messages) - 2 - large} and large
        monkeypatch.setattr(WebSocketProtocol, "attach", lambda self, handler: None)
        counts.update(push=0, start_push=0)
        assert events(running.socket) == direct and counts["start_push"] == 0
    assert [event["type"] for event in direct].count("final") >= 2 and direct[-1]["type"] == "done"


def test_realtime_sessions_get_the_same_events(serve_here: Any, spoken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(2)
    update = {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}  # its bytes are noise, but the same ones
    first, second = pieces(spoken[0].pcm, chance), pieces(spoken[1].pcm, chance)
    requests: list[dict[str, Any]] = [
        *({"type": "input_audio_buffer.append", "audio": encoded(part)} for part in first),
        {"type": "input_audio_buffer.append", "audio": encoded(b"fLaC"), "event_id": 7, "other": 1},
        {"type": "input_audio_buffer.append", "audio": "***", "event_id": "e1"},
        {"type": "input_audio_buffer.append", "audio": 5},
        {"type": "input_audio_buffer.commit"},
        {"type": "session.update", "session": update},
        {"type": "input_audio_buffer.append", "audio": encoded(b"OggS" + bytes(99)), "event_id": "e2"},
        {"type": "input_audio_buffer.clear"},
        *({"type": "input_audio_buffer.append", "audio": encoded(part)} for part in second),
        {"type": "input_audio_buffer.commit"},
        {"type": "unknown", "event_id": "last"},
    ]

    def events(url: str) -> list[dict[str, Any]]:
        found = []
        with connect(f"{url}/v1/realtime", max_size=None) as client:
            for request in requests:
                client.send(json.dumps(request))
            while True:
                found.append(without_ids(str(client.recv(30))))
                if found[-1].get("error", {}).get("event_id") == "last":
                    return found

    with serve_here(measure=False) as running:
        counts = count_pushes(monkeypatch)
        direct = events(running.socket)
        large = sum(len(part) > 8000 for part in second)  # more than a second
        usual = sum(part != b"" for part in (*first, *second)) - large
        assert counts == {"push": large, "start_push": usual + 1} and large  # one is the start of a file
        monkeypatch.setattr(WebSocketProtocol, "attach", lambda self, handler: None)
        counts.update(push=0, start_push=0)
        assert events(running.socket) == direct and counts["start_push"] == 0
    kinds = [event["type"] for event in direct]
    assert kinds.count("conversation.item.input_audio_transcription.completed") >= 2
    errors = [event["error"] for event in direct if event["type"] == "error"]
    assert [error["event_id"] for error in errors] == [None, "e1", None, "e2", "last"]
    assert "is a file of type" in errors[3]["message"]


def encoded(audio: bytes) -> str:
    return base64.b64encode(audio).decode()


class Transport:
    """The transport of a connection: records what is written."""

    def __init__(self) -> None:
        self.written, self.closing, self.protocol = b"", False, None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 55), "sockname": ("127.0.0.1", 80)}.get(name, default)

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int) -> None: ...


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("path", ["/v1/stream", "/v1/realtime"])
def test_events_wait_for_a_client_that_does_not_read(
    fakes: Any, model: Any, clock: Any, path: str, reads: bool
) -> None:
    """They are not written before it reads again; a client that does not is disconnected after the send timeout."""
    service = fakes.start(model, clock, send_seconds=7)
    http, ws = protocol_classes(Connections(9, 9, 9, clock=clock))
    config = uvicorn.Config(
        create_app(service), lifespan="off", log_config=None, http=http, ws=ws, ws_per_message_deflate=False
    )
    config.load()
    message: bytes | str = bytes(3200)
    if path == "/v1/realtime":
        message = json.dumps({"type": "input_audio_buffer.append", "audio": encoded(bytes(4800))})
    opcode, data = (Opcode.TEXT, message.encode()) if isinstance(message, str) else (Opcode.BINARY, message)
    frame = Frame(opcode, data).serialize(mask=True)
    events = [
        [fakes.event("partial", "one")],
        [fakes.event("partial", "one two")],
        [fakes.event("partial", "one two three")],
    ]

    async def main() -> None:
        connection, transport = http(config, ServerState(), {}), Transport()  # type: ignore[call-arg]
        connection.connection_made(transport)
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        connection.data_received(f"{head}Sec-WebSocket-Key: {'A' * 22}==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        await asyncio.sleep(1)
        socket: Any = transport.protocol
        model.events = {"push": [list(one) for one in events]}
        socket.data_received(frame)
        assert b"one" in transport.written  # in the same callback
        socket.pause_writing()
        transport.written = b""
        for _ in range(2):
            socket.data_received(frame)
            await asyncio.sleep(1)
        assert transport.written == b""
        if reads:
            socket.resume_writing()
            await asyncio.sleep(0.1)
            assert transport.written.index(b" two") < transport.written.index(b" three")
            assert service.sessions and not transport.closing
        else:
            await asyncio.sleep(4.9)
            assert service.sessions
            await asyncio.sleep(0.2)
            assert not service.sessions and fakes.metric(service, "timeouts_total") == 1
        socket.connection_lost(None)
        await asyncio.sleep(1)

    fakes.run(clock, main())


@pytest.mark.parametrize("fault", ["audio", "failure"])
def test_errors_close_the_connection(serve_here: Any, spoken: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """With the event and the code of the error; an error of the program ends only its own connection."""
    with serve_here(measure=False) as running:
        with connect(f"{running.socket}/v1/stream") as client, connect(f"{running.socket}/v1/stream") as other:
            json.loads(client.recv())
            if fault == "audio":
                client.send(b"fLaC" + bytes(100))
                event = json.loads(client.recv())
                assert event["type"] == "error" and event["code"] == "audio" and "FLAC" in event["message"]
                with pytest.raises(ConnectionClosedError):
                    client.recv()
                assert client.close_code == 1007
            else:

                def fail(*arguments: Any) -> None:
                    raise ZeroDivisionError

                with monkeypatch.context() as patch:
                    patch.setattr(running.service, "record_latency", fail)
                    client.send(spoken[0].pcm[:30_000])
                    with pytest.raises(ConnectionClosed):
                        client.recv(30)
            other.send(spoken[0].pcm[:30_000])
            other.send(FINISH)
            assert [json.loads(message)["type"] for message in other][-1] == "done"
        assert not running.service.sessions


@given(
    st.text(),
    st.integers(0, 5),
    st.floats(0, 1e5),
    st.none() | st.sampled_from(["en", "de-DE", 'quote"']),
    st.sampled_from(["partial", "backchannel", "final"]),
)
def test_the_text_of_an_event_is_its_json(
    fakes: Any, text: str, cut: int, time: float, language: str | None, kind: str
) -> None:
    event: Callable[..., Event] = fakes.event
    one = event(kind, text, 3, stable=text[:cut], start=time / 3, end=time, audio=time * 1.1, language=language)
    assert websocket._event_text(one) == json.dumps(websocket._event_message(one, False))
