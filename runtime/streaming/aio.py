"""Live streams for asyncio. The only module of the runtime that imports it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Callable
from types import TracebackType
from typing import ClassVar, TypeVar
from weakref import WeakKeyDictionary, ref

from nemostream.runtime.audio.sources import SourceLike, open_source
from nemostream.runtime.streaming.session import OpenSession, Pcm, StreamSession
from nemostream.runtime.streaming.snapshot import StreamSnapshot
from nemostream.runtime.streaming.state import StreamState, StreamTrace
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Result

T = TypeVar("T")


class AsyncLiveStream:
    """`LiveStream` for asyncio: the scheduler wakes the event loop, and no thread waits.

    For one event loop, and one task at a time. If a task is cancelled in `push` or `finish`, its audio is processed
    nevertheless and the results are returned by the next call. An asynchronous context manager.
    """

    def __init__(self, session: StreamSession) -> None:
        self.session = session  # callers that do not wait call `listen`, and `feed` and `poll` of the session
        self._listener: _LoopListener | None = None  # once the event loop is known
        self._progress: asyncio.Future[None] | None = None  # done at the next change; None unless a task waits for it
        self._feeding: asyncio.Task[None] | None = None  # the last call that `_feed` started on a thread
        self.on_progress: Callable[[], None] | None = None

    @property
    def result(self) -> Result:
        """The current result; after `finish` the final one."""
        return self.session.result

    @property
    def steps(self) -> int:
        """Number of chunks processed up to the last result or event returned."""
        return self.session.steps

    @property
    def chunk_ms(self) -> int:
        """Size of the last of these chunks, in milliseconds."""
        return self.session.chunk_ms

    @property
    def language(self) -> str:
        """The name of the language that is set, one of the model's `languages`."""
        return self.session.language

    async def push(self, pcm: Pcm) -> list[Result]:
        """As `LiveStream.push`."""
        await self._feed(self.session.feed, pcm)
        await self._wait()
        return self.session.collect()

    async def finish(self) -> Result:
        """As `LiveStream.finish`."""
        await self._feed(self.session.finish)
        await self._wait()
        return self.session.final()

    async def push_events(self, pcm: Pcm) -> list[Event]:
        """As `LiveStream.push_events`."""
        await self._feed(self.session.feed, pcm)
        await self._wait()
        return self.session.events()

    async def end_utterance(self) -> list[Event]:
        """As `LiveStream.end_utterance`. The utterance is ended even if the task is cancelled."""
        await self._feed(self.session.end_utterance)
        await self._wait()
        return self.session.events()

    async def finish_events(self) -> list[Event]:
        """As `LiveStream.finish_events`."""
        await self.finish()
        return self.session.events()

    def listen(self, on_progress: Callable[[], None]) -> None:
        """Call `on_progress` in the running event loop when the result of `session.poll` may have changed."""
        self.on_progress = on_progress
        self._listen()

    @property
    def feeding(self) -> bool:
        """Whether a thread accepts audio (with VAD). The accurate lane must not be set meanwhile."""
        return self._feeding is not None and not self._feeding.done()

    def trace(self) -> StreamTrace:
        """Record when chunks of `chunk_ms` are run (`StreamSession.trace`). Called before the first audio."""
        return self.session.trace()

    @property
    def end_sample(self) -> int:
        """Samples at the model's rate that were processed up to the last result or event returned."""
        return self.session.end_sample

    def check(self, pcm: Pcm) -> None:
        """Raise `AudioError` if `push` would reject `pcm`."""
        self.session.preprocessor.check(pcm)

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """As `LiveStream.set_chunk_ms`; never blocks."""
        self.session.set_chunk_ms(chunk_ms)

    @property
    def final_chunk_ms(self) -> int | None:
        """As `LiveStream.final_chunk_ms`."""
        return self.session.final_chunk_ms

    def set_final_chunk_ms(self, final_chunk_ms: int | None) -> None:
        """As `LiveStream.set_final_chunk_ms`; never blocks. Not to be called while another task awaits `push`."""
        self.session.set_final_chunk_ms(final_chunk_ms)

    def set_language(self, language: str | None) -> None:
        """As `LiveStream.set_language`; never blocks."""
        self.session.set_language(language)

    def save(self) -> Callable[[], StreamSnapshot] | None:
        """Begin to save the stream (`StreamSession.save_live`); never blocks, but the function that it returns does."""
        return self.session.save_live()

    def close(self) -> None:
        """As `LiveStream.close`; never blocks."""
        self.session.close()

    async def __aenter__(self) -> AsyncLiveStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _feed(self, function: Callable[..., None], *args: Pcm) -> None:
        """Call one of the session's methods that accept audio.

        With VAD it runs on a thread, because it takes time. Calls run in order, and complete even if their task is
        cancelled.
        """
        if not self.session.has_vad:
            return function(*args)
        self._feeding = asyncio.get_running_loop().create_task(self._feed_after(self._feeding, function, *args))
        # If the task is cancelled, nothing else retrieves the exception.
        self._feeding.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._feeding)

    async def _feed_after(self, previous: asyncio.Task[None] | None, function: Callable[..., None], *args: Pcm) -> None:
        if previous:
            await asyncio.wait([previous])
        await asyncio.to_thread(function, *args)

    async def _wait(self) -> None:
        """Wait until every complete chunk is processed."""
        listener = self._listen()
        while not self.session.settled():  # a change after the check wakes the loop after this task has begun to wait
            if self._progress is None:
                self._progress = asyncio.get_running_loop().create_future()
            listener.waiting.add(self)
            try:
                await asyncio.shield(self._progress)  # another task may wait for it, although it should not
            finally:
                listener.waiting.discard(self)

    def _listen(self) -> _LoopListener:
        """Register at the listener of the running event loop, once. Returns it."""
        if self._listener is None:
            self._listener = _LoopListener.of(asyncio.get_running_loop())
            self.session.notify(self._listener, ref(self))  # a cycle would keep the stream until a garbage collection
        return self._listener

    def _wake(self) -> None:
        if self._progress is not None:
            self._progress.set_result(None)
            self._progress = None
        if self.on_progress is not None:
            self.on_progress()


