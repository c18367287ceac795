"""`nemostream.client` with a scripted server: the order of messages, and every kind of loss.

The scripted server follows docs/websocket.md; it transcribes nothing. tests/serving/test_client.py uses the real one.
"""

from __future__ import annotations

import array
import asyncio
import datetime
import inspect
import ipaddress
import json
import signal
import ssl
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("websockets", reason="needs the client extra")

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from nemostream import client
from nemostream.cli.remote import RemoteModel
from nemostream.client import AsyncStream, Event, Rejected, Stream, StreamLost, Unavailable
from nemostream.errors import AudioError, OptionError, StreamError

EVENT_BYTES = 100  # of audio per partial of the scripted server
COMMIT, FINISH = {"type": "commit"}, {"type": "finish"}


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MIN_BACKOFF", 0.001)
    monkeypatch.setattr(client, "_MAX_BACKOFF", 0.02)


# -- scripted server ---------------------------------------------------------------------------------------------------


@dataclass
class Received:
    """What a server has of a stream: audio, and each control with the number of bytes before it."""

    audio: bytes = b""
    controls: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def append(self, message: bytes | dict[str, Any]) -> None:
        if isinstance(message, bytes):
            self.audio += message
        else:
            self.controls.append((len(self.audio), message))

    def up_to(self, size: int, count: int) -> Received:
        return Received(self.audio[:size], self.controls[:count])

    def events(self) -> list[dict[str, Any]]:
        """Return the events: a partial for each `EVENT_BYTES`, and one for each control."""
        events: list[dict[str, Any]] = []
        sizes = range(EVENT_BYTES, len(self.audio) + 1, EVENT_BYTES)
        ends = [(size, 0, {"type": "partial", "text": f"{size}"}) for size in sizes]
        for place, message in self.controls:
            if message["type"] == "commit":
                ends.append((place, 1, {"type": "committed"}))
            elif message["type"] == "finish":
                ends.append((place, 1, {"type": "done", "text": f"{len(self.audio)} bytes"}))
        for place, _, event in sorted(ends, key=lambda one: one[:2]):
            events.append({**event, "audio": place / 32000, "sequence": len(events) + 1})
        return events


@dataclass
class Refusal:
    """An HTTP response in place of a connection."""

    status: int
    code: str = "state"
    headers: dict[str, str] = field(default_factory=dict)


