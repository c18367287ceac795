"""The scheduler against a backend that tells exactly what it heard; every test with overlap and with its plain twin."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import BackendError, CapacityError, NemostreamError, OptionError, StreamError
from nemostream.runtime.decoding.boosting import NO_PHRASES
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.scheduler import Scheduler

WAIT = 20  # seconds after which a test that hangs fails; nothing waits that long when all is well


def noise(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


def said(state) -> tuple[list[int], list[int]]:
    return state.chunker.hypothesis.tokens, [
        sample_pos // 1280 for sample_pos in state.chunker.hypothesis.sample_positions
    ]


def open_(scheduler, chunk, listener=None, **about):
    return scheduler.open(Chunker(scheduler._manifest, chunk), listener, **about)


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
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


class ChunkFilter:
    """Holds the scheduler's thread inside a backend call, so that a test decides what happens meanwhile."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT)


def transcribe(scheduler, manifest, audio, ms=560, size=4000):
    state = open_(scheduler, manifest.chunk(ms))
    for at in range(0, len(audio), size):
        scheduler.accept(state, audio[at : at + size])
        scheduler.wait(state)
    scheduler.finish(state)
    scheduler.wait(state)
    return state


ACTIONS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["push", "push", "end", "leave", "wait"])), max_size=60)


