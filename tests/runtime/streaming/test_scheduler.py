"""The scheduler with a fake backend whose tokens encode the audio it received, with and without overlap."""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import BackendError, CapacityError, NemostreamError, OptionError, StreamError
from nemostream.runtime.decoding.boosting import NO_PHRASES
from nemostream.runtime.streaming import scheduler as scheduler_module
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.scheduler import Scheduler

TIMEOUT = 20  # seconds after which a hanging test fails


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
        lambda: scheduler.finish(stream),
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


def test_a_wrong_number_of_result_rows_is_rejected(serve, manifest, fake):
    scheduler, backend = serve()
    submit = backend.submit

    def wrong_submit(batch):
        step = submit(batch)
        step.emissions = dataclasses.replace(step.emissions, tokens=(), frames=(), scores=())
        return step

    backend.submit = wrong_submit
    stream = open_(scheduler, manifest.chunk(80))
    scheduler.accept(stream, noise(0, 199))
    with pytest.raises(BackendError, match=r"returned \(0, 0, 0, 1, 1\) rows .* for a batch of 1"):
        scheduler.wait(stream)


def test_a_reset_that_raises_fails_its_stream(serve, manifest, fake):
    scheduler, backend = serve(capacity=1)

    def fail(slots):
        raise RuntimeError("no memory")

    backend.on_reset = fail
    notified = threading.Event()
    stream = open_(scheduler, manifest.chunk(80), notified.set)
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


@pytest.mark.parametrize("raised", [BackendError("no GPU."), MemoryError("none left"), KeyboardInterrupt()])
def test_an_error_while_opening_is_raised_and_ends_the_thread(manifest, raised):
    before = set(threading.enumerate())
    memory = BlockingCall()  # any object
    reference = weakref.ref(memory)

    def open_backend(memory):
        raise raised

    with pytest.raises(type(raised)) as caught:
        Scheduler(manifest, functools.partial(open_backend, memory))
    assert caught.value is raised
    for thread in set(threading.enumerate()) - before:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    raised.__traceback__ = None
    del caught, memory
    assert reference() is None, "what was opened before the error is not released"


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
            while True:  # a stream without work is settled until the error occurs
                scheduler.wait(stream)
    with pytest.raises(BackendError, match="the scheduler failed"):
        open_(scheduler, manifest.chunk(80))


def test_listeners_are_called_after_every_step_and_one_that_raises_cancels_its_stream(serve, manifest):
    scheduler, _ = serve(capacity=2)
    threads, done = [], threading.Event()

    def listen():
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

    def raise_():
        raise RuntimeError("event loop is closed")

    cancelled = open_(scheduler, manifest.chunk(80), raise_)
    scheduler.accept(cancelled, noise(0, 199))
    with pytest.raises(NemostreamError, match="the stream was closed"):
        while True:
            scheduler.wait(cancelled)
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
        while not scheduler._calls:
            threading.Event().wait(0.001)
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
            while not any(job.done() for job in waiting):
                threading.Event().wait(0.001)
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
        while True:
            scheduler.wait(stream)
    audio = noise(1, 5000)
    assert emitted(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)
