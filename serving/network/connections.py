"""uvicorn with limits on the number of connections, the duration of requests and the work per turn of the event loop.

uvicorn's protocols trust their peers: the head of a request may take forever, a small frame costs as much as a large
one, and everything that one read returned is parsed at once. `Connections` counts and closes connections; the two
protocol classes parse at most `_SLICE_BYTES` per turn of the event loop.
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
LINGER_SECONDS = 2.0  # for the rest of a body after its response, and for sending a response before closing
MAX_HEAD_BYTES = 64 << 10  # of a request line and its headers together
_MAX_HEAD_LINES = 256
_SLICE_BYTES = 8 << 10  # parsed per turn of the event loop: a thousand of the smallest frames
_CONTROL_BURST, _CONTROL_RATE = 100, 20.0  # pings and pongs: at once, and per second
_MAX_UNREAD_BYTES = 16 << 10  # of events in the send buffer before a client counts as a slow reader
_MAX_FRAGMENTS = 4096  # of one WebSocket message
_SERVICE_UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"
)
_MAX_FRAGMENT_BYTES = 256 << 10  # larger frames are split: the parser copies and unmasks a whole frame at once
_MAX_LARGE_MESSAGES = 16  # messages above `max_message_bytes` that all clients may send at once
_CLOSED_STATES = (7, 8)  # TCP_CLOSE and TCP_CLOSE_WAIT in Linux
_RESERVED_FILES = 24  # file descriptors for temporary files, decoder processes and other files of requests


class Connections:
    """All HTTP and WebSocket connections of a server."""

    def __init__(
        self,
        max_connections: int,
        max_per_client: int,
        body_seconds: float,
        proxies: TrustedProxies | None = None,
        message_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """Set the limits.

        `max_per_client` 0 is three quarters of `max_connections`. `body_seconds` limits the time for a request body.
        `message_bytes` maps paths of WebSockets to their maximum message size, where it differs from the usual one.
        """
        self.proxies = TrustedProxies(()) if proxies is None else proxies
        self.max_connections = max_connections
        self.max_per_client = max_per_client or max(1, 3 * max_connections // 4)
        self.body_seconds = body_seconds
        self._open: dict[Any, str] = {}  # transport -> address
        self._addresses: Counter[str] = Counter()
        self._requests: dict[Any, HttpProtocol] = {}  # transport -> protocol, of connections that are not WebSockets
        self._sockets: set[Any] = set()  # transports of WebSockets
        self.message_bytes = message_bytes or {}
        self._large: set[WebSocketProtocol] = set()  # that have a slot for a large message
        self._large_waiting: dict[WebSocketProtocol, None] = {}  # that wait for a slot, in order of arrival

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, protocol: HttpProtocol) -> bool:
        """Count a new connection. Return False if a limit is reached.

        A connection that waits for a request is closed to make room for a new one.
        """
        address = protocol.client[0] if protocol.client else ""
        if self._addresses[address] >= self.max_per_client and not self._evict(address):
            return False
        if len(self._open) >= self.max_connections and not self._evict(None):
            return False
        self._open[protocol.transport] = address
        self._addresses[address] += 1
        self._requests[protocol.transport] = protocol
        return True

    def reassign(self, transport: Any, address: str) -> bool:
        """Count a proxy's connection for the client behind it. Return False if that client's limit is reached."""
        before = self._open.get(transport)
        if before is None or before == address:
            return True
        if self._addresses[address] >= self.max_per_client and not self._evict(address):
            return False
        self._open[transport] = address
        self._addresses[address] += 1
        self._release(before)
        return True

    def upgraded(self, transport: Any) -> None:
        """Treat a connection as a WebSocket, which has its own limits."""
        self._requests.pop(transport, None)
        self._sockets.add(transport)

    def closed(self, transport: Any) -> None:
        """Remove a connection. Later calls have no effect."""
        self._requests.pop(transport, None)
        self._sockets.discard(transport)
        address = self._open.pop(transport, None)
        if address is not None:
            self._release(address)

    def admit_large(self, protocol: WebSocketProtocol) -> bool:
        """Reserve a slot for a large message. Return False if all are in use; `proceed` is called when one is free."""
        if protocol not in self._large:
            if len(self._large) >= _MAX_LARGE_MESSAGES:
                self._large_waiting[protocol] = None
                return False
            self._large_waiting.pop(protocol, None)
            self._large.add(protocol)
        return True

    def release_large(self, protocol: WebSocketProtocol) -> None:
        """Release the slot of a large message, if `protocol` has one."""
        self._large_waiting.pop(protocol, None)
        self._large.discard(protocol)
        for waiting in list(self._large_waiting)[: _MAX_LARGE_MESSAGES - len(self._large)]:
            del self._large_waiting[waiting]
            self._large.add(waiting)
            waiting.proceed()

    def reap(self) -> None:
        """Close connections whose timeout passed. Called every second."""
        now = time.monotonic()
        for protocol in list(self._requests.values()):
            protocol.reap(now)
        for transport in list(self._sockets):
            # The peer of a WebSocket closes its side only when it is gone. While reading is paused no event reports
            # this, and the data that it sent before would keep its stream open for minutes.
            if _peer_closed(transport):
                transport.abort()

    def _release(self, address: str) -> None:
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]

    def _evict(self, address: str | None) -> bool:
        """Close the connection that has waited longest for a request, of one address or (None) of all."""
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


def available_connections(max_connections: int) -> int:
    """Return how many of `max_connections` the free file descriptors of this process suffice for.

    Raises the soft limit of file descriptors towards the hard one if needed.
    """
    needed = max_connections + 4 * _RESERVED_FILES + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed and soft < hard:
        soft = min(hard, needed) if hard != resource.RLIM_INFINITY else needed
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(8, min(max_connections, (soft - _used_files() - _RESERVED_FILES) * 2 // 3))  # the other third: gRPC


def _used_files() -> int:
    return len(os.listdir("/dev/fd"))


def _peer_closed(transport: Any) -> bool:
    """Return whether the peer closed or reset its side, even if data is left to read (Linux only)."""
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
    def level(self) -> int:  # read by uvicorn, missing in the base class
        return self.logger.level


class _SlicedParser:
    """Parses received data in slices, one per turn of the event loop; reading is paused meanwhile."""

    transport: Any
    loop: asyncio.AbstractEventLoop

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._backlog, self._scheduled, self._paused = bytearray(), False, False
        self.peer = ""  # the client's address

    def log_peer(self, address: str) -> None:
        """Set the client's address in uvicorn's log records about this connection."""
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
        if self._backlog and not self._is_full():
            data = bytes(self._backlog[:_SLICE_BYTES])
            del self._backlog[:_SLICE_BYTES]
            try:
                self.feed(data)
            except Exception:  # an error of a parser ends only this connection
                log.exception("connection failed", extra={"peer": self.peer})
                self.transport.abort()
                return
        if self._backlog:
            if not self._paused:
                self._paused = True
                self.transport.pause_reading()
            if not self._is_full():
                self._schedule()
        elif self._paused and not self._is_full():
            self._paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def feed(self, data: bytes) -> None:
        """Parse one slice."""
        cast(Any, super()).data_received(data)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._parse)

    def _is_full(self) -> bool:
        """Return whether the application must consume parsed data before more is parsed."""
        raise NotImplementedError


class HttpProtocol(_SlicedParser, H11Protocol):
    """HTTP/1.1.

    `phase` is "head" while a request's head is awaited, "body" while a body is received, "lingering" while a body
    continues after its response, "closing" while a last response is sent, else ""; `since` is when it started.
    """

    limits: Connections  # set by `protocol_classes`

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = _Flow(transport, self)
        self.log_peer(self.client[0] if self.client else "")
        self.phase, self.since = "head", time.monotonic()
        self._head_bytes = self._head_lines = 0
        if not self.limits.admit(self):
            transport.write(_SERVICE_UNAVAILABLE)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.closed(self.transport)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self._count_for_client():
            # The task that calls the application was just created and has not started yet.
            cast(dict[str, Any], self.scope)["nemostream.over_capacity"] = True
        self._update_phase()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and not self._head_fits(data):
            self.send_400_response("The request head is too large.")
            self._backlog.clear()
            return
        super().data_received(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_phase()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        headers = dict(self.headers)
        errors = (
            event.method != b"GET",
            b"sec-websocket-key" not in headers,
            headers.get(b"sec-websocket-version") != b"13",
            any(byte > 0x7E for _, value in self.headers for byte in value),
            b"content-length" in headers,
            b"transfer-encoding" in headers,
        )
        if any(errors):
            self.send_400_response("Invalid WebSocket upgrade request.")
            return
        if not self._count_for_client():
            self.transport.write(_SERVICE_UNAVAILABLE)
            self.transport.close()
            return
        self.limits.upgraded(self.transport)
        self._backlog.clear()  # clients send frames only after the response
        super().handle_websocket_upgrade(event)

    def _count_for_client(self) -> bool:
        """Count a trusted proxy's connection for the client behind it. Return False if its limit is reached."""
        peer = self.client[0] if self.client else ""
        if peer not in self.limits.proxies:
            return True
        forwarded = b",".join(value for name, value in self.headers if name == b"x-forwarded-for")
        address = self.limits.proxies.client(peer, forwarded.decode("latin-1"))
        self.log_peer(address)
        return self.limits.reassign(self.transport, address)

    def reap(self, now: float) -> None:
        """Close the connection if its phase timed out. Called every second."""
        timeouts = {"head": HEAD_SECONDS, "body": self.limits.body_seconds, "lingering": LINGER_SECONDS}
        timeout = timeouts.get(self.phase)
        if self.transport.is_closing():
            timeout = LINGER_SECONDS
            if self.phase != "closing":
                self.phase, self.since = "closing", now
        if timeout is not None and now - self.since > timeout:
            self.transport.abort() if self.transport.is_closing() else self.transport.close()

    def _update_phase(self) -> None:
        state = self.conn.their_state
        phase = "head" if state is h11.IDLE else "body" if state is h11.SEND_BODY else ""
        if phase == "body" and self.cycle is not None and self.cycle.response_complete:
            phase = "lingering"
        if phase != self.phase:
            self.phase, self.since = phase, time.monotonic()
            self._head_bytes = self._head_lines = 0

    def _head_fits(self, data: bytes) -> bool:
        end = data.find(b"\r\n\r\n")
        self._head_bytes += len(data) if end < 0 else end
        self._head_lines += data.count(b"\n", 0, len(data) if end < 0 else end)
        return self._head_bytes <= MAX_HEAD_BYTES and self._head_lines <= _MAX_HEAD_LINES

    def _is_full(self) -> bool:
        return bool(self.flow.read_paused)