@given(actions=ACTIONS, chunks=st.lists(st.sampled_from([80, 160, 560]), min_size=4, max_size=4), overlap=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_interleaving_of_streams_reaches_each_slot_whole_and_in_order(manifest, fake, actions, chunks, overlap):
    backend = fake.FakeBackend(manifest, capacity=3, max_batch=2)
    scheduler = Scheduler(manifest, backend, overlap)
    states, heard, done = {}, {}, []
    try:
        for number, (who, action) in enumerate(actions):
            if who not in states:
                try:
                    states[who] = open_(scheduler, manifest.chunk(chunks[who]))
                    heard[who] = []
                except CapacityError:
                    continue
            state = states[who]
            if action == "push":
                heard[who].append(noise(number, 37 * number * who + 700))
                scheduler.accept(state, heard[who][-1])
            elif action == "wait":
                scheduler.wait(state)
            elif action == "leave":
                scheduler.cancel(state)
                del states[who], heard[who]
            else:
                scheduler.finish(state)
                done.append((state, np.concatenate([np.zeros(0, np.float32), *heard.pop(who)])))
                del states[who]
        for who in list(states):
            scheduler.finish(states[who])
            done.append((states[who], np.concatenate([np.zeros(0, np.float32), *heard[who]])))
        for state, audio in done:
            scheduler.wait(state)
            assert said(state) == fake.expected(audio, manifest.decoder.vocabulary)
    finally:
        scheduler.close()
    assert backend.closed


def test_many_threads_share_batches_and_nothing_else(serve, manifest, fake):
    scheduler, _ = serve(capacity=16, max_batch=8)
    lengths = [0, 100, 160, 199, 1279, 7879, 30_000, 50_001] * 2
    audios = [noise(i, n) for i, n in enumerate(lengths)]
    with ThreadPoolExecutor(16) as pool:
        jobs = [
            pool.submit(transcribe, scheduler, manifest, audio, (80, 160, 560, 1120)[i % 4], 1000 + 977 * i)
            for i, audio in enumerate(audios)
        ]
        for job, audio in zip(jobs, audios, strict=True):
            assert said(job.result(WAIT)) == fake.expected(audio, manifest.decoder.vocabulary)
    assert len([open_(scheduler, manifest.chunk(80)) for _ in range(16)]) == 16  # every slot came back


def test_streams_ready_together_run_together_sorted_by_slot_up_to_max_batch(serve, manifest):
    scheduler, backend = serve(capacity=6, max_batch=3)
    states = [open_(scheduler, manifest.chunk(80)) for _ in range(6)]
    backend.on_submit = gate = ChunkFilter()
    scheduler.accept(states[5], noise(0, 199))
    assert gate.entered.wait(WAIT)
    for i in (4, 2, 0, 3, 1):
        scheduler.accept(states[i], noise(0, 199))
    gate.opened.set()
    for state in states:
        scheduler.wait(state)
    assert backend.batches == [(80, [5]), (80, [0, 2, 4]), (80, [1, 3])]


def test_no_chunk_size_starves_another(serve, manifest):
    scheduler, backend = serve(capacity=3)
    short, other, long = (open_(scheduler, manifest.chunk(ms)) for ms in (80, 80, 560))
    backend.on_submit = gate = ChunkFilter()
    scheduler.accept(short, noise(0, 1280 * 20))
    assert gate.entered.wait(WAIT)
    scheduler.accept(long, noise(1, 9000))
    scheduler.accept(other, noise(2, 1280 * 20))
    gate.opened.set()
    for state in (short, other, long):
        scheduler.wait(state)
    # `short` had queued again before `long` came: one more step of 80 ms, then it is `long`'s turn.
    assert [ms for ms, _ in backend.batches[:4]] == [80, 80, 560, 80]


def test_overlap_submits_the_next_step_before_it_waits_for_the_last(manifest, fake):
    for overlap, most in ((False, 1), (True, 2)):
        backend = fake.FakeBackend(manifest)
        scheduler = Scheduler(manifest, backend, overlap)
        transcribe(scheduler, manifest, noise(0, 50_000), size=50_000)
        scheduler.close()
        assert backend.most_in_flight == most


def test_the_slots_used_are_the_lowest(serve, manifest):
    scheduler, _ = serve(capacity=4)
    states = [open_(scheduler, manifest.chunk(80)) for _ in range(3)]
    for state in (states[2], states[0]):
        scheduler.cancel(state)
    assert [open_(scheduler, manifest.chunk(80)).slot for _ in range(3)] == [0, 2, 3]


def test_full_is_an_error_that_tells_how_to_serve_more_and_passes(serve, manifest, fake):
    scheduler, _ = serve(capacity=1)
    state = open_(scheduler, manifest.chunk(80))
    with pytest.raises(CapacityError, match=r"all 1 slots are taken; .* nemostream.load\(capacity=...\)"):
        open_(scheduler, manifest.chunk(80))
    scheduler.cancel(state)
    audio = noise(3, 9000)
    assert said(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)


@pytest.mark.parametrize("samples", [0, 159, 160, 20_000])
def test_a_finished_stream_gives_its_slot_back_by_itself(serve, manifest, samples):
    scheduler, _ = serve(capacity=1)
    for _ in range(3):
        state = transcribe(scheduler, manifest, noise(0, samples))
        assert state.slot is None
        scheduler.cancel(state)
        scheduler.wait(state)  # leaving a stream that is done changes nothing


def test_leaving_in_mid_flight_keeps_the_slot_until_the_step_is_over(serve, manifest, fake):
    scheduler, backend = serve(capacity=1)
    backend.on_result = gate = ChunkFilter()
    state = open_(scheduler, manifest.chunk(80))
    scheduler.accept(state, noise(0, 199))
    assert gate.entered.wait(WAIT)
    scheduler.cancel(state)
    with pytest.raises(CapacityError):
        open_(scheduler, manifest.chunk(80))
    late = noise(0, 9)
    for call in (lambda: scheduler.accept(state, late), lambda: scheduler.finish(state), lambda: scheduler.wait(state)):
        with pytest.raises(StreamError, match="the stream was closed; open a new one"):
            call()
    freed = threading.Event()
    backend.on_reset = lambda slots: freed.set()
    gate.opened.set()
    audio, again = noise(1, 5000), None
    for _ in range(5000):  # the slot comes back when the scheduler's thread has seen the step end
        try:
            again = transcribe(scheduler, manifest, audio)
            break
        except CapacityError:
            threading.Event().wait(0.001)
    assert again and freed.is_set() and said(again) == fake.expected(audio, manifest.decoder.vocabulary)
    assert said(state) == ([], [])


def test_a_failed_row_ends_its_stream_alone(serve, manifest, fake):
    scheduler, backend = serve(capacity=3)
    backend.fails = lambda slot, position: slot == 1 and position == 3
    states = [open_(scheduler, manifest.chunk(80)) for _ in range(3)]
    audio = noise(5, 1280 * 9)
    for state in states:
        scheduler.accept(state, audio)
    with pytest.raises(StreamError, match="not finite; open a new one"):
        scheduler.wait(states[1])
    with pytest.raises(StreamError, match="not finite"):
        scheduler.accept(states[1], audio)
    whole = fake.expected(audio, manifest.decoder.vocabulary)
    assert said(states[1])[1] == [frame for frame in whole[1] if frame < 3]
    for state in (states[0], states[2]):
        scheduler.finish(state)
        scheduler.wait(state)
        assert said(state) == whole
    backend.fails = lambda slot, position: False
    assert states[1].slot is None  # wait for the neighbours was wait for its last step too
    new = [transcribe(scheduler, manifest, audio) for _ in range(3)]
    assert all(said(state) == whole for state in new)


@pytest.mark.parametrize(
    ("raised", "kind", "sentence"),
    [
        (BackendError("the device fell off the bus."), BackendError, "fell off the bus"),
        (OptionError("no such chunk."), OptionError, "no such chunk"),
        (ZeroDivisionError("by zero"), BackendError, "the model failed: ZeroDivisionError: by zero"),
        (MemoryError(), BackendError, "the model failed: MemoryError"),
    ],
)
@pytest.mark.parametrize("where", ["on_submit", "on_result"])
def test_a_step_that_raises_ends_its_streams_and_no_others(serve, manifest, fake, raised, kind, sentence, where):
    scheduler, backend = serve(capacity=4)

    def fail(batch):
        if batch.chunk.ms == 80:
            raise raised

    setattr(backend, where, fail)
    failures: list[Exception] = []
    scheduler.on_failure = failures.append
    hit = [open_(scheduler, manifest.chunk(80)) for _ in range(2)]
    spared = open_(scheduler, manifest.chunk(560))
    audio = noise(6, 30_000)
    scheduler.accept(spared, audio)
    for state in hit:
        scheduler.accept(state, noise(0, 5000))
    for state in hit:
        for _ in range(2):
            with pytest.raises(kind, match=sentence):
                scheduler.wait(state)
    scheduler.finish(spared)
    scheduler.wait(spared)
    assert said(spared) == fake.expected(audio, manifest.decoder.vocabulary)
    assert failures == [raised] * sum(ms == 80 for ms, _ in backend.batches)  # by step, not by stream
    setattr(backend, where, fake.nothing)
    assert said(transcribe(scheduler, manifest, audio, 80)) == said(spared)


def test_a_backend_that_answers_for_other_rows_is_not_believed(serve, manifest, fake):
    scheduler, backend = serve()
    submit = backend.submit

    def twisted(batch):
        step = submit(batch)
        step.emissions = dataclasses.replace(step.emissions, tokens=(), frames=(), scores=())
        return step

    backend.submit = twisted
    state = open_(scheduler, manifest.chunk(80))
    scheduler.accept(state, noise(0, 199))
    with pytest.raises(BackendError, match=r"answered \(0, 0, 0, 1, 1\) rows .* to a batch of 1"):
        scheduler.wait(state)


def test_a_reset_that_raises_ends_the_stream_it_was_for(serve, manifest, fake):
    scheduler, backend = serve(capacity=1)

    def fail(slots):
        raise RuntimeError("no memory")

    backend.on_reset = fail
    listened = threading.Event()
    state = open_(scheduler, manifest.chunk(80), listened.set)
    assert listened.wait(WAIT)
    with pytest.raises(BackendError, match="RuntimeError: no memory"):
        scheduler.wait(state)
    backend.on_reset = lambda slots: None
    audio = noise(0, 5000)
    assert said(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)


def test_close_fails_those_who_wait_and_ends_the_thread(serve, manifest):
    scheduler, backend = serve()
    backend.on_result = gate = ChunkFilter()
    state = open_(scheduler, manifest.chunk(80))
    scheduler.accept(state, noise(0, 5000))
    assert gate.entered.wait(WAIT)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(scheduler.wait, state)
        closing = pool.submit(scheduler.close)
        with pytest.raises(StreamError, match="the model was closed; load it again"):
            waiting.result(WAIT)  # while the step is still under way
        assert not backend.closed
        gate.opened.set()
        closing.result(WAIT)
    assert backend.closed and not any(backend.in_flight.values())
    scheduler.close()
    for call in (lambda: open_(scheduler, manifest.chunk(80)), lambda: scheduler.accept(state, noise(0, 1))):
        with pytest.raises(StreamError, match="the model was closed"):
            call()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_scheduler_itself_is_heard_by_all(serve, manifest, monkeypatch):
    scheduler, _ = serve()
    states = [open_(scheduler, manifest.chunk(80)) for _ in range(2)]
    monkeypatch.setattr(scheduler, "_pick", lambda: 1 / 0)
    scheduler.accept(states[0], noise(0, 199))
    for state in states:
        with pytest.raises(BackendError, match="the scheduler failed: ZeroDivisionError"):
            while True:  # a seat without work is settled until the fault is known
                scheduler.wait(state)
    with pytest.raises(BackendError, match="the scheduler failed"):
        open_(scheduler, manifest.chunk(80))


def test_listeners_hear_of_every_step_and_one_that_raises_loses_its_stream(serve, manifest):
    scheduler, _ = serve(capacity=2)
    heard, done = [], threading.Event()

    def listen():
        heard.append(threading.current_thread().name)
        if len(heard) == 3:
            done.set()

    state = open_(scheduler, manifest.chunk(80), listen)
    scheduler.accept(state, noise(0, 199 + 2 * 1280))
    assert done.wait(WAIT)
    assert heard == ["nemostream-scheduler"] * 3
    chunk = manifest.chunk(80)
    assert [(heard.item.chunk, heard.count) for heard in scheduler.collect(state)] == [
        (chunk, 3),
        (chunk, 6),
        (chunk, 9),
    ]
    assert scheduler.collect(state) == []

    def gone():
        raise RuntimeError("event loop is closed")

    deaf = open_(scheduler, manifest.chunk(80), gone)
    scheduler.accept(deaf, noise(0, 199))
    with pytest.raises(NemostreamError, match="the stream was closed"):
        while True:
            scheduler.wait(deaf)
    scheduler.wait(state)
    assert deaf.slot is None


def test_waiting_for_a_backlog_returns_while_work_remains(serve, manifest):
    scheduler, backend = serve()
    state = open_(scheduler, manifest.chunk(80))
    backend.on_result = gate = ChunkFilter()
    scheduler.accept(state, noise(0, 199 + 1280))
    scheduler.wait(state, backlog=2)
    assert not scheduler.settled(state) and scheduler.settled(state, 2)
    gate.opened.set()
    scheduler.wait(state)
    assert scheduler.settled(state)


def test_calls_run_on_the_schedulers_thread_and_raise_what_they_raise(serve, manifest, fake):
    scheduler, backend = serve()
    assert scheduler.call(lambda held: (held, threading.current_thread().name)) == (backend, "nemostream-scheduler")
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda held: 1 // 0)
    audio = noise(0, 20_000)
    state = open_(scheduler, manifest.chunk(560))
    scheduler.accept(state, audio)
    scheduler.wait(state)
    saved = scheduler.call(lambda held: held.save(state.slot))
    assert saved["position"] == 14  # after what was accepted before
    assert said(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)


def test_a_call_that_is_too_late_raises(serve, manifest):
    scheduler, backend = serve()
    backend.on_submit = gate = ChunkFilter()
    scheduler.accept(open_(scheduler, manifest.chunk(80)), noise(0, 199))
    assert gate.entered.wait(WAIT)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(scheduler.call, lambda held: None)
        while not scheduler._calls:
            threading.Event().wait(0.001)
        closing = pool.submit(scheduler.close)
        with pytest.raises(StreamError, match="the model was closed"):
            waiting.result(WAIT)
        gate.opened.set()
        closing.result(WAIT)
    with pytest.raises(StreamError, match="the model was closed"):
        scheduler.call(lambda held: None)


def test_the_patient_wait_for_a_slot(serve, manifest, fake):
    scheduler, _ = serve(capacity=1)
    state, audio = open_(scheduler, manifest.chunk(80)), noise(1, 5000)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(scheduler.open, Chunker(manifest, manifest.chunk(80)), None, True) for _ in range(3)]
        for _ in range(3):
            scheduler.cancel(state)
            while not any(job.done() for job in waiting):
                threading.Event().wait(0.001)
            (job,) = [job for job in waiting if job.done()][:1]
            waiting.remove(job)
            state = job.result()
        scheduler.accept(state, audio)
        scheduler.finish(state)
        scheduler.wait(state)
        assert said(state) == fake.expected(audio, manifest.decoder.vocabulary)
        held = open_(scheduler, manifest.chunk(80))
        late = pool.submit(scheduler.open, Chunker(manifest, manifest.chunk(80)), None, True)
        scheduler.close()
        with pytest.raises(StreamError, match="the model was closed"):
            late.result(WAIT)
        assert held.error


