"""`/v1/realtime`: OpenAI's realtime API, transcription sessions only (the GA event names; the beta's are understood).

Every event and field of OpenAI's schema is supported, rejected by name or ignored; docs/protocols.md lists them.

An item is an utterance. With turn detection (`server_vad`, the default) it ends after a silence, otherwise when the
client commits its buffer. Deltas come while the audio does: nothing waits for the commit.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.websockets import WebSocket, WebSocketDisconnect

from nemostream.errors import AudioError, NemostreamError, OptionError, StreamError
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.text.events import Event
from nemostream.serving.network.access import shown
from nemostream.serving.protocols.websocket import LEAST_TEXT, MOST_TEXT, deny, hang_up, name_of
from nemostream.serving.service import Service
from nemostream.serving.session import Expired, Session

_FORMATS = {"audio/pcm": ("pcm_s16le", 24000), "audio/pcmu": ("mulaw", 8000), "audio/pcma": ("alaw", 8000)}
_AUDIO = re.compile(r'"audio"\s*:\s*"')
_AUDIO_BYTES = 15 << 20  # in one input_audio_buffer.append, as OpenAI's
MESSAGE_BYTES = _AUDIO_BYTES * 4 // 3 + MOST_TEXT  # of one message: base64, and the rest of the JSON
_BASE64_SLICE = 1 << 20  # characters, a multiple of 4, that are decoded without a turn of other tasks
_BETA = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_EVENTS = {  # what a client may send, and the fields besides type and event_id
    "session.update": ("session",),
    "transcription_session.update": ("session",),
    "input_audio_buffer.append": ("audio",),
    "input_audio_buffer.commit": (),
    "input_audio_buffer.clear": (),
}
_TURN = {
    "type": None,
    "silence_duration_ms": None,
    "threshold": None,
    "prefix_padding_ms": None,
    "create_response": None,
    "interrupt_response": None,
    "idle_timeout_ms": None,
    "eagerness": None,
}
_TRANSCRIPTION = dict.fromkeys(("model", "language", "languages", "keywords", "prompt", "delay"))
_SESSION: dict[str, Any] = {  # the fields of a session, also the beta's; a dict has fields, None has no more
    "type": None,
    "include": None,
    "turn_detection": _TURN,
    "input_audio_format": None,
    "input_audio_transcription": _TRANSCRIPTION,
    "input_audio_noise_reduction": None,
    "modalities": None,
    "client_secret": None,
    "audio": {
        "input": {
            "format": {"type": None, "rate": None},
            "transcription": _TRANSCRIPTION,
            "turn_detection": _TURN,
            "noise_reduction": None,
        }
    },
}


class _Rejected(OptionError):
    """A client's event that cannot be followed, with OpenAI's code for the reason and the field."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


async def serve(socket: WebSocket, service: Service) -> None:
    """One connection."""
    conversation = _Conversation(socket, service)
    try:
        await conversation.begin()
    except NemostreamError as error:
        return await deny(socket, error)
    try:
        await socket.accept("realtime" if "realtime" in socket.scope.get("subprotocols", ()) else None)
        await conversation.run()
    except WebSocketDisconnect:
        conversation.session.close("the client hung up")
    except NemostreamError as error:
        conversation.session.close(str(error))
        if isinstance(error, Expired):
            service.metrics.dropped.inc()
        code = "session_expired" if isinstance(error, Expired) else name_of(error)[0]
        kind = "invalid_request_error" if isinstance(error, Expired | OptionError | AudioError) else "server_error"
        await hang_up(socket, error, _error(str(error), code, kind=kind))
    finally:
        conversation.session.close()