class Session:
    """A connection of a stream, as scripts use it."""

    def __init__(self, cluster: Cluster, socket: ServerConnection, token: str, sequence: int) -> None:
        self.cluster, self.socket, self.token = cluster, socket, token
        self.received = cluster.store[token].up_to(1 << 62, 1 << 62)
        self.sequence = sequence  # of the last event that the client has
        self.receipts: list[int] = []  # numbers of `received`
        self.keepalives = 0

    async def receive(self) -> bool:
        """Receive one message of audio or control, and send its events. Return whether it was `finish`."""
        while True:
            data = await self.socket.recv()
            message = data if isinstance(data, bytes) else json.loads(data)
            if isinstance(message, bytes) or message["type"] in ("commit", "configure", "finish"):
                break
            self.keepalives += message["type"] == "keepalive"
            if message["type"] == "received":
                self.receipts.append(message["sequence"])
        self.received.append(message)
        await self.send_events()
        return message == FINISH

    async def send_events(self) -> None:
        for event in self.received.events()[self.sequence :]:
            await self.send(**event)
            self.sequence = event["sequence"]

    async def send(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def keep(self, size: int | None = None, count: int | None = None) -> None:
        """Store what was received, or its first `size` bytes and `count` controls, and report it."""
        size = len(self.received.audio) if size is None else size
        count = len(self.received.controls) if count is None else count
        state = self.cluster.store[self.token] = self.received.up_to(size, count)
        await self.send(type="stored", bytes=size, controls=count, sequence=len(state.events()))

    async def serve(self, store: bool = True) -> None:
        """Serve the stream to its end."""
        while not await self.receive():
            if store:
                await self.keep()
        await self.socket.close()


Script = Callable[[Session], Awaitable[Any]] | Refusal


async def serve_all(session: Session) -> None:
    await session.serve()


async def serve_all_unstored(session: Session) -> None:
    await session.serve(store=False)


class Cluster:
    """Servers that share a store. Each connection is served by the next of `scripts`, or to its end if none is left."""

    def __init__(self, *scripts: Script, resumption: bool = True) -> None:
        self.scripts = deque(scripts)
        self.resumption = resumption  # whether states are kept
        self.store: dict[str, Received] = {}
        self.requests: list[tuple[int, dict[str, str]]] = []  # number of the server, and query
        self.headers: list[Any] = []
        self.sessions: list[Session] = []
        self.errors: list[Exception] = []  # of scripts
        self.servers: list[Server] = []
        self.tls: Any = None

    async def start(self, script: Script | None = None) -> str:
        """Start a server; if `script` is given, it serves all its connections. Return its URL."""
        number = len(self.servers)

        async def check(socket: ServerConnection, request: Request) -> Response | None:
            query = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
            self.requests.append((number, query))
            self.headers.append(request.headers)
            step = script or (self.scripts.popleft() if self.scripts else serve_all)
            if "resume" in query and query["resume"] not in self.store and not isinstance(step, Refusal):
                step = Refusal(404)
            if not isinstance(step, Refusal):
                socket.step, socket.query = step, query  # type: ignore[attr-defined]
                return None
            error = {"message": f"refused with {step.status}.", "code": step.code}
            response = socket.respond(HTTPStatus(step.status), json.dumps({"error": error}))
            for name, value in step.headers.items():
                response.headers[name] = value
            return response

        async def handle(socket: Any) -> None:
            token = socket.query.get("resume") or f"token-{len(self.store):021}"
            self.store.setdefault(token, Received())
            session = Session(self, socket, token, int(socket.query.get("received", 0)))
            self.sessions.append(session)
            ready: dict[str, Any] = {"type": "ready", "stream": token}
            if self.resumption:
                state = session.received
                position = {"bytes": len(state.audio), "controls": len(state.controls), "sequence": len(state.events())}
                ready["resumption"] = {"version": 1, "token": token, "seconds": 300.0, **position}
            else:
                ready["resumption"] = None
            try:
                await session.send(**ready)
                await session.send_events()
                if FINISH in [message for _, message in session.received.controls]:
                    await socket.close()
                else:
                    await socket.step(session)
            except ConnectionClosed:
                pass
            except Exception as error:
                self.errors.append(error)

        server = await serve(
            handle,
            "127.0.0.1",
            0,
            process_request=check,
            compression=None,
            ping_interval=None,
            close_timeout=0.2,
            ssl=self.tls,
        )
        self.servers.append(server)
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"

    async def stop(self) -> None:
        for session in self.sessions:
            session.socket.transport.abort()
        for server in self.servers:
            server.close()
            await server.wait_closed()
        assert self.errors == []


@asynccontextmanager
async def running(*scripts: Script, count: int = 1, **options: Any) -> AsyncIterator[tuple[Cluster, list[str]]]:
    cluster = Cluster(*scripts, **options)
    try:
        yield cluster, [await cluster.start() for _ in range(count)]
    finally:
        await cluster.stop()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test, and check that no task is left behind."""

    async def guarded() -> None:
        async with asyncio.timeout(30):  # a failure instead of a run without end
            await main
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in left if "AsyncStream" in repr(task)]

    asyncio.run(guarded())


def audio(size: int, start: int = 0) -> bytes:
    """Return bytes that differ from one position to another."""
    return bytes((index * 7 + index // 251) % 256 for index in range(start, start + size))


async def send_all(stream: AsyncStream, messages: list[bytes | dict[str, Any]]) -> None:
    for message in messages:
        if isinstance(message, bytes):
            await stream.send(message)
        else:
            await (stream.commit() if message == COMMIT else stream.finish())
        await asyncio.sleep(0)


async def closed_url() -> str:
    """Return the URL of a port on which nothing listens."""
    async with running() as (_, urls):
        return urls[0]


def sent_once(messages: list[bytes | dict[str, Any]]) -> Received:
    received = Received()
    for message in messages:
        received.append(message)
    return received


# -- one connection ----------------------------------------------------------------------------------------------------


def test_events_are_those_of_the_server() -> None:
    words = [
        {"text": "one", "start": 0.1, "end": 0.2, "confidence": 0.5},
        {"text": "two", "start": 0.3, "end": 0.4, "confidence": 1, "language": "de-DE"},
    ]
    texts = {
        "utterance": 0,
        "text": "one two",
        "stable": "one",
        "language": "de-DE",
        "start": 0.1,
        "end": 0.4,
        "audio": 0.5,
        "chunk_ms": 80,
    }

    async def script(session: Session) -> None:
        await session.receive()
        await session.send(type="partial", **texts, words=words, words_from=0, sequence=1)
        await session.send(type="news", text="of a later version")
        await session.send(type="final", **texts | {"stable": "one two"}, words=words, words_from=0, sequence=2)
        await session.send(type="end", utterance=0, reason="silence", time=1.25, audio=1.5, chunk_ms=80, sequence=3)
        await session.send(type="done", text="one  two", audio=2.0, sequence=4)
        await session.socket.close()

    async def main() -> None:
        async with (
            running(script) as (cluster, urls),
            AsyncStream(
                urls[0] + "/",
                api_key="secret",
                sample_rate=8000,
                encoding="mulaw",
                chunk_ms=80,
                words=True,
                vad=False,
                phrases={"Zoë": 2},
                language=None,
            ) as stream,
        ):
            await stream.send(b"\0" * 8)
            events = [event async for event in stream]
            assert stream.text == "one  two"
        first, second = client.Word("one", 0.1, 0.2, 0.5), client.Word("two", 0.3, 0.4, 1, "de-DE")
        partial = Event("partial", 0, "one two", "one", 0.1, 0.4, 0.5, 80, "de-DE", (first, second), 0, None, 1)
        assert events[0] == partial and hash(partial)
        assert (events[1].stable, events[1].sequence) == ("one two", 2)
        assert events[2] == Event("end", 0, "", "", 1.25, 1.25, 1.5, 80, reason="silence", sequence=3)
        assert events[3] == Event("done", text="one  two", audio=2.0, sequence=4)
        assert len(events) == 4 and (stream.reconnects, stream.gaps) == (0, [])
        options = {"sample_rate": "8000", "encoding": "mulaw", "chunk_ms": "80", "words": "1", "vad": "0"}
        assert cluster.requests == [(0, options | {"phrases": '{"Zoë": 2}', "resumable": "1"})]
        assert cluster.headers[0]["Authorization"] == "Bearer secret"

    run(main())


def test_messages_arrive_in_order() -> None:
    async def main() -> None:
        async with running() as (cluster, urls), AsyncStream(urls) as stream:
            await stream.send(audio(300_000))  # several messages
            await stream.configure(chunk_ms=80, final_chunk_ms=None)
            await stream.commit()
            await stream.send(audio(10, 300_000))
            await stream.finish()
            with pytest.raises(StreamError, match="finished"):
                await stream.send(b"12")
            events = [event async for event in stream]
        received = cluster.sessions[0].received
        assert received.audio == audio(300_010)
        configure = {"type": "configure", "chunk_ms": 80, "final_chunk_ms": None}
        assert received.controls == [(300_000, configure), (300_000, COMMIT), (300_010, FINISH)]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1)) and events[-1].type == "done"
        assert stream.text == events[-1].text == "300010 bytes"

    run(main())


def test_stored_is_answered_with_received() -> None:
    async def script(session: Session) -> None:
        await session.receive()
        await session.keep()
        await session.serve()

    async def main() -> None:
        async with running(script) as (cluster, urls), AsyncStream(urls) as stream:
            await stream.send(audio(350))
            await anext(stream)
            while not (receipts := cluster.sessions[0].receipts):
                await stream.send(audio(2))
                await asyncio.sleep(0.01)
            assert receipts[0] == 3  # events of 350 bytes
            await stream.finish()
            assert [event async for event in stream][-1].type == "done"

    run(main())


def test_an_idle_stream_is_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_KEEPALIVE_SECONDS", 0.02)

    async def main() -> None:
        async with running() as (cluster, urls), AsyncStream(urls) as stream:
            while not cluster.sessions[0].keepalives:
                await asyncio.sleep(0.01)
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]

    run(main())


def test_a_connection_that_answers_pings_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PING_SECONDS", 0.1)

    async def main() -> None:
        async with running() as (cluster, urls), AsyncStream(urls) as stream:
            await asyncio.sleep(1)
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]
            assert len(cluster.requests) == 1

    run(main())


def test_an_invalid_configure_is_an_event() -> None:
    async def script(session: Session) -> None:
        await session.receive()
        await session.send(type="rejected", code="option", message="no such language: xx.")
        await session.serve()

    async def main() -> None:
        async with running(script) as (_, urls), AsyncStream(urls) as stream:
            await stream.configure(language="xx")
            assert await anext(stream) == Event("rejected", reason="no such language: xx.")
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]

    run(main())


@pytest.mark.parametrize(("code", "kind"), [("option", Rejected), ("audio", AudioError)])
def test_errors_of_the_client_are_final(code: str, kind: type[Exception]) -> None:
    async def script(session: Session) -> None:
        await session.receive()
        await session.send(type="error", code=code, message="the reason.")
        await session.socket.close(1008)

    async def main() -> None:
        async with running(script) as (cluster, urls):
            async with AsyncStream(urls) as stream:
                await stream.send(audio(100))
                with pytest.raises(kind, match=r"^http://127.0.0.1:\d+: the reason\.$"):
                    assert [event.type async for event in stream] == ["partial"]
                with pytest.raises(kind):
                    await stream.send(audio(2))
            assert len(cluster.requests) == 1

    run(main())


@pytest.mark.parametrize(
    "message", ["no JSON", "[]", "{}", '{"type": "stored"}', '{"type": "partial", "words": [{}]}', b"\xff"]
)
def test_invalid_messages_of_a_server(message: str | bytes) -> None:
    async def script(session: Session) -> None:
        await session.socket.send(message)
        await session.serve()

    async def main() -> None:
        async with running(script) as (_, urls), AsyncStream(urls) as stream:
            with pytest.raises(StreamLost, match="invalid message"):
                await anext(stream)

    run(main())


def test_stored_audio_that_was_not_sent() -> None:
    async def script(session: Session) -> None:
        await session.send(type="stored", bytes=2, controls=0, sequence=0)
        await session.serve()

    async def main() -> None:
        async with running(script) as (_, urls), AsyncStream(urls) as stream:
            with pytest.raises(StreamLost, match="has stored 2 bytes and 0 controls, but 0 bytes"):
                await anext(stream)

    run(main())


def test_tls(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="needs cryptography")
    server_tls, client_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    pem = tmp_path / "certificate.pem"
    pem.write_bytes(certificate())
    server_tls.load_cert_chain(pem)
    client_tls.load_verify_locations(pem)

    async def main() -> None:
        cluster = Cluster()
        cluster.tls = server_tls
        try:
            url = await cluster.start()
            async with AsyncStream(url, ssl=client_tls) as stream:
                await stream.finish()
                assert [event.type async for event in stream] == ["done"]
            with pytest.raises(Unavailable, match="certificate verify failed"):
                await AsyncStream(url).open()
        finally:
            await cluster.stop()

    run(main())


def certificate() -> bytes:
    """Return a key and a self-signed certificate of 127.0.0.1 in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    return key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(pem)


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://host:x",
        "http://host?a=1",
        "ws://user@host",
        "http://[::1",
    ],
)
def test_invalid_urls(url: str) -> None:
    with pytest.raises(OptionError, match="URL"):
        AsyncStream(url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"servers": []}, "no server"),
        ({"encoding": "mp3"}, "encoding is 'mp3'"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"channels": "2"}, "channels is '2'"),
        ({"max_buffered_seconds": 0}, "max_buffered_seconds is 0"),
        ({"max_reconnect_seconds": float("nan")}, "max_reconnect_seconds is nan"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AsyncStream(**{"servers": "http://127.0.0.1:8000"} | options)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 200])
