"""`/v1/stream`: binary PCM in, JSON events out. `docs/websocket.md` documents the protocol for clients."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, cast

from starlette.datastructures import QueryParams
from starlette.websockets import WebSocket, WebSocketDisconnect

from nemostream.errors import AudioError, CapacityError, NemostreamError, OptionError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.formats import time_span, word_to_dict
from nemostream.serving.client import Client, shorten
from nemostream.serving.errors import Expired, StateSuperseded, status_of
from nemostream.serving.network.connections import WebSocketProtocol
from nemostream.serving.protocols.direct import DirectAudio, deferred
from nemostream.serving.protocols.resumption import Resumption
from nemostream.serving.protocols.sockets import (
    MAX_TEXT_CHARACTERS,
    MIN_TEXT_BYTES,
    close_with_error,
    reject,
    timed_out,
)
from nemostream.serving.service import Service
from nemostream.serving.session import OnPushed, Session
from nemostream.untrusted import short_repr

SUBPROTOCOL = "nemostream"
_MOVE = "nemostream.move"  # type of the message that ends a resumable connection
_MOVED = "the server is stopping; resume the stream, on another server if there is one."
_NOT_STORED = "the server is stopping, and its newest state is older than usual; resume the stream."


async def serve(socket: WebSocket, service: Service) -> None:
    """Serve one connection."""
    client: Client = socket.scope["nemostream.client"]
    try:
        session, options, resumption = await _open(socket.query_params, service, client)
    except NemostreamError as error:
        return await reject(socket, error)
    async with session:
        if options["resumable"] and resumption is None:
            resumption = await Resumption.open(service, client, options)
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None)
        if resumption is None:
            return await _run(_Connection(socket, session, service, options), socket, session, service)
        connection = _ResumableConnection(socket, session, service, options, resumption)
        service.resumable[resumption.token] = connection.move
        try:
            await _run(connection, socket, session, service)
        finally:
            connection.ended.set()
            if service.resumable.get(resumption.token) == connection.move:
                del service.resumable[resumption.token]


async def _open(
    query: QueryParams, service: Service, client: Client
) -> tuple[Session, dict[str, Any], Resumption | None]:
    """Open the session that a query requests. Return it, its options, and the resumption of a stream that continues.

    The stored state, which may have many megabytes, can be freed after the return.
    """
    options, resumption = _options(query), None
    state: dict[str, Any] = {}
    if "resume" in options:
        resumption, state = await Resumption.resume(
            service, client, options["resume"], options["received"], options["results"]
        )
        options = resumption.options
    arguments = {name: value for name, value in options.items() if name not in ("words", "resumable", "itn")}
    arguments["phrases"] = await service.compile_phrases(options.get("phrases"))
    arguments["normalizer"] = await service.normalizer(options["itn"], options.get("language"))
    session = service.open("websocket", client=client, **arguments, **state)
    if resumption is not None:
        service.metrics.resumed.inc()
    return session, options, resumption


async def _run(connection: _Connection, socket: WebSocket, session: Session, service: Service) -> None:
    try:
        await connection.run()
    except NemostreamError as error:
        await connection.keep_state(error)
        session.close(str(error))
        if isinstance(error, Expired):
            service.metrics.timeouts.inc()
        event = {"type": "error", "code": status_of(error).code, "message": str(error)}
        await close_with_error(socket, error, event)
    except WebSocketDisconnect:
        await connection.keep_state(None)
        session.close("the client disconnected")
        if timed_out(socket):
            service.metrics.timeouts.inc()


class _Connection:
    """An accepted connection. With the option `words`, events list words with times and confidence."""

    def __init__(self, socket: WebSocket, session: Session, service: Service, options: dict[str, Any]) -> None:
        self._socket, self._session, self._service, self._words = socket, session, service, options["words"]
        self._resumable = options["resumable"]

    async def run(self) -> None:
        """Process messages until the client finishes. Raises `NemostreamError` and `WebSocketDisconnect`."""
        await self._begin()
        finished = False
        with DirectAudio(self._socket.scope, self._start_push, self._direct_texts):
            while not finished:
                async with self._session.receiving():
                    message = await self._receive()
                if message["type"] == _MOVE:
                    break
                if message["type"] == "websocket.disconnect":
                    raise WebSocketDisconnect(message.get("code", 1006))
                if (result := message.get("deferred")) is not None:
                    await self._send_texts(self._direct_texts(deferred(result)))
                elif (data := message.get("bytes")) is not None:
                    await self._push(data)
                else:
                    finished = await self._handle_text(message.get("text") or "{}")
        await self._end(finished)

    async def keep_state(self, error: NemostreamError | None) -> None:
        """Store the state of a resumable stream after the loss of its connection, or with `error`, its failure."""

    async def _begin(self) -> None:
        await self._send(self._ready() | ({"resumption": None} if self._resumable else {}))

    def _ready(self) -> dict[str, Any]:
        session = self._session
        return {
            "type": "ready",
            "stream": session.id,
            "chunk_ms": session.requested_ms,
            "final_chunk_ms": session.requested_final_ms,
            "language": session.language,
            "model": self._service.model.manifest.name,
        }

    async def _receive(self) -> Any:
        return await self._socket.receive()

    async def _end(self, finished: bool) -> None:
        await self._socket.close()

    def _start_push(self, on_pushed: OnPushed, message: bytes | str) -> bool:
        return isinstance(message, bytes) and self._session.start_push(message, on_pushed)

    def _direct_texts(self, events: Iterable[Any]) -> list[str]:
        """Return the messages for the result of `_start_push`."""
        return self._texts_of(events)

    async def _push(self, data: bytes) -> None:
        await self._send_texts(self._texts_of(await self._session.push(data)))

    async def _handle_text(self, text: str) -> bool:
        """Process a text message. Return whether the stream is finished."""
        session = self._session
        await session.pace(len(text), min_bytes=MIN_TEXT_BYTES)
        kind, message = _parse(text)
        if kind == "commit":
            events = await session.commit()
            await self._complete_control(events, {"type": "committed", "audio": round(session.audio, 3)})
        elif kind == "configure":
            await self._configure(message)
        elif kind == "finish":
            events = await session.finish()
            await self._complete_control(
                events, {"type": "done", "text": session.text, "audio": round(session.audio, 3)}
            )
            return True
        elif kind == "received":
            self._confirm(message)
        elif kind != "keepalive":
            raise OptionError(
                f"there is no message of type {shorten(kind)!r}; send commit, configure, finish, keepalive, or audio."
            )
        return False

    async def _complete_control(self, events: Iterable[Event], result: dict[str, Any] | None) -> None:
        """Send the events of a control, and its result."""
        await self._send_texts([*self._texts_of(events), *([json.dumps(result)] if result else [])])

    def _confirm(self, message: dict[str, Any]) -> None:
        """Process the number of the last event that the client has received."""
        raise OptionError("received was sent on a stream that is not resumable; connect with resumable=1.")

    async def _configure(self, message: dict[str, Any]) -> None:
        """Change options. An invalid one changes nothing, and the stream continues."""
        options = {name: message[name] for name in ("chunk_ms", "language", "final_chunk_ms") if name in message}
        rejected = None
        try:
            if not options:
                raise OptionError("configure has no option; set chunk_ms, final_chunk_ms or language.")
            if options.get("final_chunk_ms", 0) is None:
                options["final_chunk_ms"] = 0
            if empty := [name for name, value in options.items() if value is None]:
                raise OptionError(f"{empty[0]} of configure is null; set a value, or omit it.")
            self._service.configure(self._session, **options)
        except (OptionError, CapacityError) as error:
            rejected = {"type": "rejected", "code": status_of(error).code, "message": str(error)}
        await self._complete_control([], None)
        if rejected:
            await self._send(rejected)

    def _texts_of(self, events: Iterable[Event]) -> list[str]:
        """Return the messages for events. `committed` and `done` report the ends that the client requested."""
        return [
            json.dumps(_event_message(event, self._words)) if self._words or event.kind == "end" else _event_text(event)
            for event in events
            if event.reason not in ("forced", "finish")
        ]

    async def _send_texts(self, texts: Iterable[str]) -> None:
        for text in texts:
            await self._send_text(text)

    async def _send(self, message: dict[str, Any]) -> None:
        await self._send_text(json.dumps(message))

    async def _send_text(self, text: str) -> None:
        async with self._session.sending():
            await self._socket.send_text(text)


class _ResumableConnection(_Connection):
    """A connection whose stream can be continued over another one (`resumption`)."""

    def __init__(
        self,
        socket: WebSocket,
        session: Session,
        service: Service,
        options: dict[str, Any],
        resumption: Resumption,
    ) -> None:
        super().__init__(socket, session, service, options)
        self._resumption = resumption
        self._moving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sending: set[asyncio.Task[None]] = set()  # of messages about stored states
        self.ended = asyncio.Event()
        resumption.on_stored, resumption.on_superseded = self._on_stored, self._on_superseded

    async def move(self) -> None:
        """Store the state and close the connection. The client continues over another one."""
        if not self._moving.done():
            self._moving.set_result(None)
        await self.ended.wait()

    async def keep_state(self, error: NemostreamError | None) -> None:
        if isinstance(error, OptionError | AudioError):  # the client's next attempt would fail too
            return await self._resumption.delete()
        if error is None or isinstance(error, Expired):
            await self._save()

    async def _save(self) -> bool:
        """Store the state after the audio that is being processed. Return False if it is not stored."""
        try:
            return await self._resumption.save(self._session)
        except NemostreamError:  # the stream has failed: the last state is kept
            return False

    async def _begin(self) -> None:
        await self._send(self._ready() | {"resumption": self._resumption.describe()})
        await self._send_texts(self._resumption.resent)

    async def _receive(self) -> Any:
        receiving: asyncio.Future[Any] = asyncio.ensure_future(self._socket.receive())
        try:
            await asyncio.wait(
                cast(list[asyncio.Future[Any]], [receiving, self._moving]), return_when=asyncio.FIRST_COMPLETED
            )
            if receiving.done():
                return receiving.result()
            self._moving.result()  # raises if the stream is continued elsewhere
            return {"type": _MOVE}
        finally:
            receiving.cancel()

    async def _end(self, finished: bool) -> None:
        if not finished:
            stored = await self._save()
            self._session.close()
            self._service.metrics.moved.inc()
            await self._send({"type": "moved", "message": _MOVED if stored else _NOT_STORED})
            return await self._socket.close(1012, "moved")
        connection: WebSocketProtocol | None = self._socket.scope.get("nemostream.connection")
        await self._socket.close()
        if connection is None:  # another ASGI server: the state expires
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._service.settings.send_seconds):
                if await connection.wait_closed():
                    await self._resumption.delete()

    def _start_push(self, on_pushed: OnPushed, message: bytes | str) -> bool:
        return super()._start_push(partial(self._pushed, len(message), on_pushed), message)

    def _pushed(self, size: int, on_pushed: OnPushed, result: list[Event] | Exception) -> None:
        """Pass on the messages of the events, which belong to the state from now on, whether or not they are sent."""
        if isinstance(result, Exception):
            return on_pushed(result)
        self._resumption.bytes += size
        on_pushed(cast(Any, self._texts_of(result)))
        self._save_if_due()

    def _direct_texts(self, events: Iterable[Any]) -> list[str]:
        return [*events]  # `_pushed` has made them

    async def _push(self, data: bytes) -> None:
        texts = self._texts_of(await self._session.push(data))
        self._resumption.bytes += len(data)
        self._save_if_due()
        await self._send_texts(texts)

    async def _handle_text(self, text: str) -> bool:
        finished = await super()._handle_text(text)
        if not finished:
            self._save_if_due()
        return finished

    async def _complete_control(self, events: Iterable[Event], result: dict[str, Any] | None) -> None:
        self._resumption.controls += 1
        texts = self._texts_of(events)
        if result and (text := self._resumption.events.add(json.dumps(result), True)) is not None:
            texts.append(text)
        await self._send_texts(texts)

    def _confirm(self, message: dict[str, Any]) -> None:
        number = message.get("sequence")
        if not isinstance(number, int) or isinstance(number, bool):
            raise OptionError(f"sequence of received is {short_repr(number)}; it must be the number of an event.")
        self._resumption.events.confirm(number)

    def _texts_of(self, events: Iterable[Event]) -> list[str]:
        texts = []
        for event in events:
            for text in super()._texts_of([event]):
                is_result = event.kind in ("final", "end")
                if (numbered := self._resumption.events.add(text, is_result)) is not None:
                    texts.append(numbered)
            self._resumption.utterance_ended |= event.kind == "end"
        return texts

    def _save_if_due(self) -> None:
        with suppress(NemostreamError):  # the next message raises it
            self._resumption.save_if_due(self._session)

    def _on_stored(self, message: dict[str, Any]) -> None:
        async def send() -> None:
            with suppress(NemostreamError, WebSocketDisconnect, RuntimeError):  # the connection is closed
                await self._send(message)

        task = asyncio.get_running_loop().create_task(send())
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _on_superseded(self, error: StateSuperseded) -> None:
        if not self._moving.done():
            self._moving.set_exception(error)
            self._moving.exception()  # marks it as retrieved


def _event_message(event: Event, words: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"type": event.kind, "utterance": event.utterance}
    if event.kind == "end":
        message |= {"reason": event.reason, "time": round(event.end, 3)}
        return message | {"audio": round(event.audio, 3), "chunk_ms": event.chunk_ms}
    message |= {
        "text": event.text,
        "language": event.language,
        "stable": event.stable,
        **time_span(event),
        "audio": round(event.audio, 3),
        "chunk_ms": event.chunk_ms,
    }
    if words:
        # Only a final has all words: all words in each event would add up to the square of an utterance's length.
        final = event.kind == "final"
        message["words_from"] = 0 if final else event.words_from
        message["words"] = [word_to_dict(word) for word in (event.words if final else event.new_words)]
    return message


def _event_text(event: Event) -> str:
    """Return what `json.dumps` returns for the message of a partial, a backchannel or a final without words.

    Written by hand because it is created for a third of the messages, and takes half the time.
    """
    language = "null" if event.language is None else _quoted(event.language)
    return (
        f'{{"type": "{event.kind}", "utterance": {event.utterance}, "text": {_quoted(event.text)}, '
        f'"language": {language}, "stable": {_quoted(event.stable)}, "start": {round(event.start, 3)!r}, '
        f'"end": {round(event.end, 3)!r}, "audio": {round(event.audio, 3)!r}, "chunk_ms": {event.chunk_ms}}}'
    )


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Return the type and the fields of a text message. Raises `OptionError`."""
    if len(text) > MAX_TEXT_CHARACTERS:
        raise OptionError(f"a text message has {len(text)} characters; the maximum is {MAX_TEXT_CHARACTERS}.")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"a text message must be JSON ({error}); send audio in binary messages.") from error
    if not isinstance(message, dict):
        raise OptionError('a text message must be a JSON object such as {"type": "finish"}.')
    return str(message.get("type")), message


