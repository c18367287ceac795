"""uvicorn with limits: how many connections, how long each may take to send a request, how much it may send at once.

uvicorn's protocols trust their peers: a request head may trickle in for ever, a small frame costs as much as a large
one, and everything that one read returned is parsed in one go. `Connections` counts and closes connections; the two
protocol classes parse at most `_SLICE` bytes in one turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request

from nemostream.serving.network.proxies import TrustedProxies

log = logging.getLogger("nemostream.serving")

HEAD_SECONDS = 20.0  # for the head of each request
LINGER_SECONDS = 2.0  # for the rest of a body whose request was answered, and for an answer to be sent at the end
HEAD_BYTES = 64 << 10  # of a request line and its headers together
_HEAD_LINES = 256
_SLICE = 8 << 10  # bytes parsed in one turn: a thousand of the smallest frames
_CONTROL_BURST, _CONTROL_RATE = 100, 20.0  # pings and other frames without a message: at once, and per second
_UNREAD_BYTES = 16 << 10  # events that wait in the server until a client counts as one that does not read
_FRAGMENTS = 4096  # of one WebSocket message
_NO_ROOM = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"
_FRAGMENT_BYTES = 256 << 10  # larger frames are split: the parser copies and unmasks a frame in one turn
_LARGE_MESSAGES = 16  # messages larger than `max_message_bytes` that are received and handled at once, of all clients
_CLOSED_STATES = (7, 8)  # TCP_CLOSE, TCP_CLOSE_WAIT of the kernel's enumeration
_RESERVED_FILES = 24  # file descriptors for temporary files, decoder processes, and what else a request may open


class Connections:
    """All HTTP and WebSocket connections of a server."""

    def __init__(
        self,
        most: int,
        most_per_client: int,
        body_seconds: float,
        proxies: TrustedProxies | None = None,
        message_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """`most_per_client` 0 is three quarters of `most`; `body_seconds` is the time that a request body may take;
        `message_bytes` are paths of WebSockets whose messages may be larger than those of the others."""
        self.proxies = TrustedProxies(()) if proxies is None else proxies
        self.most = most
        self.most_per_client = most_per_client or max(1, 3 * most // 4)
        self.body_seconds = body_seconds
        self._open: dict[Any, str] = {}  # transport -> address
        self._addresses: Counter[str] = Counter()
        self._requests: dict[Any, HttpProtocol] = {}  # transport -> its protocol, until it is a WebSocket
        self._sockets: set[Any] = set()  # transports of WebSockets
        self.message_bytes = message_bytes or {}
        self._large: set[WebSocketProtocol] = set()  # they hold a place for a large message
        self._large_waiting: dict[WebSocketProtocol, None] = {}  # they wait for one; first come, first served

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, protocol: HttpProtocol) -> bool:
        """Count a new connection; False if there is no room, even after closing one that waits for a request."""
        address = protocol.client[0] if protocol.client else ""
        if self._addresses[address] >= self.most_per_client and not self._evict(address):
            return False
        if len(self._open) >= self.most and not self._evict(None):
            return False
        self._open[protocol.transport] = address
        self._addresses[address] += 1
        self._requests[protocol.transport] = protocol
        return True

    def forwarded(self, transport: Any, address: str) -> bool:
        """Count a proxy's connection for the client whose request it carries; False if that client has no room."""
        before = self._open.get(transport)
        if before is None or before == address:
            return True
        if self._addresses[address] >= self.most_per_client and not self._evict(address):
            return False
        self._open[transport] = address
        self._addresses[address] += 1
        self._release(before)
        return True

    def upgraded(self, transport: Any) -> None:
        """It is a WebSocket now, which has limits of its own."""
        self._requests.pop(transport, None)
        self._sockets.add(transport)

    def closed(self, transport: Any) -> None:
        self._requests.pop(transport, None)
        self._sockets.discard(transport)
        address = self._open.pop(transport, None)
        if address is not None:
            self._release(address)

    def admit_large(self, protocol: WebSocketProtocol) -> bool:
        """Take a place for a large message; False if all are taken: `proceed` is called when one is free."""
        if protocol not in self._large:
            if len(self._large) >= _LARGE_MESSAGES:
                self._large_waiting[protocol] = None
                return False
            self._large_waiting.pop(protocol, None)
            self._large.add(protocol)
        return True

    def release_large(self, protocol: WebSocketProtocol) -> None:
        """Give back the place of a large message, if there is one."""
        self._large_waiting.pop(protocol, None)
        self._large.discard(protocol)
        for waiting in list(self._large_waiting)[: _LARGE_MESSAGES - len(self._large)]:
            del self._large_waiting[waiting]
            self._large.add(waiting)
            waiting.proceed()

    def reap(self) -> None:
        """Close connections whose time is over. Called every second."""
        now = time.monotonic()
        for protocol in list(self._requests.values()):
            protocol.reap(now)
        for transport in list(self._sockets):
            # A WebSocket's peer closes its side only when it is gone. While nothing is read no event reports it, and
            # what it sent before would keep its stream open for minutes.
            if _peer_closed(transport):
                transport.abort()

    def _release(self, address: str) -> None:
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]

    def _evict(self, address: str | None) -> bool:
        """Close the connection that waits longest for a request, of one address or of any."""
        waiting = [
            protocol
            for transport, protocol in self._requests.items()
            if protocol.phase == "head" and (address is None or self._open[transport] == address)
        ]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda protocol: protocol.since)
        oldest.transport.abort()
        self.closed(oldest.transport)
        return True