class _Conversation:
    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._socket, self._service = socket, service
        self._format, self._rate = "audio/pcm", 24000
        self._silence_ms: int | None = service.settings.endpoint_ms
        self._model = socket.query_params.get("model") or "nemostream"
        self._item, self._told = "", ""
        self._last: str | None = None
        self._sent = 0.0  # seconds of audio since the last commit
        self._keywords: list[str] = []
        self._phrases: Boosting | None = None  # compiled keywords

    async def begin(self) -> None:
        """Open the stream. Raises what `Service.open` raises."""
        if "call_id" in self._socket.query_params:
            raise OptionError("call_id is not supported: this server has no calls, only transcription sessions.")
        self.session = self._open()

    def _open(self) -> Session:
        return self._service.open(
            "realtime",
            sample_rate=self._rate,
            encoding=_FORMATS[self._format][0],
            endpoint_ms=self._silence_ms,
            client=self._socket.scope["nemostream.client"],
            phrases=self._phrases,
        )

    async def run(self) -> None:
        await self._send({"type": "session.created", "session": self._described()})
        while True:
            async with self.session.receiving():
                message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1006))
            order: Any = None
            try:
                text = message.get("text")
                del message
                await self.session.pace(max(len(text or ""), LEAST_TEXT), MESSAGE_BYTES)
                order = _json(text)
                del text
                await self._obey(order)
            except (OptionError, AudioError) as error:  # the session goes on, the event has no effect
                given = order.get("event_id") if isinstance(order, dict) else None
                code = error.code if isinstance(error, _Rejected) else "invalid_value"
                param = error.param if isinstance(error, _Rejected) else None
                await self._send(_error(str(error), code, given if isinstance(given, str) else None, param))

    async def _obey(self, order: dict[str, Any]) -> None:
        kind = order.get("type")
        if kind is None:
            raise _Rejected("type is missing; a message is an event with a type.", "missing_required_parameter", "type")
        if not isinstance(kind, str) or kind not in _EVENTS:
            raise _Rejected(
                f"type is {_short(kind)}; a transcription session supports {', '.join(_EVENTS)}.", param="type"
            )
        _known(order, dict.fromkeys(("type", "event_id", *_EVENTS[kind])), "")
        if missing := [field for field in _EVENTS[kind] if field not in order]:
            what = "a base64 string" if missing[0] == "audio" else "an object"
            raise _Rejected(f"{missing[0]} is missing; it must be {what}.", "missing_required_parameter", missing[0])
        if kind in ("session.update", "transcription_session.update"):
            await self._update(order.get("session"))
            await self._send({"type": kind + "d", "session": self._described()})
        elif kind == "input_audio_buffer.append":
            await self._append(order["audio"])
        elif kind == "input_audio_buffer.commit":
            if self._sent < 0.1:
                raise _Rejected(
                    f"the buffer has {1000 * self._sent:.0f} ms of audio; a commit needs at least 100 ms.",
                    "input_audio_buffer_commit_empty",
                )
            self._begin_item()
            events = [event for event in await self.session.commit() if event.kind != "end"]
            await self._tell(events[:-1])  # utterances that a silence had ended are items of their own
            self._begin_item()
            await self._committed()
            await self._completed(events[-1] if events else None)
            self._sent = 0.0
        elif kind == "input_audio_buffer.clear":
            await self.session.clear()
            self._item, self._told, self._sent = "", "", 0.0
            await self._send({"type": "input_audio_buffer.cleared"})

    async def _append(self, audio: Any) -> None:
        if isinstance(audio, str):
            audio = _Span(audio, 0, len(audio))
        if not isinstance(audio, _Span):
            raise _Rejected("audio must be a base64 string.", "invalid_type", "audio")
        size = 0
        async for data in _decoded(audio):  # all of it is checked before any of it is used
            size += len(data)
        if size > _AUDIO_BYTES:
            raise _Rejected(f"audio has {size} bytes; the most is {_AUDIO_BYTES}: send less at once.", param="audio")
        most = self._service.settings.max_message_bytes
        async for data in _decoded(audio):
            for start in range(0, len(data), most):
                before = self.session.audio
                events = await self.session.push(data[start : start + most])
                self._sent += self.session.audio - before
                await self._tell(events)

    async def _update(self, wanted: Any) -> None:
        if not isinstance(wanted, dict):
            raise _Rejected("session must be an object.", "invalid_type", "session")
        _known(wanted, _SESSION, "session.")
        if wanted.get("type", "transcription") != "transcription":
            raise _Rejected(
                f"session.type is {_short(wanted['type'])}; this server supports transcription only.",
                param="session.type",
            )
        for field, why in (
            ("include", "the server sends no log probabilities"),
            ("client_secret", "the server creates no client secrets"),
        ):
            if wanted.get(field):
                raise _Rejected(f"session.{field} is not supported: {why}.", param=f"session.{field}")
        given = (wanted.get("audio") or {}).get("input") or {}
        sound, rate, silence = self._format, self._rate, self._silence_ms
        model, keywords = self._model, self._keywords
        for place, name in (
            (given, "session.audio.input.transcription"),
            (wanted, "session.input_audio_transcription"),
        ):
            if (key := name.rpartition(".")[2]) in place:
                model, keywords = _transcription(place[key], name, model, keywords)
        if found := given.get("format") or wanted.get("input_audio_format"):
            sound, rate = _format(found)
        for place, name in ((given, "session.audio.input.turn_detection"), (wanted, "session.turn_detection")):
            if "turn_detection" in place:
                silence = self._silence(place["turn_detection"], name)
        self._model = model
        phrases = self._phrases
        if keywords != self._keywords:
            phrases = await self._service.compile_phrases(keywords or None)
        if (sound, rate, silence, keywords) == (self._format, self._rate, self._silence_ms, self._keywords):
            return
        if self._sent:
            raise _Rejected(
                "format, turn_detection and keywords can change only while the buffer is empty; commit or clear it."
            )
        # The stream is closed and opened again without a turn of other tasks in between.
        old = (self._format, self._rate, self._silence_ms, self._keywords, self._phrases)
        self._format, self._rate, self._silence_ms = sound, rate, silence
        self._keywords, self._phrases = keywords, phrases
        self.session.close()
        try:
            self.session = self._open()
        except NemostreamError as error:
            self._format, self._rate, self._silence_ms, self._keywords, self._phrases = old
            try:
                self.session = self._open()
            except NemostreamError as lost:
                raise StreamError(str(lost)) from lost
            raise OptionError(str(error)) from error

    def _silence(self, detection: Any, name: str) -> int | None:
        if detection is None:
            return None
        kind = detection.get("type", "server_vad") if isinstance(detection, dict) else detection
        if kind != "server_vad":
            raise _Rejected(
                f"{name} is {_short(kind)}; this server supports null and server_vad.", param=f"{name}.type"
            )
        for field in ("idle_timeout_ms", "eagerness"):
            if detection.get(field) is not None:
                raise _Rejected(f"{name}.{field} is not supported; leave it out.", param=f"{name}.{field}")
        silence = detection.get("silence_duration_ms", self._service.settings.endpoint_ms)
        if not isinstance(silence, int) or isinstance(silence, bool) or not 80 <= silence <= 60_000:
            raise _Rejected(
                f"silence_duration_ms is {_short(silence)}; it must be from 80 to 60000.",
                param=f"{name}.silence_duration_ms",
            )
        return silence

    async def _tell(self, events: list[Event]) -> None:
        for event in events:
            if event.kind == "end":
                continue
            if not self._item:
                self._begin_item()
                await self._send(
                    {
                        "type": "input_audio_buffer.speech_started",
                        "item_id": self._item,
                        "audio_start_ms": round(1000 * event.start),
                    }
                )
            await self._delta(event)
            if event.kind == "final":
                await self._send(
                    {
                        "type": "input_audio_buffer.speech_stopped",
                        "item_id": self._item,
                        "audio_end_ms": round(1000 * event.end),
                    }
                )
                await self._committed()
                await self._completed(event)
                self._sent = 0.0

    def _begin_item(self) -> None:
        self._item = self._item or "item_" + secrets.token_hex(10)

    async def _delta(self, event: Event) -> None:
        if delta := event.text[len(self._told) :]:
            self._told = event.text
            await self._send(
                {
                    "type": "conversation.item.input_audio_transcription.delta",
                    "item_id": self._item,
                    "content_index": 0,
                    "delta": delta,
                }
            )

    async def _committed(self) -> None:
        await self._send(
            {"type": "input_audio_buffer.committed", "item_id": self._item, "previous_item_id": self._last}
        )

    async def _completed(self, event: Event | None) -> None:
        if event:
            await self._delta(event)
        await self._send(
            {
                "type": "conversation.item.input_audio_transcription.completed",
                "item_id": self._item,
                "content_index": 0,
                "transcript": event.text if event else "",
                "usage": {"type": "duration", "seconds": round(self._sent, 3)},
            }
        )
        self._item, self._last, self._told = "", self._item, ""

    def _described(self) -> dict[str, Any]:
        format_: dict[str, Any] = {"type": self._format}
        if self._format == "audio/pcm":
            format_["rate"] = self._rate
        detection = (
            None
            if self._silence_ms is None
            else {
                "type": "server_vad",
                "silence_duration_ms": self._silence_ms,
                "threshold": 0.5,
                "prefix_padding_ms": 0,
            }
        )
        transcription: dict[str, Any] = {"model": self._model, "language": "en"}
        if self._keywords:
            transcription["keywords"] = self._keywords
        return {
            "type": "transcription",
            "object": "realtime.transcription_session",
            "id": "sess_" + self.session.id,
            "audio": {
                "input": {
                    "format": format_,
                    "transcription": transcription,
                    "noise_reduction": None,
                    "turn_detection": detection,
                }
            },
        }

    async def _send(self, event: dict[str, Any]) -> None:
        async with self.session.sending():
            await self._socket.send_text(json.dumps({"event_id": "event_" + secrets.token_hex(8), **event}))