class _LoopListener:
    """Wakes the streams of one event loop: the loop receives one call per step, not one per stream."""

    _of_loops: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopListener]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self.waiting = set[AsyncLiveStream]()  # streams for which a task waits that nothing else may refer to

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _LoopListener:
        """Return the listener of an event loop. Called in this loop."""
        listener = cls._of_loops.get(loop)
        if listener is None:
            listener = cls._of_loops[loop] = cls(loop)
        return listener

    def __call__(self, streams: list[StreamState]) -> None:
        """Wake streams; called on any thread. Raises if the loop is closed; the scheduler then drops the streams."""
        loop = self._loop()
        if loop is None:
            raise RuntimeError("the event loop does not exist any more.")
        loop.call_soon_threadsafe(self._wake, streams)

    def _wake(self, streams: list[StreamState]) -> None:
        for stream in streams:
            if (live := stream.consumer()) is not None:
                live._wake()


async def events_of(
    open_session: OpenSession, source: SourceLike, sample_rate: int, channels: int
) -> AsyncIterator[Event]:
    """Yield the events of a source (`EventStream`). Sources that are not asynchronous are read on a thread."""

    def open_stream(sample_rate: int, channels: int) -> AsyncLiveStream:
        return AsyncLiveStream(open_session(sample_rate, channels))

    if isinstance(source, AsyncIterable):
        async with open_stream(sample_rate, channels) as stream:
            async for block in source:
                for event in await stream.push_events(block):
                    yield event
            for event in await stream.finish_events():
                yield event
        return
    with open_source(source, sample_rate, channels) as audio:
        async with open_stream(audio.sample_rate, audio.channels) as stream:
            blocks = iter(audio.blocks)
            while next_block := await _on_thread(lambda: list(itertools.islice(blocks, 1))):
                for event in await stream.push_events(next_block[0]):
                    yield event
            for event in await stream.finish_events():
                yield event


async def _on_thread(function: Callable[[], T]) -> T:
    """Call a function on a thread. If the task is cancelled, wait for the thread before raising.

    Otherwise the caller could close a file that the thread still reads, which crashes the process if a native library
    (libsndfile) reads it.
    """
    future = asyncio.ensure_future(asyncio.to_thread(function))
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:
            break
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # marks the exception as retrieved
        raise cancelled
    return future.result()
