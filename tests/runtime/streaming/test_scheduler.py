"""The scheduler with a fake backend whose tokens encode the audio it received, with and without overlap."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import sys
import threading
import time
import types
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import BackendError, CapacityError, NemostreamError, OptionError, StreamError
from nemostream.runtime.decoding.boosting import NO_PHRASES
from nemostream.runtime.streaming import scheduler as scheduler_module
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.compiled import Queue
from nemostream.runtime.streaming.items import WorkItem
from nemostream.runtime.streaming.rows import ROW, RowQueue
from nemostream.runtime.streaming.scheduler import Scheduler

TIMEOUT = 20  # seconds after which a hanging test fails


def until(condition) -> None:
    """Call `condition` until it returns a true value or raises."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def noise(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


def emitted(stream) -> tuple[list[int], list[int]]:
    """Tokens of a stream, and the encoder frame of each."""
    return stream.hypothesis.tokens, [position // 1280 for position in stream.hypothesis.sample_positions]


def open_(scheduler, chunk, listener=None, **fields):
    return scheduler.open(Chunker(scheduler._manifest, chunk), listener, **fields)


@pytest.fixture(params=[False, True], ids=["no overlap", "overlap"])
def serve(request, manifest, fake):
    """Makes (scheduler, backend) pairs and closes them."""
    made = []

    def make(capacity: int = 4, max_batch: int = 4):
        backend = fake.FakeBackend(manifest, capacity, max_batch)
        made.append(Scheduler(manifest, backend, overlap=request.param))
        return made[-1], backend

    yield make
    for scheduler in made:
        scheduler.close()


class BlockingCall:
    """Blocks the scheduler's thread inside a backend call until the test sets `released`."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.released.wait(TIMEOUT)


def transcribe(scheduler, manifest, audio, ms=560, size=4000):
    stream = open_(scheduler, manifest.chunk(ms))
    for at in range(0, len(audio), size):
        scheduler.accept(stream, audio[at : at + size])
        scheduler.wait(stream)
    scheduler.finish(stream)
    scheduler.wait(stream)
    return stream


ACTIONS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["push", "push", "finish", "cancel", "wait"])), max_size=60
)


@given(actions=ACTIONS, chunks=st.lists(st.sampled_from([80, 160, 560]), min_size=4, max_size=4), overlap=st.booleans())
@settings(max_examples=60, deadline=None)
def test_interleaved_streams_are_processed_completely_and_in_order(manifest, fake, actions, chunks, overlap):
    backend = fake.FakeBackend(manifest, capacity=3, max_batch=2)
    scheduler = Scheduler(manifest, backend, overlap)
    streams, pushed, finished = {}, {}, []
    try:
        for number, (client, action) in enumerate(actions):
            if client not in streams:
                try:
                    streams[client] = open_(scheduler, manifest.chunk(chunks[client]))
                    pushed[client] = []
                except CapacityError:
                    continue
            stream = streams[client]
            if action == "push":
                pushed[client].append(noise(number, 37 * number * client + 700))
                scheduler.accept(stream, pushed[client][-1])
            elif action == "wait":
                scheduler.wait(stream)
            elif action == "cancel":
                scheduler.cancel(stream)
                del streams[client], pushed[client]
            else:
                scheduler.finish(stream)
                finished.append((stream, np.concatenate([np.zeros(0, np.float32), *pushed.pop(client)])))
                del streams[client]
        for client in list(streams):
            scheduler.finish(streams[client])
            finished.append((streams[client], np.concatenate([np.zeros(0, np.float32), *pushed[client]])))
        for stream, audio in finished:
            scheduler.wait(stream)
            assert emitted(stream) == fake.expected(audio, manifest.decoder.vocabulary)
    finally:
        scheduler.close()
    assert backend.closed


def test_streams_of_many_threads_do_not_interfere(serve, manifest, fake):
    scheduler, _ = serve(capacity=16, max_batch=8)
    lengths = [0, 100, 160, 199, 1279, 7879, 30_000, 50_001] * 2
    audios = [noise(i, n) for i, n in enumerate(lengths)]
    with ThreadPoolExecutor(16) as pool:
        jobs = [
            pool.submit(transcribe, scheduler, manifest, audio, (80, 160, 560, 1120)[i % 4], 1000 + 977 * i)
            for i, audio in enumerate(audios)
        ]
        for job, audio in zip(jobs, audios, strict=True):
            assert emitted(job.result(TIMEOUT)) == fake.expected(audio, manifest.decoder.vocabulary)
    assert len([open_(scheduler, manifest.chunk(80)) for _ in range(16)]) == 16  # every slot was released


def test_ready_streams_are_batched_by_slot_up_to_max_batch(serve, manifest):
    scheduler, backend = serve(capacity=6, max_batch=3)
    streams = [open_(scheduler, manifest.chunk(80)) for _ in range(6)]
    backend.on_submit = block = BlockingCall()
    scheduler.accept(streams[5], noise(0, 199))
    assert block.entered.wait(TIMEOUT)
    for i in (4, 2, 0, 3, 1):
        scheduler.accept(streams[i], noise(0, 199))
    block.released.set()
    for stream in streams:
        scheduler.wait(stream)
    assert backend.batches == [(80, [5]), (80, [0, 2, 4]), (80, [1, 3])]


@pytest.mark.parametrize(
    "kinds", [("int16", "int16"), ("int16", "float32"), ("float32", "int16"), ("float32", "float32")]
)
def test_rows_of_int16_and_float_audio_share_a_step(serve, manifest, fake, kinds):
    scheduler, backend = serve(capacity=2)
    integers = np.random.default_rng(3).integers(-(2**15), 2**15, (2, 5000), dtype=np.int16)
    floats = [row.astype(np.float32) / 32768 for row in integers]
    backend.on_reset = block = BlockingCall()  # so that both are in one step
    streams = [open_(scheduler, manifest.chunk(80)) for _ in kinds]
    assert block.entered.wait(TIMEOUT)
    for stream, kind, *audio in zip(streams, kinds, integers, floats, strict=True):
        scheduler.accept(stream, audio[kind == "float32"])
        scheduler.finish(stream)
    block.released.set()
    for stream, audio in zip(streams, floats, strict=True):
        scheduler.wait(stream)
        assert emitted(stream) == fake.expected(audio, manifest.decoder.vocabulary)
    assert (80, [0, 1]) in backend.batches


def test_items_of_a_failed_stream_are_rejected(serve, manifest):
    scheduler, _ = serve()
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.cancel(stream)
    with pytest.raises(StreamError, match="the stream was closed"):
        scheduler.enqueue(stream, [])


def test_no_chunk_size_starves_another(serve, manifest):
    scheduler, backend = serve(capacity=3)
    short, other, long = (open_(scheduler, manifest.chunk(ms)) for ms in (80, 80, 560))
    backend.on_submit = block = BlockingCall()
    scheduler.accept(short, noise(0, 1280 * 20))
    assert block.entered.wait(TIMEOUT)
    scheduler.accept(long, noise(1, 9000))
    scheduler.accept(other, noise(2, 1280 * 20))
    block.released.set()
    for stream in (short, other, long):
        scheduler.wait(stream)
    # `short` was ready again before `long`, so one more step of 80 ms precedes that of `long`.
    assert [ms for ms, _ in backend.batches[:4]] == [80, 80, 560, 80]


def test_overlap_submits_the_next_step_before_awaiting_the_last(manifest, fake):
    for overlap, in_flight in ((False, 1), (True, 2)):
        backend = fake.FakeBackend(manifest)
        scheduler = Scheduler(manifest, backend, overlap)
        transcribe(scheduler, manifest, noise(0, 50_000), size=50_000)
        scheduler.close()
        assert backend.max_in_flight == in_flight
        backend = fake.FakeBackend(manifest)
        backend.asynchronous = overlap
        scheduler = Scheduler(manifest, backend)  # by default, if the backend is asynchronous
        transcribe(scheduler, manifest, noise(0, 50_000), size=50_000)
        scheduler.close()
        assert backend.max_in_flight == in_flight


def test_the_lowest_free_slot_is_used(serve, manifest):
    scheduler, _ = serve(capacity=4)
    streams = [open_(scheduler, manifest.chunk(80)) for _ in range(3)]
    for stream in (streams[2], streams[0]):
        scheduler.cancel(stream)
    assert [open_(scheduler, manifest.chunk(80)).slot for _ in range(3)] == [0, 2, 3]


def test_without_a_free_slot_open_raises_until_one_is_released(serve, manifest, fake):
    scheduler, _ = serve(capacity=1)
    stream = open_(scheduler, manifest.chunk(80))
    with pytest.raises(CapacityError, match=r"all 1 slots are taken; .* nemostream.load\(capacity=...\)"):
        open_(scheduler, manifest.chunk(80))
    scheduler.cancel(stream)
    audio = noise(3, 9000)
    assert emitted(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)


@pytest.mark.parametrize("samples", [0, 159, 160, 20_000])
def test_a_finished_stream_releases_its_slot(serve, manifest, samples):
    scheduler, _ = serve(capacity=1)
    for _ in range(3):
        stream = transcribe(scheduler, manifest, noise(0, samples))
        assert stream.slot is None
        scheduler.cancel(stream)
        scheduler.wait(stream)  # cancelling a finished stream has no effect


def test_a_cancelled_stream_keeps_its_slot_until_its_step_is_done(serve, manifest, fake):
    scheduler, backend = serve(capacity=1)
    backend.on_result = block = BlockingCall()
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 199))
    assert block.entered.wait(TIMEOUT)
    scheduler.cancel(stream)
    with pytest.raises(CapacityError):
        open_(scheduler, manifest.chunk(80))
    more = noise(0, 9)
    for call in (
        lambda: scheduler.accept(stream, more),
        lambda: scheduler.skip_silence(stream, 9),
        lambda: scheduler.end_utterance(stream),
        lambda: scheduler.finish(stream),
        lambda: scheduler.settled(stream, 99),
        lambda: scheduler.wait(stream),
    ):
        with pytest.raises(StreamError, match="the stream was closed; open a new one"):
            call()
    reset = threading.Event()
    backend.on_reset = lambda slots: reset.set()
    block.released.set()
    audio, again = noise(1, 5000), None
    for _ in range(5000):  # the scheduler's thread releases the slot when the step is done
        try:
            again = transcribe(scheduler, manifest, audio)
            break
        except CapacityError:
            threading.Event().wait(0.001)
    assert again and reset.is_set() and emitted(again) == fake.expected(audio, manifest.decoder.vocabulary)
    assert emitted(stream) == ([], [])


def test_a_failed_row_fails_only_its_stream(serve, manifest, fake):
    scheduler, backend = serve(capacity=3)
    backend.fails = lambda slot, position: slot == 1 and position == 3
    streams = [open_(scheduler, manifest.chunk(80)) for _ in range(3)]
    audio = noise(5, 1280 * 9)
    for stream in streams:
        scheduler.accept(stream, audio)
    with pytest.raises(StreamError, match="not finite; open a new one"):
        scheduler.wait(streams[1])
    with pytest.raises(StreamError, match="not finite"):
        scheduler.accept(streams[1], audio)
    whole = fake.expected(audio, manifest.decoder.vocabulary)
    assert emitted(streams[1])[1] == [frame for frame in whole[1] if frame < 3]
    for stream in (streams[0], streams[2]):
        scheduler.finish(stream)
        scheduler.wait(stream)
        assert emitted(stream) == whole
    backend.fails = lambda slot, position: False
    assert streams[1].slot is None  # released, because the other streams were in its last step too
    new = [transcribe(scheduler, manifest, audio) for _ in range(3)]
    assert all(emitted(stream) == whole for stream in new)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (BackendError("the device fell off the bus."), BackendError, "fell off the bus"),
        (OptionError("no such chunk."), OptionError, "no such chunk"),
        (ZeroDivisionError("by zero"), BackendError, "the model failed: ZeroDivisionError: by zero"),
        (MemoryError(), BackendError, "the model failed: MemoryError"),
    ],
)
@pytest.mark.parametrize("where", ["on_submit", "on_result"])
def test_a_step_that_raises_fails_only_its_streams(serve, manifest, fake, raised, expected, message, where):
    scheduler, backend = serve(capacity=4)

    def fail(batch):
        if batch.chunk.ms == 80:
            raise raised

    setattr(backend, where, fail)
    failures: list[Exception] = []
    scheduler.on_failure = failures.append
    failing = [open_(scheduler, manifest.chunk(80)) for _ in range(2)]
    other = open_(scheduler, manifest.chunk(560))
    audio = noise(6, 30_000)
    scheduler.accept(other, audio)
    for stream in failing:
        scheduler.accept(stream, noise(0, 5000))
    for stream in failing:
        for _ in range(2):
            with pytest.raises(expected, match=message):
                scheduler.wait(stream)
    scheduler.finish(other)
    scheduler.wait(other)
    assert emitted(other) == fake.expected(audio, manifest.decoder.vocabulary)
    assert failures == [raised] * sum(ms == 80 for ms, _ in backend.batches)  # once per step, not per stream
    setattr(backend, where, fake.do_nothing)
    assert emitted(transcribe(scheduler, manifest, audio, 80)) == emitted(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.zeros(0, np.int64)}, r"returned \(0, 1\) rows of counts, failed for a batch of 1"),
        ({"failed": np.zeros(2, bool)}, r"returned \(1, 2\) rows of counts, failed for a batch of 1"),
        ({"all_tokens": np.zeros(0, np.int32)}, r"returned \(0, 3, 3, 3\) tokens, .*; its counts add to 3"),
        ({"all_frames": np.zeros(4, np.int64)}, r"returned \(3, 4, 3, 3\) tokens, .*; its counts add to 3"),
        ({"all_scores": np.zeros(0, np.float32)}, r"returned \(3, 3, 0, 3\) tokens, .*; its counts add to 3"),
        ({"all_sum_p_alpha": np.zeros(2, np.float32)}, r"returned \(3, 3, 3, 2\) tokens, .*; its counts add to 3"),
    ],
)
def test_results_of_a_wrong_size_are_rejected(serve, manifest, change, message):
    scheduler, backend = serve()
    submit = backend.submit

    def wrong_submit(batch):
        step = submit(batch)
        step.emissions = dataclasses.replace(step.emissions, **change)
        return step

    backend.submit = wrong_submit
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 199))
    with pytest.raises(BackendError, match=message):
        scheduler.wait(stream)


def test_a_reset_that_raises_fails_its_stream(serve, manifest, fake):
    scheduler, backend = serve(capacity=1)

    def fail(slots):
        raise RuntimeError("no memory")

    backend.on_reset = fail
    notified = threading.Event()
    stream = open_(scheduler, manifest.chunk(80), lambda streams: notified.set())
    assert notified.wait(TIMEOUT)
    with pytest.raises(BackendError, match="RuntimeError: no memory"):
        scheduler.wait(stream)
    backend.on_reset = lambda slots: None
    audio = noise(0, 5000)
    assert emitted(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)


def test_close_fails_waiting_streams_and_ends_the_thread(serve, manifest):
    scheduler, backend = serve()
    backend.on_result = block = BlockingCall()
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 5000))
    assert block.entered.wait(TIMEOUT)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(scheduler.wait, stream)
        closing = pool.submit(scheduler.close)
        with pytest.raises(StreamError, match="the model was closed; load it again"):
            waiting.result(TIMEOUT)  # while the step is still in flight
        assert not backend.closed
        block.released.set()
        closing.result(TIMEOUT)
    assert backend.closed and not any(backend.in_flight.values())
    scheduler.close()
    for call in (lambda: open_(scheduler, manifest.chunk(80)), lambda: scheduler.accept(stream, noise(0, 1))):
        with pytest.raises(StreamError, match="the model was closed"):
            call()


def test_a_function_opens_the_backend_on_the_schedulers_thread(manifest, fake):
    opened = []

    def open_backend():
        opened.append(threading.current_thread())
        return fake.FakeBackend(manifest, capacity=2)

    scheduler = Scheduler(manifest, open_backend)
    audio = noise(0, 5000)
    assert emitted(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)
    assert len([open_(scheduler, manifest.chunk(80)) for _ in range(2)]) == 2
    assert opened == [scheduler.call(lambda backend: threading.current_thread())]
    scheduler.close()


@pytest.mark.parametrize("error", [BackendError, MemoryError, KeyboardInterrupt])
def test_an_error_while_opening_is_raised_and_ends_the_thread(manifest, error):
    before = set(threading.enumerate())
    memory = BlockingCall()  # any object
    reference, raised = weakref.ref(memory), []

    def open_backend(memory):
        try:
            raise error("no GPU.")
        finally:
            raised.append(id(sys.exc_info()[1]))

    gc.disable()  # what was opened is released without it
    try:
        with pytest.raises(error, match="no GPU") as caught:
            Scheduler(manifest, functools.partial(open_backend, memory))
        assert [id(caught.value)] == raised
        for thread in set(threading.enumerate()) - before:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        del caught, memory
        assert reference() is None, "what was opened before the error is not released"
    finally:
        gc.enable()


def test_ctrl_c_while_opening_closes_the_backend(manifest, fake, monkeypatch):
    backend, block = fake.FakeBackend(manifest), BlockingCall()

    def open_backend():
        block()
        return backend

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            if threading.current_thread() is threading.main_thread() and block.entered.wait(TIMEOUT):
                block.released.set()
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(scheduler_module, "threading", types.SimpleNamespace(**vars(threading)), raising=True)
    scheduler_module.threading.Event = Interrupted
    with pytest.raises(KeyboardInterrupt):
        Scheduler(manifest, open_backend)
    assert backend.closed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_scheduler_fails_all_streams(serve, manifest, monkeypatch):
    scheduler, _ = serve()
    streams = [open_(scheduler, manifest.chunk(80)) for _ in range(2)]
    monkeypatch.setattr(scheduler, "_next_batch", lambda: 1 / 0)
    scheduler.accept(streams[0], noise(0, 199))
    for stream in streams:
        with pytest.raises(BackendError, match="the scheduler failed: ZeroDivisionError"):
            until(functools.partial(scheduler.wait, stream))  # a stream without work is settled until the error occurs
    with pytest.raises(BackendError, match="the scheduler failed"):
        open_(scheduler, manifest.chunk(80))


def test_listeners_are_called_after_every_step_and_one_that_raises_cancels_its_stream(serve, manifest):
    scheduler, _ = serve(capacity=2)
    threads, done = [], threading.Event()

    def listen(streams):
        assert streams == [stream]
        threads.append(threading.current_thread().name)
        if len(threads) == 3:
            done.set()

    stream = open_(scheduler, manifest.chunk(80), listen)
    scheduler.accept(stream, noise(0, 199 + 2 * 1280))
    assert done.wait(TIMEOUT)
    assert threads == ["nemostream-scheduler"] * 3
    chunk = manifest.chunk(80)
    assert [(output.item.chunk, output.count) for output in scheduler.collect(stream)] == [
        (chunk, 3),
        (chunk, 6),
        (chunk, 9),
    ]
    assert scheduler.collect(stream) == []

    def raise_(streams):
        raise RuntimeError("event loop is closed")

    cancelled = open_(scheduler, manifest.chunk(80), raise_)
    scheduler.accept(cancelled, noise(0, 199))
    with pytest.raises(NemostreamError, match="the stream was closed"):
        until(lambda: scheduler.wait(cancelled))
    scheduler.wait(stream)
    assert cancelled.slot is None


def test_waiting_for_a_backlog_returns_while_work_remains(serve, manifest):
    scheduler, backend = serve()
    stream = open_(scheduler, manifest.chunk(80))
    backend.on_result = block = BlockingCall()
    scheduler.accept(stream, noise(0, 199 + 1280))
    scheduler.wait(stream, backlog=2)
    assert not scheduler.settled(stream) and scheduler.settled(stream, 2)
    block.released.set()
    scheduler.wait(stream)
    assert scheduler.settled(stream)


def test_calls_run_on_the_schedulers_thread_and_pass_on_errors(serve, manifest, fake):
    scheduler, backend = serve()
    assert scheduler.call(lambda used: (used, threading.current_thread().name)) == (backend, "nemostream-scheduler")
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda backend: 1 // 0)
    audio = noise(0, 20_000)
    stream = open_(scheduler, manifest.chunk(560))
    scheduler.accept(stream, audio)
    scheduler.wait(stream)
    saved = scheduler.call(lambda backend: backend.save(stream.slot))
    assert saved["position"] == 14  # after the audio accepted before
    assert emitted(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)


def test_calls_raise_after_close(serve, manifest):
    scheduler, backend = serve()
    backend.on_submit = block = BlockingCall()
    scheduler.accept(open_(scheduler, manifest.chunk(80)), noise(0, 199))
    assert block.entered.wait(TIMEOUT)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(scheduler.call, lambda backend: None)
        until(lambda: scheduler._calls)
        closing = pool.submit(scheduler.close)
        with pytest.raises(StreamError, match="the model was closed"):
            waiting.result(TIMEOUT)
        block.released.set()
        closing.result(TIMEOUT)
    with pytest.raises(StreamError, match="the model was closed"):
        scheduler.call(lambda backend: None)


def test_open_with_block_waits_for_a_slot(serve, manifest, fake):
    scheduler, _ = serve(capacity=1)
    stream, audio = open_(scheduler, manifest.chunk(80)), noise(1, 5000)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(scheduler.open, Chunker(manifest, manifest.chunk(80)), None, True) for _ in range(3)]
        for _ in range(3):
            scheduler.cancel(stream)
            until(lambda: any(job.done() for job in waiting))
            (job,) = [job for job in waiting if job.done()][:1]
            waiting.remove(job)
            stream = job.result()
        scheduler.accept(stream, audio)
        scheduler.finish(stream)
        scheduler.wait(stream)
        assert emitted(stream) == fake.expected(audio, manifest.decoder.vocabulary)
        open_stream = open_(scheduler, manifest.chunk(80))
        waiting = pool.submit(scheduler.open, Chunker(manifest, manifest.chunk(80)), None, True)
        scheduler.close()
        with pytest.raises(StreamError, match="the model was closed"):
            waiting.result(TIMEOUT)
        assert open_stream.error


def test_a_saved_state_is_loaded_after_the_reset_of_the_previous_stream(serve, manifest):
    """The slot is reused while the backend still resets it for a stream that was cancelled."""
    scheduler, backend = serve(capacity=1)
    backend.on_reset = block = BlockingCall()
    first = open_(scheduler, manifest.chunk(80))
    assert block.entered.wait(TIMEOUT)
    scheduler.cancel(first)
    saved = {"position": np.array(7), "checksum": np.array(5), "phrases": NO_PHRASES}
    open_(scheduler, manifest.chunk(80), saved_slot=saved)
    block.released.set()
    backend.on_reset = lambda slots: None
    scheduler.call(lambda backend: None)  # runs after the second reset
    found = scheduler.call(lambda backend: backend.save(0))
    assert (int(found["position"]), int(found["checksum"])) == (7, 5)


def test_a_saved_state_that_does_not_fit_fails_its_stream(serve, manifest, fake):
    scheduler, _ = serve(capacity=2)
    stream = open_(scheduler, manifest.chunk(80), saved_slot={"position": np.zeros(3)})
    with pytest.raises(OptionError, match="the saved state is from another model"):
        scheduler.accept(stream, noise(0, 199))
        until(lambda: scheduler.wait(stream))
    audio = noise(1, 5000)
    assert emitted(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)
    assert free_slots(scheduler, manifest) == 2


# -- waiting callers ---------------------------------------------------------------------------------------------------


def test_a_caller_that_waits_for_a_slot_waits_again_if_another_takes_it(serve, manifest):
    scheduler, _ = serve(capacity=1)
    stream, pool = open_(scheduler, manifest.chunk(80)), ThreadPoolExecutor(1)
    waiting = pool.submit(scheduler.open, Chunker(manifest, manifest.chunk(80)), None, True)
    until(lambda: scheduler._slot_released._waiters)
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(10)  # the caller is notified, but this thread is faster
        scheduler.cancel(stream)
        with contextlib.suppress(CapacityError):  # unless something else interrupts it
            stream = open_(scheduler, manifest.chunk(80))
    finally:
        sys.setswitchinterval(interval)
    scheduler.call(lambda backend: None)
    scheduler.cancel(stream)
    assert waiting.result(TIMEOUT).slot == 0


def waiting_threads(scheduler, stream, count: int):
    """Start threads that wait for a stream; return their results once all of them wait."""
    pool = ThreadPoolExecutor(count)
    jobs = [pool.submit(scheduler.wait, stream) for _ in range(count)]
    until(lambda: len(stream.progress._waiters) >= count)
    pool.shutdown(wait=False)
    return jobs


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        ("complete", None),
        ("failed", "the model failed: RuntimeError: gone"),
        ("cancelled", "the stream was closed; open a new one for more audio."),
        ("closed", "the model was closed; load it again."),
    ],
)
def test_every_waiting_thread_and_the_listener_are_notified(serve, manifest, outcome, error):
    scheduler, backend = serve()
    block, calls, called = BlockingCall(), [], threading.Event()

    def result(batch):
        block()
        if outcome == "failed":
            raise RuntimeError("gone")

    def listen(streams):
        assert streams == [stream]
        calls.append(stream.error and str(stream.error))
        called.set()

    backend.on_result = result
    stream = open_(scheduler, manifest.chunk(80), listen)
    scheduler.accept(stream, noise(0, 199))
    assert block.entered.wait(TIMEOUT)
    jobs = waiting_threads(scheduler, stream, 3)
    assert calls == []
    closing = threading.Thread(target=scheduler.close)
    if outcome == "cancelled":
        scheduler.cancel(stream)
        assert calls == [error]
        scheduler.cancel(stream)  # has no effect
        closing.start()
        with pytest.raises(StreamError, match="the model was closed"):
            until(lambda: scheduler.cancel(open_(scheduler, manifest.chunk(80))))
    elif outcome == "closed":
        closing.start()
        assert called.wait(TIMEOUT)  # while the step is in flight
    else:
        block.released.set()
        assert called.wait(TIMEOUT)
    for job in jobs:
        if error is None:
            job.result(TIMEOUT)
            continue
        with pytest.raises(NemostreamError) as caught:
            job.result(TIMEOUT)
        assert str(caught.value) == error
    assert set(calls) == {error}  # the first error
    block.released.set()
    if outcome in ("cancelled", "closed"):
        closing.join(TIMEOUT)


def test_callers_that_wait_for_a_slot_are_notified_of_the_close_during_a_step(serve, manifest):
    scheduler, backend = serve(capacity=1)
    backend.on_result = block = BlockingCall()
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 199))
    assert block.entered.wait(TIMEOUT)
    pool = ThreadPoolExecutor(3)
    jobs = [pool.submit(scheduler.open, Chunker(manifest, manifest.chunk(80)), None, True) for _ in range(2)]
    until(lambda: len(scheduler._slot_released._waiters) >= 2)
    pool.submit(scheduler.close)
    try:
        for job in jobs:  # the slot is still in use
            with pytest.raises(StreamError, match="the model was closed"):
                job.result(TIMEOUT)
    finally:
        block.released.set()


def test_a_listener_that_raises_is_called_once(serve, manifest):
    scheduler, _ = serve()
    calls = []

    def listen(streams):
        calls.append(stream.error)
        raise RuntimeError("event loop is closed")

    stream = open_(scheduler, manifest.chunk(80), listen)
    scheduler.accept(stream, noise(0, 199 + 3 * 1280))
    with pytest.raises(StreamError, match="the stream was closed"):
        until(lambda: scheduler.wait(stream))
    scheduler.close()
    assert calls == [None]


# -- failures ----------------------------------------------------------------------------------------------------------


def free_slots(scheduler, manifest) -> int:
    """Return the number of free slots, by taking them."""
    for count in range(100):
        try:
            open_(scheduler, manifest.chunk(80))
        except CapacityError:
            return count
    raise AssertionError


@pytest.mark.parametrize("where", ["on_submit", "on_result"])
def test_a_failed_step_releases_its_slots_and_notifies_its_streams(serve, manifest, where):
    scheduler, backend = serve(capacity=3)
    raised = ZeroDivisionError("by zero")

    def fail(batch):
        raise raised

    setattr(backend, where, fail)
    order = []
    scheduler.on_failure = order.append
    done = threading.Event()

    def listen(streams_of_step):
        order.append(streams_of_step)
        done.set()

    streams = [open_(scheduler, manifest.chunk(80), listen) for _ in range(2)]
    backend.on_reset = block = BlockingCall()  # so that both are in one step
    other = open_(scheduler, manifest.chunk(80))
    assert block.entered.wait(TIMEOUT)
    for stream in streams:
        scheduler.accept(stream, noise(0, 199))
    block.released.set()
    assert done.wait(TIMEOUT)
    assert order == [raised, streams]  # the listener that both have is called once
    errors = []
    for _ in range(2):
        with pytest.raises(BackendError, match="by zero") as caught:
            scheduler.wait(streams[0])
        errors.append(caught.value)
    assert errors[0] is not errors[1] and all(error.__cause__ is raised for error in errors)
    scheduler.wait(other)
    assert free_slots(scheduler, manifest) == 2


def test_a_reset_that_raises_does_not_fail_the_next_stream_of_the_slot(serve, manifest, fake):
    scheduler, backend = serve(capacity=1)
    block = BlockingCall()

    def fail(slots):
        backend.on_reset = lambda slots: None
        block()
        raise RuntimeError("no memory")

    backend.on_reset = fail
    first = open_(scheduler, manifest.chunk(80))
    assert block.entered.wait(TIMEOUT)
    scheduler.cancel(first)
    second, audio = open_(scheduler, manifest.chunk(80)), noise(1, 5000)
    block.released.set()
    scheduler.accept(second, audio)
    scheduler.finish(second)
    scheduler.wait(second)
    assert emitted(second) == fake.expected(audio, manifest.decoder.vocabulary)


def test_a_decoder_reset_that_raises_fails_its_streams(serve, manifest, fake):
    scheduler, backend = serve(capacity=2)

    def reset_decoder(slots):
        raise RuntimeError("gone")

    class Rule:
        """Resets the decoder after every step."""

        resets_decoder = reset_due = True
        next_end = 0

        def step(self, tokens, positions, end_sample):
            return []

    backend.reset_decoder = reset_decoder
    failures = []
    scheduler.on_failure = failures.append
    other = open_(scheduler, manifest.chunk(80))
    stream = open_(scheduler, manifest.chunk(80), endpointer=Rule())
    scheduler.accept(stream, noise(0, 9000))
    with pytest.raises(BackendError, match="gone"):
        until(lambda: scheduler.wait(stream))
    audio = noise(1, 9000)
    scheduler.accept(other, audio)
    scheduler.finish(other)
    scheduler.wait(other)
    assert emitted(other) == fake.expected(audio, manifest.decoder.vocabulary)
    scheduler.call(lambda backend: None)  # the failed stream's last step is complete
    assert len(failures) == 1 and free_slots(scheduler, manifest) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_first_reason_for_the_end_of_a_scheduler_is_reported(serve, manifest):
    scheduler, backend = serve()
    scheduler.on_step = lambda chunk, rows, seconds: 1 / 0  # it must not raise
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 199 + 1280))
    with pytest.raises(BackendError, match="the scheduler failed: ZeroDivisionError") as caught:
        until(lambda: scheduler.wait(stream))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    scheduler.close()
    assert backend.closed
    for call in (lambda: open_(scheduler, manifest.chunk(80)), lambda: scheduler.call(lambda backend: None)):
        with pytest.raises(BackendError, match="the scheduler failed"):
            call()


def test_a_step_callback_can_close_the_scheduler(serve, manifest):
    scheduler, backend = serve()
    scheduler.on_step = lambda chunk, rows, seconds: scheduler.close()
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 199 + 9 * 1280))
    with pytest.raises(StreamError, match="the model was closed"):
        until(lambda: scheduler.wait(stream))
    scheduler.close()
    assert backend.closed and not any(backend.in_flight.values())


def test_a_finished_stream_is_not_changed_by_the_close(serve, manifest):
    scheduler, _ = serve()
    calls = []
    stream = open_(scheduler, manifest.chunk(80), lambda streams: calls.append(stream.error))
    scheduler.accept(stream, noise(0, 5000))
    scheduler.finish(stream)
    scheduler.wait(stream)
    scheduler.close()
    steps = len(calls)
    scheduler.wait(stream)
    assert scheduler.settled(stream) and stream.error is None
    assert calls == [None] * steps and steps == len(scheduler.collect(stream))


# -- order -------------------------------------------------------------------------------------------------------------


def test_steps_are_reported_with_chunk_streams_and_duration(serve, manifest, monkeypatch, request):
    scheduler, backend = serve(capacity=3)
    now = [100.0]
    monkeypatch.setattr(scheduler_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def advance(seconds):
        now[0] += seconds

    backend.on_submit, backend.on_result = lambda batch: advance(0.25), lambda batch: advance(0.5)
    found, done = [], threading.Event()
    scheduler.on_step = lambda *step: (found.append(step), len(found) == 2 and done.set())
    backend.on_reset = block = BlockingCall()
    streams = [open_(scheduler, manifest.chunk(ms)) for ms in (80, 560, 80)]
    assert block.entered.wait(TIMEOUT)
    for stream in streams:
        scheduler.accept(stream, noise(0, 7879))
    for stream in streams:
        scheduler.set_chunk(stream, manifest.chunk(1120))
    scheduler.cancel(streams[0])
    block.released.set()
    assert done.wait(TIMEOUT)
    overlapped = 0.25 if request.node.callspec.params["serve"] else 0.0  # the second step is submitted during the first
    assert found[:1] == [(manifest.chunk(560), 1, 0.75 + overlapped)]
    assert found[1][:2] == (manifest.chunk(80), 1)


def test_traced_chunks_have_the_times_of_their_steps(serve, manifest, monkeypatch):
    scheduler, backend = serve(capacity=3)
    now = itertools.count(1.0)
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(scheduler_module, "time", clock)
    monkeypatch.setattr("nemostream.runtime.streaming.state.time", clock)
    traced, other = open_(scheduler, manifest.chunk(80)), open_(scheduler, manifest.chunk(80))
    trace, slot = scheduler.trace(traced), traced.slot
    for block in range(3):
        for stream in (traced, other):
            scheduler.accept(stream, noise(block, 2560))
        for stream in (traced, other):
            scheduler.wait(stream)
    scheduler.skip_silence(traced, 12_800)  # not a step
    scheduler.finish(traced)
    scheduler.wait(traced)
    ran = [output.item for output in scheduler.collect(traced) if output.item.kind == "run"]
    assert [end for end, _, _ in trace.chunks] == [item.end_sample for item in ran] and len(ran) >= 6
    steps = [step for _, _, step in trace.chunks]
    assert [step.streams for step in steps] == [len(slots) for _, slots in backend.batches if slot in slots]
    assert all(ready < step.started < step.ended for _, ready, step in trace.chunks)
    assert steps == sorted(steps) and len(set(steps)) == len(steps)
    assert scheduler.last_step == steps[-1] and other.trace is None


def test_the_times_of_steps_are_recorded_for_traces_only(serve, manifest):
    scheduler, _ = serve()
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 2560))
    scheduler.wait(stream)
    assert not scheduler.records_times and scheduler.last_step == (0.0, 0.0, 0)


def test_streams_with_a_chunk_that_is_not_in_a_step_are_counted(serve, manifest):
    scheduler, backend = serve(capacity=3, max_batch=1)
    blocks = [BlockingCall(), BlockingCall()]
    waiting = []
    scheduler.on_step = lambda chunk, rows, seconds: waiting.append(scheduler.waiting)
    streams = [open_(scheduler, manifest.chunk(80)) for _ in range(3)]
    assert scheduler.waiting == 0
    backend.on_submit = lambda batch: blocks[len(backend.batches) - 1]() if len(backend.batches) <= 2 else None
    for stream in streams:
        scheduler.accept(stream, noise(0, 1280 * 2))
    assert blocks[0].entered.wait(TIMEOUT)
    until(lambda: scheduler.waiting == 3)  # the next chunk of the stream in the step is one of them
    blocks[0].released.set()
    assert blocks[1].entered.wait(TIMEOUT)
    blocks[1].released.set()
    for stream in streams:
        scheduler.wait(stream)
    assert scheduler.waiting == 0 and waiting[-1] == 0 and max(waiting) <= 3


def test_waiting_rows_are_counted_by_stream(manifest) -> None:
    queue = RowQueue(4)
    rows = np.zeros(3, ROW)
    rows["slot"] = [1, 3, 1]
    queue.append(rows)
    assert queue.streams == 2
    queue.take(0, 1)
    assert queue.streams == 2
    queue.take(0, 2)
    assert queue.streams == 0


@pytest.mark.parametrize("end", ["skip_silence", "end_utterance", "finish"])
def test_audio_is_processed_at_once_when_its_recording_ends(serve, manifest, fake, end):
    scheduler, _ = serve()
    stream, audio = open_(scheduler, manifest.chunk(560)), noise(2, 5000)
    scheduler.accept(stream, audio)
    getattr(scheduler, end)(stream, *([20_000] if end == "skip_silence" else []))
    for _ in range(3):  # iterations of the scheduler
        scheduler.call(lambda backend: None)
    assert scheduler.settled(stream)
    assert emitted(stream) == fake.expected(audio, manifest.decoder.vocabulary)
    kinds = {"skip_silence": ["run", "skip"], "end_utterance": ["run", "end_of_utterance"], "finish": ["run"]}
    assert [output.item.kind for output in scheduler.collect(stream)] == kinds[end]


def test_audio_after_a_reset_does_not_continue_a_saved_state(serve, manifest, fake):
    """A stream is restored at the start of a recording: its slot is reset for the recording, not loaded after it."""
    scheduler, backend = serve(capacity=2)
    backend.on_reset = block = BlockingCall()
    open_(scheduler, manifest.chunk(80))
    assert block.entered.wait(TIMEOUT)
    chunker = Chunker(manifest, manifest.chunk(80))
    chunker.end_utterance()
    chunker.take()
    saved = {"position": np.array(7), "checksum": np.array(5), "phrases": NO_PHRASES}
    stream, audio = scheduler.open(chunker, saved_slot=saved), noise(1, 5000)
    scheduler.accept(stream, audio)
    scheduler.finish(stream)
    block.released.set()
    scheduler.wait(stream)
    assert emitted(stream) == fake.expected(audio, manifest.decoder.vocabulary)


class LockedItems(deque):
    """Items, or outputs, of a stream, which fail if they are changed without the scheduler's lock."""

    locked = staticmethod(lambda: True)

    def _checked(name):
        def method(self, *args):
            assert self.locked(), f"{name} is called without the lock"
            return getattr(super(), name)(*args)

        return method

    append, extend, clear = _checked("append"), _checked("extend"), _checked("clear")


class LockedQueue(LockedItems):
    """Items that are also taken with the lock only; outputs are collected without it."""

    popleft, __getitem__ = LockedItems._checked("popleft"), LockedItems._checked("__getitem__")
    __iadd__ = LockedItems._checked("__iadd__")


@pytest.mark.skipif(Queue is not deque, reason="the methods in C use no other class of queues")
def test_the_state_of_a_stream_is_used_with_the_lock_only(serve, manifest):
    scheduler, _ = serve()
    stream = open_(scheduler, manifest.chunk(80))
    stream.items, stream.outputs = LockedQueue(), LockedItems()
    stream.items.locked = stream.outputs.locked = scheduler._lock.locked
    scheduler.accept(stream, noise(0, 5000))
    scheduler.set_chunk(stream, manifest.chunk(160))
    scheduler.skip_silence(stream, 5000)
    scheduler.set_prompt(stream, 0)
    scheduler.end_utterance(stream)
    scheduler.wait(stream)
    assert scheduler.settled(stream)
    assert len(scheduler.collect(stream)) > 5
    scheduler.accept(stream, noise(0, 5000))
    scheduler.finish(stream)
    scheduler.wait(stream)
    assert scheduler.collect(stream) and stream.slot is None


# -- branches ----------------------------------------------------------------------------------------------------------


def branch(scheduler, stream):
    return scheduler.branch(stream, stream.chunker.copy())


def test_a_thread_that_waits_for_a_branch_without_items_is_woken(serve, manifest) -> None:
    """The branch settles when its stream's step is done, without a step of its own."""
    scheduler, backend = serve()
    call = BlockingCall()
    backend.on_submit = call
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 1280))
    assert call.entered.wait(TIMEOUT)
    one = scheduler.branch(stream, None)
    scheduler.enqueue(one, [], last=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(scheduler.wait, one)
        until(lambda: one.progress is not None)
        call.released.set()
        waiting.result(TIMEOUT)
    assert one.slot is None and one.copied == len(stream.hypothesis.tokens) == 3


def test_a_branch_waits_for_a_slot_and_its_stream_with_it(serve, manifest) -> None:
    scheduler, _ = serve(capacity=2)
    stream, other = open_(scheduler, manifest.chunk(80)), open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 2560))
    one = branch(scheduler, stream)
    scheduler.accept(one, noise(1, 2000))
    scheduler.finish(one)
    scheduler.accept(stream, noise(2, 3000))
    assert not scheduler.settled(stream) and not scheduler.settled(one) and one.slot is None
    scheduler.cancel(other)
    scheduler.wait(one)
    scheduler.wait(stream)
    expected = transcribe(scheduler, manifest, np.concatenate([noise(0, 2560), noise(1, 2000)]), 80)
    assert (one.hypothesis.tokens, one.slot) == (expected.hypothesis.tokens, None)


