"""A whole recording that a client sent, recognised as fast as it goes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from typing import Any, BinaryIO

from nemostream.errors import StreamError
from nemostream.runtime.audio import Recording
from nemostream.runtime.utterance import Event
from nemostream.serving.service import Service


class Upload:
    """Iterate it for its events; the first is None and says that it was let in. `text` and `seconds` come last.

    `gone` tells whether the client left: then the rest is not decoded. `options` are those of `Service.open`. Iterating
    raises `AudioError` if it is no recording, `StreamError` if nobody waits for it any more, and what `Service.open`
    and a stream raise.
    """

    def __init__(
        self, service: Service, transport: str, source: BinaryIO, name: str,
        gone: Callable[[], Awaitable[bool]] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.text, self.seconds = "", 0.0
        self._gone = gone
        self._events = self._run(service, transport, source, name, options)

    def __aiter__(self) -> AsyncIterator[Event | None]:
        return self._events

    async def __anext__(self) -> Event | None:
        return await anext(self._events)

    async def _run(
        self, service: Service, transport: str, source: BinaryIO, name: str, options: dict[str, Any]
    ) -> AsyncIterator[Event | None]:
        # libsndfile wants a file of its own: one that it may seek in, without Python between.
        with tempfile.NamedTemporaryFile(prefix="nemostream-") as file:
            await asyncio.to_thread(shutil.copyfileobj, source, file)
            file.flush()
            with await asyncio.to_thread(Recording, file.name, name) as recording:
                session = service.open(
                    transport, sample_rate=recording.sample_rate, channels=recording.channels, **options
                )
                async with session:
                    yield None
                    with closing(recording.blocks()) as blocks:
                        while (block := await asyncio.to_thread(next, blocks, None)) is not None:
                            if self._gone and await self._gone():
                                raise StreamError("the client hung up.")
                            for event in await session.push_pcm(block):
                                yield event
                    for event in await session.finish():
                        yield event
                    self.text, self.seconds = session.text, session.audio