def test_a_rejected_stream_is_not_tried_elsewhere(status: int) -> None:
    async def main() -> None:
        async with running(Refusal(status, "option"), count=2) as (cluster, urls):
            with pytest.raises(Rejected, match=rf"HTTP {status}, refused with {status}\.$|HTTP 200"):
                await AsyncStream(urls).open()
            assert len(cluster.requests) == 1

    run(main())


@pytest.mark.parametrize("status", [429, 503, 500])
def test_the_next_server_accepts_the_stream(status: int) -> None:
    async def main() -> None:
        async with running(Refusal(status, "capacity", {"Retry-After": "2"}), count=2) as (cluster, urls):
            async with AsyncStream([await closed_url(), *urls]) as stream:
                await stream.finish()
                assert [event.type async for event in stream] == ["done"]
            assert [number for number, _ in cluster.requests] == [0, 1]

    run(main())


def test_no_server_accepts_the_stream() -> None:
    async def main() -> None:
        closed = await closed_url()
        async with running(Refusal(429, "capacity")) as (_, urls):
            with pytest.raises(Unavailable) as caught:
                await AsyncStream([urls[0], closed]).open()
        assert str(caught.value) == (
            f"no server accepted the stream: {urls[0]}: HTTP 429, refused with 429; {closed}: Connection refused."
        )
        assert caught.value.text == "" and caught.value.exit_code == StreamError.exit_code

    run(main())


