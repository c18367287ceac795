"""`/v1/realtime`: OpenAI's realtime API, transcription sessions only (GA event names; those of the beta are accepted).

Every event and field of OpenAI's schema is supported, rejected by name or ignored; docs/protocols.md lists them.

An item is an utterance. With turn detection (`server_vad`, the default) it ends after a silence, otherwise when the
client commits its buffer. Deltas are sent while audio is received; they do not wait for the commit. A delta cannot be
revised, so with `final_chunk_ms` deltas have the text that is stable, and the last one has the rest.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from starlette.websockets import WebSocket, WebSocketDisconnect

from nemostream.bundle import LanguageConfig
from nemostream.errors import AudioError, CapacityError, NemostreamError, OptionError, StreamError
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.text.events import Event
from nemostream.serving.client import shorten
from nemostream.serving.errors import Expired, openai_error, status_of
from nemostream.serving.languages import languages_of, select_language, to_openai
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

_FORMATS = {"audio/pcm": ("pcm_s16le", 24000), "audio/pcmu": ("mulaw", 8000), "audio/pcma": ("alaw", 8000)}
_BETA_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_AUDIO_FIELD = re.compile(r'"audio"\s*:\s*"')
_MAX_AUDIO_BYTES = 15 << 20  # of one input_audio_buffer.append, as in OpenAI's API
MAX_MESSAGE_BYTES = _MAX_AUDIO_BYTES * 4 // 3 + MAX_TEXT_CHARACTERS  # base64, and the rest of the JSON
_BASE64_SLICE = 1 << 20  # characters, a multiple of 4, that are decoded before other tasks run
_MIN_COMMIT_MS = 100  # of audio
_EVENTS = {  # the events of clients, and their fields besides type and event_id
    "session.update": ("session",),
    "transcription_session.update": ("session",),
    "input_audio_buffer.append": ("audio",),
    "input_audio_buffer.commit": (),
    "input_audio_buffer.clear": (),
}
_DIRECT_FIELDS = frozenset(("type", "event_id", *_EVENTS["input_audio_buffer.append"]))
_TURN_DETECTION = dict.fromkeys(
    (
        "type",
        "silence_duration_ms",
        "threshold",
        "prefix_padding_ms",
        "create_response",
        "interrupt_response",
        "idle_timeout_ms",
        "eagerness",
    )
)
_TRANSCRIPTION = dict.fromkeys(("model", "language", "languages", "keywords", "prompt", "delay", "final_chunk_ms"))
_SESSION: dict[str, Any] = {  # the fields of a session, including the beta's; a dict lists the fields of an object
    "type": None,
    "include": None,
    "turn_detection": _TURN_DETECTION,
    "input_audio_format": None,
    "input_audio_transcription": _TRANSCRIPTION,
    "input_audio_noise_reduction": None,
    "modalities": None,
    "client_secret": None,
    "audio": {
        "input": {
            "format": {"type": None, "rate": None},
            "transcription": _TRANSCRIPTION,
            "turn_detection": _TURN_DETECTION,
            "noise_reduction": None,
        }
    },
}


class _EventError(OptionError):
    """A client's event that is rejected, with OpenAI's code for the reason and the name of the field."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(frozen=True)
class _Config:
    """The options of a session, which `session.update` changes."""

    model: str
    silence_ms: int | None  # None: no turn detection
    format: str = "audio/pcm"
    rate: int = 24000  # Hz
    language: str | None = None  # None: the server's default
    keywords: tuple[str, ...] = ()
    phrases: Boosting | None = field(default=None, compare=False)  # compiled keywords
    final_chunk_ms: int | None = None  # None: the server's default, 0: that of partials


async def serve(socket: WebSocket, service: Service) -> None:
    """Serve one connection."""
    try:
        connection = _RealtimeConnection(socket, service)
    except NemostreamError as error:
        return await reject(socket, error)
    try:
        await socket.accept("realtime" if "realtime" in socket.scope.get("subprotocols", ()) else None)
        await connection.run()
    except WebSocketDisconnect:
        connection.session.close("the client disconnected")
        if timed_out(socket):
            service.metrics.timeouts.inc()
    except NemostreamError as error:
        connection.session.close(str(error))
        if isinstance(error, Expired):
            service.metrics.timeouts.inc()
        status = status_of(error)
        event = _error_event(str(error), status.realtime_code or status.code, type=status.type)
        await close_with_error(socket, error, event)
    finally:
        connection.session.close()


