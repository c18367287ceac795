"""The live stream for asyncio. The only file that imports it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from nemostream.runtime.audio.sources import SourceLike, open_source
from nemostream.runtime.streaming.session import Options, Pcm, StreamSession
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Result

if TYPE_CHECKING:
    from nemostream.runtime.model import Model


T = TypeVar("T")


class AsyncLiveStream:
    """`LiveStream` with `push` and `finish` awaited; the scheduler wakes the event loop, no thread waits.

    For one event loop, and one task at a time. A task cancelled in `push` or `finish` loses no audio: what it pushed
    is decoded, and the next call's results tell it. An asynchronous context manager.
    """

    def __init__(self, open_: Callable[[Callable[[], None]], StreamSession]) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._progress = asyncio.Event()
        self._taking: asyncio.Task[None] | None = None  # what a thread is taking in
        self._session = open_(self._wake)

    @property
    def result(self) -> Result:
        """The current result; after `finish` the final one."""
        return self._session.result

    @property
    def steps(self) -> int:
        """Chunks decoded that a result or an event told of, or would have."""
        return self._session.steps

    @property
    def chunk_ms(self) -> int:
        """Size of the last of them."""
        return self._session.chunk_ms

    async def push(self, pcm: Pcm) -> list[Result]:
        """As `LiveStream.push`."""
        await self._take(self._session.feed, pcm)
        await self._settle()
        return self._session.collect()

    async def finish(self) -> Result:
        """As `LiveStream.finish`."""
        await self._take(self._session.finish)
        await self._settle()
        return self._session.final()

    async def push_events(self, pcm: Pcm) -> list[Event]:
        """As `LiveStream.push_events`."""
        await self._take(self._session.feed, pcm)
        await self._settle()
        return self._session.events()

    async def end_utterance(self) -> list[Event]:
        """As `LiveStream.end_utterance`. A task cancelled in it has ended the utterance all the same."""
        await self._take(self._session.end_utterance)
        await self._settle()
        return self._session.events()

    async def finish_events(self) -> list[Event]:
        """As `LiveStream.finish_events`."""
        await self.finish()
        return self._session.events()

    def check(self, pcm: Pcm) -> None:
        """Raise `AudioError` if `pcm` is not audio that this stream takes; take nothing."""
        self._session.preprocessor.check(pcm)

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """As `LiveStream.set_chunk_ms`; never blocks."""
        self._session.set_chunk_ms(chunk_ms)

    def close(self) -> None:
        """As `LiveStream.close`; never blocks."""
        self._session.close()

    async def __aenter__(self) -> AsyncLiveStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _take(self, act: Callable[..., None], *what: Pcm) -> None:
        """Hand something to the recognition. Looking for speech in it is work, and done on a thread: the loop has other
        streams. Whatever becomes of the task, what it handed over is taken in, and in order."""
        if not self._session.gated:
            return act(*what)
        self._taking = asyncio.get_running_loop().create_task(self._take_after(self._taking, act, *what))
        self._taking.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may have no reader
        await asyncio.shield(self._taking)

    async def _take_after(self, before: asyncio.Task[None] | None, act: Callable[..., None], *what: Pcm) -> None:
        if before:
            await asyncio.wait([before])
        await asyncio.to_thread(act, *what)

    async def _settle(self) -> None:
        self._loop = asyncio.get_running_loop()
        while True:
            self._progress.clear()  # before looking: what happens after the look sets it again
            if self._session.settled():
                return
            await self._progress.wait()

    def _wake(self) -> None:
        """On the scheduler's thread. Raises if the loop was closed: then the scheduler drops the stream."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._progress.set)


async def listen(
    model: Model, source: SourceLike, sample_rate: int, channels: int, options: Options
) -> AsyncIterator[Event]:
    """`Model.listen` for `async for`. Files are read, and other sources waited for, on a thread."""
    if isinstance(source, AsyncIterable):
        async with model.astream(sample_rate=sample_rate, channels=channels, **options) as stream:
            async for block in source:
                for event in await stream.push_events(block):
                    yield event
            for event in await stream.finish_events():
                yield event
        return
    with open_source(source, sample_rate, channels) as sound:
        async with model.astream(sample_rate=sound.sample_rate, channels=sound.channels, **options) as stream:
            turn = iter(sound.blocks)
            while rest := await _on_thread(lambda: [*itertools.islice(turn, 1)]):
                for event in await stream.push_events(rest[0]):
                    yield event
            for event in await stream.finish_events():
                yield event


async def _on_thread(call: Callable[[], T]) -> T:
    """Run `call` on a thread. A task that is cancelled meanwhile goes on only when the thread is done with it.

    Otherwise the caller would close what the thread still reads, which ends the process if it belongs to a native
    library (libsndfile).
    """
    work = asyncio.ensure_future(asyncio.to_thread(call))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:
            break
    if cancelled is not None:
        if not work.cancelled():
            work.exception()  # marks the exception as retrieved
        raise cancelled
    return work.result()
