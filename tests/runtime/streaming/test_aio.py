"""Streams for asyncio: which thread audio is processed on, the order of calls, cancellation and wake-ups."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream.errors import AudioError, StreamError
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.aio import AsyncLiveStream
from nemostream.runtime.streaming.state import StreamState

TIMEOUT = 20


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine. Fails if the event loop reports an error, such as an exception that was not retrieved."""
    errors: list[Any] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        try:
            return await asyncio.wait_for(main(), TIMEOUT)
        finally:
            gc.collect(1)
            await asyncio.sleep(0)

    result = asyncio.run(watched())
    assert errors == []
    return result


class Session:
    """A session whose steps are complete when `complete` is called, on any thread."""

    def __init__(self, has_vad: bool) -> None:
        self.has_vad = has_vad
        self.listener: Callable[[list[Any]], None] = lambda streams: None
        self.consumer: Callable[[], None] = lambda: None
        self.calls: list[Any] = []
        self.threads: list[int] = []  # of each call
        self.done = True
        self.hold, self.entered = threading.Event(), threading.Event()
        self.hold.set()

    def feed(self, pcm: Any) -> None:
        self.threads.append(threading.get_ident())
        self.entered.set()
        assert self.hold.wait(TIMEOUT)
        self.calls.append(pcm)
        if pcm == "invalid":
            raise AudioError("invalid.")

    def end_utterance(self) -> None:
        self.feed("end of utterance")

    def finish(self) -> None:
        self.feed("finish")

    def settled(self) -> bool:
        return self.done

    def collect(self) -> list[Any]:
        assert self.done
        return [("results of", *self.calls)]

    def events(self) -> list[Any]:
        assert self.done
        return [("events of", *self.calls)]

    def final(self) -> Any:
        assert self.done
        return ("final of", *self.calls)

    def close(self) -> None: ...

    def notify(self, listener: Callable[[list[Any]], None], consumer: Callable[[], None]) -> None:
        self.listener, self.consumer = listener, consumer

    def changed(self) -> None:
        """Tell the listener that the stream has changed; this object stands in for its `StreamState`."""
        self.listener([self])

    def complete(self) -> None:
        self.done = True
        self.changed()


def make(has_vad: bool) -> tuple[AsyncLiveStream, Session]:
    session = Session(has_vad)
    return AsyncLiveStream(session), session  # type: ignore[arg-type]


def test_whether_a_thread_accepts_audio() -> None:
    async def main() -> None:
        stream, session = make(has_vad=True)
        assert not stream.feeding
        session.hold.clear()
        pushing = asyncio.create_task(stream.push(1))  # type: ignore[arg-type]
        await asyncio.to_thread(session.entered.wait, TIMEOUT)
        assert stream.feeding
        session.hold.set()
        await pushing
        assert not stream.feeding

    run(main)


@pytest.mark.parametrize("has_vad", [False, True])
def test_audio_is_processed_on_a_thread_only_with_vad(has_vad: bool) -> None:
    async def main() -> None:
        stream, session = make(has_vad)
        assert await stream.push("a") == [("results of", "a")]
        assert await stream.push_events("b") == [("events of", "a", "b")]
        assert await stream.end_utterance() == [("events of", "a", "b", "end of utterance")]
        assert await stream.finish_events() == [("events of", "a", "b", "end of utterance", "finish")]
        with pytest.raises(AudioError):
            await stream.push("invalid")
        assert await stream.finish() == ("final of", *session.calls)
        loop_thread = threading.get_ident()
        assert loop_thread not in session.threads if has_vad else set(session.threads) == {loop_thread}

    run(main)


@pytest.mark.parametrize("method", ["push", "push_events", "end_utterance", "finish", "finish_events"])
def test_every_call_waits_for_its_steps(method: str) -> None:
    """The steps are completed on another thread, after two changes that do not complete them."""

    async def main() -> None:
        stream, session = make(False)
        session.done = False
        task = asyncio.create_task(getattr(stream, method)(*(["a"] if "push" in method else [])))
        for _ in range(2):
            await asyncio.to_thread(session.changed)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done() and len(session.calls) == 1
        await asyncio.to_thread(session.complete)
        await task

    run(main)


def test_each_waiting_task_is_woken() -> None:
    """Also beside one that waits already, and after one that was cancelled."""

    async def main() -> None:
        stream, session = make(False)
        session.done = False
        tasks = [asyncio.create_task(stream.push(pcm)) for pcm in ("a", "b", "c")]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert len(session.calls) == 3
        tasks[1].cancel()
        await asyncio.to_thread(session.changed)
        await asyncio.to_thread(session.complete)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[1], asyncio.CancelledError)
        assert found[0] == found[2] == [("results of", "a", "b", "c")]

    run(main)


