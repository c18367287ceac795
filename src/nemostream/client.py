"""Client of `/v1/stream`, the WebSocket of `nemostream serve`. A stream continues after its connection is lost.

    async with AsyncStream(["https://one.example", "https://two.example"], chunk_ms=160) as stream:
        sending = asyncio.create_task(send_audio(stream))  # stream.send(pcm), ..., stream.finish()
        async for event in stream:
            print(event.type, event.text)

`send` and the controls (`commit`, `configure`, `finish`) append to a backlog; a task sends the backlog over the current
connection. The server reports how much of it is stored, and that part is discarded. After a loss, the stream is resumed
on the same or another server, which states the position from which the rest of the backlog is sent again.

docs/client.md is the guide, docs/websocket.md describes the protocol. This module needs `websockets` and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import ssl
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import urlencode, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.http11 import Response

from nemostream.errors import AudioError, NemostreamError, OptionError, StreamError

T = TypeVar("T")

_PATH = "/v1/stream"
_RESUMPTION_VERSION = 1
_CONNECT_SECONDS = 10.0  # for the handshake, and for `ready` after it
_CLOSE_SECONDS = 1.0  # for the closing handshake
_PING_SECONDS, _MAX_UNANSWERED_PINGS = 3.0, 3  # a connection on which nothing is received after so many pings is lost
_KEEPALIVE_SECONDS = 10.0  # without a message of the client; the server ends a stream after 30 s
_MIN_BACKOFF, _MAX_BACKOFF = 0.1, 5.0  # seconds before a server is tried again
# Connections in a row that are lost without a new event, each within `_STABLE_SECONDS`, before the stream is given up:
# a stream may make every server fail.
_MAX_EARLY_LOSSES, _STABLE_SECONDS = 8, 10.0
_STORE_SECONDS = 30.0  # without `stored`, after which a full buffer is emptied
_MESSAGE_BYTES = 64 << 10  # of audio in one message
_MAX_EVENT_BYTES = 64 << 20
_RETRIED_STATUSES = (408, 425, 429)  # and those from 500 on

# Encodings: the format of their samples in the buffer protocol, its size in bytes, and its name.
_SAMPLES = {
    "pcm_s16le": ("h", 2, "int16"),
    "pcm_f32le": ("f", 4, "float32"),
    "mulaw": ("B", 1, "uint8"),
    "alaw": ("B", 1, "uint8"),
}
_TRANSCRIPT = ("partial", "backchannel", "final", "end", "committed", "done")  # types of numbered events


class Rejected(OptionError):
    """The server rejected an option or the API key. Exit code 2."""


class StreamLost(StreamError):
    """The connection was lost and the stream cannot be resumed. Exit code 9.

    `text` is the text received so far, including that of the utterance that is not finished.
    """

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


class Unavailable(StreamLost):
    """No server accepted the stream: at the start, or for `max_reconnect_seconds` after a loss. Exit code 9."""


@dataclass(frozen=True)
class Word:
    """A word with its punctuation. Times are seconds from the start of the stream."""

    text: str
    start: float
    end: float
    confidence: float  # 0 to 1
    language: str | None = None  # if the model emitted a language tag after the word


@dataclass(frozen=True)
class Event:
    """An event of the server, with the fields of docs/websocket.md. Times are seconds from the start of the stream."""

    type: str  # partial, backchannel, final, end, committed, done, or rejected
    utterance: int | None = None  # number of the utterance, from 0
    text: str = ""  # of the utterance; of a `done`: of all utterances
    stable: str = ""  # the part of `text` that is not revised
    start: float = 0.0  # time of the first token; of an `end`: when the utterance ended
    end: float = 0.0  # time of the last token; of an `end`: as `start`
    audio: float = 0.0  # seconds of audio received by the server
    chunk_ms: int | None = None  # milliseconds
    language: str | None = None
    words: tuple[Word, ...] = ()  # with the option `words`: those from `words_from` on
    words_from: int = 0
    reason: str | None = None  # of an `end`: silence, length or model; of a `rejected`: the message
    sequence: int | None = None  # number of the event, from 1, if the stream is resumable


_EVENT_FIELDS = {field.name for field in fields(Event)}


class _Position(NamedTuple):
    """A point between two messages or within audio. On one stream, positions are ordered."""

    bytes: int  # of audio before it
    controls: int  # before it


class _Backlog:
    """The audio and the controls that may have to be sent, in order. `start` and `end` are the positions kept."""

    def __init__(self) -> None:
        self.start = self.end = _Position(0, 0)
        self._audio = bytearray()
        self._controls: list[tuple[int, str]] = []  # the bytes of audio before the control, and its message
        self._control_bytes = 0

    @property
    def size(self) -> int:
        """Bytes of memory for audio and controls."""
        return len(self._audio) + self._control_bytes

    def append(self, message: bytes | str) -> None:
        if isinstance(message, bytes):
            self._audio += message
            self.end = _Position(self.end.bytes + len(message), self.end.controls)
        else:
            self._controls.append((self.end.bytes, message))
            self._control_bytes += len(message)
            self.end = _Position(self.end.bytes, self.end.controls + 1)

    def after(self, position: _Position) -> tuple[bytes | str, _Position]:
        """Return the message to send at a position before the end, and the position after it."""
        limit = min(self.end.bytes, position.bytes + _MESSAGE_BYTES)
        if (index := position.controls - self.start.controls) < len(self._controls):
            place, control = self._controls[index]
            if place <= position.bytes:
                return control, _Position(position.bytes, position.controls + 1)
            limit = min(limit, place)
        with memoryview(self._audio) as audio:
            part = bytes(audio[position.bytes - self.start.bytes : limit - self.start.bytes])
        return part, _Position(limit, position.controls)

    def discard(self, position: _Position) -> None:
        """Remove what is before a position."""
        start = self.start
        self.start = _Position(max(start.bytes, position.bytes), max(start.controls, position.controls))
        count = self.start.controls - start.controls
        self._control_bytes -= sum(len(message) for _, message in self._controls[:count])
        del self._controls[:count]
        del self._audio[: self.start.bytes - start.bytes]


class _Refused(Exception):
    """A server did not accept the stream. It may be tried again after `retry_seconds`, or (None) never."""

    def __init__(self, reason: str, retry_seconds: float | None = 0.0) -> None:
        super().__init__(reason)
        self.retry_seconds = retry_seconds


@dataclass
class _Connection:
    """A connection on which `ready` was received."""

    socket: ClientConnection
    server: str
    opened_at: float
    received_at: float  # when a message or a pong was received last
    stored_at: float  # when the server last reported what is stored; first when the connection was opened
    reason: str = ""  # why it ends, as far as known
    leave: bool = False  # the server is stopping or does not answer: other servers are tried first
    progress: bool = False  # whether it has delivered a new event


class AsyncStream:
    """A stream of audio to `nemostream serve`, and of events from it. An asynchronous context manager.

    Entering it connects; leaving it before `done` discards the stream. Iterate over it, in the same or another task,
    to receive events until `done`. Events are kept until they are read.

    Parameters
    ----------
    servers
        URL of the server, such as `https://host:port/prefix` (or http, ws, wss), or several URLs. If none of them can
        be reached at the start, `Unavailable` is raised at once. After a loss, the server of the stream is tried first.
    api_key
        API key of the server.
    sample_rate
        Sample rate of the audio in Hz.
    encoding
        "pcm_s16le", "pcm_f32le", "mulaw" or "alaw".
    ssl
        TLS settings of https and wss. Default: those of Python, with verified certificates.
    max_buffered_seconds
        Seconds of audio kept until they are stored by the server. While the buffer is full, `send` waits. If the
        server has stored nothing for 30 s, the oldest audio is dropped instead; a loss before the server stores the
        audio after it ends the stream.
    max_reconnect_seconds
        Seconds without a connection after which the stream is lost.
    options
        Options of docs/websocket.md, such as `chunk_ms=160`, `words=True` or `phrases=["Siobhan"]`. None is the
        server's default.

    Raises
    ------
    OptionError
        If an option is invalid; its subclass `Rejected` if the server rejects it or the API key.
    Unavailable
        If no server accepts the stream; it is a `StreamLost`.
    StreamLost
        By all methods and the iteration, once the stream is lost.
    """

    def __init__(
        self,
        servers: str | Iterable[str],
        *,
        api_key: str | None = None,
        sample_rate: int = 16000,
        encoding: str = "pcm_s16le",
        ssl: ssl.SSLContext | None = None,
        max_buffered_seconds: float = 120.0,
        max_reconnect_seconds: float = 60.0,
        **options: Any,
    ) -> None:
        names = dict.fromkeys([servers] if isinstance(servers, str) else servers)
        if not names:
            raise OptionError("no server is given; pass a URL such as http://127.0.0.1:8000.")
        self._urls = {name: _stream_url(name) for name in names}
        if encoding not in _SAMPLES:
            raise OptionError(f"encoding is {encoding!r}; choose one of {', '.join(_SAMPLES)}.")
        channels = options.get("channels") or 1
        for name, value in (("sample_rate", sample_rate), ("channels", channels)):
            if not isinstance(value, int) or value <= 0:
                raise OptionError(f"{name} is {value!r}; it must be a positive integer.")
        for name, seconds in (
            ("max_buffered_seconds", max_buffered_seconds),
            ("max_reconnect_seconds", max_reconnect_seconds),
        ):
            if not seconds > 0:
                raise OptionError(f"{name} is {seconds!r}; it must be more than 0 seconds.")
        self._encoding, self._channels = encoding, channels
        self._bytes_per_second = sample_rate * channels * _SAMPLES[encoding][1]
        self._max_bytes = max_buffered_seconds * self._bytes_per_second
        self._max_buffered_seconds, self._max_reconnect_seconds = max_buffered_seconds, max_reconnect_seconds
        self._query = {"sample_rate": sample_rate, "encoding": encoding, "resumable": 1}
        self._query |= {name: _query_value(value) for name, value in options.items() if value is not None}
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._ssl = ssl
        self.reconnects = 0  # how often the stream was resumed
        self.gaps: list[float] = []  # seconds from the detection of each loss to the next new event
        self._backlog = _Backlog()
        self._sent = _Position(0, 0)  # on the current connection
        self._finish_requested = False
        self._appending = asyncio.Lock()  # keeps the parts of one `send` together
        self._outgoing = asyncio.Event()  # there may be something to send
        self._room = asyncio.Event()  # there may be room in the backlog
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()  # there are events, or the stream has ended
        self._token = ""  # of a resumable stream
        self._sequence = 0  # of the last event received
        self._results = 0  # events received that are not partials or backchannels
        self._receipt_due = False  # whether `received` is to be sent
        self._finals: list[str] = []
        self._partial = ""  # text of the unfinished utterance
        self._text: str | None = None  # of all utterances, once `done` is received
        self._connection: _Connection | None = None
        self._lost_at: float | None = None  # when the connection was lost, until the next new event
        self._early_losses = 0  # connections in a row that were lost early
        self._task: asyncio.Task[None] | None = None
        self._error: Exception | None = None  # that ended the stream
        self._error_trace: TracebackType | None = None

    # -- for callers ---------------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The text of all utterances; before `done`, the finals received so far, separated by spaces."""
        return " ".join(self._finals) if self._text is None else self._text

    @property
    def resumable(self) -> bool:
        """Whether the server stores the stream, so that it continues after a loss of the connection."""
        return bool(self._token)

    async def open(self) -> None:
        """Connect. Raises `Rejected` and `Unavailable`."""
        if self._task is not None:
            raise StreamError("the stream has been opened before; create another one.")
        connection = await self._connect(list(self._urls), retry=False)
        self._task = asyncio.create_task(self._run(connection), name="nemostream-client")

    async def close(self) -> None:
        """Close the connection and end all tasks. Before `done`, the rest of the stream is discarded."""
        if self._task is not None:
            if self._text is None:
                self._task.cancel()
            await asyncio.wait([self._task])
        if self._text is None:
            self._fail(StreamError("the stream is closed."))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def send(self, pcm: Any) -> None:
        """Send audio: bytes, or an array with the buffer protocol, [n] or [n, channels].

        Waits while the buffer is full. Raises `AudioError` for another format than that of the encoding, and
        `StreamError` after `finish` and `close`.
        """
        data = self._to_bytes(pcm)
        async with self._appending:
            for start in range(0, len(data), _MESSAGE_BYTES):
                await self._append(data[start : start + _MESSAGE_BYTES])

    async def commit(self) -> None:
        """End the utterance here: the answer is its `final`, then `committed`. Raises as `send`."""
        await self._control({"type": "commit"})

    async def configure(self, **options: Any) -> None:
        """Change `chunk_ms`, `final_chunk_ms` or `language` from here on. Raises as `send`.

        The answer to an invalid value is an event `rejected`; the stream continues unchanged.
        """
        await self._control({"type": "configure", **options})

    async def finish(self) -> None:
        """End the audio: the answer is the last `final`, then `done`. Raises as `send`."""
        await self._control({"type": "finish"})

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._text is not None:
                raise StopAsyncIteration
            self._raise_error()
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    # -- backlog -------------------------------------------------------------------------------------------------------

    def _to_bytes(self, pcm: Any) -> bytes:
        code, size, name = _SAMPLES[self._encoding]
        try:
            view = memoryview(pcm)
        except TypeError:
            raise AudioError(f"audio is of type {type(pcm).__name__}; send bytes or an array of {name}.") from None
        if view.format in ("B", "c"):
            return view.tobytes()
        if view.format not in (code, f"<{code}") or view.itemsize != size:
            raise AudioError(
                f"the samples have format {view.format!r} and {view.itemsize} byte(s), but the stream's encoding is "
                f"{self._encoding}: send {name} or bytes, or open the stream with another encoding."
            )
        if view.ndim > 2 or (view.ndim == 2 and view.shape is not None and view.shape[1] != self._channels):
            raise AudioError(
                f"the audio has shape {list(view.shape or ())}, but the stream has {self._channels} channel(s): send "
                "[n] or [n, channels], and open the stream with channels=..."
            )
        return view.tobytes()

    async def _control(self, message: dict[str, Any]) -> None:
        async with self._appending:
            await self._append(json.dumps(message))
            self._finish_requested = message["type"] == "finish"

    async def _append(self, message: bytes | str) -> None:
        """Append to the backlog as soon as it has room."""
        while True:
            self._raise_error()
            if self._task is None:
                raise StreamError("the stream is not open; use it in `async with`.")
            if self._finish_requested:
                raise StreamError("the stream is finished: nothing can be sent after finish.")
            if self._backlog.size < self._max_bytes:
                break
            timeout = None
            if self._connection is not None and self._backlog.start < self._sent:
                timeout = self._connection.stored_at + _STORE_SECONDS - asyncio.get_running_loop().time()
                if timeout <= 0:
                    self._drop_sent()
                    continue
            self._room.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._room.wait()
        self._backlog.append(message)
        self._outgoing.set()

    def _drop_sent(self) -> None:
        """Discard the oldest messages that were sent until there is room: a failing store must not stop the stream."""
        while self._backlog.size >= self._max_bytes and self._backlog.start < self._sent:
            self._backlog.discard(min(self._backlog.after(self._backlog.start)[1], self._sent))

    # -- connections ---------------------------------------------------------------------------------------------------

    async def _run(self, connection: _Connection) -> None:
        try:
            while not await self._use(connection):
                connection = await self._resume(connection)
        except Exception as error:  # of any class: callers must not wait for a task that has ended
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error, self._error_trace = error, error.__traceback__
        self._news.set()
        self._room.set()

    def _raise_error(self) -> None:
        """Raise the error that ended the stream, if any."""
        if self._error is not None:
            raise self._error.with_traceback(self._error_trace)  # without the frames of earlier calls

    def _lost(self, reason: str) -> StreamLost:
        return StreamLost(reason, " ".join(filter(None, [*self._finals, self._partial])))

    async def _resume(self, lost: _Connection) -> _Connection:
        """Return a new connection to the stream. Raises `StreamLost`."""
        if not self._token:
            raise self._lost(f"{lost.reason}; the server does not store streams, so it cannot be resumed.")
        now = asyncio.get_running_loop().time()
        self._lost_at = self._lost_at or now
        early = not lost.progress and now - lost.opened_at < _STABLE_SECONDS
        self._early_losses = self._early_losses + 1 if early else 0
        if self._early_losses > _MAX_EARLY_LOSSES:
            raise self._lost(f"{self._early_losses} connections in a row were lost without a new event; {lost.reason}.")
        if self._early_losses:
            await asyncio.sleep(_backoff(self._early_losses))
        names = list(self._urls)
        index = names.index(lost.server) + lost.leave
        connection = await self._connect(names[index:] + names[:index], retry=True)
        self.reconnects += 1
        return connection

    async def _connect(self, servers: list[str], retry: bool) -> _Connection:
        """Return a connection to the first server that accepts the stream.

        With `retry`, servers that refuse are tried again for `max_reconnect_seconds`.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._max_reconnect_seconds if retry else math.inf
        due = dict.fromkeys(servers, 0.0)  # when each server may be tried
        attempts = dict.fromkeys(servers, 0)
        reasons: dict[str, str] = {}
        while due:
            server = min(due, key=lambda name: due[name])
            await asyncio.sleep(max(0.0, min(due[server], deadline) - clock()))
            if clock() >= deadline:
                break
            attempts[server] += 1
            try:
                return await self._attempt(server)
            except _Refused as error:
                reasons[server] = str(error)
                if error.retry_seconds is None or not retry:
                    del due[server]
                    continue
                delay = error.retry_seconds * random.uniform(1.0, 1.5)
                due[server] = clock() + max(delay, _backoff(attempts[server]))
        refusals = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        if retry and not due:
            raise self._lost(f"no server can resume the stream: {refusals}.")
        limit = f" for {self._max_reconnect_seconds:g} s" if retry else ""
        raise Unavailable(f"no server accepted the stream{limit}: {refusals}.", self._lost("").text)

    async def _attempt(self, server: str) -> _Connection:
        """Connect to a server. Raises `_Refused`, or `Rejected` or `StreamLost` if no server will accept the stream."""
        query = self._query
        if self._token:
            query = {"resume": self._token, "received": self._sequence, "results": self._results}
        url = self._urls[server]
        tls: dict[str, Any] = {"ssl": self._ssl} if self._ssl is not None and url.startswith("wss:") else {}
        try:
            socket = await connect(
                f"{url}?{urlencode(query)}",
                additional_headers=self._headers,
                compression=None,  # PCM hardly shrinks, and it costs time on both sides
                open_timeout=_CONNECT_SECONDS,
                ping_interval=None,  # see `_watch`
                close_timeout=_CLOSE_SECONDS,
                max_size=_MAX_EVENT_BYTES,
                **tls,
            )
        except InvalidStatus as error:
            raise self._refusal(server, error.response) from error
        except (OSError, EOFError, UnicodeError, WebSocketException) as error:
            raise _Refused(_describe(error)) from error
        now = asyncio.get_running_loop().time()
        connection = _Connection(socket, server, opened_at=now, received_at=now, stored_at=now)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                message = await socket.recv()
            self._begin(connection, message)
        except BaseException as error:
            socket.transport.abort()
            if isinstance(error, TimeoutError | ConnectionClosed):
                raise _Refused(_describe(error)) from error
            raise
        return connection

    def _refusal(self, server: str, response: Response) -> Exception:
        """Return the error for an HTTP response: `_Refused`, or `StreamLost` or `Rejected` if it is final."""
        status, code, message = response.status_code, None, ""
        with suppress(ValueError, LookupError, TypeError, AttributeError):
            error = json.loads(response.body or b"")["error"]
            code, message = error.get("code"), str(error.get("message"))
        if code == "invalid_api_key":  # the server's message names the header
            message = "a valid API key is required: set api_key (on the command line: --api-key)"
        reason = f"HTTP {status}, {message}".rstrip(" ,.")
        if status in _RETRIED_STATUSES or status >= 500:
            # A URL may be that of a load balancer: the next attempt may reach another server than the one that stops.
            seconds = "" if code == "draining" else response.headers.get("Retry-After", "")
            return _Refused(reason, float(seconds) if seconds.isdecimal() else 0.0)
        if self._token:
            # The server has the stream and does not continue it; any other server would answer the same.
            if code == "state" and status in (403, 409):
                return self._lost(f"{server} does not resume the stream: {reason}.")
            return _Refused(reason, None)
        return Rejected(f"{server} rejected the stream: {reason}.")

    def _begin(self, connection: _Connection, message: str | bytes) -> None:
        """Process `ready`. Raises `_Refused` if the server sends an error instead, and `StreamLost`."""
        with self._parsed(connection, message) as ready:
            if ready["type"] == "error":
                self._handle_error(connection, ready)
                raise _Refused(str(ready["message"]).rstrip("."))
            resumption = ready.get("resumption") or {}
            if resumption.get("version") == _RESUMPTION_VERSION:
                position = _Position(int(resumption["bytes"]), int(resumption["controls"]))
                self._check_kept(connection, position)
                self._token = str(resumption["token"])
                self._backlog.discard(position)
                self._sent = position
            elif self._token:
                raise self._lost(f"{connection.server} accepted the stream, but did not resume it.")

    def _check_kept(self, connection: _Connection, position: _Position) -> None:
        """Raise `StreamLost` if the backlog does not have all that follows a position."""
        kept = self._backlog.start
        if position.bytes < kept.bytes or position.controls < kept.controls:
            stored, oldest = position.bytes / self._bytes_per_second, kept.bytes / self._bytes_per_second
            raise self._lost(
                f"{connection.server} has stored the audio up to {stored:.2f} s, and the client has kept that from "
                f"{oldest:.2f} s on (max_buffered_seconds={self._max_buffered_seconds:g}): {oldest - stored:.2f} s "
                "are lost."
            )
        self._check_sent(connection, position, self._backlog.end)

    def _check_sent(self, connection: _Connection, position: _Position, sent: _Position) -> None:
        if position.bytes > sent.bytes or position.controls > sent.controls:
            raise self._lost(
                f"{connection.server} has stored {position.bytes} bytes and {position.controls} controls, but "
                f"{sent.bytes} bytes and {sent.controls} controls were sent."
            )

    # -- messages ------------------------------------------------------------------------------------------------------

    async def _use(self, connection: _Connection) -> bool:
        """Exchange messages until the connection ends. Return whether the stream is done."""
        receiving = asyncio.create_task(self._receive(connection))
        tasks = {
            receiving,
            asyncio.create_task(self._send(connection.socket)),
            asyncio.create_task(self._watch(connection)),
        }
        self._connection = connection
        self._room.set()
        try:
            pending = tasks
            while not receiving.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            return receiving.result()
        finally:
            self._connection = None
            for task in tasks:
                task.cancel()
            try:
                await asyncio.wait(tasks)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CLOSE_SECONDS):  # `close` has no timeout while buffers are full
                        await connection.socket.close()
            finally:
                connection.socket.transport.abort()

    async def _receive(self, connection: _Connection) -> bool:
        """Receive messages. Return whether the stream is done."""
        clock = asyncio.get_running_loop().time
        try:
            while self._text is None:
                message = await connection.socket.recv()
                connection.received_at = clock()
                with self._parsed(connection, message) as event:
                    self._handle(connection, event)
        except ConnectionClosed as error:
            connection.reason = connection.reason or f"the connection to {connection.server} {_describe(error)}"
            return False
        with suppress(TimeoutError):  # the server deletes the stored state once the closing handshake completes
            async with asyncio.timeout(_CLOSE_SECONDS):
                await connection.socket.wait_closed()
        return True

    @contextmanager
    def _parsed(self, connection: _Connection, message: str | bytes) -> Iterator[dict[str, Any]]:
        """A context with the JSON object of a message; errors that an invalid message causes become `StreamLost`."""
        try:
            found = json.loads(message)
            if not isinstance(found, dict):
                raise TypeError(f"the message is of type {type(found).__name__}")
            yield found
        except NemostreamError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise self._lost(f"{connection.server} sent an invalid message: {message[:200]!r}.") from error

    def _handle(self, connection: _Connection, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind in _TRANSCRIPT:
            self._handle_event(connection, message)
        elif kind == "stored":
            position = _Position(int(message["bytes"]), int(message["controls"]))
            self._check_sent(connection, position, self._sent)
            self._backlog.discard(position)
            connection.stored_at, self._receipt_due = connection.received_at, True
            self._room.set()
            self._outgoing.set()
        elif kind == "rejected":
            self._deliver(Event("rejected", reason=str(message["message"])))
        elif kind == "moved":
            connection.leave = True
            connection.reason = f"{connection.server}: {str(message.get('message')).rstrip('.')}"
        elif kind == "error":
            self._handle_error(connection, message)

    def _handle_event(self, connection: _Connection, message: dict[str, Any]) -> None:
        if (sequence := message.get("sequence")) is not None:
            if sequence <= self._sequence:
                return
            if sequence > self._sequence + 1:
                raise self._lost(f"{connection.server} skipped the events {self._sequence + 1} to {sequence - 1}.")
            self._sequence = sequence
            self._results += message["type"] not in ("partial", "backchannel")
        connection.progress = True
        if self._lost_at is not None:
            self.gaps.append(connection.received_at - self._lost_at)
            self._lost_at = None
        event = _to_event(message)
        if event.type in ("partial", "backchannel"):
            self._partial = event.text
        elif event.type == "final":
            self._finals += filter(None, [event.text])
            self._partial = ""
        elif event.type == "done":
            self._text = event.text
        self._deliver(event)

    def _handle_error(self, connection: _Connection, message: dict[str, Any]) -> None:
        """Process an error of the server. Raises `Rejected` and `AudioError` for those of the client."""
        connection.reason = f"{connection.server}: {str(message['message']).rstrip('.')}"
        if message.get("code") == "option":
            raise Rejected(f"{connection.reason}.")
        if message.get("code") == "audio":
            raise AudioError(f"{connection.reason}.")

    def _deliver(self, event: Event) -> None:
        self._events.append(event)
        self._news.set()

    async def _send(self, socket: ClientConnection) -> None:
        """Send receipts, the backlog, and keepalives, until the connection is closed."""
        with suppress(ConnectionClosed):  # `_receive` handles it, after the messages that are left
            while True:
                self._outgoing.clear()
                if self._receipt_due:
                    self._receipt_due = False
                    await socket.send(json.dumps({"type": "received", "sequence": self._sequence}))
                elif self._sent < self._backlog.end:
                    message, self._sent = self._backlog.after(self._sent)
                    await socket.send(message)
                    if not self.resumable:
                        self._backlog.discard(self._sent)
                    self._room.set()
                else:
                    try:
                        async with asyncio.timeout(_KEEPALIVE_SECONDS):
                            await self._outgoing.wait()
                    except TimeoutError:
                        await socket.send(json.dumps({"type": "keepalive"}))

    async def _watch(self, connection: _Connection) -> None:
        """Abort the connection if nothing is received after several pings.

        Pings are counted instead of seconds, because this process may have been suspended. The keepalive of
        `websockets` would end connections of busy servers, which read a ping after the audio that was sent before it,
        and would not detect a frozen server while its ping waits for room in the send buffer.
        """
        clock = asyncio.get_running_loop().time

        def on_pong(pong: Any) -> None:
            connection.received_at = clock()

        unanswered = 0  # pings in a row after which nothing was received
        while unanswered < _MAX_UNANSWERED_PINGS:
            now, received_at = clock(), connection.received_at
            try:
                async with asyncio.timeout(_PING_SECONDS):
                    pong: Any = await connection.socket.ping()
                pong.add_done_callback(on_pong)
            except TimeoutError:
                pass
            except ConnectionClosed:
                return
            await asyncio.sleep(max(0.0, now + _PING_SECONDS - clock()))
            unanswered = unanswered + 1 if connection.received_at == received_at else 0
        connection.leave = True
        connection.reason = f"{connection.server} has not answered for {_MAX_UNANSWERED_PINGS * _PING_SECONDS:g} s"
        connection.socket.transport.abort()


class Stream:
    """The twin of `AsyncStream` for threads, with the same parameters. A context manager and an iterator.

    One thread may send while another iterates. The connection is used in the event loop of a thread of its own.
    """

    def __init__(
        self,
        servers: str | Iterable[str],
        *,
        api_key: str | None = None,
        sample_rate: int = 16000,
        encoding: str = "pcm_s16le",
        ssl: ssl.SSLContext | None = None,
        max_buffered_seconds: float = 120.0,
        max_reconnect_seconds: float = 60.0,
        **options: Any,
    ) -> None:
        self._stream = AsyncStream(
            servers,
            api_key=api_key,
            sample_rate=sample_rate,
            encoding=encoding,
            ssl=ssl,
            max_buffered_seconds=max_buffered_seconds,
            max_reconnect_seconds=max_reconnect_seconds,
            **options,
        )
        self._loop: asyncio.AbstractEventLoop | None = None  # while calls are accepted
        self._lock = threading.Lock()  # held to start a call, so that none starts after `close`
        self._thread: threading.Thread | None = None

    @property
    def text(self) -> str:
        """As `AsyncStream.text`."""
        return self._stream.text

    @property
    def resumable(self) -> bool:
        """As `AsyncStream.resumable`."""
        return self._stream.resumable

    @property
    def reconnects(self) -> int:
        """How often the stream was resumed."""
        return self._stream.reconnects

    @property
    def gaps(self) -> list[float]:
        """Seconds from the detection of each loss to the next new event."""
        return self._stream.gaps

    def open(self) -> None:
        """As `AsyncStream.open`."""
        if self._thread is not None:
            raise StreamError("the stream has been opened before; create another one.")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nemostream-client", daemon=True)
        self._thread.start()
        try:
            self._call(self._stream.open)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """As `AsyncStream.close`."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._end_tasks(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()

    async def _end_tasks(self) -> None:
        await self._stream.close()
        # Calls of other threads end with the error of a closed stream; those that do not are cancelled.
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            _, pending = await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, pcm: Any) -> None:
        """As `AsyncStream.send`."""
        self._call(lambda: self._stream.send(pcm))

    def commit(self) -> None:
        """As `AsyncStream.commit`."""
        self._call(self._stream.commit)

    def configure(self, **options: Any) -> None:
        """As `AsyncStream.configure`."""
        self._call(lambda: self._stream.configure(**options))

    def finish(self) -> None:
        """As `AsyncStream.finish`."""
        self._call(self._stream.finish)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        try:
            return self._call(self._stream.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def _call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function in the event loop and return its result."""
        with self._lock:
            if self._loop is None:
                raise StreamError("the stream is not open; use it in `with`.")
            future = asyncio.run_coroutine_threadsafe(function(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # after Ctrl-C
            raise


def _stream_url(server: str) -> str:
    """Return the URL of the WebSocket of a server. Raises `OptionError`."""
    try:
        parts = urlsplit(server)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        valid = scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise OptionError(f"{server!r} is not the URL of a server; give one such as http://127.0.0.1:8000.")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + _PATH, "", ""))


def _query_value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "1" if value else "0"
    return json.dumps(value, ensure_ascii=False)


def _to_event(message: dict[str, Any]) -> Event:
    values = {name: value for name, value in message.items() if name in _EVENT_FIELDS}
    if "time" in message:  # of an `end`
        values["start"] = values["end"] = message["time"]
    values["words"] = tuple(
        Word(word["text"], word["start"], word["end"], word["confidence"], word.get("language"))
        for word in message.get("words", ())
    )
    return Event(**values)


def _backoff(attempts: int) -> float:
    """Return the seconds to wait after a number of failed attempts."""
    return min(_MAX_BACKOFF, _MIN_BACKOFF * 2.0 ** (attempts - 1)) * random.uniform(0.5, 1.0)


def _describe(error: Exception) -> str:
    """Return the reason of a failed or lost connection."""
    if isinstance(error, ConnectionClosed):
        if error.rcvd is None:
            return "was lost"
        return f"was closed with code {error.rcvd.code}" + (f" ({error.rcvd.reason})" if error.rcvd.reason else "")
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error) or "timed out"  # only a `TimeoutError` has no text