class _RealtimeConnection:
    """A connection and its current session; the constructor opens it and raises what `Service.open` raises."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        if "call_id" in socket.query_params:
            raise OptionError("call_id is not supported: this server has no calls, only transcription sessions.")
        self._socket, self._service = socket, service
        self._config = _Config(socket.query_params.get("model") or "nemostream", service.settings.endpoint_ms)
        self._item = ""  # id of the current item; empty before its first event
        self._sent_text = ""  # of the current item, as deltas
        self._previous_item: str | None = None
        self._buffered = 0.0  # seconds of audio since the last commit
        self._pushed: dict[str, Any] = {}  # the last event of `_start_push`, without its audio
        self.session = self._open(self._config)

    def _open(self, config: _Config) -> Session:
        return self._service.open(
            "realtime",
            sample_rate=config.rate,
            encoding=_FORMATS[config.format][0],
            endpoint_ms=config.silence_ms,
            endpoint_model=config.silence_ms is not None,
            language=config.language,
            client=self._socket.scope["nemostream.client"],
            phrases=config.phrases,
            final_chunk_ms=config.final_chunk_ms,
        )

    async def run(self) -> None:
        """Process events until the client disconnects. Raises `NemostreamError` and `WebSocketDisconnect`."""
        await self._send({"type": "session.created", "session": self._session_object()})
        with DirectAudio(self._socket.scope, self._start_push, self._texts_of):
            while True:
                async with self.session.receiving():
                    message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    raise WebSocketDisconnect(message.get("code", 1006))
                await self._receive(message)

    async def _receive(self, message: MutableMapping[str, Any]) -> None:
        event: Any = None
        try:
            if (result := message.get("deferred")) is not None:
                event = self._pushed
                return await self._send_events(deferred(result))
            text = message.pop("text", None)
            await self.session.pace(len(text or ""), MAX_MESSAGE_BYTES, MIN_TEXT_BYTES)
            event = _parse(text)
            del text
            await self._handle(event)
        except (OptionError, AudioError) as error:  # the event has no effect, the session continues
            event_id = event.get("event_id") if isinstance(event, dict) else None
            code = error.code if isinstance(error, _EventError) else "invalid_value"
            param = error.param if isinstance(error, _EventError) else None
            await self._send(_error_event(str(error), code, event_id if isinstance(event_id, str) else None, param))

    def _start_push(self, on_pushed: OnPushed, message: bytes | str) -> bool:
        """Start to process an `input_audio_buffer.append` of usual size; the task receives all other messages."""
        if isinstance(message, bytes) or len(message) > MAX_TEXT_CHARACTERS:
            return False
        try:
            event = json.loads(message)
            if not isinstance(event, dict) or not _DIRECT_FIELDS.issuperset(event):
                return False
            if event.get("type") != "input_audio_buffer.append" or not isinstance(event.get("audio"), str):
                return False
            audio = base64.b64decode(event["audio"], validate=True)
        except (ValueError, RecursionError):  # the task reports the error
            return False
        session, before = self.session, self.session.audio

        def pushed(result: list[Event] | Exception) -> None:
            self._buffered += session.audio - before
            on_pushed(result)

        self._pushed = {"event_id": event.get("event_id")}
        return bool(audio) and session.start_push(audio, pushed, max(len(message), MIN_TEXT_BYTES))

    async def _handle(self, event: dict[str, Any]) -> None:
        match _checked_type(event):
            case "session.update" | "transcription_session.update" as type_:
                await self._update(event.get("session"))
                await self._send({"type": type_ + "d", "session": self._session_object()})
            case "input_audio_buffer.append":
                await self._append(event["audio"])
            case "input_audio_buffer.commit":
                await self._commit()
            case "input_audio_buffer.clear":
                await self.session.clear()
                self._item, self._sent_text, self._buffered = "", "", 0.0
                await self._send({"type": "input_audio_buffer.cleared"})

    # -- audio ---------------------------------------------------------------------------------------------------------

    async def _append(self, audio: Any) -> None:
        if isinstance(audio, str):
            audio = _TextSpan(audio, 0, len(audio))
        if not isinstance(audio, _TextSpan):
            raise _EventError("audio must be a base64 string.", "invalid_type", "audio")
        size = 0
        async for data in _decode_base64(audio):  # the whole message is checked before any of it is used
            size += len(data)
        if size > _MAX_AUDIO_BYTES:
            raise _EventError(
                f"audio has {size} bytes; the maximum is {_MAX_AUDIO_BYTES}: send smaller messages.", param="audio"
            )
        block = self._service.settings.max_message_bytes
        async for data in _decode_base64(audio):
            for start in range(0, len(data), block):
                before = self.session.audio
                events = await self.session.push(data[start : start + block])
                self._buffered += self.session.audio - before
                await self._send_events(events)

    async def _commit(self) -> None:
        buffered_ms = round(1000 * self._buffered, 3)  # the sum of many messages is not exact
        if buffered_ms < _MIN_COMMIT_MS:
            raise _EventError(
                f"the buffer has {int(buffered_ms)} ms of audio; a commit needs at least {_MIN_COMMIT_MS} ms.",
                "input_audio_buffer_commit_empty",
            )
        self._begin_item()
        events = [event for event in await self.session.commit() if event.kind in ("partial", "final")]
        await self._send_events(events[:-1])  # utterances that a silence had ended are items of their own
        self._begin_item()
        await self._send(self._committed())
        for message in self._completed(events[-1] if events else None):
            await self._send(message)
        self._buffered = 0.0

    # -- options -------------------------------------------------------------------------------------------------------

    async def _update(self, session: Any) -> None:
        old = self._config
        new = _updated(old, session, self._service.settings.endpoint_ms, self._service.model.manifest.languages)
        if new.keywords != old.keywords:
            new = replace(new, phrases=await self._service.compile_phrases(list(new.keywords) or None))
        if replace(new, model=old.model, language=old.language, final_chunk_ms=old.final_chunk_ms) == old:
            language = None if new.language == self.session.language else new.language
            final_chunk_ms = None if new.final_chunk_ms == old.final_chunk_ms else new.final_chunk_ms
            try:
                self._service.configure(self.session, language=language, final_chunk_ms=final_chunk_ms)
            except CapacityError as error:
                raise OptionError(str(error)) from error
            self._config = new
            return
        if self._buffered:
            raise _EventError(
                "format, turn_detection and keywords can change only while the buffer is empty; commit or clear it."
            )
        previous = self.session
        await previous.pace_operation()
        # No other task runs between closing the session and opening the next one, so its slot stays free.
        previous.close()
        try:
            self.session = self._open(new)
        except NemostreamError as error:
            try:
                self.session = self._open(old)
            except NemostreamError as reopen_error:
                raise StreamError(str(reopen_error)) from reopen_error
            raise OptionError(str(error)) from error
        finally:
            self.session.continue_pace(previous)
        self._config = new

    def _session_object(self) -> dict[str, Any]:
        config = self._config
        audio_format: dict[str, Any] = {"type": config.format}
        if config.format == "audio/pcm":
            audio_format["rate"] = config.rate
        turn_detection = None
        if config.silence_ms is not None:
            turn_detection = {
                "type": "server_vad",
                "silence_duration_ms": config.silence_ms,
                "threshold": 0.5,
                "prefix_padding_ms": 0,
            }
        transcription: dict[str, Any] = {"model": config.model, "language": self.session.language}
        if config.keywords:
            transcription["keywords"] = list(config.keywords)
        if self.session.requested_final_ms is not None:
            transcription["final_chunk_ms"] = self.session.requested_final_ms
        return {
            "type": "transcription",
            "object": "realtime.transcription_session",
            "id": "sess_" + self.session.id,
            "audio": {
                "input": {
                    "format": audio_format,
                    "transcription": transcription,
                    "noise_reduction": None,
                    "turn_detection": turn_detection,
                }
            },
        }

    # -- events to the client ------------------------------------------------------------------------------------------

    def _messages_of(self, events: list[Event]) -> Iterator[dict[str, Any]]:
        """Yield the messages for events of the stream."""
        for event in events:
            if event.kind not in ("partial", "final"):
                continue
            if not self._item:
                self._begin_item()
                yield {
                    "type": "input_audio_buffer.speech_started",
                    "item_id": self._item,
                    "audio_start_ms": round(1000 * event.start),
                }
            yield from self._delta(event)
            if event.kind == "final":
                yield {
                    "type": "input_audio_buffer.speech_stopped",
                    "item_id": self._item,
                    "audio_end_ms": round(1000 * event.end),
                }
                yield self._committed()
                yield from self._completed(event)
                self._buffered = 0.0

    def _texts_of(self, events: list[Event]) -> list[str]:
        return [_with_id(message) for message in self._messages_of(events)]

    async def _send_events(self, events: list[Event]) -> None:
        for message in self._messages_of(events):
            await self._send(message)

    def _begin_item(self) -> None:
        self._item = self._item or "item_" + secrets.token_hex(10)

    def _delta(self, event: Event) -> Iterator[dict[str, Any]]:
        text = event.stable if event.kind == "partial" and self.session.revises else event.text
        if delta := text[len(self._sent_text) :]:
            self._sent_text = text
            yield {
                "type": "conversation.item.input_audio_transcription.delta",
                "item_id": self._item,
                "content_index": 0,
                "delta": delta,
            }

    def _committed(self) -> dict[str, Any]:
        return {
            "type": "input_audio_buffer.committed",
            "item_id": self._item,
            "previous_item_id": self._previous_item,
        }

    def _completed(self, event: Event | None) -> Iterator[dict[str, Any]]:
        if event:
            yield from self._delta(event)
        completed: dict[str, Any] = {
            "type": "conversation.item.input_audio_transcription.completed",
            "item_id": self._item,
            "content_index": 0,
            "transcript": event.text if event else "",
            "usage": {"type": "duration", "seconds": round(self._buffered, 3)},
        }
        if self._service.model.manifest.languages.prompts:  # models that detect the language, as OpenAI's do
            completed["languages"] = to_openai(languages_of(event.words, event.set_language) if event else ())
        yield completed
        self._item, self._previous_item, self._sent_text = "", self._item, ""

    async def _send(self, message: dict[str, Any]) -> None:
        async with self.session.sending():
            await self._socket.send_text(_with_id(message))


def _with_id(message: dict[str, Any]) -> str:
    return json.dumps({"event_id": _event_id(), **message})


def _event_id() -> str:
    return "event_" + secrets.token_hex(8)


def _error_event(
    message: str,
    code: str,
    event_id: str | None = None,
    param: str | None = None,
    type: str = "invalid_request_error",
) -> dict[str, Any]:
    """Return an error event about the client's event `event_id`."""
    error = openai_error(message, type, code, param) | {"event_id": event_id}
    return {"type": "error", "event_id": _event_id(), "error": error}