class _Span(NamedTuple):
    """A part of a text, which is not copied: it may be of 20 MiB."""

    text: str
    start: int
    end: int


def _json(text: str | None) -> dict[str, Any]:
    if text is None:
        raise _Rejected("binary messages are not supported; send audio as base64 in input_audio_buffer.append.")
    text, audio = _without_audio(text)
    if len(text) > MOST_TEXT:
        raise _Rejected(
            f"the message has {len(text)} characters besides its audio, a top-level string; the most is {MOST_TEXT}."
        )
    try:
        order = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Rejected(f"the message is not JSON: {error}.", "invalid_json") from error
    if not isinstance(order, dict):
        raise _Rejected("a message must be a JSON object with a type.", "invalid_json")
    if audio is not None:
        if order.get("audio") != "":
            raise _Rejected("audio must be a top-level string of the message.", "invalid_type", "audio")
        order["audio"] = audio
    return order


def _without_audio(text: str) -> tuple[str, _Span | None]:
    """A long message without the value of its "audio", and that value: a JSON parser would keep the event loop for too
    long, and for longest where the message is not what it should be."""
    if len(text) <= MOST_TEXT:
        return text, None
    found = _AUDIO.search(text, 0, MOST_TEXT)
    if found is None or (end := text.find('"', found.end())) < 0:
        return text, None
    return text[: found.end()] + text[end:], _Span(text, found.end(), end)