def test_a_branch_that_is_cancelled_does_not_block_its_stream(serve, manifest) -> None:
    scheduler, _ = serve(capacity=1)
    stream = open_(scheduler, manifest.chunk(80))
    one, two = branch(scheduler, stream), branch(scheduler, stream)
    scheduler.accept(stream, noise(0, 2560))
    assert not scheduler.settled(stream)
    scheduler.cancel(one)
    assert not scheduler.settled(stream)
    scheduler.cancel(two)
    scheduler.wait(stream)
    scheduler.cancel(stream)
    assert transcribe(scheduler, manifest, noise(1, 2000), 80).error is None  # the slot is free


def test_listeners_of_a_stream_that_waited_for_a_slot_and_of_its_branch_are_called(serve, manifest) -> None:
    """The change is caused by another stream, and the waiting one has no chunk to run after it."""
    scheduler, _ = serve(capacity=2)
    changed, others = [], []
    other, stream = open_(scheduler, manifest.chunk(80), others.append), open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 1280))
    scheduler.wait(stream)
    stream.listener = changed.extend
    one = scheduler.branch(stream, None)
    scheduler.enqueue(one, [], last=True)
    scheduler.enqueue(stream, [WorkItem("skip", manifest.chunk(80), 8000)], last=True)
    assert not changed
    scheduler.cancel(other)
    until(lambda: {stream, one} <= set(changed))
    assert scheduler.collect(stream)[-1].item.kind == "skip" and one.copied and stream.slot is one.slot is None


