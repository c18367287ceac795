"""Transcription of an uploaded recording: from the file to events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from nemostream.errors import StreamError
from nemostream.runtime.text.events import Event
from nemostream.serving.errors import Expired
from nemostream.serving.service import Service

_POLL_SECONDS = 0.05  # between two checks whether live streams are on time again


class Upload:
    """The events of a recording, by asynchronous iteration. The first item is None: the recording was accepted.

    `text`, `language` (the stream's, or the last one that was detected), `seconds` and `warning` (about a file that was
    cut short) are set at the end.

    `file` is the descriptor of an open file, which must stay open meanwhile. `is_disconnected` returns whether the
    client disconnected: the rest is not decoded then. `options` are those of `Service.open`. Decoding pauses while
    results of live streams are late. Iterating raises `AudioError` if the file is not a recording, `StreamError` if the
    client disconnected, `Expired` if it takes longer than a stream may, and what `Service.open` and a stream raise.
    """

    def __init__(
        self,
        service: Service,
        transport: str,
        file: int,
        name: str,
        is_disconnected: Callable[[], Awaitable[bool]] | None = None,
        **options: Any,
    ) -> None:
        self.text, self.seconds, self.warning = "", 0.0, ""
        self.language: str | None = None
        self._service, self._is_disconnected = service, is_disconnected
        self._events = self._run(transport, file, name, options)

    def __aiter__(self) -> AsyncIterator[Event | None]:
        return self._events

    async def __anext__(self) -> Event | None:
        return await anext(self._events)

    async def _run(self, transport: str, file: int, name: str, options: dict[str, Any]) -> AsyncIterator[Event | None]:
        service = self._service
        deadline = service.clock() + service.settings.max_seconds
        async with service.decoders.decode(file, name) as recording:
            session = service.open(transport, sample_rate=service.decoders.rate, channels=1, upload=True, **options)
            async with session:
                yield None
                async for block in recording:
                    await self._wait_for_live_streams(deadline)
                    for event in await session.push_pcm(block):
                        yield event
                for event in await session.finish():
                    yield event
                self.text, self.seconds, self.warning = session.text, recording.seconds, recording.warning
                self.language = session.text_language

    async def _wait_for_live_streams(self, deadline: float) -> None:
        """Wait until results of live streams are on time. Raises `StreamError` and `Expired`."""
        while True:
            if self._is_disconnected and await self._is_disconnected():
                raise StreamError("the client disconnected.")
            if self._service.clock() > deadline:
                raise Expired(
                    f"the recording took more than {self._service.settings.max_seconds:.0f} s, the longest allowed."
                )
            if not self._service.is_late:
                return
            await asyncio.sleep(_POLL_SECONDS)