def test_a_change_before_the_first_call_is_ignored_and_one_after_the_loop_is_closed_raises() -> None:
    stream, session = make(False)
    session.changed()

    async def main() -> None:
        await stream.push("a")

    run(main)
    with pytest.raises(RuntimeError, match=r"closed|does not exist"):  # the scheduler then drops the stream
        session.changed()


def test_streams_that_have_ended_are_freed(demo_bundle: Any) -> None:
    """Also those of the scheduler's last step, while it waits for the next one."""
    before = [found for found in gc.get_objects() if isinstance(found, StreamState)]  # of other tests

    async def transcribe(model: Any) -> None:
        async with model.astream(sample_rate=48_000, chunk_ms=80) as stream:
            await stream.push(np.zeros(48_000, np.int16))
            await stream.finish()

    async def main(model: Any) -> None:
        await asyncio.gather(*(transcribe(model) for _ in range(5)))

    with nemostream.load(demo_bundle.path, capacity=8) as model:
        asyncio.run(main(model))
        while not model.context.scheduler._idle:  # it waits for the next step
            time.sleep(0.01)
        gc.collect()
        others = {id(stream) for stream in before}
        assert not [found for found in gc.get_objects() if isinstance(found, StreamState) and id(found) not in others]


def test_a_waiting_task_is_kept() -> None:
    """Also if nothing refers to it and its stream."""

    async def main() -> None:
        results: list[Any] = []
        stream, session = make(False)
        session.done = False

        async def push(stream: AsyncLiveStream) -> None:
            results.append(await stream.push("a"))  # type: ignore[arg-type]

        asyncio.create_task(push(stream))  # noqa: RUF006
        del stream
        await asyncio.sleep(0)
        gc.collect()
        session.complete()
        for _ in range(3):
            await asyncio.sleep(0)
        assert results == [[("results of", "a")]]
        assert session.consumer() is None  # it is freed after the wait

    run(main)


def test_cancelled_calls_complete_in_order() -> None:
    """With VAD: audio that is being processed, or waits for it, is kept when its task is cancelled."""

    async def main() -> None:
        stream, session = make(True)
        session.hold.clear()
        tasks = [asyncio.create_task(stream.push(pcm)) for pcm in ("a", "invalid", "b")]
        assert await asyncio.to_thread(session.entered.wait, TIMEOUT)
        for task in tasks:
            task.cancel()
        for task in tasks:
            with pytest.raises(asyncio.CancelledError):
                await task
        assert session.calls == [] and len(session.threads) == 1  # the others wait for the first
        last = asyncio.create_task(stream.push("c"))
        await asyncio.sleep(0)
        session.hold.set()
        assert await last == [("results of", "a", "invalid", "b", "c")]

    run(main)


# -- several event loops -----------------------------------------------------------------------------------------------


def noise(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32) * np.float32(0.1)