def test_an_error_in_place_of_ready() -> None:
    async def refuse(socket: ServerConnection) -> None:
        await socket.send('{"type": "error", "code": "draining", "message": "the server is stopping."}')
        await socket.close(1012)

    async def hang_up(socket: ServerConnection) -> None:
        socket.transport.abort()

    async def main() -> None:
        for handler, reason in ((refuse, "the server is stopping"), (hang_up, "was lost")):
            async with await serve(handler, "127.0.0.1", 0) as server:
                url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
                with pytest.raises(Unavailable, match=f": {reason}"):
                    await AsyncStream(url).open()

    run(main())


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to the request nor, after the handshake, with `ready`."""
    monkeypatch.setattr(client, "_CONNECT_SECONDS", 0.1)

    async def main() -> None:
        accepted: list[Any] = []
        server = await asyncio.start_server(lambda *streams: accepted.append(streams), "127.0.0.1", 0)
        async with await serve(ServerConnection.wait_closed, "127.0.0.1", 0) as silent:
            for listener in (*server.sockets, *silent.sockets):
                with pytest.raises(Unavailable, match=r": timed out( during opening handshake)?\.$"):
                    await AsyncStream(f"http://127.0.0.1:{listener.getsockname()[1]}").open()
        for _, writer in accepted:
            writer.close()
        server.close()

    run(main())


def test_a_stream_is_opened_once() -> None:
    async def main() -> None:
        stream = AsyncStream("http://127.0.0.1:8000")
        with pytest.raises(StreamError, match="not open"):
            await stream.send(b"12")
        async with running() as (_, urls), AsyncStream(urls) as stream:
            with pytest.raises(StreamError, match="opened before"):
                await stream.open()

    run(main())


# -- servers without resumption ----------------------------------------------------------------------------------------


def test_a_server_without_resumption() -> None:
    async def cut(session: Session) -> None:
        await session.receive()
        session.socket.transport.abort()

    async def main() -> None:
        async with running(serve_all_unstored, resumption=False) as (cluster, urls):
            async with AsyncStream(urls, max_buffered_seconds=0.1) as stream:
                assert not stream.resumable
                await stream.send(audio(200_000))  # more than the buffer
                await stream.finish()
                assert [event async for event in stream][-1].text == "200000 bytes"
            cluster.scripts = deque([cut])
            async with AsyncStream(urls) as stream:
                await stream.send(audio(250))
                with pytest.raises(StreamLost, match=r"was lost; the server does not store streams") as caught:
                    assert [event.text async for event in stream] == ["100", "200"]
                assert caught.value.text == "200" and stream.reconnects == 0

    run(main())


# -- losses ------------------------------------------------------------------------------------------------------------


async def reset(session: Session) -> None:
    session.socket.transport.abort()


async def end_of_file(session: Session) -> None:
    session.socket.transport.close()


async def freeze(session: Session) -> None:
    session.socket.transport.pause_reading()  # no pong either
    await session.socket.wait_closed()


def closing(code: int, *messages: dict[str, Any]) -> Script:
    async def close(session: Session) -> None:
        for message in messages:
            await session.send(**message)
        await session.socket.close(code)

    return close


def error(code: str) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": f"an error of code {code}."}


MOVED = {"type": "moved", "message": "the server is stopping."}
LOSSES = {
    "reset": reset,
    "end of file": end_of_file,
    "frozen": freeze,
    **{str(code): closing(code) for code in (1000, 1001, 1011, 1012, 1013)},
    "moved": closing(1012, MOVED),
    "model": closing(1011, error("model")),
    "expired": closing(1008, error("expired")),
    "draining": closing(1012, error("draining")),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("stored", [True, False])
def test_a_lost_connection_is_resumed(name: str, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PING_SECONDS", 0.1)
    messages: list[bytes | dict[str, Any]] = [audio(230), COMMIT, audio(230, 230), audio(300, 460), FINISH]

    async def lose(session: Session) -> None:
        for _ in range(3):
            await session.receive()
        if stored:
            await session.keep(size=250)  # within the second message of audio
        await LOSSES[name](session)

    async def main() -> None:
        async with running(lose) as (cluster, urls), AsyncStream(urls) as stream:
            sending = asyncio.create_task(send_all(stream, messages))
            events = [event async for event in stream]
            await sending
        first, second = cluster.sessions
        expected = sent_once(messages)
        assert [(event.type, event.text, event.sequence) for event in events] == [
            (event["type"], event.get("text", ""), event["sequence"]) for event in expected.events()
        ]
        assert second.received == expected and stream.text == "760 bytes"
        results = sum(event["type"] not in ("partial", "backchannel") for event in expected.events()[: first.sequence])
        query = {"resume": first.token, "received": str(first.sequence), "results": str(results)}
        assert cluster.requests[1] == (0, query)
        assert stream.reconnects == 1 and len(stream.gaps) == 1 and stream.gaps[0] > 0

    run(main())


def test_a_frozen_server_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The send buffers are full, so that not even a ping can be sent."""
    monkeypatch.setattr(client, "_PING_SECONDS", 0.3)
    monkeypatch.setitem(globals(), "EVENT_BYTES", 1 << 30)

    async def main() -> None:
        scripts = freeze, serve_all_unstored
        async with running(*scripts) as (cluster, urls), AsyncStream(urls, max_buffered_seconds=600) as stream:
            await stream.send(bytes(8 << 20))
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]
            assert cluster.sessions[0].received == Received() and stream.reconnects == 1
            assert cluster.sessions[1].received == Received(bytes(8 << 20), [(8 << 20, FINISH)])

    run(main())