# -- parsing -----------------------------------------------------------------------------------------------------------


class _TextSpan(NamedTuple):
    """A part of a text, without a copy: it may have 20 MiB."""

    text: str
    start: int
    end: int


def _parse(text: str | None) -> dict[str, Any]:
    """Parse a message. The audio of a long message is a `_TextSpan`. Raises `_EventError`."""
    if text is None:
        raise _EventError("binary messages are not supported; send audio as base64 in input_audio_buffer.append.")
    text, audio = _split_audio(text)
    if len(text) > MAX_TEXT_CHARACTERS:
        raise _EventError(
            f"the message has {len(text)} characters besides its audio, a top-level string; the maximum is "
            f"{MAX_TEXT_CHARACTERS}."
        )
    try:
        event = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _EventError(f"the message is not JSON: {error}.", "invalid_json") from error
    if not isinstance(event, dict):
        raise _EventError("a message must be a JSON object with a type.", "invalid_json")
    if audio is not None:
        if event.get("audio") != "":
            raise _EventError("audio must be a top-level string of the message.", "invalid_type", "audio")
        event["audio"] = audio
    return event


def _split_audio(text: str) -> tuple[str, _TextSpan | None]:
    """Split a long message into its JSON without the value of "audio", and that value.

    A JSON parser would block the event loop for too long, and longest for malformed messages.
    """
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text, None
    match = _AUDIO_FIELD.search(text, 0, MAX_TEXT_CHARACTERS)
    if match is None or (end := text.find('"', match.end())) < 0:
        return text, None
    return text[: match.end()] + text[end:], _TextSpan(text, match.end(), end)


