"""`/v1/stream`: binary PCM in, JSON events out. `docs/websocket.md` documents the protocol for clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any

from starlette.datastructures import QueryParams
from starlette.websockets import WebSocket, WebSocketDisconnect

from nemostream.errors import CapacityError, NemostreamError, OptionError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.formats import time_span, word_to_dict
from nemostream.serving.client import shorten
from nemostream.serving.errors import Expired, status_of
from nemostream.serving.protocols.direct import DirectAudio, deferred
from nemostream.serving.protocols.sockets import (
    MAX_TEXT_CHARACTERS,
    MIN_TEXT_BYTES,
    close_with_error,
    reject,
    timed_out,
)
from nemostream.serving.service import Service
from nemostream.serving.session import OnPushed, Session

SUBPROTOCOL = "nemostream"


async def serve(socket: WebSocket, service: Service) -> None:
    """Serve one connection."""
    try:
        options = _options(socket.query_params)
        words = options.pop("words")
        options["phrases"] = await service.compile_phrases(options.get("phrases"))
        options["normalizer"] = await service.normalizer(options.pop("itn"), options.get("language"))
        session = service.open("websocket", client=socket.scope["nemostream.client"], **options)
    except NemostreamError as error:
        return await reject(socket, error)
    async with session:
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None)
        try:
            await _Connection(socket, session, service, words).run()
        except NemostreamError as error:
            session.close(str(error))
            if isinstance(error, Expired):
                service.metrics.timeouts.inc()
            event = {"type": "error", "code": status_of(error).code, "message": str(error)}
            await close_with_error(socket, error, event)
        except WebSocketDisconnect:
            session.close("the client disconnected")
            if timed_out(socket):
                service.metrics.timeouts.inc()


class _Connection:
    """An accepted connection. With `words`, events list words with times and confidence."""

    def __init__(self, socket: WebSocket, session: Session, service: Service, words: bool) -> None:
        self._socket, self._session, self._service, self._words = socket, session, service, words

    async def run(self) -> None:
        """Process messages until the client finishes. Raises `NemostreamError` and `WebSocketDisconnect`."""
        session = self._session
        await self._send(
            {
                "type": "ready",
                "stream": session.id,
                "chunk_ms": session.requested_ms,
                "final_chunk_ms": session.requested_final_ms,
                "language": session.language,
                "model": self._service.model.manifest.name,
            }
        )
        finished = False
        with DirectAudio(self._socket.scope, self._start_push, self._texts_of):
            while not finished:
                async with session.receiving():
                    message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    raise WebSocketDisconnect(message.get("code", 1006))
                if (result := message.get("deferred")) is not None:
                    await self._send_events(deferred(result))
                elif (data := message.get("bytes")) is not None:
                    await self._send_events(await session.push(data))
                else:
                    finished = await self._handle_text(message.get("text") or "{}")
        await self._socket.close()

    def _start_push(self, message: bytes | str, on_pushed: OnPushed) -> bool:
        return isinstance(message, bytes) and self._session.start_push(message, on_pushed)

    async def _handle_text(self, text: str) -> bool:
        """Process a text message. Return whether the stream is finished."""
        session = self._session
        await session.pace(len(text), min_bytes=MIN_TEXT_BYTES)
        kind, message = _parse(text)
        if kind == "commit":
            await self._send_events(await session.commit())
            await self._send({"type": "committed", "audio": round(session.audio, 3)})
        elif kind == "configure":
            await self._configure(message)
        elif kind == "finish":
            await self._send_events(await session.finish())
            await self._send({"type": "done", "text": session.text, "audio": round(session.audio, 3)})
            return True
        elif kind != "keepalive":
            raise OptionError(
                f"there is no message of type {shorten(kind)!r}; send commit, configure, finish, keepalive, or audio."
            )
        return False

    async def _configure(self, message: dict[str, Any]) -> None:
        """Change options. An invalid one changes nothing, and the stream continues."""
        options = {name: message[name] for name in ("chunk_ms", "language", "final_chunk_ms") if name in message}
        try:
            if not options:
                raise OptionError("configure has no option; set chunk_ms, final_chunk_ms or language.")
            if options.get("final_chunk_ms", 0) is None:
                options["final_chunk_ms"] = 0
            if empty := [name for name, value in options.items() if value is None]:
                raise OptionError(f"{empty[0]} of configure is null; set a value, or omit it.")
            self._service.configure(self._session, **options)
        except (OptionError, CapacityError) as error:
            await self._send({"type": "rejected", "code": status_of(error).code, "message": str(error)})

    def _texts_of(self, events: Iterable[Event]) -> list[str]:
        """Return the messages for events. `committed` and `done` report the ends that the client requested."""
        return [
            json.dumps(_event_message(event, self._words)) if self._words or event.kind == "end" else _event_text(event)
            for event in events
            if event.reason not in ("forced", "finish")
        ]

    async def _send_events(self, events: Iterable[Event]) -> None:
        for text in self._texts_of(events):
            await self._send_text(text)

    async def _send(self, message: dict[str, Any]) -> None:
        await self._send_text(json.dumps(message))

    async def _send_text(self, text: str) -> None:
        async with self._session.sending():
            await self._socket.send_text(text)


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
    options: dict[str, Any] = {"words": False, "itn": False}
    for name, value in query.items():
        if name not in _OPTION_PARSERS:
            raise OptionError(f"there is no option {shorten(name)!r}; the options are {', '.join(_OPTION_PARSERS)}.")
        try:
            options[name] = _OPTION_PARSERS[name](value)
        except ValueError as error:
            raise OptionError(f"{name} has an invalid value: {shorten(value)!r}.") from error
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
}