def _options(query: QueryParams) -> dict[str, Any]:
    """Return the options of a query string, for `Service.open` and `serve`. Raises `OptionError`."""
    resumes = "resume" in query
    parsers = _RESUME_PARSERS if resumes else _OPTION_PARSERS
    options: dict[str, Any] = {} if resumes else {"words": False, "itn": False, "resumable": False}
    for name, value in query.items():
        if name not in parsers:
            kind = "option besides resume" if resumes else "option"
            raise OptionError(f"there is no {kind} {shorten(name)!r}; the options are {', '.join(parsers)}.")
        try:
            options[name] = parsers[name](value)
        except ValueError as error:
            raise OptionError(f"{name} has an invalid value: {shorten(value)!r}.") from error
    if resumes and (missing := [name for name in parsers if name not in options]):
        raise OptionError(f"resume needs the option {missing[0]}: see docs/websocket.md.")
    if options.get("endpoint_ms") == -1:
        options["endpoint_ms"] = None
    return options


def _phrases(value: str) -> Any:
    try:
        phrases = json.loads(value)
    except RecursionError:
        raise ValueError from None
    if not isinstance(phrases, dict | list):
        raise ValueError
    return phrases


def _flag(value: str) -> bool:
    if value.lower() not in ("0", "1", "true", "false"):
        raise ValueError
    return value.lower() in ("1", "true")


def _token(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,128}", value):
        raise ValueError
    return value


def _count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        raise ValueError
    return int(value)


_OPTION_PARSERS: dict[str, Callable[[str], Any]] = {
    "sample_rate": int,
    "channels": int,
    "encoding": str,
    "chunk_ms": int,
    "final_chunk_ms": int,
    "language": str,
    "endpoint_ms": int,
    "endpoint_model": _flag,
    "max_utterance_ms": int,
    "decoder": str,
    "phrases": _phrases,
    "vad": _flag,
    "words": _flag,
    "itn": _flag,
    "resumable": _flag,
}
_RESUME_PARSERS: dict[str, Callable[[str], Any]] = {"resume": _token, "received": _count, "results": _count}