async def _decode_base64(audio: _TextSpan) -> AsyncIterator[bytes]:
    """Yield the bytes of base64 text in slices. JSON may write / as \\/. Raises `_EventError`."""
    rest = ""
    try:
        for start in range(audio.start, audio.end, _BASE64_SLICE):
            rest += audio.text[start : min(start + _BASE64_SLICE, audio.end)]
            escaped = rest.endswith("\\")  # the rest of the escape is in the next slice
            rest = rest[: len(rest) - escaped].replace("\\/", "/") + "\\" * escaped
            complete = len(rest) if start + _BASE64_SLICE >= audio.end else (len(rest) - escaped) // 4 * 4
            yield base64.b64decode(rest[:complete], validate=True)
            rest = rest[complete:]
            await asyncio.sleep(0)
    except (binascii.Error, ValueError) as error:
        raise _EventError(f"audio is not base64: {error}.", param="audio") from error


def _checked_type(event: dict[str, Any]) -> str:
    """Return the type of an event whose fields are valid. Raises `_EventError`."""
    type_ = event.get("type")
    if type_ is None:
        raise _EventError("type is missing; a message is an event with a type.", "missing_required_parameter", "type")
    if not isinstance(type_, str) or type_ not in _EVENTS:
        raise _EventError(
            f"type is {_short(type_)}; a transcription session supports {', '.join(_EVENTS)}.", param="type"
        )
    _check_fields(event, dict.fromkeys(("type", "event_id", *_EVENTS[type_])), "")
    if missing := [name for name in _EVENTS[type_] if name not in event]:
        kind = "a base64 string" if missing[0] == "audio" else "an object"
        raise _EventError(f"{missing[0]} is missing; it must be {kind}.", "missing_required_parameter", missing[0])
    return type_