def test_the_server_of_the_stream_is_tried_first_and_then_the_others() -> None:
    async def stop(session: Session) -> None:
        await session.receive()
        await session.keep()
        session.cluster.servers[1].close(close_connections=False)
        session.socket.transport.abort()

    async def main() -> None:
        async with running(Refusal(503), stop, Refusal(503), count=3) as (cluster, urls), AsyncStream(urls) as stream:
            await send_all(stream, [audio(200), FINISH])
            assert [event.text async for event in stream][-1] == "200 bytes"
            assert [number for number, _ in cluster.requests] == [0, 1, 2, 0]

    run(main())


@pytest.mark.parametrize("script", [closing(1012, MOVED), freeze])
def test_a_stream_moves_to_the_next_server(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PING_SECONDS", 0.1)

    async def main() -> None:
        async with running(script, count=3) as (cluster, urls), AsyncStream(urls) as stream:
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]
            assert [number for number, _ in cluster.requests] == [0, 1]

    run(main())


def test_a_full_server_is_tried_again() -> None:
    async def main() -> None:
        refusals = [Refusal(429, "capacity", {"Retry-After": "0"}), Refusal(503, "draining"), Refusal(500, "model")]
        async with running(reset, *refusals) as (cluster, urls), AsyncStream(urls) as stream:
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]
            assert len(cluster.requests) == 5 and stream.reconnects == 1

    run(main())


def test_retry_after_is_respected() -> None:
    async def main() -> None:
        busy = Refusal(503, "capacity", {"Retry-After": "600"})
        async with running(reset, busy, *[Refusal(503)] * 3, count=2) as (cluster, urls), AsyncStream(urls) as stream:
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]
            assert [number for number, _ in cluster.requests] == [0, 0, 1, 1, 1, 1]

    run(main())


def test_a_stopping_server_is_tried_again_soon() -> None:
    """Its URL may be that of a load balancer, which selects another server then."""

    async def main() -> None:
        stopping = [Refusal(503, "draining", {"Retry-After": "600"})] * 2
        async with running(reset, *stopping) as (cluster, urls), AsyncStream(urls) as stream:
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]
            assert len(cluster.requests) == 4 and stream.reconnects == 1

    run(main())


@pytest.mark.parametrize("status", [404, 400, 401])
def test_a_final_refusal_of_one_server(status: int) -> None:
    """Its store may not be shared, or its version may be an older one."""

    async def main() -> None:
        async with running(reset, Refusal(status), count=2) as (cluster, urls), AsyncStream(urls) as stream:
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]
            assert [number for number, _ in cluster.requests] == [0, 0, 1]

    run(main())


def test_no_server_has_the_state() -> None:
    async def lose(session: Session) -> None:
        await session.receive()
        await session.send(type="final", text="one", sequence=3)
        await session.send(type="partial", text="tw", sequence=4)
        session.socket.transport.abort()

    async def main() -> None:
        async with running(lose, Refusal(404), Refusal(404), count=2) as (cluster, urls), AsyncStream(urls) as stream:
            await stream.send(audio(200))
            with pytest.raises(StreamLost, match=r"no server can resume the stream: .*404.*404") as caught:
                while True:
                    await anext(stream)
            assert caught.value.text == "one tw" and stream.text == "one"
            assert [number for number, _ in cluster.requests] == [0, 0, 1]
            depths = []
            for _ in range(2):
                with pytest.raises(StreamLost) as caught:
                    await stream.finish()
                depths.append(len(caught.traceback))
            assert depths[0] == depths[1]  # the traceback of an error that is raised again does not grow

    run(main())


@pytest.mark.parametrize("status", [403, 409])
def test_a_refusal_that_concerns_all_servers(status: int) -> None:
    async def main() -> None:
        async with running(reset, Refusal(status), count=2) as (cluster, urls), AsyncStream(urls) as stream:
            with pytest.raises(StreamLost, match=f"does not resume the stream: HTTP {status}"):
                await anext(stream)
            assert len(cluster.requests) == 2

    run(main())


