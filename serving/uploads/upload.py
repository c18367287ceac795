"""Whole recordings that clients send: who may send one, and the way from the file to events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from nemostream.errors import CapacityError, StreamError
from nemostream.runtime.text.events import Event
from nemostream.serving.metrics import Metrics
from nemostream.serving.network.access import Client
from nemostream.serving.session import Expired
from nemostream.serving.settings import Settings

if TYPE_CHECKING:
    from nemostream.serving.service import Service

log = logging.getLogger("nemostream.serving")

_TURN_SECONDS = 0.05  # between two looks whether live streams are on time again


class Uploads:
    """Places for recordings. They are not those of live streams, and each is taken before the body is read."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._bytes = 0  # reserved in memory and in temporary files
        self._clients: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Recordings that are received or recognised now."""
        return self._clients.total()

    def admit(self, size: int | None, client: Client) -> AbstractContextManager[None]:
        """Take a place for a recording of `size` bytes (None: unknown) for as long as the context lasts.

        Raises `CapacityError` at once when all places, all places of this client, or all bytes are taken.
        """
        limits = self._settings
        size = min(limits.max_upload_bytes if size is None else size, limits.max_upload_bytes)
        why = ""
        if self.count >= limits.max_uploads:
            why = f"all {limits.max_uploads} places for recordings are taken; try again in a few seconds."
        elif limits.max_streams_per_client and self._clients[client.name] >= limits.max_streams_per_client:
            why = f"this client sends {limits.max_streams_per_client} recordings already, the most that it may."
        elif self.count and self._bytes + size > limits.max_upload_total_bytes:
            why = f"recordings of {self._bytes >> 20} MiB are being received; try again in a few seconds."
        if why:
            self._metrics.rejected.labels("CapacityError").inc()
            log.info("refused", extra={"transport": "upload", "why": why, "peer": client.address})
            raise CapacityError(why)
        return self._place(size, client.name)

    @contextmanager
    def _place(self, size: int, client: str) -> Iterator[None]:
        self._clients[client] += 1
        self._bytes += size
        self._metrics.uploads.set(self.count)
        try:
            yield
        finally:
            self._bytes -= size
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]
            self._metrics.uploads.set(self.count)


class Upload:
    """Iterate it for its events; the first is None: the recording was accepted. `text`, `seconds` and
    `warning` (of a file that was cut short) come last.

    `file` is the descriptor of an open file, which must stay open meanwhile. `gone` returns whether the client
    disconnected: then the rest is not decoded. `options` are those of `Service.open`. While results of live streams
    are late, it waits. Iterating raises `AudioError` if it is no recording, `StreamError` if the client disconnected,
    `Expired` if it takes longer than a stream may, and what `Service.open` and a stream raise.
    """

    def __init__(
        self,
        service: Service,
        transport: str,
        file: int,
        name: str,
        gone: Callable[[], Awaitable[bool]] | None = None,
        **options: Any,
    ) -> None:
        self.text, self.seconds, self.warning = "", 0.0, ""
        self._service, self._gone = service, gone
        self._events = self._run(transport, file, name, options)

    def __aiter__(self) -> AsyncIterator[Event | None]:
        return self._events

    async def __anext__(self) -> Event | None:
        return await anext(self._events)

    async def _run(self, transport: str, file: int, name: str, options: dict[str, Any]) -> AsyncIterator[Event | None]:
        service, began = self._service, time.monotonic()
        longest = service.settings.max_seconds
        async with service.decoders.decode(file, name) as recording:
            session = service.open(transport, sample_rate=service.decoders.rate, channels=1, upload=True, **options)
            async with session:
                yield None
                async for block in recording:
                    while True:
                        if self._gone and await self._gone():
                            raise StreamError("the client disconnected.")
                        if time.monotonic() - began > longest:
                            raise Expired(f"the recording took more than {longest:.0f} s, the longest allowed.")
                        if not service.late:
                            break
                        await asyncio.sleep(_TURN_SECONDS)
                    for event in await session.push_pcm(block):
                        yield event
                for event in await session.finish():
                    yield event
                self.text, self.seconds, self.warning = session.text, recording.seconds, recording.warning