def _check_fields(values: Any, fields: dict[str, Any], path: str) -> None:
    """Raise `_EventError` for a name that is not in `fields`, and for a value that must be an object but is not."""
    for name, value in values.items():
        if name not in fields:
            full_name = path + name
            raise _EventError(
                f"{shorten(full_name)} is not a field of this event.", "unknown_parameter", full_name[:200]
            )
        inner = fields[name]
        if inner is None or value is None or (isinstance(value, str) and name == "format"):
            continue
        if not isinstance(value, dict):
            raise _EventError(f"{path}{name} must be an object.", "invalid_type", path + name)
        _check_fields(value, inner, f"{path}{name}.")


def _updated(config: _Config, session: Any, default_silence_ms: int, languages: LanguageConfig) -> _Config:
    """Return the config after an update with OpenAI's session object, without `phrases`. Raises `_EventError`."""
    if not isinstance(session, dict):
        raise _EventError("session must be an object.", "invalid_type", "session")
    _check_fields(session, _SESSION, "session.")
    if session.get("type", "transcription") != "transcription":
        raise _EventError(
            f"session.type is {_short(session['type'])}; this server supports transcription only.",
            param="session.type",
        )
    for name, reason in (
        ("include", "the server sends no log probabilities"),
        ("client_secret", "the server creates no client secrets"),
    ):
        if session.get(name):
            raise _EventError(f"session.{name} is not supported: {reason}.", param=f"session.{name}")
    audio_input = (session.get("audio") or {}).get("input") or {}
    for values, path in (
        (audio_input, "session.audio.input.transcription"),
        (session, "session.input_audio_transcription"),
    ):
        if (name := path.rpartition(".")[2]) in values:
            config = _with_transcription(config, values[name], path, languages)
    if audio_format := audio_input.get("format") or session.get("input_audio_format"):
        name, rate = _parse_format(audio_format)
        config = replace(config, format=name, rate=rate)
    for values, path in (
        (audio_input, "session.audio.input.turn_detection"),
        (session, "session.turn_detection"),
    ):
        if "turn_detection" in values:
            silence_ms = _parse_silence_ms(values["turn_detection"], path, default_silence_ms)
            config = replace(config, silence_ms=silence_ms)
    return config


