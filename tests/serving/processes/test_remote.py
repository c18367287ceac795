"""A transport's scheduler and the engine's host, connected in one process, against a model with a scheduler of its own.

The backend's tokens are a checksum of all audio that its slot received, so a sample that is lost, doubled or in another
stream changes all later tokens.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import BackendError, CapacityError, StreamError
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.aio import AsyncLiveStream
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.compiled import RemoteFields
from nemostream.runtime.streaming.items import WorkItem
from nemostream.runtime.streaming.scheduler import Scheduler, StreamScheduler
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.serving.errors import Draining
from nemostream.serving.processes import engine as engine_module
from nemostream.serving.processes import link as link_module
from nemostream.serving.processes import remote
from nemostream.serving.processes.board import Board
from nemostream.serving.processes.control import Control
from nemostream.serving.processes.engine import EngineHost
from nemostream.serving.processes.link import SharedAudio, socket_pair
from nemostream.serving.settings import Settings

CAPACITY = 3


def load_fake_backend() -> Any:
    name, path = "nemostream_tests_fake_backend", Path(__file__).parents[2] / "runtime" / "fake_backend.py"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


fake = load_fake_backend()
BUNDLE = Bundle.open(nemostream.demo_bundle())


class Resetting(fake.FakeBackend):  # type: ignore[misc]
    """The tokens after a reset of the decoder depend on where it was. As with a model, a second one has no effect."""

    def reset_decoder(self, slots: Any) -> None:
        super().reset_decoder(slots)
        for slot in slots.tolist():
            if self.position[slot]:
                self.checksum[slot] |= 0xFFFF


class Engine:
    """An engine's host on a thread of this process."""

    def __init__(self, regions: int = 2 * CAPACITY, backend: Any = None, model: Model | None = None) -> None:
        self.backend = backend or fake.FakeBackend(BUNDLE.manifest, capacity=CAPACITY)
        self.model = model or Model(BUNDLE, self.backend)
        self.regions = regions
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control, self._theirs = Control(ours), theirs
        self.host = EngineHost(self.model, Control(theirs))
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.host.run()
        except BaseException as error:
            self.error = error

    def connect(self) -> tuple[socket.socket, int]:
        """Return the transport's end of a new link, and the descriptor of its memory."""
        audio, (one, two) = SharedAudio.create(self.regions, BUNDLE.manifest), socket_pair()
        self._control.send((one.fileno(), audio))
        one.close()
        return two, audio

    def crash(self) -> None:
        """End the links as the end of the process does."""
        for link in self.host.links:
            link.socket.shutdown(socket.SHUT_RDWR)

    def free_slots(self) -> int:
        return len(self.model._scheduler._free)

    def close(self) -> None:
        self._control.socket.close()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.model.close()
        self.host.close()
        self._theirs.close()