class Loop:
    """An event loop on a thread of its own, with three streams."""

    def __init__(self, model: Model) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.streams = [model.astream(chunk_ms=80) for _ in range(3)]
        self.calls: list[int] = []  # the thread of each wake-up of the loop

    def start(self, method: str, *args: Any) -> Any:
        """Call a method of all streams at the same time; return a future of the results."""

        async def call() -> list[Any]:
            return await asyncio.gather(*(getattr(stream, method)(*args) for stream in self.streams))

        return asyncio.run_coroutine_threadsafe(call(), self.loop)

    def count_calls(self) -> None:
        call_soon = self.loop.call_soon_threadsafe

        def counted(*args: Any, **options: Any) -> Any:
            self.calls.append(threading.get_ident())
            return call_soon(*args, **options)

        self.loop.call_soon_threadsafe = counted  # type: ignore[method-assign]

    def close(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(TIMEOUT)
            self.loop.close()


@pytest.fixture
def two_loops(bundle: Any, fake: Any) -> Any:
    """A model, its backend, and two loops whose streams have had a step and are known to their loop's listener."""
    backend = fake.FakeBackend(bundle.manifest, capacity=6, max_batch=6)
    with Model(bundle, backend) as model:
        loops = [Loop(model), Loop(model)]
        for loop in loops:
            loop.start("push", noise(0, 199)).result(TIMEOUT)
        yield model, backend, loops
        for loop in loops:
            loop.close()


def held_step(backend: Any) -> tuple[threading.Event, threading.Event]:
    """Hold the next steps: return the events that a step has begun, and that releases all."""
    entered, released = threading.Event(), threading.Event()

    def hold(batch: Any) -> None:
        entered.set()
        assert released.wait(TIMEOUT)

    backend.on_submit = hold
    return entered, released


def test_each_event_loop_is_woken_once_per_step_that_has_one_of_its_streams(two_loops: Any, fake: Any) -> None:
    _, backend, loops = two_loops
    slots = [{stream.session._stream.slot for stream in loop.streams} for loop in loops]
    backend.batches.clear()
    entered, released = held_step(backend)
    first = loops[0].streams[0]
    asyncio.run_coroutine_threadsafe(first.push(noise(1, 1280)), loops[0].loop)
    assert entered.wait(TIMEOUT)  # while this step runs, all streams become ready
    queued = [loop.start("push", noise(2, 1280)) for loop in loops]
    deadline = time.monotonic() + TIMEOUT
    while sum(len(stream.session._stream.items) for loop in loops for stream in loop.streams) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for loop in loops:
        loop.count_calls()
    released.set()
    for future in queued:
        assert len(future.result(TIMEOUT)) == 3
    steps = [set(batch) for _, batch in backend.batches]
    assert steps == [{first.session._stream.slot}, slots[0] | slots[1]]
    for loop, its_slots in zip(loops, slots, strict=True):
        # The last call of a step may follow the result that ends this wait, but only by the time to call the loops.
        expected = [backend.thread] * sum(bool(step & its_slots) for step in steps)
        while len([thread for thread in loop.calls if thread == backend.thread]) < len(expected):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert [thread for thread in loop.calls if thread == backend.thread] == expected


def test_a_closed_event_loop_cancels_only_its_own_streams(two_loops: Any, fake: Any) -> None:
    """Both loops' streams are in one step when one of the loops is closed."""
    model, backend, (closed, running) = two_loops
    entered, released = held_step(backend)
    # Feed without waiting, as a task that was cancelled has done.
    for stream in closed.streams:
        stream.session.feed(noise(1, 1280))
    results = running.start("push", noise(2, 9000))
    assert entered.wait(TIMEOUT)
    closed.close()
    released.set()
    results.result(TIMEOUT)
    for stream in closed.streams:
        with pytest.raises(StreamError, match="the stream was closed"):
            stream.session.wait()
    wanted = fake.expected(np.concatenate([noise(0, 199), noise(2, 9000)]), model.manifest.decoder.vocabulary)[0]
    for result in running.start("finish").result(TIMEOUT):
        assert [token.id for token in result.tokens] == wanted
    streams = [model.astream() for _ in range(6)]  # all slots were released
    for stream in streams:
        stream.close()


# -- sources -----------------------------------------------------------------------------------------------------------


class Blocks:
    """An iterable of audio whose second block arrives when the test permits it, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.error, self.count, self.reading = error, 0, False

    def __iter__(self) -> Blocks:
        return self

    def __next__(self) -> np.ndarray:
        self.count += 1
        if self.count == 1:
            return np.ones(30_000, np.float32)
        self.reading = True
        self.entered.set()
        assert self.released.wait(TIMEOUT)
        self.reading = False
        if self.error:
            raise self.error
        return np.ones(100, np.float32)


@pytest.fixture
def model(bundle: Any, fake: Any) -> Any:
    with Model(bundle, fake.FakeBackend(bundle.manifest, capacity=1)) as model:
        yield model


@pytest.mark.parametrize("error", [None, AudioError("damaged.")])
def test_a_cancelled_reader_waits_for_its_thread(model: Model, error: Exception | None) -> None:
    """A file must not be closed while a thread reads it."""
    source = Blocks(error)

    async def main() -> None:
        events: list[Any] = []

        async def listen() -> None:
            async for event in model.listen(source):
                events.append(event)

        task = asyncio.create_task(listen())
        assert await asyncio.to_thread(source.entered.wait, TIMEOUT)
        for _ in range(2):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done() and source.reading
        source.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not source.reading and source.count == 2 and events

    run(main)


def test_an_error_of_a_source_is_raised_and_the_slot_is_released(model: Model) -> None:
    async def main() -> None:
        for _ in range(3):  # more often than there are slots
            source = Blocks(AudioError("damaged."))
            source.released.set()
            with pytest.raises(AudioError, match="damaged"):
                async for _ in model.listen(source):
                    pass

    run(main)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_sources_with_several_channels(model: Model, asynchronous: bool) -> None:
    audio = (np.random.default_rng(0).standard_normal((30_000, 2)) * 0.1).astype(np.float32)
    blocks = [audio[at : at + 4000] for at in range(0, len(audio), 4000)]

    async def source() -> Any:
        for block in blocks:
            yield block

    async def main() -> list[Any]:
        return [event async for event in model.listen(source() if asynchronous else blocks, channels=2)]

    events = run(main)
    assert [event.kind for event in events[-2:]] == ["final", "end"]
    assert events[-2].tokens == model.transcribe(audio).tokens