def _with_transcription(config: _Config, values: Any, path: str, languages: LanguageConfig) -> _Config:
    """Return the config with the model, the language and the keywords of a transcription object."""
    if values is None:
        raise _EventError(f"{path} is null; this server only transcribes, so it cannot be turned off.", param=path)
    if values.get("delay") is not None:
        raise _EventError(
            f"{path}.delay is not supported; the server's chunk size sets the latency.", param=f"{path}.delay"
        )
    candidates = values.get("languages")
    if candidates is not None and not _is_list_of_strings(candidates):
        raise _EventError(f"{path}.languages must be a list of strings.", "invalid_type", f"{path}.languages")
    try:
        language = select_language(languages, values.get("language"), candidates or ())
    except OptionError as error:
        raise _EventError(str(error), param=f"{path}.language") from error
    if language is not None:
        config = replace(config, language=language)
    if "final_chunk_ms" in values:
        config = replace(config, final_chunk_ms=_parse_final_chunk_ms(values["final_chunk_ms"], path))
    if (keywords := values.get("keywords")) is not None:
        if not _is_list_of_strings(keywords):
            raise _EventError(f"{path}.keywords must be a list of strings.", "invalid_type", f"{path}.keywords")
        config = replace(config, keywords=tuple(keywords))
    return replace(config, model=str(values.get("model") or config.model)[:200])


def _parse_format(value: Any) -> tuple[str, int]:
    """Return name and rate of GA's `{"type": "audio/pcm", "rate": 24000}`, or of the beta's name."""
    name = (
        _BETA_FORMATS.get(value) if isinstance(value, str) else value.get("type") if isinstance(value, dict) else None
    )
    if not isinstance(name, str) or name not in _FORMATS:
        raise _EventError(
            f"format must be one of {', '.join(_FORMATS)}, not {_short(value)}.", param="session.audio.input.format"
        )
    default_rate = _FORMATS[name][1]
    rate = value.get("rate", default_rate) if isinstance(value, dict) else default_rate
    if not isinstance(rate, int) or (name != "audio/pcm" and rate != 8000):
        raise _EventError(
            f"rate is {_short(rate)}; the rate of {name} is {default_rate}.", param="session.audio.input.format.rate"
        )
    return name, rate


def _parse_silence_ms(detection: Any, path: str, default_ms: int) -> int | None:
    """Return the silence in milliseconds after which a turn ends; None if turn detection is off."""
    if detection is None:
        return None
    kind = detection.get("type", "server_vad") if isinstance(detection, dict) else detection
    if kind != "server_vad":
        raise _EventError(f"{path} is {_short(kind)}; this server supports null and server_vad.", param=f"{path}.type")
    for name in ("idle_timeout_ms", "eagerness"):
        if detection.get(name) is not None:
            raise _EventError(f"{path}.{name} is not supported; leave it out.", param=f"{path}.{name}")
    silence_ms = detection.get("silence_duration_ms", default_ms)
    if not isinstance(silence_ms, int) or isinstance(silence_ms, bool) or not 80 <= silence_ms <= 60_000:
        raise _EventError(
            f"silence_duration_ms is {_short(silence_ms)}; it must be from 80 to 60000.",
            param=f"{path}.silence_duration_ms",
        )
    return silence_ms


def _parse_final_chunk_ms(value: Any, path: str) -> int:
    """Return the chunk size of finals; 0 for null: that of partials. The service checks the size."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise _EventError(
            f"final_chunk_ms is {_short(value)}; it must be a number of milliseconds or null.",
            "invalid_type",
            f"{path}.final_chunk_ms",
        )
    return value


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _short(value: Any) -> str:
    """Return a client's value for an error message."""
    try:
        return shorten(repr(value))
    except RecursionError:
        return type(value).__name__