def test_servers_that_stay_away() -> None:
    async def main() -> None:
        closed = await closed_url()
        async with running(reset) as (cluster, urls), AsyncStream([*urls, closed], max_reconnect_seconds=0.5) as stream:
            await stream.send(audio(2))
            cluster.servers[0].close(close_connections=False)
            with pytest.raises(Unavailable, match=r"for 0.5 s: .*Connection refused; .*Connection refused\.$"):
                await anext(stream)

    run(main())


def test_a_stream_that_makes_servers_fail() -> None:
    """The connection succeeds each time, and no event is new."""

    async def main() -> None:
        async with running() as (cluster, _):
            url = await cluster.start(closing(1011, error("model")))
            async with AsyncStream(url) as stream:
                with pytest.raises(StreamLost, match=r"9 connections in a row .*an error of code model\.$"):
                    await anext(stream)
            assert len(cluster.requests) == 9

    run(main())


def test_known_events_are_ignored_and_missing_ones_detected() -> None:
    async def repeat(session: Session) -> None:
        for sequence in (1, 2, 1, 2, 3, 5):
            await session.send(type="partial", text=str(sequence), sequence=sequence)
        await session.socket.wait_closed()

    async def main() -> None:
        async with running(repeat) as (_, urls), AsyncStream(urls) as stream:
            assert [(await anext(stream)).text for _ in range(3)] == ["1", "2", "3"]
            with pytest.raises(StreamLost, match="skipped the events 4 to 4"):
                await anext(stream)

    run(main())


def test_a_resumed_stream_without_resumption() -> None:
    async def main() -> None:
        async with running(reset) as (cluster, urls), AsyncStream(urls) as stream:
            cluster.resumption = False
            with pytest.raises(StreamLost, match="did not resume"):
                await anext(stream)

    run(main())


def test_a_stream_that_was_finished_before_the_loss() -> None:
    async def lose(session: Session) -> None:
        session.sequence = 1000  # it sends no event
        while not await session.receive():
            pass
        await session.keep()
        session.socket.transport.abort()

    async def main() -> None:
        async with running(lose) as (cluster, urls), AsyncStream(urls) as stream:
            await send_all(stream, [audio(100), FINISH])
            assert [event.type async for event in stream] == ["partial", "done"]
            assert cluster.requests[1][1]["received"] == "0"
            assert cluster.sessions[1].socket.close_code == 1000

    run(main())


# -- any order of losses -----------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[bytes | dict[str, Any]], list[list[tuple[int, float]]]]:
    """Draw messages, and for each lost connection after how many messages which part of the stream is stored."""
    sizes = draw(st.lists(st.one_of(st.none(), st.integers(1, 400)), min_size=1, max_size=8))
    messages: list[bytes | dict[str, Any]] = []
    start = 0
    for size in sizes:
        messages.append(COMMIT if size is None else audio(size, start))
        start += size or 0
    messages.append(FINISH)
    step = st.tuples(st.integers(0, 3), st.floats(0, 1))
    return messages, draw(st.lists(st.lists(step, max_size=3), max_size=5))


@settings(max_examples=60)
@given(plans())
def test_everything_is_received_once(plan: tuple[list[bytes | dict[str, Any]], list[list[tuple[int, float]]]]) -> None:
    messages, losses = plan

    def script(steps: list[tuple[int, float]]) -> Script:
        async def lose(session: Session) -> None:
            for count, share in steps:
                for _ in range(count):
                    if await session.receive():
                        return await session.socket.close()
                received, kept = session.received, session.cluster.store[session.token]
                size = len(kept.audio) + int(share * (len(received.audio) - len(kept.audio)))
                controls = sum(place < size for place, _ in received.controls)
                if share > 0.5:
                    controls = sum(place <= size for place, _ in received.controls)
                await session.keep(size, max(controls, len(kept.controls)))
            session.socket.transport.abort()

        return lose

    async def main() -> None:
        async with running(*map(script, losses), count=2) as (cluster, urls), AsyncStream(urls) as stream:
            sending = asyncio.create_task(send_all(stream, messages))
            events = [event async for event in stream]
            await sending
        expected = sent_once(messages)
        assert cluster.sessions[-1].received == expected
        assert [(event.type, event.text, event.sequence) for event in events] == [
            (event["type"], event.get("text", ""), event["sequence"]) for event in expected.events()
        ]
        assert stream.reconnects == len(cluster.sessions) - 1

    run(main())


# -- buffer ------------------------------------------------------------------------------------------------------------


def test_send_waits_until_audio_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MESSAGE_BYTES", 1000)
    proceed = asyncio.Event()

    async def script(session: Session) -> None:
        while len(session.received.audio) < 4000:
            await session.receive()
        await proceed.wait()
        await session.keep(2500)
        while len(session.received.audio) < 6500:
            await session.receive()
        await session.keep()
        await session.serve()

    async def main() -> None:
        async with running(script) as (cluster, urls), AsyncStream(urls, max_buffered_seconds=0.125) as stream:
            sending = asyncio.create_task(stream.send(audio(10_000)))
            while not cluster.sessions or len(cluster.sessions[0].received.audio) < 4000:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert len(cluster.sessions[0].received.audio) == 4000 == stream._backlog.size  # 0.125 s
            proceed.set()
            await sending
            assert stream._backlog.size <= 4000 + 1000
            session = cluster.sessions[0]
            await stream.commit()
            while len(session.received.audio) < 10_000:
                await asyncio.sleep(0.01)
            assert session.received.audio == audio(10_000)

    run(main())