@contextmanager
def transport(engine: Engine, on_engine_ended: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """A model of a transport, in the running event loop."""
    schedulers: list[remote.RemoteScheduler] = []

    def open_scheduler(manifest: Any, tokenizer: Any) -> remote.RemoteScheduler:
        schedulers.append(remote.RemoteScheduler(manifest, tokenizer, asyncio.get_running_loop(), on_engine_ended))
        return schedulers[0]

    model = Model(BUNDLE, None, open_scheduler=open_scheduler)
    link, audio = engine.connect()
    schedulers[0].attach(link, audio)
    os.close(audio)
    try:
        yield model
    finally:
        model.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        await asyncio.sleep(0.005)


# -- equality with a scheduler in the same process ---------------------------------------------------------------------

PUSH = st.tuples(st.just("push"), st.integers(0, 40_000), st.sampled_from(["noise", "float", "silence"]))
ACTION = st.one_of(
    PUSH,
    PUSH,
    st.tuples(st.just("end_utterance")),
    st.tuples(st.just("chunk"), st.sampled_from([80, 160, 560, 1120])),
    st.tuples(st.just("branch"), st.integers(0, 20_000)),
    st.tuples(st.just("reset_decoder")),
)
OPTIONS = st.fixed_dictionaries(
    {
        "chunk_ms": st.sampled_from([80, 160, 560, 1120]),
        "endpoint": st.sampled_from([None, Endpoint(80), Endpoint(800, 1000, decoder="reset"), Endpoint(None)]),
        "phrases": st.sampled_from([None, ["twenty", "hundred"]]),
    }
)
STREAM = st.tuples(OPTIONS, st.lists(ACTION, min_size=1, max_size=8))


async def run_stream(model: Any, seed: int, options: Any, actions: Any) -> list[Any]:
    """Return the events, the final result, and the outputs of the branches of a stream."""
    random, events = np.random.default_rng(seed), []
    scheduler, branches = model._scheduler, []
    async with model.astream(**options) as stream:
        session = stream.session
        await asyncio.sleep(0)  # all streams are opened before the first branch takes a slot
        for kind, *values in actions:
            if kind == "push":
                pcm = (random.standard_normal(values[0]) * 3000).astype(np.int16)
                if values[1] == "silence":
                    pcm = np.zeros_like(pcm)
                events += await stream.push_events(pcm / np.float32(30_000) if values[1] == "float" else pcm)
            elif kind == "end_utterance":
                events += await stream.end_utterance()
            elif kind == "branch":  # it receives other audio; the stream continues at once
                branch = scheduler.branch(session._stream, session._chunker.copy())
                branches.append(branch)
                scheduler.accept(branch, random.standard_normal(values[0]).astype(np.float32))
                scheduler.finish(branch)
            elif kind == "reset_decoder":
                scheduler.enqueue(session._stream, [WorkItem("reset_decoder", BUNDLE.manifest.chunk(80), 0)])
            else:
                stream.set_chunk_ms(values[0])
        events += await stream.finish_events()
        events.append(stream.result)
    for branch in branches:
        await until(lambda branch=branch: scheduler.settled(branch) and branch.slot is None)  # type: ignore[misc]
        items = [(item.kind, item.end_sample, count, list(ends)) for item, count, ends in scheduler.collect(branch)]
        events.append((branch.copied, branch.hypothesis, items))
    return events


@settings(max_examples=100)
@given(st.lists(STREAM, min_size=1, max_size=CAPACITY))
def test_streams_are_equal_to_those_of_a_scheduler_in_the_same_process(streams: list[Any]) -> None:
    async def run_all(model: Any) -> list[Any]:
        return await asyncio.gather(*(run_stream(model, seed, *one) for seed, one in enumerate(streams)))

    async def run_remote() -> list[Any]:
        with transport(engine) as model:
            return await run_all(model)

    with Model(BUNDLE, Resetting(BUNDLE.manifest, capacity=CAPACITY + 1)) as local:  # one for branches
        expected = asyncio.run(run_all(local))
    engine = Engine(64, Resetting(BUNDLE.manifest, capacity=CAPACITY + 1))
    try:
        assert asyncio.run(run_remote()) == expected
    finally:
        engine.close()


def test_tokens_are_those_of_the_audio(engine: Engine) -> None:
    """The oracle computes the checksums from the definition."""
    pcm = (np.random.default_rng(5).standard_normal(50_000) * 3000).astype(np.int16)

    async def main() -> Any:
        with transport(engine) as model:
            async with model.astream(chunk_ms=160) as stream:
                for begin in range(0, len(pcm), 3000):
                    await stream.push(pcm[begin : begin + 3000])
                return await stream.finish()

    tokens, frames = fake.expected(pcm.astype(np.float32) / 32768, BUNDLE.manifest.decoder.vocabulary)
    result = asyncio.run(main())
    assert [token.id for token in result.tokens] == tokens
    assert [round(token.time / 0.08) for token in result.tokens] == frames


def test_audio_waits_for_space(engine: Engine) -> None:
    """A minute in one push has more chunks than a region can hold."""
    pcm = (np.random.default_rng(6).standard_normal(60 * 16000) * 3000).astype(np.int16)

    async def main() -> Any:
        with transport(engine) as model:
            async with model.astream(chunk_ms=80) as stream:
                await stream.push(pcm)
                return await stream.finish()

    tokens, _ = fake.expected(pcm.astype(np.float32) / 32768, BUNDLE.manifest.decoder.vocabulary)
    assert [token.id for token in asyncio.run(main()).tokens] == tokens


def test_two_transports_share_the_slots(engine: Engine) -> None:
    async def main() -> None:
        with transport(engine) as one, transport(engine) as two:
            results = await asyncio.gather(
                *(run_stream(model, seed, {"chunk_ms": 80}, ACTIONS) for seed, model in enumerate([one, two, one]))
            )
            with Model(BUNDLE, fake.FakeBackend(BUNDLE.manifest, capacity=1)) as local:
                for seed, found in enumerate(results):
                    assert found == await run_stream(local, seed, {"chunk_ms": 80}, ACTIONS)

    asyncio.run(main())
    assert max(len(slots) for _, slots in engine.backend.batches) > 1  # streams of both transports share steps


ACTIONS = [("push", 30_000, "noise"), ("end_utterance",), ("push", 9_999, "noise")]


# -- slots -------------------------------------------------------------------------------------------------------------


def test_streams_beyond_the_slots_wait_for_one(engine: Engine) -> None:
    """The limits of a server leave a slot for each stream; the slot of one that was just closed may be free later."""
    started, proceed = threading.Event(), threading.Event()

    def on_submit(batch: Any) -> None:
        started.set()
        assert proceed.wait(20)

    async def main() -> None:
        with transport(engine) as one, transport(engine) as two:
            first = one.astream(chunk_ms=80)
            others = [one.astream(chunk_ms=80) for _ in range(CAPACITY - 1)]
            late = asyncio.create_task(run_stream(two, 1, {"chunk_ms": 80}, ACTIONS))
            await until(lambda: len(engine.host._waiting) == 1)
            abandoned = two.astream(chunk_ms=80)
            await until(lambda: len(engine.host._waiting) == 2)
            abandoned.close()
            engine.backend.on_submit = on_submit
            pushing = asyncio.create_task(first.push(np.ones(4000, np.int16)))
            await asyncio.to_thread(started.wait, 20)
            first.close()  # its slot is in use by the step
            with pytest.raises(StreamError):
                await pushing
            await asyncio.sleep(0.05)
            assert not late.done() and engine.free_slots() == 0
            engine.backend.on_submit = lambda batch: None
            proceed.set()
            with Model(BUNDLE, fake.FakeBackend(BUNDLE.manifest, capacity=1)) as local:
                assert await late == await run_stream(local, 1, {"chunk_ms": 80}, ACTIONS)
            for stream in others:
                stream.close()
            await until(lambda: engine.free_slots() == CAPACITY and not engine.host._waiting)

    asyncio.run(main())


def test_a_transport_that_ends_releases_its_slots(engine: Engine) -> None:
    async def main() -> None:
        with transport(engine) as healthy:
            stream = healthy.astream(chunk_ms=80)
            await stream.push(np.ones(4000, np.int16))
            with transport(engine) as crashing:
                for _ in range(CAPACITY - 1):
                    await crashing.astream(chunk_ms=80).push(np.ones(4000, np.int16))
                assert engine.free_slots() == 0
                crashing._scheduler._link.socket.shutdown(socket.SHUT_RDWR)
                await until(lambda: engine.free_slots() == CAPACITY - 1)
            await stream.push(np.ones(4000, np.int16))
            await stream.finish()
            await until(lambda: engine.free_slots() == CAPACITY)

    asyncio.run(main())


def test_many_short_streams_leave_nothing(engine: Engine) -> None:
    async def main() -> None:
        with transport(engine) as model:
            for number in range(200):
                stream = model.astream(chunk_ms=80)
                pushing = asyncio.create_task(stream.push(np.ones(3000, np.int16)))
                await asyncio.sleep(0)
                if number % 3 == 0:
                    stream.close()
                    with suppress(StreamError):
                        await pushing
                else:
                    await pushing
                    await stream.finish()
                    stream.close()
            link = model._scheduler._link
            await until(lambda: not link.streams)
            assert sorted(link.free) == list(range(engine.regions)) and engine.free_slots() == CAPACITY

    asyncio.run(main())
    assert max(max(slots) for _, slots in engine.backend.batches) < CAPACITY


def test_a_transport_has_a_region_for_each_stream(engine: Engine) -> None:
    async def main() -> None:
        with transport(engine) as model:
            failing = mock.patch.object(remote, "dump_fields", side_effect=ZeroDivisionError)
            with failing, pytest.raises(ZeroDivisionError):
                model.astream()  # takes no region
            streams = [model.astream() for _ in range(engine.regions)]
            with mock.patch.object(remote, "dump_fields") as dump, pytest.raises(CapacityError, match="try again"):
                model.astream()
            assert not dump.called
            for stream in streams:
                stream.close()
            await until(lambda: len(model._scheduler._link.free) == engine.regions)

    asyncio.run(main())


# -- branches ----------------------------------------------------------------------------------------------------------


def test_lanes_have_the_finals_of_one_process(heldout: Any) -> None:
    """The fast lane in steps of one chunk, with and without a decoder reset at the end of an utterance."""
    pause = (np.random.default_rng(0).standard_normal(20_000) * 1e-3).astype(np.float32)
    speech = np.concatenate([part for audio in heldout[:3] for part in (audio, pause)])

    async def listen(model: Any) -> list[Any]:
        found = []
        for rule in (Endpoint(), Endpoint(400, decoder="reset")):
            async with model.astream(chunk_ms=80, final_chunk_ms=1120, endpoint=rule) as stream:
                events = []
                for at in range(0, len(speech), 1280):
                    events += await stream.push_events(speech[at : at + 1280])
                events += await stream.finish_events()
                found.append([event for event in events if event.kind in ("final", "end")])
                found.append(stream.result)
        return found

    async def listen_remotely() -> list[Any]:
        with transport(engine) as model:
            return await listen(model)

    with nemostream.load(BUNDLE.path) as local:
        expected = asyncio.run(listen(local))
    engine = Engine(model=nemostream.load(BUNDLE.path))
    try:
        assert asyncio.run(listen_remotely()) == expected
    finally:
        engine.close()
    assert [event.chunk_ms for event in expected[0] if event.kind == "final"].count(1120) >= 3


def test_a_lane_without_a_slot_fails_and_can_be_opened_later(heldout: Any) -> None:
    """As in one process, where the stream has no lane before that moment."""
    speech = [*heldout[0], *np.zeros(20_000, np.float32)]

    async def listen(model: Any, final_chunk_ms: int | None, release: Callable[[], Any]) -> list[Any]:
        async with model.astream(chunk_ms=80, final_chunk_ms=final_chunk_ms, endpoint=Endpoint()) as stream:
            events = await stream.push_events(np.array(speech, np.float32))
            assert stream.final_chunk_ms is None
            await release()
            stream.set_final_chunk_ms(1120)
            events += await stream.end_utterance()
            events += await stream.push_events(np.array(speech, np.float32))
            assert stream.final_chunk_ms == 1120
            events += await stream.finish_events()
            fields = [(event.text, event.chunk_ms, event.start, event.end) for event in events if event.kind == "final"]
        return fields

    async def listen_remotely() -> list[Any]:
        with transport(engine) as model:
            model.watch(None, None, lambda error: errors.append(type(error)))
            other = model.astream(chunk_ms=80)  # with it, only the slot that is reserved for finals is free

            async def release() -> None:
                other.close()
                await until(lambda: engine.free_slots() == 2)

            return await listen(model, 1120, release)

    errors: list[Any] = []
    with nemostream.load(BUNDLE.path) as local:
        expected = asyncio.run(listen(local, None, lambda: asyncio.sleep(0)))
    engine = Engine(model=nemostream.load(BUNDLE.path, capacity=3))
    try:
        assert asyncio.run(listen_remotely()) == expected
    finally:
        engine.close()
    assert errors and set(errors) == {CapacityError}
    assert [chunk_ms for text, chunk_ms, *_ in expected if text] == [80, 1120]


def branch_of(scheduler: Any, session: Any, samples: int) -> Any:
    """Return a branch that receives further audio and ends."""
    branch = scheduler.branch(session._stream, session._chunker.copy())
    scheduler.accept(branch, np.ones(samples, np.float32))
    scheduler.finish(branch)
    return branch


def tokens_of(*parts: Any) -> list[int]:
    return fake.expected(np.concatenate(parts), BUNDLE.manifest.decoder.vocabulary)[0]  # type: ignore[no-any-return]


def test_a_branch_follows_audio_that_waits_for_space(engine: Engine) -> None:
    pcm = np.random.default_rng(6).standard_normal(60 * 16000).astype(np.float32)

    async def main() -> None:
        with transport(engine) as model:
            scheduler = model._scheduler
            session = model.open_session(16000, 1, chunk_ms=80)
            session.feed(pcm)
            branch, cancelled = branch_of(scheduler, session, 9000), branch_of(scheduler, session, 9000)
            assert not branch.opened and not cancelled.opened
            scheduler.cancel(cancelled)
            assert cancelled.slot is None
            session.feed(pcm[:5000])
            session.finish()
            await until(lambda: session.settled() and scheduler.settled(branch))
            assert [token.id for token in session.final().tokens] == tokens_of(pcm, pcm[:5000])
            assert branch.hypothesis.tokens == tokens_of(pcm, np.ones(9000, np.float32))
            assert 0 < branch.copied < len(branch.hypothesis.tokens)
            link = scheduler._link
            await until(lambda: not link.streams and engine.free_slots() == CAPACITY)
            assert sorted(link.free) == list(range(engine.regions))

    asyncio.run(main())


def test_a_branch_of_a_stream_that_waits_for_a_slot(engine: Engine) -> None:
    actions = [*ACTIONS, ("branch", 9000), ("push", 5000, "float")]

    async def main() -> None:
        with transport(engine) as one, transport(engine) as two:
            others = [one.astream(chunk_ms=80) for _ in range(CAPACITY)]
            late = two.open_session(16000, 1, chunk_ms=80)
            late.feed(np.ones(9000, np.float32))
            branch, cancelled = (branch_of(two._scheduler, late, 3000) for _ in range(2))
            two._scheduler.cancel(cancelled)
            late.finish()
            task = asyncio.create_task(run_stream(two, 1, {"chunk_ms": 80}, actions))
            await until(lambda: len(engine.host._waiting) == 2)
            assert not branch.hypothesis.tokens
            for stream in others:
                stream.close()
            with Model(BUNDLE, fake.FakeBackend(BUNDLE.manifest, capacity=2)) as local:
                assert await task == await run_stream(local, 1, {"chunk_ms": 80}, actions)
            assert branch.hypothesis.tokens == tokens_of(np.ones(12_000, np.float32))
            await until(lambda: not two._scheduler._link.streams and engine.free_slots() == CAPACITY)

    asyncio.run(main())


@pytest.mark.parametrize("ending", ["failure", "cancel", "branch cancelled", "engine"])
def test_a_branch_that_has_not_begun(engine: Engine, ending: str) -> None:
    """It fails with its stream; if only the branch is cancelled, the stream continues."""
    started, proceed = threading.Event(), threading.Event()

    def on_submit(batch: Any) -> None:
        started.set()
        assert proceed.wait(20)
        if ending == "failure":
            raise ValueError("broken")

    async def main() -> None:
        with transport(engine) as model:
            scheduler, link = model._scheduler, model._scheduler._link
            engine.backend.on_submit = on_submit
            session = model.open_session(16000, 1, chunk_ms=80)
            session.feed(np.ones(4000, np.float32))
            await asyncio.to_thread(started.wait, 20)
            branch, called = scheduler.branch(session._stream, session._chunker.copy()), []
            branch.listener = called.append
            scheduler.accept(branch, np.ones(9000, np.float32))
            await asyncio.sleep(0)  # the items are sent
            if ending == "branch cancelled":
                scheduler.cancel(branch)
            elif ending == "cancel":
                session.close()
            elif ending == "engine":
                engine.crash()
            proceed.set()
            await until(lambda: branch.error is not None and bool(called))
            if ending == "branch cancelled":
                engine.backend.on_submit = lambda batch: None
                session.finish()
                await until(session.settled)
                assert [token.id for token in session.final().tokens] == tokens_of(np.ones(4000, np.float32))
            else:
                assert str(branch.error) == str(session._stream.error)
                assert type(branch.error) is type(session._stream.error)
            await until(lambda: not link.streams and engine.free_slots() == CAPACITY)
            if ending != "engine":
                assert sorted(link.free) == list(range(engine.regions))

    asyncio.run(main())


def test_slots_are_reserved_for_branches(engine: Engine) -> None:
    """A stream that may branch, but has no slot, fails. Others wait, and a branch takes the reserved slot."""

    async def main() -> None:
        with transport(engine) as model:
            scheduler, streams = model._scheduler, []
            chunk = BUNDLE.manifest.chunk(80)
            for _ in range(3):
                streams.append(scheduler.open(Chunker(BUNDLE.manifest, chunk), may_branch=True))
            await until(lambda: streams[2].error is not None)
            assert isinstance(streams[2].error, CapacityError) and "reserved for finals" in str(streams[2].error)
            refused = scheduler.branch(streams[0], None, may_branch=True)
            await until(lambda: refused.error is not None)
            assert isinstance(refused.error, CapacityError)
            waiting = model.open_session(16000, 1, chunk_ms=80)
            waiting.feed(np.ones(4000, np.float32))
            waiting.finish()
            scheduler.accept(streams[0], np.ones(4000, np.float32))
            branch = scheduler.branch(streams[0], streams[0].chunker.copy())
            scheduler.finish(branch)
            await until(lambda: scheduler.settled(branch))
            assert branch.hypothesis.tokens == tokens_of(np.ones(4000, np.float32))
            assert engine.free_slots() == 1 and len(engine.host._waiting) == 1
            scheduler.cancel(streams[1])
            await until(waiting.settled)
            assert [token.id for token in waiting.final().tokens] == tokens_of(np.ones(4000, np.float32))

    asyncio.run(main())


# -- failures ----------------------------------------------------------------------------------------------------------


def test_an_error_of_the_backend_fails_the_streams_of_its_step(engine: Engine) -> None:
    def fail(batch: Any) -> None:
        raise ValueError("broken")

    async def main() -> None:
        with transport(engine) as model:
            healthy, failing = model.astream(chunk_ms=160), model.astream(chunk_ms=80)
            await healthy.push(np.ones(4000, np.int16))
            engine.backend.on_submit = fail
            with pytest.raises(BackendError, match=r"the model failed: ValueError: broken"):
                await failing.push(np.ones(4000, np.int16))
            with pytest.raises(BackendError, match="broken"):
                await failing.finish()
            engine.backend.on_submit = lambda batch: None
            await healthy.push(np.ones(4000, np.int16))
            assert (await healthy.finish()).final
            await until(lambda: engine.free_slots() == CAPACITY and not model._scheduler._link.streams)

    asyncio.run(main())


def test_an_engine_that_ends_fails_the_streams_until_another_is_attached(engine: Engine) -> None:
    ended: list[bool] = []

    async def main() -> None:
        with transport(engine, lambda: ended.append(True)) as model:
            stream = model.astream(chunk_ms=80)
            await stream.push(np.ones(4000, np.int16))
            waiting = model.astream(chunk_ms=80)
            engine.crash()
            with pytest.raises(BackendError, match="the engine process ended unexpectedly and is started again"):
                while True:
                    await stream.push(np.ones(4000, np.int16))
            with pytest.raises(BackendError, match="open a new stream"):
                await waiting.push(np.ones(4000, np.int16))
            stream.close()
            assert ended == [True]
            with pytest.raises(Draining, match="being started"):
                model.astream()
            successor = Engine()
            link, audio = successor.connect()
            model._scheduler.attach(link, audio)
            os.close(audio)
            async with model.astream(chunk_ms=80) as stream:
                await stream.push(np.ones(4000, np.int16))
                assert (await stream.finish()).tokens
            successor.close()

    asyncio.run(main())


def test_a_stream_that_has_all_results_does_not_fail_with_the_engine(engine: Engine) -> None:
    """The engine ends after the results of the last step, before it reports that the slot is released."""

    async def main() -> None:
        with transport(engine) as model:
            session = model.open_session(16000, 1, chunk_ms=80)
            session.feed(np.ones(4000, np.int16))
            session.finish()
            stream = session._stream
            link, receive = model._scheduler._link, link_module.FrameReader.__call__

            def without_closed(reader: Any, data: bytes) -> Any:
                return [frame for frame in receive(reader, data) if frame[0] != link_module.CLOSED]

            with mock.patch.object(link_module.FrameReader, "__call__", without_closed):
                await until(lambda: stream.in_flight == 0 and not stream.items)
            assert stream.slot is not None
            other = model.open_session(16000, 1, chunk_ms=80)
            model._scheduler._end_link(link)
            assert session.settled() and session.final().tokens and stream.slot is None
            session.close()
            with pytest.raises(BackendError, match="ended unexpectedly"):
                other.settled()

    asyncio.run(main())


def test_a_scheduler_that_failed_ends_the_engine(engine: Engine) -> None:
    async def main() -> None:
        with transport(engine) as model:
            engine.model.close()
            model.astream()
            await until(lambda: engine.error is not None)

    asyncio.run(main())
    assert isinstance(engine.error, StreamError)


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
def test_an_engine_ends_with_the_supervisor(monkeypatch: pytest.MonkeyPatch, error: type[OSError]) -> None:
    """Also if the supervisor had not read all messages of the engine: that end is a reset."""
    closed: list[bool] = []
    model = SimpleNamespace(
        manifest=BUNDLE.manifest,
        context=SimpleNamespace(scheduler=SimpleNamespace(set_feed=lambda feed: None)),
        watch=lambda *callbacks: None,
        close=lambda: closed.append(True),
    )

    def send(files: tuple[int, ...] = (), **message: Any) -> None:
        raise error

    start = SimpleNamespace(
        transports=1, entries=1, text=False, name="", folder="", restore_settings=Settings, check=lambda manifest: None
    )
    with closing(socket.socket()) as connection:
        control, board = SimpleNamespace(socket=connection, send=send), Board.create(1, 1)
        monkeypatch.setattr(engine_module, "connect", lambda: (control, start, board))
        for name in ("log_to_stderr", "share_metrics", "log_ready"):
            monkeypatch.setattr(engine_module, name, lambda *arguments: None)
        monkeypatch.setattr(engine_module.sys, "setswitchinterval", lambda seconds: None)
        monkeypatch.setattr(engine_module, "freeze_heap", lambda: None)
        loaded = SimpleNamespace(model=model, max_streams=1)
        monkeypatch.setattr(engine_module, "load_model", lambda *arguments: loaded)
        engine_module.main()
        os.close(board)
    assert closed == [True]


def test_results_of_a_transport_that_does_not_read_are_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is full: the scheduler does not wait for it, and the rest follows when it is read again."""

    async def main() -> Any:
        with transport(engine) as model:
            link = model._scheduler._link
            link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            model._scheduler._event_loop.remove_reader(link.socket)
            for one in engine.host.links:
                one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            streams = [model.astream(chunk_ms=80) for _ in range(CAPACITY)]
            pushing = [
                asyncio.create_task(stream.push((np.ones(400_000) * (index + 1)).astype(np.int16)))
                for index, stream in enumerate(streams)
            ]
            await until(lambda: len(engine.backend.batches) >= 20)
            await asyncio.sleep(0.1)
            model._scheduler._event_loop.add_reader(link.socket, model._scheduler._receive, link)
            await asyncio.gather(*pushing)
            return [[token.id for token in (await stream.finish()).tokens] for stream in streams]

    for index, tokens in enumerate(asyncio.run(main())):
        audio = np.full(400_000, (index + 1) / 32768, np.float32)
        assert tokens == fake.expected(audio, BUNDLE.manifest.decoder.vocabulary)[0]


def test_items_for_an_engine_that_does_not_read_are_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    proceed, receive = threading.Event(), engine.host.receive

    def receive_later() -> None:
        assert proceed.wait(20)
        receive()

    monkeypatch.setattr(engine.host, "receive", receive_later)

    async def main() -> Any:
        with transport(engine) as model:
            link = model._scheduler._link
            link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            streams = [model.astream(chunk_ms=80, phrases=["twenty"]) for _ in range(CAPACITY)]
            pushing = [
                asyncio.create_task(stream.push((np.ones(100_000) * (index + 1)).astype(np.int16)))
                for index, stream in enumerate(streams)
            ]
            await until(lambda: link.is_blocked)
            proceed.set()
            await asyncio.gather(*pushing)
            await until(lambda: not link.is_blocked)
            return [[token.id for token in (await stream.finish()).tokens] for stream in streams]

    for index, tokens in enumerate(asyncio.run(main())):
        audio = np.full(100_000, (index + 1) / 32768, np.float32)
        assert tokens == fake.expected(audio, BUNDLE.manifest.decoder.vocabulary)[0]


@pytest.mark.parametrize("options", [{}, {"final_chunk_ms": 1120}, {"endpoint": Endpoint(400, decoder="reset")}])
def test_a_stream_that_is_saved_continues_at_another_engine(heldout: Any, options: dict[str, Any]) -> None:
    """The tokens and scores of finals are those of one process without an interruption."""
    pause = (np.random.default_rng(0).standard_normal(20_000) * 1e-3).astype(np.float32)
    speech = np.concatenate([part for audio in heldout[:2] for part in (audio, pause)])
    options = {"chunk_ms": 80, "endpoint": Endpoint(), **options}
    with nemostream.load(BUNDLE.path) as local:
        expected = finals_of([*local.listen(speech, **options)])

    async def main() -> list[Any]:
        events, saved, due = [], 0, False
        with transport(engines[0]) as one, transport(engines[1]) as two:
            model, stream = one, one.astream(**options)
            for number, at in enumerate(range(0, len(speech), 5000)):
                events += await stream.push_events(speech[at : at + 5000])
                due = due or number % 4 == 0
                if due and (complete := stream.save()) is not None:  # not while the other lane is busy
                    snapshot, saved, due = await asyncio.to_thread(complete), saved + 1, False
                    stream.close()
                    model = two if model is one else one
                    stream = AsyncLiveStream(model.open_session(16000, 1, snapshot=snapshot, **options))
            assert saved > 5
            return events + await stream.finish_events()

    engines = [Engine(model=nemostream.load(BUNDLE.path)) for _ in range(2)]
    try:
        assert finals_of(asyncio.run(main())) == expected
    finally:
        for engine in engines:
            engine.close()
    assert len(expected) >= 4


def finals_of(events: list[Any]) -> list[Any]:
    kept = [event for event in events if event.kind in ("final", "end")]
    return [(event.kind, event.utterance, event.text, event.tokens, event.end, event.reason) for event in kept]


def test_saving_a_stream_that_ends_fails(engine: Engine) -> None:
    async def main() -> None:
        with transport(engine) as model:
            stream = model.astream(chunk_ms=80)
            await stream.push(np.ones(3000, np.int16))
            complete = stream.save()
            assert complete is not None
            stream.close()
            with pytest.raises(StreamError):
                await asyncio.to_thread(complete)
            other = model.astream(chunk_ms=80)
            await other.push(np.ones(3000, np.int16))
            with mock.patch.object(engine.backend, "save", side_effect=ZeroDivisionError):
                complete = other.save()
                assert complete is not None
                with pytest.raises(BackendError, match="the engine could not save the stream"):
                    await asyncio.to_thread(complete)
            complete = other.save()
            assert complete is not None and (await asyncio.to_thread(complete)).parts["slot"]
            engine.crash()
            with pytest.raises(BackendError):
                other.save()
                await until(lambda: model._scheduler._link is None)
                other.save()

    asyncio.run(main())


def test_no_public_method_needs_the_backend_of_this_process() -> None:
    feed = {"set_feed", "enqueue_rows", "wake", "call", "waiting"}  # for the engine process, and for tests
    public = {name for name in vars(Scheduler) if not name.startswith("_")} - feed
    shared = set(vars(StreamScheduler)) - StreamScheduler.__abstractmethods__
    assert public and public <= set(vars(remote.RemoteScheduler)) | shared


@pytest.mark.skipif(not hasattr(RemoteFields, "accept"), reason="the methods in C were not compiled")
def test_the_python_methods_do_the_same(tmp_path: Path) -> None:
    """The tests of this module and of regions pass without the methods in C."""
    tests = ("streams_are_equal", "tokens_are_those", "audio_waits", "many_short", "branch_follows")
    code = (
        "import sys; sys.modules['nemostream.runtime.streaming._host'] = None\n"
        "import pytest\n"
        f"options = ['-q', '-p', 'no:cacheprovider', '-n', '0', '-k', {' or '.join((*tests, 'region'))!r}]\n"
        f"sys.exit(pytest.main([*options, {__file__!r}, {str(Path(__file__).parent / 'test_link.py')!r}]))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