def connections_for(most: int) -> int:
    """How many of `most` connections this process has file descriptors for, beside those that it uses now.

    Raises the soft limit to the hard one, as far as is needed.
    """
    wanted = most + 4 * _RESERVED_FILES + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and soft < hard:
        soft = min(hard, wanted) if hard != resource.RLIM_INFINITY else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(8, min(most, (soft - _used_files() - _RESERVED_FILES) * 2 // 3))  # the other third: gRPC


def _used_files() -> int:
    return len(os.listdir("/dev/fd"))


def _peer_closed(transport: Any) -> bool:
    """Whether the peer has closed or reset its side, be there data left to read or not (known on Linux)."""
    sock = transport.get_extra_info("socket")
    if sock is None or not hasattr(socket, "TCP_INFO"):
        return False
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return False
    return state in _CLOSED_STATES


class _PeerLogger(logging.LoggerAdapter[logging.Logger]):
    @property
    def level(self) -> int:  # which uvicorn reads, and the base class lacks
        return self.logger.level


class _Sliced:
    """Parses what was received in slices, one per turn of the event loop, and reads no more meanwhile."""

    transport: Any
    loop: asyncio.AbstractEventLoop

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._backlog, self._scheduled, self._held = bytearray(), False, False
        self.peer = ""  # the client's address

    def log_peer(self, address: str) -> None:
        """Add the client's address to what uvicorn logs about this connection."""
        self.peer = address
        cast(Any, self).logger = _PeerLogger(logging.getLogger("uvicorn.error"), {"peer": address})

    def data_received(self, data: bytes) -> None:
        self._backlog += data
        if not self._scheduled:
            self._parse()

    def _parse(self) -> None:
        self._scheduled = False
        if self.transport.is_closing():
            self._backlog.clear()
            return
        if self._backlog and not self._full():
            piece = bytes(self._backlog[:_SLICE])
            del self._backlog[:_SLICE]
            try:
                self.feed(piece)
            except Exception:  # a fault of a parser ends this connection, and leaves nothing behind
                log.exception("connection failed", extra={"peer": self.peer})
                self.transport.abort()
                return
        if self._backlog:
            if not self._held:
                self._held = True
                self.transport.pause_reading()
            if not self._full():
                self._schedule()
        elif self._held and not self._full():
            self._held = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def feed(self, data: bytes) -> None:
        """Parse one slice."""
        cast(Any, super()).data_received(data)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._parse)

    def _full(self) -> bool:
        """Whether the application must take what was parsed before more is."""
        raise NotImplementedError


class HttpProtocol(_Sliced, H11Protocol):
    """HTTP/1.1. `phase` is "head" while a request's head is awaited, "body" while a body is received, "late" while a
    body goes on after its answer, else ""; `since` is when that began."""

    limits: Connections  # set by `protocols`

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = _Flow(transport, self)
        self.log_peer(self.client[0] if self.client else "")
        self.phase, self.since = "head", time.monotonic()
        self._head_bytes = self._head_lines = 0
        if not self.limits.admit(self):
            transport.write(_NO_ROOM)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.closed(self.transport)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self._forwarded():
            # The task that calls the application was created a moment ago and did not start yet.
            cast(dict[str, Any], self.scope)["nemostream.no_room"] = True
        self._look()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and not self._head_fits(data):
            self.send_400_response("The request head is too large.")
            self._backlog.clear()
            return
        super().data_received(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        headers = dict(self.headers)
        faults = (
            event.method != b"GET",
            b"sec-websocket-key" not in headers,
            headers.get(b"sec-websocket-version") != b"13",
            any(byte > 0x7E for _, value in self.headers for byte in value),
            b"content-length" in headers,
            b"transfer-encoding" in headers,
        )
        if any(faults):
            self.send_400_response("Invalid WebSocket upgrade request.")
            return
        if not self._forwarded():
            self.transport.write(_NO_ROOM)
            self.transport.close()
            return
        self.limits.upgraded(self.transport)
        self._backlog.clear()  # a client waits for the answer before it sends frames
        super().handle_websocket_upgrade(event)

    def _forwarded(self) -> bool:
        """Count the connection for the client that a trusted proxy names; False if that client has no room."""
        direct = self.client[0] if self.client else ""
        if direct not in self.limits.proxies:
            return True
        sent = b",".join(value for name, value in self.headers if name == b"x-forwarded-for")
        address = self.limits.proxies.client(direct, sent.decode("latin-1"))
        self.log_peer(address)
        return self.limits.forwarded(self.transport, address)

    def reap(self, now: float) -> None:
        most = {"head": HEAD_SECONDS, "body": self.limits.body_seconds, "late": LINGER_SECONDS}.get(self.phase)
        if self.transport.is_closing():
            most = LINGER_SECONDS
            if self.phase != "closing":
                self.phase, self.since = "closing", now
        if most is not None and now - self.since > most:
            self.transport.abort() if self.transport.is_closing() else self.transport.close()

    def _look(self) -> None:
        """Find out what the connection waits for."""
        theirs = self.conn.their_state
        phase = "head" if theirs is h11.IDLE else "body" if theirs is h11.SEND_BODY else ""
        if phase == "body" and self.cycle is not None and self.cycle.response_complete:
            phase = "late"
        if phase != self.phase:
            self.phase, self.since = phase, time.monotonic()
            self._head_bytes = self._head_lines = 0

    def _head_fits(self, data: bytes) -> bool:
        end = data.find(b"\r\n\r\n")
        self._head_bytes += len(data) if end < 0 else end
        self._head_lines += data.count(b"\n", 0, len(data) if end < 0 else end)
        return self._head_bytes <= HEAD_BYTES and self._head_lines <= _HEAD_LINES

    def _full(self) -> bool:
        return bool(self.flow.read_paused)


class _Flow(FlowControl):
    """Goes on with what was received before it reads more."""

    def __init__(self, transport: Any, protocol: HttpProtocol) -> None:
        super().__init__(transport)
        self._protocol = protocol

    def resume_reading(self) -> None:
        if self.read_paused and self._protocol._backlog:
            self.read_paused = False
            self._protocol._schedule()
        else:
            super().resume_reading()


class FrameSplitter:
    """Rewrite a client's WebSocket frames (RFC 6455, 5.2) so that none has more than `most` bytes of payload.

    A larger frame becomes fragments of the same message, with the same masking key. Call it with the bytes as they
    come; it returns the bytes to parse. What is not a frame of a client passes unchanged, for the parser to reject.
    """

    def __init__(self, most: int) -> None:
        self._most = most - most % 4  # the masking key has four bytes
        self._head = b""  # of a frame, not complete yet
        self._payload = 0  # bytes of the current fragment still to come
        self._rest = 0  # bytes of the frame after the current fragment
        self._final, self._key = 0, b""

    def __call__(self, data: bytes) -> bytes:
        found, at = bytearray(), 0
        while at < len(data):
            if self._payload:
                piece = data[at : at + self._payload]
                found += piece
                at += len(piece)
                self._payload -= len(piece)
            elif self._rest:
                found += self._fragment(0)
            else:
                wanted = self._head_size() - len(self._head)
                self._head += data[at : at + wanted]
                at += wanted
                if len(self._head) >= 2 and len(self._head) == self._head_size():
                    found += self._frame()
        return bytes(found)

    def _head_size(self) -> int:
        if len(self._head) < 2:
            return 2
        return 2 + {126: 2, 127: 8}.get(self._head[1] & 0x7F, 0) + (4 if self._head[1] & 0x80 else 0)

    def _frame(self) -> bytes:
        """The head of a frame is complete: the bytes that stand for it."""
        head, self._head = self._head, b""
        size, masked = head[1] & 0x7F, head[1] & 0x80
        if size >= 126:
            size = int.from_bytes(head[2 : 4 if size == 126 else 10], "big")
        if size <= self._most or not masked or head[0] & 0x08:  # a control frame is never split
            self._payload = size
            return head
        self._rest, self._final, self._key = size, head[0] & 0x80, head[-4:]
        return self._fragment(head[0] & 0x7F)

    def _fragment(self, first: int) -> bytes:
        self._payload = min(self._rest, self._most)
        self._rest -= self._payload
        first |= 0 if self._rest else self._final
        return bytes([first, 0x80 | 127]) + self._payload.to_bytes(8, "big") + self._key


class WebSocketProtocol(_Sliced, WebSocketsSansIOProtocol):
    """WebSockets, for frames that cost more to handle than to send."""

    limits: Connections  # set by `protocols`

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.log_peer(self.client[0] if self.client else "")
        # Hundreds of events: a client that does not read them is noticed before the system gives the connection up.
        transport.set_write_buffer_limits(high=_UNREAD_BYTES)
        self._control, self._control_at = 0.0, time.monotonic()
        self._fragments = 0
        self._frames = FrameSplitter(_FRAGMENT_BYTES)
        self._usual_bytes = self.conn.max_size or 0
        self._received = 0  # bytes of the message that is not complete yet
        self._queued_large = self._handling_large = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.closed(self.transport)
        self.limits.release_large(self)
        while not self.queue.empty():  # the results of these messages have no reader
            self.queue.get_nowait()
        super().connection_lost(exc)

    def handle_connect(self, event: Request) -> None:
        self.conn.max_size = self.limits.message_bytes.get(event.path.partition("?")[0], self._usual_bytes)
        super().handle_connect(event)

    def feed(self, data: bytes) -> None:
        if self.handshake_initiated:  # what comes before is the request
            self._received += len(data)
            data = self._frames(data)
        super().feed(data)

    def proceed(self) -> None:
        """There is a place for the large message that this client sends."""
        self._schedule()

    def handle_ping(self) -> None:
        if self._control_allowed():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        if self._control_allowed():
            super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        self._fragments += 1
        if self._fragments > _FRAGMENTS:
            self._fail("too many fragments")
        else:
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        self._fragments = self._received = 0
        if sum(map(len, self.frames)) > self._usual_bytes:
            # Base64 is ASCII. Decoding other text takes longer and up to four times the memory.
            if not all(map(bytes.isascii, map(bytes, self.frames))):
                self._fail("a large message must be ASCII")
                return
            self._queued_large = True
        self.read_paused = True  # the parent pauses reading otherwise, which `_Sliced` does
        super().send_receive_event_to_app()
        self.read_paused = False
        if not self.queue.empty() and not self._held:
            self._held = True
            self.transport.pause_reading()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent and self._held:
            self._schedule()  # what is left may hold the client's own close, which ends the connection

    async def receive(self) -> Any:
        if self._handling_large:  # no longer: the application asks for the next message
            self._handling_large = False
            self.limits.release_large(self)
            self._schedule()
        message = await super().receive()
        if self._queued_large and message["type"] == "websocket.receive":
            self._queued_large, self._handling_large = False, True
        if self.queue.empty() and self._held:
            self._schedule()
        return message

    def _full(self) -> bool:
        if not self.handshake_complete or self.close_sent:
            return False
        if not self.queue.empty() or self._handling_large:
            return True
        return self._received > self._usual_bytes and not self.limits.admit_large(self)

    def _control_allowed(self) -> bool:
        now = time.monotonic()
        self._control = max(0.0, self._control - _CONTROL_RATE * (now - self._control_at)) + 1
        self._control_at = now
        if self._control <= _CONTROL_BURST:
            return True
        self._fail("too many control frames")
        return False

    def _fail(self, reason: str) -> None:
        """Close the connection and notify the application."""
        if self.transport.is_closing():
            return
        self.conn.fail(CloseCode.POLICY_VIOLATION, reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1008, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()


def protocols(limits: Connections) -> tuple[type[HttpProtocol], type[WebSocketProtocol]]:
    """The protocol classes of one server, as `uvicorn.Config` takes them (`http`, `ws`)."""
    http = type("HttpProtocol", (HttpProtocol,), {"limits": limits})
    websocket = type("WebSocketProtocol", (WebSocketProtocol,), {"limits": limits})
    return http, websocket


class Server(uvicorn.Server):
    """uvicorn that reaps connections, and leaves signals to its caller: uvicorn would close every stream at once."""

    def __init__(self, config: uvicorn.Config, limits: Connections) -> None:
        super().__init__(config)
        self._limits = limits

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # ten ticks are a second
            self._limits.reap()
        return await super().on_tick(counter)