def test_branches_that_wait_for_a_slot_fail_at_the_close(serve, manifest) -> None:
    """None of them takes a slot that the close releases."""
    scheduler, _ = serve(capacity=2)
    open_(scheduler, manifest.chunk(80))
    stream = open_(scheduler, manifest.chunk(80))
    changed = []
    one, two = branch(scheduler, stream), branch(scheduler, stream)
    one.listener = two.listener = changed.extend
    scheduler.close()
    for each in (stream, one, two):
        with pytest.raises(StreamError, match="the model was closed"):
            scheduler.wait(each)
    assert set(changed) == {one, two}


class OneStep:
    """A feed whose rows, one per stream, are all run in one step."""

    def __init__(self, manifest, scheduler, streams) -> None:
        self.manifest, self.scheduler, self.streams = manifest, scheduler, streams

    def receive(self) -> None:
        streams, self.streams = self.streams, []
        if streams:
            rows = np.zeros(len(streams), ROW)
            rows["slot"] = [stream.slot for stream in streams]
            rows["size"] = self.manifest.chunks.index(self.manifest.chunk(80))
            rows["end_sample"] = rows["length"] = 1280
            assert self.scheduler.enqueue_rows(rows).all()

    def audio(self, rows, samples):
        return np.ones((len(rows), samples), np.float32)

    def before_wait(self) -> None: ...

    def deliver(self, rows, streams) -> None: ...

    def stopped(self) -> None: ...


