"""nemostream as the speech-to-text service of a Pipecat pipeline.

    pipeline = Pipeline([transport.input(), vad, NemostreamSTTService(), context.user(), llm, tts, transport.output()])

Pushes an `InterimTranscriptionFrame` while words are spoken and a `TranscriptionFrame` when an utterance ends: after a
silence, or at once when the pipeline's VAD detects that the user stopped speaking. After a lost connection the stream
continues (docs/client.md). Needs `pip install pipecat-ai` and the extra `client`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import Any

from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InterimTranscriptionFrame,
    StartFrame,
    TranscriptionFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.settings import STTSettings
from pipecat.services.stt_service import STTService
from pipecat.transcriptions.language import Language
from pipecat.utils.time import time_now_iso8601

from nemostream.client import AsyncStream
from nemostream.errors import NemostreamError

_LANGUAGES = {language.value: language for language in Language}


class NemostreamSTTService(STTService):
    """Streams the pipeline's audio to `nemostream serve`."""

    def __init__(
        self,
        servers: str | Iterable[str] = "http://127.0.0.1:8000",
        *,
        chunk_ms: int = 160,
        final_chunk_ms: int | None = None,  # larger: accurate finals, of the same latency; None: the server's default
        language: str | None = None,  # None: the server's default
        api_key: str | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("settings", STTSettings(model="nemostream", language=language))
        super().__init__(**options)
        self._servers, self._api_key = servers, api_key
        self._query = {"chunk_ms": chunk_ms, "final_chunk_ms": final_chunk_ms, "language": language}
        self._stream: AsyncStream | None = None

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        stream = AsyncStream(self._servers, api_key=self._api_key, sample_rate=self.sample_rate, **self._query)
        try:
            await stream.open()
        except NemostreamError as error:
            return await self._report(error)
        self._stream = stream
        self._receiver = self.create_task(self._receive(stream))
        await self._call_event_handler("on_connected")

    async def stop(self, frame: EndFrame) -> None:
        await super().stop(frame)
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        await super().cancel(frame)
        await self._close()

    async def run_stt(self, audio: bytes) -> AsyncGenerator[Frame | None, None]:
        if self._stream is not None:
            with suppress(NemostreamError):  # reported by `_receive`
                await self._stream.send(audio)
        yield None

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, VADUserStoppedSpeakingFrame) and self._stream is not None:
            self.request_finalize()
            with suppress(NemostreamError):
                await self._stream.commit()

    async def _close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await self.cancel_task(self._receiver)
            await stream.close()
            await self._call_event_handler("on_disconnected")

    async def _receive(self, stream: AsyncStream) -> None:
        try:
            async for event in stream:
                if event.type in ("partial", "final"):
                    final = event.type == "final"
                    kind = TranscriptionFrame if final else InterimTranscriptionFrame
                    if final:
                        self.confirm_finalize()
                    language = event.language or ""
                    known = _LANGUAGES.get(language) or _LANGUAGES.get(language.partition("-")[0])
                    await self.push_frame(kind(event.text, "", time_now_iso8601(), known, result=event))
        except NemostreamError as error:
            await self._report(error)

    async def _report(self, error: NemostreamError) -> None:
        await self._call_event_handler("on_connection_error", str(error))
        await self.push_error(str(error), exception=error)
