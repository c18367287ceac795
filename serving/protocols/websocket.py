"""`/v1/stream`: binary PCM up, JSON events down. Documented for clients in `docs/websocket.md`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from starlette.datastructures import QueryParams
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from nemostream.errors import AudioError, CapacityError, NemostreamError, OptionError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.formats import word_to_dict
from nemostream.serving.network.access import shown
from nemostream.serving.service import Service
from nemostream.serving.session import Draining, Expired, Session

PROTOCOL = "nemostream"
LEAST_TEXT = 8192  # bytes of audio that a text message counts as: handling one costs about as much
MOST_TEXT = 1 << 16  # characters of a message without audio: parsing one must not keep the event loop from others
_CODES: tuple[tuple[type[NemostreamError], str, int], ...] = (
    (Draining, "draining", 1012),
    (CapacityError, "capacity", 1013),
    (OptionError, "option", 1008),
    (AudioError, "audio", 1007),
    (Expired, "expired", 1008),
    (NemostreamError, "model", 1011),
)


def name_of(error: NemostreamError) -> tuple[str, int]:
    """An error's name in events, and the code that the socket is closed with."""
    return next((name, code) for kind, name, code in _CODES if isinstance(error, kind))


async def deny(socket: WebSocket, error: NemostreamError) -> None:
    """Refuse a connection that is not accepted yet, as HTTP would."""
    from nemostream.serving.protocols.http import refusal

    response: Response = refusal(error)
    await socket.send_denial_response(response)


async def serve(socket: WebSocket, service: Service) -> None:
    """One connection."""
    try:
        options = _options(socket.query_params)
        words = options.pop("words")
        options["phrases"] = await service.compile_phrases(options.get("phrases"))
        options["normalizer"] = await service.normalizer(options.pop("itn"))
        session = service.open("websocket", client=socket.scope["nemostream.client"], **options)
    except NemostreamError as error:
        return await deny(socket, error)
    async with session:
        await socket.accept(PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", ()) else None)
        try:
            await _talk(socket, session, service, words)
        except NemostreamError as error:
            session.close(str(error))
            if isinstance(error, Expired):
                service.metrics.dropped.inc()
            await hang_up(socket, error, {"type": "error", "code": name_of(error)[0], "message": str(error)})
        except WebSocketDisconnect:
            session.close("the client hung up")


async def hang_up(socket: WebSocket, error: NemostreamError, event: dict[str, Any]) -> None:
    """Tell why, and close; a client that is gone does not matter."""
    try:
        unread = isinstance(error, Expired) and error.unread  # one more event would hang too
        if socket.application_state == WebSocketState.CONNECTED and not unread:
            await socket.send_text(json.dumps(event))
        await socket.close(name_of(error)[1], str(error).encode()[:120].decode(errors="ignore"))
    except (RuntimeError, WebSocketDisconnect):
        pass


async def _talk(socket: WebSocket, session: Session, service: Service, words: bool) -> None:
    await _send(
        socket, session, {"type": "ready", "stream": session.id, "chunk_ms": session.wanted_ms, **_model(service)}
    )
    while True:
        async with session.receiving():
            message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        if (data := message.get("bytes")) is not None:
            await _tell(socket, session, await session.push(data), words)
            continue
        text = message.get("text") or "{}"
        await session.pace(max(len(text), LEAST_TEXT))
        kind, order = _order(text)
        if kind == "commit":
            await _tell(socket, session, await session.commit(), words)
            await _send(socket, session, {"type": "committed", "audio": round(session.audio, 3)})
        elif kind == "use":
            service.set_chunk_ms(session, order.get("chunk_ms"))
        elif kind == "finish":
            await _tell(socket, session, await session.finish(), words)
            await _send(socket, session, {"type": "done", "text": session.text, "audio": round(session.audio, 3)})
            await socket.close()
            return
        elif kind != "keepalive":
            raise OptionError(
                f"there is no message of type {shown(kind)!r}; send commit, use, finish, keepalive, or audio."
            )


async def _tell(socket: WebSocket, session: Session, events: Iterable[Event], words: bool) -> None:
    for event in events:
        if event.reason not in ("forced", "finish"):  # these ends have answers of their own: committed, done
            await _send(socket, session, _written(event, words))


def _written(event: Event, words: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"type": event.kind, "utterance": event.utterance}
    if event.kind == "end":
        found |= {"reason": event.reason, "time": round(event.end, 3)}
        return found | {"audio": round(event.audio, 3), "chunk_ms": event.chunk_ms}
    found |= {
        "text": event.text,
        "stable": event.stable,
        "start": round(event.start, 3),
        "end": round(event.end, 3),
        "audio": round(event.audio, 3),
        "chunk_ms": event.chunk_ms,
    }
    if words:
        # Of a partial only what is new: all words in each would add up to the square of an utterance's length.
        partial = event.kind == "partial"
        found["words_from"] = event.words_from if partial else 0
        found["words"] = [word_to_dict(word) for word in (event.new_words if partial else event.words)]
    return found


async def _send(socket: WebSocket, session: Session, event: dict[str, Any]) -> None:
    async with session.sending():
        await socket.send_text(json.dumps(event))


def _model(service: Service) -> dict[str, Any]:
    return {"model": service.model.manifest.name}


def _order(text: str) -> tuple[str, dict[str, Any]]:
    if len(text) > MOST_TEXT:
        raise OptionError(f"a text message has {len(text)} characters; the most is {MOST_TEXT}.")
    try:
        order = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"a text message must be JSON ({error}); audio goes into binary messages.") from error
    if not isinstance(order, dict):
        raise OptionError('a text message must be a JSON object such as {"type": "finish"}.')
    return str(order.get("type")), order


def _options(query: QueryParams) -> dict[str, Any]:
    known: dict[str, Callable[[str], Any]] = {
        "sample_rate": int,
        "channels": int,
        "encoding": str,
        "chunk_ms": int,
        "endpoint_ms": int,
        "max_utterance_ms": int,
        "decoder": str,
        "phrases": _phrases,
        "vad": _flag,
        "words": _flag,
        "itn": _flag,
    }
    options: dict[str, Any] = {"words": False, "itn": False}
    for name, value in query.items():
        if name not in known:
            raise OptionError(f"there is no option {shown(name)!r}; there are {', '.join(known)}.")
        try:
            options[name] = known[name](value)
        except ValueError as error:
            raise OptionError(f"{name} is {shown(value)!r}, which is not a value that it takes.") from error
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