class _Flow(FlowControl):
    """Parses received data before it resumes reading."""

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
    """Splits a client's WebSocket frames (RFC 6455, 5.2) into frames of at most `max_bytes` of payload.

    A larger frame becomes fragments of the same message, with the same masking key. Call it with received bytes; it
    returns the bytes to parse. Bytes that are not a client's frame pass unchanged, for the parser to reject.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes - max_bytes % 4  # the masking key has four bytes
        self._head = b""  # of a frame, incomplete
        self._payload = 0  # bytes of the current fragment that are still to be received
        self._rest = 0  # bytes of the frame after the current fragment
        self._final, self._key = 0, b""

    def __call__(self, data: bytes) -> bytes:
        output, position = bytearray(), 0
        while position < len(data):
            if self._payload:
                payload = data[position : position + self._payload]
                output += payload
                position += len(payload)
                self._payload -= len(payload)
            elif self._rest:
                output += self._fragment(0)
            else:
                missing = self._head_size() - len(self._head)
                self._head += data[position : position + missing]
                position += missing
                if len(self._head) >= 2 and len(self._head) == self._head_size():
                    output += self._frame()
        return bytes(output)

    def _head_size(self) -> int:
        if len(self._head) < 2:
            return 2
        return 2 + {126: 2, 127: 8}.get(self._head[1] & 0x7F, 0) + (4 if self._head[1] & 0x80 else 0)

    def _frame(self) -> bytes:
        """Return the head to parse for a complete frame head: the same, or that of the first fragment."""
        head, self._head = self._head, b""
        size, masked = head[1] & 0x7F, head[1] & 0x80
        if size >= 126:
            size = int.from_bytes(head[2 : 4 if size == 126 else 10], "big")
        if size <= self._max_bytes or not masked or head[0] & 0x08:  # a control frame is never split
            self._payload = size
            return head
        self._rest, self._final, self._key = size, head[0] & 0x80, head[-4:]
        return self._fragment(head[0] & 0x7F)

    def _fragment(self, first: int) -> bytes:
        """Return the head of the next fragment; `first` is its first byte without the FIN bit."""
        self._payload = min(self._rest, self._max_bytes)
        self._rest -= self._payload
        first |= 0 if self._rest else self._final
        return bytes([first, 0x80 | 127]) + self._payload.to_bytes(8, "big") + self._key


class WebSocketProtocol(_SlicedParser, WebSocketsSansIOProtocol):
    """WebSockets, with limits on frames that cost more to handle than to send."""

    limits: Connections  # set by `protocol_classes`

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.log_peer(self.client[0] if self.client else "")
        # Hundreds of events: the send timeout detects a slow reader before the system closes the connection.
        transport.set_write_buffer_limits(high=_MAX_UNREAD_BYTES)
        self._control_frames, self._control_at = 0.0, time.monotonic()
        self._fragments = 0
        self._frames = FrameSplitter(_MAX_FRAGMENT_BYTES)
        self._usual_bytes = self.conn.max_size or 0
        self._received = 0  # bytes of the incomplete message
        self._queued_large = self._handling_large = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.closed(self.transport)
        self.limits.release_large(self)
        while not self.queue.empty():  # nobody can receive the results of these messages
            self.queue.get_nowait()
        # `TCP_USER_TIMEOUT`: the system closed the connection because the client does not read.
        if isinstance(exc, TimeoutError) and self.handshake_initiated:
            cast(dict[str, Any], self.scope)["nemostream.timed_out"] = True
        super().connection_lost(exc)

    def handle_connect(self, event: Request) -> None:
        self.conn.max_size = self.limits.message_bytes.get(event.path.partition("?")[0], self._usual_bytes)
        super().handle_connect(event)

    def feed(self, data: bytes) -> None:
        if self.handshake_initiated:  # earlier data is the request
            self._received += len(data)
            data = self._frames(data)
        super().feed(data)

    def proceed(self) -> None:
        """Continue parsing: a slot for the large message of this client is free."""
        self._schedule()

    def handle_ping(self) -> None:
        if self._control_allowed():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        if self._control_allowed():
            super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        self._fragments += 1
        if self._fragments > _MAX_FRAGMENTS:
            self._fail("too many fragments")
        else:
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        self._fragments = self._received = 0
        if sum(map(len, self.frames)) > self._usual_bytes:
            # Base64 is ASCII; decoding other text takes longer and up to four times the memory.
            if not all(map(bytes.isascii, map(bytes, self.frames))):
                self._fail("a large message must be ASCII")
                return
            self._queued_large = True
        self.read_paused = True  # else the parent class pauses reading, which is up to `_SlicedParser`
        super().send_receive_event_to_app()
        self.read_paused = False
        if not self.queue.empty() and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent and self._paused:
            self._schedule()  # the backlog may contain the client's close frame, which ends the connection

    async def receive(self) -> Any:
        if self._handling_large:  # the application is done with it
            self._handling_large = False
            self.limits.release_large(self)
            self._schedule()
        message = await super().receive()
        if self._queued_large and message["type"] == "websocket.receive":
            self._queued_large, self._handling_large = False, True
        if self.queue.empty() and self._paused:
            self._schedule()
        return message

    def _is_full(self) -> bool:
        if not self.handshake_complete or self.close_sent:
            return False
        if not self.queue.empty() or self._handling_large:
            return True
        return self._received > self._usual_bytes and not self.limits.admit_large(self)

    def _control_allowed(self) -> bool:
        now = time.monotonic()
        self._control_frames = max(0.0, self._control_frames - _CONTROL_RATE * (now - self._control_at)) + 1
        self._control_at = now
        if self._control_frames <= _CONTROL_BURST:
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


def protocol_classes(limits: Connections) -> tuple[type[HttpProtocol], type[WebSocketProtocol]]:
    """Return the protocol classes of one server, for `http` and `ws` of `uvicorn.Config`."""
    http = type("HttpProtocol", (HttpProtocol,), {"limits": limits})
    websocket = type("WebSocketProtocol", (WebSocketProtocol,), {"limits": limits})
    return http, websocket


class Server(uvicorn.Server):
    """uvicorn with connection timeouts and without signal handlers, which would close every stream at once."""

    def __init__(self, config: uvicorn.Config, limits: Connections) -> None:
        super().__init__(config)
        self._limits = limits

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once per second
            self._limits.reap()
        return await super().on_tick(counter)
