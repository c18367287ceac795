"""nemostream as the speech-to-text service of a Pipecat pipeline.

    pipeline = Pipeline([transport.input(), vad, NemostreamSTTService(), context.user(), llm, tts, transport.output()])

Pushes an `InterimTranscriptionFrame` while words are spoken and a `TranscriptionFrame` when an utterance ends: after a
silence, or at once when the pipeline's VAD detects that the user stopped speaking. Needs `pip install pipecat-ai`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlencode

from pipecat.frames.frames import (
    Frame,
    InterimTranscriptionFrame,
    StartFrame,
    TranscriptionFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.settings import STTSettings
from pipecat.services.stt_service import WebsocketSTTService
from pipecat.transcriptions.language import Language
from pipecat.utils.time import time_now_iso8601
from websockets.asyncio.client import connect
from websockets.protocol import State

_LANGUAGES = {language.value: language for language in Language}


class NemostreamSTTService(WebsocketSTTService):
    """Streams the pipeline's audio to `nemostream serve`."""

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        *,
        chunk_ms: int = 160,
        final_chunk_ms: int | None = None,  # larger: accurate finals, of the same latency; None: the server's default
        language: str | None = None,  # None: the server's default
        api_key: str | None = None,
        **options: Any,
    ) -> None:
        # The server ends a stream that sends nothing for 30 s, as a pipeline may while the bot speaks.
        options.setdefault("keepalive_timeout", 10)
        options.setdefault("settings", STTSettings(model="nemostream", language=language))
        super().__init__(**options)
        self._url, self._api_key = url, api_key
        self._query = {"chunk_ms": chunk_ms} | ({"language": language} if language else {})
        if final_chunk_ms is not None:
            self._query["final_chunk_ms"] = final_chunk_ms

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self._connect()

    async def run_stt(self, audio: bytes) -> AsyncGenerator[Frame | None, None]:
        if self._is_keepalive_ready():
            await self.send_with_retry(audio, self._report_error)
        yield None

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, VADUserStoppedSpeakingFrame) and self._is_keepalive_ready():
            self.request_finalize()
            await self._websocket.send(json.dumps({"type": "commit"}))

    async def _send_keepalive(self, silence: bytes) -> None:
        await self._websocket.send(json.dumps({"type": "keepalive"}))

    async def _connect(self) -> None:
        await self._connect_websocket()
        await super()._connect()
        self._receiver = self.create_task(self._receive_task_handler(self._report_error))

    async def _disconnect(self) -> None:
        await super()._disconnect()
        if receiver := getattr(self, "_receiver", None):
            self._receiver = None
            await self.cancel_task(receiver)
        await self._disconnect_websocket()

    async def _connect_websocket(self) -> None:
        if self._websocket is not None and self._websocket.state is State.OPEN:
            return
        query = urlencode({"sample_rate": self.sample_rate, **self._query})
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else None
        self._websocket = await connect(f"{self._url}/v1/stream?{query}", additional_headers=headers)
        await self._call_event_handler("on_connected")

    async def _disconnect_websocket(self) -> None:
        if self._websocket is not None:
            await self._websocket.close()
            self._websocket = None
            await self._call_event_handler("on_disconnected")

    async def _receive_messages(self) -> None:
        async for message in self._websocket:
            event = json.loads(message)
            if event["type"] in ("partial", "final"):
                final = event["type"] == "final"
                kind = TranscriptionFrame if final else InterimTranscriptionFrame
                if final:
                    self.confirm_finalize()
                language = event["language"] or ""
                known = _LANGUAGES.get(language) or _LANGUAGES.get(language.partition("-")[0])
                await self.push_frame(kind(event["text"], "", time_now_iso8601(), known, result=event))
            elif event["type"] == "error":
                await self.push_error(event["message"])