async def _decoded(audio: _Span) -> AsyncIterator[bytes]:
    """The bytes of base64 text, a slice at a time. JSON may write / as \\/."""
    rest = ""
    try:
        for start in range(audio.start, audio.end, _BASE64_SLICE):
            rest += audio.text[start : min(start + _BASE64_SLICE, audio.end)]
            escaped = rest.endswith("\\")  # the rest of the escape is in the next slice
            rest = rest[: len(rest) - escaped].replace("\\/", "/") + "\\" * escaped
            whole = len(rest) if start + _BASE64_SLICE >= audio.end else (len(rest) - escaped) // 4 * 4
            yield base64.b64decode(rest[:whole], validate=True)
            rest = rest[whole:]
            await asyncio.sleep(0)
    except (binascii.Error, ValueError) as error:
        raise _Rejected(f"audio is not base64: {error}.", param="audio") from error


def _known(given: Any, fields: dict[str, Any], path: str) -> None:
    """Raise `_Rejected` for a field that is not one of `fields`, or is no object where they have fields."""
    for name, value in given.items():
        if name not in fields:
            where = path + name
            raise _Rejected(f"{shown(where)} is not a field of this event.", "unknown_parameter", where[:200])
        inner = fields[name]
        if inner is None or value is None or (isinstance(value, str) and name == "format"):
            continue
        if not isinstance(value, dict):
            raise _Rejected(f"{path}{name} must be an object.", "invalid_type", path + name)
        _known(value, inner, f"{path}{name}.")


def _transcription(given: Any, path: str, model: str, keywords: list[str]) -> tuple[str, list[str]]:
    """Model and keywords after an update."""
    if given is None:
        raise _Rejected(f"{path} is null; this server only transcribes, so it cannot be turned off.", param=path)
    if given.get("delay") is not None:
        raise _Rejected(f"{path}.delay is not supported; the server's chunk size decides.", param=f"{path}.delay")
    languages = given.get("languages")
    if languages is not None and not (isinstance(languages, list) and all(isinstance(one, str) for one in languages)):
        raise _Rejected(f"{path}.languages must be a list of strings.", "invalid_type", f"{path}.languages")
    for language in (given.get("language"), *(languages or ())):
        if language and not str(language).lower().startswith("en"):
            raise _Rejected(f"language is {_short(language)}; this model knows English.", param=f"{path}.language")
    if (wanted := given.get("keywords")) is not None:
        if not isinstance(wanted, list) or not all(isinstance(one, str) for one in wanted):
            raise _Rejected(f"{path}.keywords must be a list of strings.", "invalid_type", f"{path}.keywords")
        keywords = wanted
    return str(given.get("model") or model)[:200], keywords


def _format(given: Any) -> tuple[str, int]:
    """GA's `{"type": "audio/pcm", "rate": 24000}`, or the beta's name."""
    name = _BETA.get(given) if isinstance(given, str) else given.get("type") if isinstance(given, dict) else None
    if not isinstance(name, str) or name not in _FORMATS:
        raise _Rejected(
            f"format must be one of {', '.join(_FORMATS)}, not {_short(given)}.", param="session.audio.input.format"
        )
    rate = given.get("rate", _FORMATS[name][1]) if isinstance(given, dict) else _FORMATS[name][1]
    if not isinstance(rate, int) or (name != "audio/pcm" and rate != 8000):
        raise _Rejected(
            f"rate is {_short(rate)}; {name} has {_FORMATS[name][1]}.", param="session.audio.input.format.rate"
        )
    return name, rate


def _short(value: Any) -> str:
    """A client's value in a message."""
    try:
        return shown(repr(value))
    except RecursionError:
        return type(value).__name__


def _error(
    message: str, code: str, given: str | None = None, param: str | None = None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    return {
        "type": "error",
        "event_id": "event_" + secrets.token_hex(8),
        "error": {"type": kind, "code": code, "message": message, "param": param, "event_id": given},
    }