def test_a_state_outlives_the_reset_for_the_stream_before(serve, manifest):
    """Its slot is taken while the backend still resets it for one that is gone already."""
    scheduler, backend = serve(capacity=1)
    backend.on_reset = gate = ChunkFilter()
    first = open_(scheduler, manifest.chunk(80))
    assert gate.entered.wait(WAIT)
    scheduler.cancel(first)
    state = {"position": np.array(7), "checksum": np.array(5), "phrases": NO_PHRASES}
    open_(scheduler, manifest.chunk(80), saved=state)
    gate.opened.set()
    backend.on_reset = lambda slots: None
    scheduler.call(lambda backend: None)  # a turn of the thread, and with it the second reset
    found = scheduler.call(lambda backend: backend.save(0))
    assert (int(found["position"]), int(found["checksum"])) == (7, 5)


def test_a_state_that_does_not_fit_ends_the_stream_it_was_for(serve, manifest, fake):
    scheduler, _ = serve(capacity=2)
    state = open_(scheduler, manifest.chunk(80), saved={"position": np.zeros(3)})
    with pytest.raises(OptionError, match="the saved state is of another model"):
        scheduler.accept(state, noise(0, 199))
        while True:
            scheduler.wait(state)
    audio = noise(1, 5000)
    assert said(transcribe(scheduler, manifest, audio)) == fake.expected(audio, manifest.decoder.vocabulary)