@pytest.mark.parametrize("fails", [False, True])
def test_a_branch_does_not_begin_between_two_rows_of_a_step(serve, manifest, fails) -> None:
    """The result of the first row releases a slot, for which a branch waits of the stream of the second row."""
    scheduler, backend = serve(capacity=2)
    first, second = scheduler.open(None), scheduler.open(None)
    branches = []

    def on_submit(batch) -> None:
        assert batch.slots.tolist() == [0, 1]
        scheduler.enqueue(first, [], last=True)
        branches.append(scheduler.branch(second, None))
        scheduler.enqueue(branches[0], [], last=True)

    def on_result(batch) -> None:
        if fails:
            raise ValueError("broken")

    backend.on_submit, backend.on_result = on_submit, on_result
    scheduler.set_feed(OneStep(manifest, scheduler, [first, second]))
    until(lambda: branches and first.slot is None)
    if fails:
        with pytest.raises(BackendError, match="broken"):
            scheduler.wait(branches[0])
    else:
        scheduler.wait(branches[0])
        assert branches[0].hypothesis == second.hypothesis and branches[0].copied == 3


def test_branches_fail_with_their_stream_before_they_begin(serve, manifest) -> None:
    scheduler, _ = serve(capacity=2)
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 2560))
    scheduler.wait(stream)
    begun, waiting = branch(scheduler, stream), branch(scheduler, stream)
    scheduler.cancel(stream)
    with pytest.raises(StreamError, match="closed"):
        scheduler.wait(waiting)
    scheduler.accept(begun, noise(1, 2000))
    scheduler.finish(begun)
    scheduler.wait(begun)
    with pytest.raises(StreamError, match="closed"):
        scheduler.branch(stream, None)
    assert sorted(scheduler._free) == [0, 1]


