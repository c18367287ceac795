"""uvicorn with limits on the number of connections, the duration of requests and the work per turn of the event loop.

uvicorn's protocols do not limit the time for the head of a request and the number of small frames, which cost as much
as large ones, and parse everything that one read returned at once. `Connections` counts and closes connections; the two
protocol classes parse at most `_SLICE_BYTES`, or one complete frame of up to 64 KiB, per turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast
from weakref import ref

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request
from websockets.server import ServerProtocol

from nemostream.serving.network.proxies import TrustedProxies

try:
    from websockets.speedups import apply_mask
except ImportError:  # an installation of websockets without its C extension
    from websockets.utils import apply_mask

log = logging.getLogger("nemostream.serving")

HEAD_SECONDS = 20.0  # for the head of each request
LINGER_SECONDS = 2.0  # for the rest of a body after its response, and for sending a response before closing
MAX_HEAD_BYTES = 64 << 10  # of a request line and its headers together
_MAX_HEAD_LINES = 256
_SLICE_BYTES = 8 << 10  # parsed per turn of the event loop: a thousand of the smallest frames
_MESSAGE_FRAMES = (0x81, 0x82)  # first byte of a text or a binary message in one frame, not compressed
_CONTROL_BURST, _CONTROL_RATE = 100, 20.0  # pings and pongs: at once, and per second
_MAX_UNREAD_BYTES = 16 << 10  # of events in the send buffer before a client counts as a slow reader
_MAX_FRAGMENTS = 4096  # of one WebSocket message
_SERVICE_UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"
)
_MAX_FRAGMENT_BYTES = 256 << 10  # larger frames are split: the parser copies and unmasks a whole frame at once
_MAX_SIZE = "max_message_size" if hasattr(ServerProtocol(), "max_message_size") else "max_size"  # since websockets 16
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the limits.

        `max_per_client` 0 is three quarters of `max_connections`. `body_seconds` limits the time for a request body.
        `message_bytes` maps paths of WebSockets to their maximum message size, where it differs from the usual one.
        """
        self.proxies = TrustedProxies(()) if proxies is None else proxies
        self.max_connections = max_connections
        self.max_per_client = max_per_client or max(1, 3 * max_connections // 4)
        self.body_seconds, self.clock = body_seconds, clock
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
        if self.is_full(address) and not self._evict(address):
            return False
        if self.is_full(None) and not self._evict(None):
            return False
        self.add(protocol.transport, address)
        self._requests[protocol.transport] = protocol
        return True

    def reassign(self, transport: Any, address: str) -> bool:
        """Count a proxy's connection for the client behind it. Return False if that client's limit is reached."""
        before = self._open.get(transport)
        if before is None or before == address:
            return True
        if self.is_full(address) and not self._evict(address):
            return False
        self.remove(transport)
        self.add(transport, address)
        return True

    def upgraded(self, transport: Any) -> None:
        """Treat a connection as a WebSocket, which has its own limits."""
        self._requests.pop(transport, None)
        self._sockets.add(transport)

    def closed(self, transport: Any) -> None:
        """Remove a connection. Later calls have no effect."""
        self._requests.pop(transport, None)
        self._sockets.discard(transport)
        self.remove(transport)

    def is_full(self, address: str | None) -> bool:
        """Return whether the limit of one address, or (None) of all, is reached."""
        if address is None:
            return len(self._open) >= self.max_connections
        return self._addresses[address] >= self.max_per_client

    def add(self, transport: Any, address: str) -> None:
        """Count a connection for an address."""
        self._open[transport] = address
        self._addresses[address] += 1

    def remove(self, transport: Any) -> None:
        """Stop counting a connection. Later calls have no effect."""
        address = self._open.pop(transport, None)
        if address is not None:
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

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
        now = self.clock()
        for protocol in list(self._requests.values()):
            protocol.reap(now)
        for transport in list(self._sockets):
            # The peer of a WebSocket closes its side only when it is gone. While reading is paused no event reports
            # this, and the data that it sent before would keep its stream open for minutes.
            if not transport.is_reading() and _peer_closed(transport):
                transport.abort()

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
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < min(hard, needed):
        soft = min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
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

    def _abort(self) -> None:
        """End this connection after an error of a parser, and only this one. Called while the error is handled."""
        log.exception("connection failed", extra={"peer": self.peer})
        self.transport.abort()

    def _slice_size(self) -> int:
        """Return the number of bytes of the backlog to parse next."""
        return _SLICE_BYTES

    def _parse(self) -> None:
        self._scheduled = False
        if self.transport.is_closing():
            self._backlog.clear()
            return
        if self._backlog and not self._is_full():
            size = self._slice_size()
            data = bytes(self._backlog[:size])
            del self._backlog[:size]
            try:
                self.feed(data)
            except Exception:
                return self._abort()
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
        self.phase, self.since = "head", self.limits.clock()
        self._head_bytes = self._head_lines = 0
        if not self.limits.admit(self):
            transport.write(_SERVICE_UNAVAILABLE)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.closed(self.transport)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.cycle = cast(Any, None)  # it refers to this object

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
            self.phase, self.since = phase, self.limits.clock()
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
        self._protocol = ref(protocol)  # a cycle would keep both until a garbage collection

    def resume_reading(self) -> None:
        protocol = self._protocol()
        if protocol is not None and self.read_paused and protocol._backlog:
            self.read_paused = False
            protocol._schedule()
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
        # Whether all frames that were passed to it are complete; not a property, because every message reads it.
        self.between_frames = True

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
        self.between_frames = not (self._payload or self._rest or self._head)
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


class MessageHandler(Protocol):
    """Processes messages without a task (`WebSocketProtocol.attach`)."""

    def __call__(self, message: bytes | str) -> bool:
        """Start to process a message; `done` or `defer` must follow once, during the call or later.

        Returns False, without any effect, for a message that the application must receive.
        """


class WebSocketProtocol(_SlicedParser, WebSocketsSansIOProtocol):
    """WebSockets, with limits on frames that cost more to handle than to send, and less overhead for usual messages.

    A message that is one complete frame of at most 64 KiB is parsed here; the general parser takes several times
    longer. An application may attach a handler that processes messages without a task; it finds this object in its
    scope as "nemostream.connection". One message is processed at a time, by the handler or by the application. The
    messages after it wait, and reading is paused.
    """

    limits: Connections  # set by `protocol_classes`

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.log_peer(self.client[0] if self.client else "")
        # Hundreds of events: the send timeout detects a slow reader before the system closes the connection.
        transport.set_write_buffer_limits(high=_MAX_UNREAD_BYTES)
        self._control_frames, self._control_at = 0.0, self.limits.clock()
        self._fragments = 0
        self._splitter = FrameSplitter(_MAX_FRAGMENT_BYTES)
        self._usual_bytes = self.config.ws_max_size
        self._received = 0  # bytes of the incomplete message
        self._waiting: deque[bytes | str] = deque()  # messages that were received and are not processed yet
        self._large: str | None = None  # the large message in `_waiting`
        self._large_queued = self._handling_large = False
        self._handler: MessageHandler | None = None
        self._handling = False  # the handler is processing a message
        self._handled: asyncio.Future[None] | None = None  # done when it is not any more
        self._receiving = False  # the application waits for a message
        self._lost, self._close_confirmed = asyncio.Event(), False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()
        self.limits.closed(self.transport)
        self.limits.release_large(self)
        self._waiting.clear()  # the results of these messages cannot be sent
        while not self.queue.empty():
            self.queue.get_nowait()
        scope = cast(dict[str, Any] | None, getattr(self, "scope", None))
        if scope is not None:  # the handshake was not rejected
            scope.pop("nemostream.connection", None)  # a cycle, which would keep the connection's memory
            # `TCP_USER_TIMEOUT`: the system closed the connection because the client does not read.
            if isinstance(exc, TimeoutError):
                scope["nemostream.timed_out"] = True
        super().connection_lost(exc)

    def handle_connect(self, event: Request) -> None:
        max_bytes = self.limits.message_bytes.get(event.path.partition("?")[0], self._usual_bytes)
        setattr(self.conn, _MAX_SIZE, max_bytes)
        super().handle_connect(event)
        if not self.close_sent:
            cast(dict[str, Any], self.scope)["nemostream.connection"] = self

    # -- for handlers --------------------------------------------------------------------------------------------------

    def attach(self, handler: MessageHandler | None) -> None:
        """Pass messages to `handler` first, whenever the application waits in `receive`. None removes the handler."""
        self._handler = handler

    @property
    def is_writable(self) -> bool:
        """Whether `write_text` may be called: not while the client does not read, because nothing limits the buffer."""
        return self.writable.is_set()

    def write_text(self, texts: Iterable[str]) -> None:
        """Send text messages with one write. Does nothing if the connection is closing."""
        if self.close_sent or self.transport.is_closing():
            return
        parts: list[bytes] = []
        for text in texts:
            data = text.encode()
            size = len(data)
            if size < 126:
                parts += (bytes((0x81, size)), data)
            elif size < 1 << 16:
                parts += (b"\x81\x7e" + size.to_bytes(2, "big"), data)
            else:
                parts += (b"\x81\x7f" + size.to_bytes(8, "big"), data)
        if parts:
            self.transport.write(b"".join(parts))

    def done(self) -> None:
        """The handler's message is processed."""
        self._handling = False
        if self._handled is not None and not self._handled.done():
            self._handled.set_result(None)
        if self._waiting:
            self.loop.call_soon(self._deliver)  # one message per turn of the event loop

    def defer(self, result: Any) -> None:
        """Let the application complete the handler's message: it receives an empty text with `result` as "deferred"."""
        self.queue.put_nowait(cast(Any, {"type": "websocket.receive", "text": "", "deferred": result}))
        self.done()

    def _deliver(self) -> None:
        """Pass the next message to the handler, or to the application if that is ready."""
        if self._handling or not self._receiving or not self._waiting or not self.queue.empty():
            return
        message = self._waiting.popleft()
        if self._paused and not self._waiting:
            self._schedule()
        if self._handler is not None and message is not self._large:
            self._handling = True
            if self._handler(message):
                return
            self._handling = False
        self._queue_message(message)

    def _queue_message(self, message: bytes | str) -> None:
        if message is self._large:
            self._large, self._large_queued = None, True
        key = "text" if isinstance(message, str) else "bytes"
        self.queue.put_nowait(cast(Any, {"type": "websocket.receive", key: message}))

    def _queue_waiting(self) -> None:
        """Pass all messages to the application: they come before the end of the connection."""
        while self._waiting:
            self._queue_message(self._waiting.popleft())

    # -- receiving -----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        # Usually one read returns one message, and none waits: no backlog is needed.
        if self._backlog or self._scheduled or self._paused or self._frame_size(data) != len(data):
            super().data_received(data)
        elif not self.transport.is_closing():
            try:
                self._receive_frame(data)
            except Exception:
                self._abort()

    def feed(self, data: bytes) -> None:
        if self.handshake_initiated:  # earlier data is the request
            if self._frame_size(data) == len(data):
                return self._receive_frame(data)
            self._received += len(data)
            data = self._splitter(data)
        super().feed(data)

    def proceed(self) -> None:
        """Continue parsing: a slot for the large message of this client is free."""
        self._schedule()

    def _slice_size(self) -> int:
        return self._frame_size(self._backlog) or super()._slice_size()

    def _frame_size(self, data: bytes | bytearray) -> int:
        """Return the size of the frame at the start of `data` if that is complete and a message, else 0."""
        if len(data) < 6 or data[0] not in _MESSAGE_FRAMES or self.frames or not self._splitter.between_frames:
            return 0
        if self.close_sent or not self.handshake_complete:
            return 0
        size, head = data[1] - 0x80, 6
        if size == 126:
            size, head = data[2] << 8 | data[3], 8
        elif not 0 <= size < 126:  # not masked, or with a length of eight bytes
            return 0
        return head + size if size <= self._usual_bytes and len(data) >= head + size else 0

    def _receive_frame(self, frame: bytes) -> None:
        """Receive the message of a complete frame (`_frame_size`)."""
        head = 8 if frame[1] == 0xFE else 6
        data = apply_mask(frame[head:], frame[head - 4 : head])
        self._received = 0
        message = data if frame[0] == 0x82 else self._decoded(data)
        if message is not None:
            self._waiting.append(message)
            self._deliver()
            if self._waiting or not self._handling:  # otherwise no message waits: most often
                self._pause()

    def _receive_message(self, message: bytes | str) -> None:
        """Receive a message of the general parser, which may find many of them in one slice."""
        self._waiting.append(message)
        if len(self._waiting) == 1:
            self.loop.call_soon(self._deliver)  # one message per turn of the event loop
        self._pause()

    def _pause(self) -> None:
        """Pause reading while a message waits."""
        if not self._paused and (self._waiting or not self.queue.empty()):
            self._paused = True
            self.transport.pause_reading()

    def _decoded(self, data: bytes) -> str | None:
        """Return the text of a message; close the connection and return None if it is not UTF-8."""
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.frames, self.curr_msg_data_type = [data], "text"
            super().send_receive_event_to_app()
            return None

    def handle_ping(self) -> None:
        if self._control_allowed():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        if self._control_allowed():
            super().handle_pong(event)

    async def wait_closed(self) -> bool:
        """Wait for the end of the connection. Return whether the client has confirmed this server's close frame.

        It has then received all messages.
        """
        await self._lost.wait()
        return self._close_confirmed

    def handle_close(self, event: Frame) -> None:
        self._close_confirmed = bool(self.close_sent)
        self._queue_waiting()
        super().handle_close(event)

    def handle_cont(self, event: Frame) -> None:
        self._fragments += 1
        if self._fragments > _MAX_FRAGMENTS:
            self._fail("too many fragments")
        else:
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        self._fragments = self._received = 0
        large = sum(map(len, self.frames)) > self._usual_bytes
        # Base64 is ASCII; decoding other text takes longer and up to four times the memory.
        if large and not all(map(bytes.isascii, map(bytes, self.frames))):
            self._fail("a large message must be ASCII")
            return
        if self.close_sent:  # as the parent class: the client's close frame may follow
            self.frames = []
            return
        data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
        self.frames = []
        if self.curr_msg_data_type == "bytes":
            self._receive_message(data)
        elif (text := self._decoded(data)) is not None:
            if large:
                self._large = text
            self._receive_message(text)

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent and self._paused:
            self._schedule()  # the backlog may contain the client's close frame, which ends the connection

    async def receive(self) -> Any:
        if self._handling_large:  # the application is done with it
            self._handling_large = False
            self.limits.release_large(self)
            self._schedule()
        self._receiving = True
        try:
            self._deliver()
            message: Any = await super().receive()
            if self._handling:  # the client disconnected; its last results come first, as for an application
                self._handled = self.loop.create_future()
                await self._handled
        finally:
            self._receiving = False
        if self._large_queued and message["type"] == "websocket.receive":
            self._large_queued, self._handling_large = False, True
        if self._paused and not self._waiting and self.queue.empty():
            self._schedule()
        return message

    def _is_full(self) -> bool:
        if not self.handshake_complete or self.close_sent:
            return False
        if self._waiting or not self.queue.empty() or self._handling_large:
            return True
        return self._received > self._usual_bytes and not self.limits.admit_large(self)

    def _control_allowed(self) -> bool:
        now = self.limits.clock()
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
        self._queue_waiting()
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