def test_a_control_of_another_task_does_not_divide_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MESSAGE_BYTES", 1000)

    async def main() -> None:
        async with running() as (cluster, urls), AsyncStream(urls, max_buffered_seconds=0.125) as stream:
            sending = asyncio.create_task(stream.send(audio(20_000)))  # it waits for room
            await asyncio.sleep(0)
            await stream.commit()
            await sending
            await stream.finish()
            assert [event async for event in stream][-1].text == "20000 bytes"
            assert cluster.sessions[0].received.controls == [(20_000, COMMIT), (20_000, FINISH)]

    run(main())


def test_a_server_that_stores_nothing_does_not_stop_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MESSAGE_BYTES", 1000)
    monkeypatch.setattr(client, "_STORE_SECONDS", 0.1)
    sizes: list[int] = []

    async def script(session: Session) -> None:
        while len(session.received.audio) < 50_000:
            await session.receive()
        session.socket.transport.abort()

    async def main() -> None:
        async with running(script) as (_, urls), AsyncStream(urls, max_buffered_seconds=0.125) as stream:
            for start in range(0, 50_000, 500):
                await stream.send(audio(500, start))
                sizes.append(stream._backlog.size)
            with pytest.raises(StreamLost) as caught:
                async for event in stream:
                    assert event.type == "partial"
        assert "has stored the audio up to 0.00 s, and the client has kept that from 1.4" in str(caught.value)
        assert "(max_buffered_seconds=0.125): 1.4" in str(caught.value) and str(caught.value).endswith(" s are lost.")
        assert max(sizes) <= 5000 and caught.value.text == "50000"

    run(main())


def test_a_stream_is_resumable_again_after_its_audio_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MESSAGE_BYTES", 1000)
    monkeypatch.setattr(client, "_STORE_SECONDS", 0.2)

    async def script(session: Session) -> None:
        while len(session.received.audio) < 20_000:
            await session.receive()
        await session.keep(19_000)
        while not session.receipts:
            await session.receive()
        session.socket.transport.abort()

    async def main() -> None:
        async with running(script) as (cluster, urls), AsyncStream(urls, max_buffered_seconds=0.125) as stream:
            await stream.send(audio(20_000))
            while not cluster.sessions[0].receipts:
                await asyncio.sleep(0)
            sending = asyncio.create_task(send_all(stream, [audio(10_000, 20_000), FINISH]))
            events = [event async for event in stream]
            await sending
            assert events[-1].text == "30000 bytes" and len(events) == 301
            assert cluster.sessions[1].received.audio == audio(30_000)

    run(main())


