"""`/v1/realtime`: OpenAI's realtime API, transcription sessions only (the GA event names; the beta's are understood).

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
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from nemostream.errors import AudioError, NemostreamError, OptionError, StreamError
from nemostream.runtime.utterance import Event
from nemostream.serving.service import Service
from nemostream.serving.session import Expired, Session
from nemostream.serving.websocket import LEAST_TEXT, MOST_TEXT, deny, hang_up, name_of

_FORMATS = {"audio/pcm": ("pcm_s16le", 24000), "audio/pcmu": ("mulaw", 8000), "audio/pcma": ("alaw", 8000)}
_AUDIO = re.compile(r'"audio"\s*:\s*"')
_BASE64_SLICE = 1 << 20  # characters, a multiple of 4, that are decoded without a turn of other tasks
_BETA = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}


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
        await hang_up(socket, error, _error(str(error), name_of(error)[0]))
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

    async def begin(self) -> None:
        """Take a place: whoever is let in may speak."""
        self.session = self._open()

    def _open(self) -> Session:
        return self._service.open(
            "realtime", sample_rate=self._rate, encoding=_FORMATS[self._format][0], endpoint_ms=self._silence_ms,
            client=self._socket.scope["nemostream.client"],
        )  # fmt: skip

    async def run(self) -> None:
        await self._send({"type": "session.created", "session": self._described()})
        while True:
            async with self.session.receiving():
                message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1006))
            order: Any = None
            try:
                await self.session.pace(max(len(message.get("text") or ""), LEAST_TEXT))
                order = _json(message)
                await self._obey(order)
            except (OptionError, AudioError) as error:  # the conversation goes on; what came counts as not said
                given = order.get("event_id") if isinstance(order, dict) else None
                await self._send(_error(str(error), "invalid_request_error", given))

    async def _obey(self, order: dict[str, Any]) -> None:
        kind = order.get("type")
        if kind in ("session.update", "transcription_session.update"):
            await self._update(order.get("session"))
            await self._send({"type": kind + "d", "session": self._described()})
        elif kind == "input_audio_buffer.append":
            data = await _audio(order.get("audio"))
            before = self.session.audio
            events = await self.session.push(data)
            self._sent += self.session.audio - before
            await self._tell(events)
        elif kind == "input_audio_buffer.commit":
            if self._sent < 0.1:
                raise AudioError(f"the buffer holds {1000 * self._sent:.0f} ms of audio; at least 100 ms are needed.")
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
        else:
            raise OptionError(f"a transcription session has no event {kind!r}.")

    async def _update(self, wanted: Any) -> None:
        if not isinstance(wanted, dict):
            raise OptionError("session must be an object.")
        if wanted.get("type", "transcription") != "transcription":
            raise OptionError(f"session.type is {wanted['type']!r}; this server has transcription only.")
        given = wanted.get("audio") or {}
        given = given.get("input") or {} if isinstance(given, dict) else {}
        if not isinstance(given, dict):
            raise OptionError("session.audio.input must be an object.")
        transcription = given.get("transcription") or wanted.get("input_audio_transcription") or {}
        if isinstance(transcription, dict):
            language = transcription.get("language")
            if language and not str(language).lower().startswith("en"):
                raise OptionError(f"language is {language!r}; this model knows English.")
            self._model = str(transcription.get("model") or self._model)
        sound, rate, silence = self._format, self._rate, self._silence_ms
        if found := given.get("format") or wanted.get("input_audio_format"):
            name, rate = _format(found)
            sound = name
        for place in (given, wanted):
            if "turn_detection" in place:
                silence = self._silence(place["turn_detection"])
        if (sound, rate, silence) == (self._format, self._rate, self._silence_ms):
            return
        if self._sent:
            raise OptionError("format and turn_detection can change only before audio came, or after a commit.")
        # Its place is given up and taken again, without anyone else's turn between.
        old = (self._format, self._rate, self._silence_ms)
        self._format, self._rate, self._silence_ms = sound, rate, silence
        self.session.close()
        try:
            self.session = self._open()
        except NemostreamError as error:
            self._format, self._rate, self._silence_ms = old
            try:
                self.session = self._open()
            except NemostreamError as lost:
                raise StreamError(str(lost)) from lost
            raise OptionError(str(error)) from error

    def _silence(self, detection: Any) -> int | None:
        if detection is None:
            return None
        if not isinstance(detection, dict) or detection.get("type") not in ("server_vad", "semantic_vad"):
            raise OptionError("turn_detection must be null, or of type server_vad or semantic_vad.")
        silence = detection.get("silence_duration_ms", self._service.settings.endpoint_ms)
        if not isinstance(silence, int) or not 80 <= silence <= 60_000:
            raise OptionError(f"silence_duration_ms is {silence!r}; it must be from 80 to 60000.")
        return silence

    async def _tell(self, events: list[Event]) -> None:
        for event in events:
            if event.kind == "end":
                continue
            if not self._item:
                self._begin_item()
                await self._send({
                    "type": "input_audio_buffer.speech_started", "item_id": self._item,
                    "audio_start_ms": round(1000 * event.start),
                })  # fmt: skip
            await self._delta(event)
            if event.kind == "final":
                await self._send({
                    "type": "input_audio_buffer.speech_stopped", "item_id": self._item,
                    "audio_end_ms": round(1000 * event.end),
                })  # fmt: skip
                await self._committed()
                await self._completed(event)
                self._sent = 0.0

    def _begin_item(self) -> None:
        self._item = self._item or "item_" + secrets.token_hex(10)

    async def _delta(self, event: Event) -> None:
        if delta := event.text[len(self._told) :]:
            self._told = event.text
            await self._send({
                "type": "conversation.item.input_audio_transcription.delta", "item_id": self._item, "content_index": 0,
                "delta": delta,
            })  # fmt: skip

    async def _committed(self) -> None:
        await self._send({
            "type": "input_audio_buffer.committed", "item_id": self._item, "previous_item_id": self._last
        })  # fmt: skip

    async def _completed(self, event: Event | None) -> None:
        if event:
            await self._delta(event)
        await self._send({
            "type": "conversation.item.input_audio_transcription.completed", "item_id": self._item, "content_index": 0,
            "transcript": event.text if event else "",
            "usage": {"type": "duration", "seconds": round(self._sent, 3)},
        })  # fmt: skip
        self._item, self._last, self._told = "", self._item, ""

    def _described(self) -> dict[str, Any]:
        format_: dict[str, Any] = {"type": self._format}
        if self._format == "audio/pcm":
            format_["rate"] = self._rate
        detection = None if self._silence_ms is None else {
            "type": "server_vad", "silence_duration_ms": self._silence_ms, "threshold": 0.5, "prefix_padding_ms": 0
        }  # fmt: skip
        return {
            "type": "transcription", "object": "realtime.transcription_session", "id": "sess_" + self.session.id,
            "audio": {"input": {
                "format": format_, "transcription": {"model": self._model, "language": "en"}, "noise_reduction": None,
                "turn_detection": detection,
            }},
        }  # fmt: skip

    async def _send(self, event: dict[str, Any]) -> None:
        async with self.session.sending():
            await self._socket.send_text(json.dumps({"event_id": "event_" + secrets.token_hex(8), **event}))


def _json(message: Any) -> dict[str, Any]:
    if message.get("text") is None:
        raise OptionError("binary messages are not supported; send audio as base64 in input_audio_buffer.append.")
    text, audio = _without_audio(message["text"])
    if len(text) > MOST_TEXT:
        raise OptionError(
            f"the message has {len(text)} characters besides its audio, a top-level string; the most is {MOST_TEXT}."
        )
    try:
        order = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the message is not JSON: {error}.") from error
    if not isinstance(order, dict):
        raise OptionError("a message must be a JSON object with a type.")
    if audio is not None:
        if order.get("audio") != "":
            raise OptionError("audio must be a top-level string of the message.")
        order["audio"] = audio
    return order


def _without_audio(text: str) -> tuple[str, str | None]:
    """A long message without the value of its "audio", and that value: a JSON parser would keep the event loop for too
    long, and for longest where the message is not what it should be."""
    if len(text) <= MOST_TEXT:
        return text, None
    found = _AUDIO.search(text, 0, MOST_TEXT)
    if found is None or (end := text.find('"', found.end())) < 0:
        return text, None
    return text[: found.end()] + text[end:], text[found.end() : end].replace("\\/", "/")


async def _audio(text: Any) -> bytes:
    if not isinstance(text, str):
        raise AudioError("audio must be a base64 string.")
    data = bytearray()
    try:
        for start in range(0, len(text), _BASE64_SLICE):
            data += base64.b64decode(text[start : start + _BASE64_SLICE], validate=True)
            await asyncio.sleep(0)
    except (binascii.Error, ValueError) as error:
        raise AudioError(f"audio is not base64: {error}.") from error
    return bytes(data)


def _format(given: Any) -> tuple[str, int]:
    """GA's `{"type": "audio/pcm", "rate": 24000}`, or the beta's name."""
    name = _BETA.get(given) if isinstance(given, str) else given.get("type") if isinstance(given, dict) else None
    if not isinstance(name, str) or name not in _FORMATS:
        raise OptionError(f"format must be one of {', '.join(_FORMATS)}, not {given!r}.")
    rate = given.get("rate", _FORMATS[name][1]) if isinstance(given, dict) else _FORMATS[name][1]
    if not isinstance(rate, int) or (name != "audio/pcm" and rate != 8000):
        raise OptionError(f"rate is {rate!r}; {name} has {_FORMATS[name][1]}.")
    return name, rate


def _error(message: str, code: str, given: Any = None) -> dict[str, Any]:
    return {
        "type": "error", "event_id": "event_" + secrets.token_hex(8),
        "error": {"type": "invalid_request_error", "code": code, "message": message, "param": None, "event_id": given},
    }  # fmt: skip