def test_a_slot_is_used_again_while_a_copy_from_it_is_due(serve, manifest) -> None:
    """The copy comes before the reset for the next stream, and a reset for a stream before comes not after the copy."""
    scheduler, backend = serve(capacity=3)
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 2560))
    scheduler.wait(stream)
    call = BlockingCall()
    backend.on_submit = call
    other = open_(scheduler, manifest.chunk(80))
    scheduler.accept(other, noise(9, 1280))
    assert call.entered.wait(TIMEOUT)
    scheduler.cancel(open_(scheduler, manifest.chunk(80)))  # slot 2: its reset is due
    one = branch(scheduler, stream)  # takes slot 2
    scheduler.cancel(stream)  # slot 0 is free
    new = open_(scheduler, manifest.chunk(80))
    assert (one.slot, new.slot) == (2, 0)
    for next_stream, seed in ((one, 1), (new, 2)):
        scheduler.accept(next_stream, noise(seed, 2000))
        scheduler.finish(next_stream)
    call.released.set()
    scheduler.wait(one)
    scheduler.wait(new)
    audio = np.concatenate([noise(0, 2560), noise(1, 2000)])
    assert one.hypothesis.tokens == transcribe(scheduler, manifest, audio, 80).hypothesis.tokens
    assert new.hypothesis.tokens == transcribe(scheduler, manifest, noise(2, 2000), 80).hypothesis.tokens


def test_slots_are_reserved_for_branches(serve, manifest) -> None:
    """One for up to 16 streams that may branch; it is free again when they have ended."""
    scheduler, _ = serve(capacity=20)
    streams = [open_(scheduler, manifest.chunk(80), may_branch=True) for _ in range(16)]
    streams += [open_(scheduler, manifest.chunk(80)) for _ in range(2)]
    with pytest.raises(CapacityError, match="18 of 20 slots are taken and the others are reserved for finals"):
        open_(scheduler, manifest.chunk(80), may_branch=True)  # would need a second reserved slot
    streams.append(open_(scheduler, manifest.chunk(80)))
    with pytest.raises(CapacityError, match="19 of 20"):
        open_(scheduler, manifest.chunk(80))
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(scheduler.open, None, block=True)
        scheduler.cancel(streams.pop(16))
        scheduler.cancel(opened.result(TIMEOUT))
    for stream in streams[:16]:
        scheduler.cancel(stream)
    assert [open_(scheduler, manifest.chunk(80)).slot is not None for _ in range(18)]
    with pytest.raises(CapacityError, match="all 20 slots are taken"):
        open_(scheduler, manifest.chunk(80))