def test_audio_is_kept_while_no_server_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is dropped meanwhile: `send` waits."""
    monkeypatch.setattr(client, "_MESSAGE_BYTES", 1000)
    monkeypatch.setattr(client, "_STORE_SECONDS", 0.0)

    async def main() -> None:
        refusals = [Refusal(503)] * 10
        async with (
            running(reset, *refusals) as (cluster, urls),
            AsyncStream(urls, max_buffered_seconds=0.125) as stream,
        ):
            while len(cluster.requests) < 2:
                await asyncio.sleep(0)
            await send_all(stream, [audio(20_000), FINISH])
            assert stream.reconnects == 1
            assert [event async for event in stream][-1].text == "20000 bytes"
            assert cluster.sessions[1].received.audio == audio(20_000)

    run(main())


@pytest.mark.parametrize(
    ("encoding", "pcm", "size"),
    [
        ("pcm_s16le", b"1234", 4),
        ("pcm_s16le", bytearray(b"1234"), 4),
        ("pcm_s16le", memoryview(b"1234")[::2], 2),
        ("pcm_s16le", array.array("h", [1, 2]), 4),
        ("pcm_s16le", np.array([1, 2], "<i2"), 4),
        ("pcm_s16le", np.array([[1], [2]], np.int16), 4),
        ("pcm_s16le", np.arange(6, dtype=np.int16)[::2], 6),
        ("pcm_f32le", np.array([1, 2], np.float32), 8),
        ("mulaw", np.array([1, 2], np.uint8), 2),
        ("pcm_s16le", np.array([1, 2], ">i2"), "format '>h' and 2 byte"),
        ("pcm_s16le", np.array([1.0]), "format 'd' and 8 byte.*pcm_s16le: send int16"),
        ("pcm_s16le", np.array([1.0], np.float32), "format 'f'"),
        ("pcm_f32le", np.array([1], np.int16), "format 'h'.*pcm_f32le: send float32"),
        ("pcm_s16le", np.array([1], np.int8), "format 'b'"),
        ("pcm_s16le", np.zeros((2, 2), np.int16), r"shape \[2, 2\], but the stream has 1 channel"),
        ("pcm_s16le", np.zeros((1, 2, 1), np.int16), r"shape \[1, 2, 1\]"),
        ("pcm_s16le", [1, 2], "type list"),
        ("pcm_s16le", "12", "type str"),
    ],
)
def test_formats_of_audio(encoding: str, pcm: Any, size: int | str) -> None:
    async def main() -> None:
        async with running() as (cluster, urls), AsyncStream(urls, encoding=encoding) as stream:
            if isinstance(size, str):
                with pytest.raises(AudioError, match=size):
                    await stream.send(pcm)
                return
            await stream.send(pcm)
            await stream.finish()
            assert [event.type async for event in stream] == ["done"]
            expected = pcm.tobytes() if hasattr(pcm, "tobytes") else bytes(pcm)
            assert cluster.sessions[0].received.audio == expected and len(expected) == size

    run(main())


# -- closing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [serve_all, freeze, reset])
def test_closing_early_ends_all_tasks(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "EVENT_BYTES", 1 << 30)

    async def main() -> None:
        async with running(script, *[Refusal(503)] * 100) as (_, urls):
            async with AsyncStream(urls) as stream:
                await stream.send(bytes(3 << 20))  # more than the buffers of the connection hold
                reading = asyncio.create_task(anext(stream))
                await asyncio.sleep(0.05)
                connection = stream._connection
            assert script is reset or (connection and connection.socket.transport.is_closing())
            for call in (reading, stream.send(b"12"), anext(stream)):
                with pytest.raises(StreamError, match=r"^the stream is closed\.$"):
                    await call
            await stream.close()
            assert not [task for task in asyncio.all_tasks() if "AsyncStream" in repr(task)]

    run(main())


def test_cancellation_ends_all_tasks() -> None:
    async def main() -> None:
        async with running() as (_, urls):

            async def use() -> None:
                async with AsyncStream(urls) as stream:
                    await anext(stream)

            task = asyncio.create_task(use())
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert not [task for task in asyncio.all_tasks() if "AsyncStream" in repr(task)]

    run(main())


def test_a_cancelled_read_loses_no_event() -> None:
    async def main() -> None:
        async with running() as (_, urls), AsyncStream(urls) as stream:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(stream)
            await send_all(stream, [audio(100), FINISH])
            assert [event.type async for event in stream] == ["partial", "done"]

    run(main())


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Any:
    """A function that starts a cluster on a thread, and returns it and its URLs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    started: list[Cluster] = []

    def start(*scripts: Script, **options: Any) -> tuple[Cluster, str]:
        started.append(Cluster(*scripts, **options))
        return started[-1], asyncio.run_coroutine_threadsafe(started[-1].start(), loop).result()

    yield start
    for one in started:
        asyncio.run_coroutine_threadsafe(one.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nemostream-client"]


def test_threads_send_and_iterate(cluster: Any) -> None:
    async def lose(session: Session) -> None:
        await session.receive()
        await session.keep()
        await session.receive()
        session.socket.transport.abort()

    served, url = cluster(lose)
    with Stream(url, chunk_ms=80) as stream:
        assert stream.resumable and len(client_threads()) == 1

        def send() -> None:
            for start in range(0, 1000, 100):
                stream.send(audio(100, start))
            stream.configure(chunk_ms=160)
            stream.commit()
            stream.finish()

        sender = threading.Thread(target=send)
        sender.start()
        events = list(stream)
        sender.join()
        assert [event.type for event in events] == ["partial"] * 10 + ["committed", "done"]
        assert stream.text == "1000 bytes" and stream.reconnects == len(stream.gaps) == 1
        assert list(stream) == []
    assert served.sessions[1].received.audio == audio(1000)
    assert [message["type"] for _, message in served.sessions[1].received.controls] == ["configure", "commit", "finish"]
    assert not client_threads()
    with pytest.raises(StreamError, match="not open"):
        stream.send(b"12")
    with pytest.raises(StreamError, match="opened before"):
        stream.open()


def test_a_thread_that_iterates_ends_when_the_stream_is_closed(cluster: Any) -> None:
    _, url = cluster()
    errors: list[Exception] = []
    with Stream(url) as stream:

        def read() -> None:
            try:
                next(stream)
            except StreamError as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
    reader.join()
    assert [str(error) for error in errors] in (
        ["the stream is closed."],
        ["the stream is not open; use it in `with`."],
    )
    assert not client_threads()


def test_a_call_that_is_interrupted_loses_no_event(cluster: Any) -> None:
    _, url = cluster()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a background job
    try:
        with Stream(url) as stream:
            timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                next(stream)
            stream.send(audio(100))
            stream.finish()
            assert [event.type for event in stream] == ["partial", "done"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stream_that_is_not_accepted_leaves_no_thread(cluster: Any) -> None:
    _, url = cluster(Refusal(400, "option"))
    with pytest.raises(Rejected, match="HTTP 400"), Stream(url):
        pass
    assert not client_threads()
    with pytest.raises(OptionError, match="encoding"):
        Stream(url, encoding="mp3")


def test_a_stream_of_the_command_line_that_is_lost_at_its_end(cluster: Any) -> None:
    """The text of the unfinished utterance is a final, and the error follows it."""

    word = {"text": "hello", "start": 0.0, "end": 0.5, "confidence": 1.0}

    async def lose(session: Session) -> None:
        session.sequence = 1000  # it sends no other event
        await session.send(type="partial", text="hello", stable="hello", words=[word])
        while not await session.receive():
            pass
        session.socket.transport.abort()

    _, url = cluster(lose, resumption=False)
    events: list[Any] = []
    with (
        RemoteModel([url], None, 80, itn=False).stream() as stream,
        pytest.raises(StreamLost, match="does not store streams"),
    ):
        for event in stream.finish_events():
            events.append(event)
    assert [(event.kind, event.text) for event in events] == [("partial", "hello"), ("final", "hello")]


def test_the_twins_have_the_same_interface() -> None:
    names = {name for name in vars(AsyncStream) if not name.startswith("_")}
    assert names | {"reconnects", "gaps"} == {name for name in vars(Stream) if not name.startswith("_")}
    assert inspect.signature(AsyncStream.__init__) == inspect.signature(Stream.__init__)
    for name in names - {"text", "resumable"}:
        one, other = inspect.signature(getattr(AsyncStream, name)), inspect.signature(getattr(Stream, name))
        assert one == other
