"""The hot path in C and in Python has the same behaviour: state, items, events and errors, and it frees its objects.

The Python methods are imported a second time, without the compiled module.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemostream.bundle import LanguageConfig
from nemostream.errors import NemostreamError, StreamError
from nemostream.runtime.streaming import compiled
from nemostream.runtime.text.endpointing import Endpoint, UtteranceEnd
from nemostream.runtime.text.events import Event, EventBuilder
from nemostream.runtime.text.languages import AUTO
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.runtime.text.words import Token

HOST = "nemostream.runtime.streaming._host"
MODULES = {
    "chunker": "nemostream.runtime.streaming.chunker",
    "items": "nemostream.runtime.streaming.items",
    "model": "nemostream.runtime.model",
    "scheduler": "nemostream.runtime.streaming.scheduler",
    "session": "nemostream.runtime.streaming.session",
    "state": "nemostream.runtime.streaming.state",
}
LANGUAGES = LanguageConfig("de-DE", {"en-US": 0, "de-DE": 3}, 4)
FOLLOWERS = ("nemostream.runtime.streaming", "nemostream.runtime.audio", "nemostream.runtime.model")

pytestmark = pytest.mark.skipif(
    not hasattr(compiled.ChunkerFields, "accept"), reason="the methods in C were not compiled"
)


def load_modules() -> SimpleNamespace:
    return SimpleNamespace(**{name: importlib.import_module(path) for name, path in MODULES.items()})


@contextmanager
def without_compiled_methods() -> Iterator[None]:
    """Import modules of streams again, without the compiled module, and restore those that were imported before."""
    before = {name: module for name, module in sys.modules.items() if name.startswith(FOLLOWERS)}
    parents = {name: (name.rpartition(".")[0], name.rpartition(".")[2]) for name in before}
    for name in before:
        del sys.modules[name]
    sys.modules[HOST] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(FOLLOWERS)]:
            del sys.modules[name]
        sys.modules.update(before)
        for name, (parent, attribute) in parents.items():
            setattr(sys.modules[parent], attribute, before[name])


@pytest.fixture(scope="module")
def twins() -> tuple[SimpleNamespace, SimpleNamespace]:
    """The modules with the methods in C, and those with the methods in Python."""
    fast = load_modules()
    with without_compiled_methods():
        plain = load_modules()
    assert type(fast.chunker.Chunker.accept).__name__ == "method_descriptor"
    assert type(plain.chunker.Chunker.accept).__name__ == "function"
    return fast, plain


def outcome(function: Any, *args: Any) -> Any:
    """Return the result of a call, or its error."""
    try:
        return function(*args)
    except Exception as error:
        return type(error), str(error) if isinstance(error, NemostreamError) else None


# -- chunker -----------------------------------------------------------------------------------------------------------

KINDS = ("int16", "float32", "float64", "reversed", "strided", "big-endian", "read-only", "misaligned")


def sound(seed: int, samples: int, kind: str) -> np.ndarray:
    """Return `samples` samples in an array of some kind."""
    values = np.random.default_rng(seed).integers(-3000, 3000, samples).astype(np.int16)
    match kind:
        case "float32" | "float64":
            return (values / 32768).astype(kind)
        case "loud":
            return np.full(samples, 30_000, np.int16)
        case "reversed":
            return values[::-1]
        case "strided":
            return np.repeat(values, 2)[::2]
        case "big-endian":
            return values.astype(">i2")
        case "read-only":
            values.setflags(write=False)
        case "misaligned":
            memory = np.zeros(2 * samples + 1, np.uint8)
            memory[1:] = values.view(np.uint8)
            return memory[1:].view(np.int16)
    return values


OPERATIONS = st.one_of(
    st.tuples(st.just("push"), st.sampled_from(KINDS), st.one_of(st.integers(0, 3000), st.integers(0, 30_000))),
    st.tuples(st.just("push"), st.sampled_from(["int16", "float32"]), st.sampled_from([1, 199, 1280, 2560, 8960])),
    st.tuples(st.just("chunk"), st.sampled_from([80, 160, 560, 1120]), st.none()),
    st.tuples(st.just("prompt"), st.sampled_from([0, 3]), st.none()),
    st.tuples(st.just("silence"), st.integers(1, 20_000), st.none()),
    st.tuples(st.sampled_from(["end_utterance", "take", "keep", "copy"]), st.none(), st.none()),
)


class Cutter:
    """A chunker that recycles the blocks of the items that are taken."""

    def __init__(self, modules: SimpleNamespace, manifest: Any, chunk_ms: int) -> None:
        self.modules, self.manifest = modules, manifest
        self.chunker = modules.chunker.Chunker(manifest, manifest.chunk(chunk_ms))
        self.items: list[tuple[Any, ...]] = []

    def apply(self, seed: int, operation: str, first: Any, second: Any) -> Any:
        chunker = self.chunker
        match operation:
            case "push":
                return outcome(chunker.accept, sound(seed, second, first))
            case "chunk":
                return chunker.set_chunk(self.manifest.chunk(first))
            case "prompt":
                chunker.prompt = first
            case "silence":
                return outcome(chunker.skip_silence, first)
            case "end_utterance":
                return chunker.end_utterance()
            case "copy":
                self.take(True)
                self.chunker = chunker.copy()
            case "finish":
                return chunker.finish()
            case _:
                self.take(operation == "take")

    def take(self, recycle: bool) -> None:
        for item in self.chunker.take():
            audio, block = item.audio.tobytes(), item.block
            self.items.append((*item._replace(audio=audio, block=block is not None), item.audio.dtype))
            if block is not None and recycle:
                self.chunker.recycle(block)

    def state(self) -> dict[str, Any]:
        """Return all fields, with arrays and blocks as bytes."""
        chunker = self.chunker
        names = {"_at", "_begin", "_block_end", "_chunk_end", "_config", "_direct", "_frame", "_lead", "_number"}
        names |= {"_scale", "chunk", "prompt", "samples", "taken", "ended", "_in_silence"}
        recording = chunker._recording
        return {name: getattr(chunker, name) for name in names} | {
            "filled": chunker._audio[chunker._begin : chunker._at].tobytes(),
            "type": chunker._audio.dtype,
            "queued": len(chunker._queue),
            "spare": [(block.audio.dtype, len(block.chunks)) for block in chunker._spare],
            "recording": [getattr(recording, name) for name in compiled.RecordingFields.__slots__],
        }


@given(st.sampled_from([80, 160, 560]), st.lists(OPERATIONS, min_size=1, max_size=25))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunkers_have_the_same_items_and_fields(twins: Any, manifest: Any, chunk_ms: int, operations: Any) -> None:
    prompted = dataclasses.replace(manifest, languages=LANGUAGES)
    fast, plain = (Cutter(modules, prompted, chunk_ms) for modules in twins)
    for seed, operation in enumerate(
        [*operations, ("take", None, None), ("finish",) * 3, ("take",) * 3, ("push", "int16", 9)]
    ):
        assert fast.apply(seed, *operation) == plain.apply(seed, *operation)
        assert fast.state() == plain.state()
    assert fast.items == plain.items


HOSTILE = {
    "0-d": np.array(3, np.int16),
    "empty": np.zeros(0, np.int16),
    "none": None,
    "list": [1, 2, 3],
    "bytes": b"12345678",
    "objects": np.array([1, None], object),
    "records": np.zeros(4, [("left", np.int16), ("right", np.int16)]),
    "stride of zero": np.broadcast_to(np.int16(7), 2000),
    "negative stride": np.arange(2000, dtype=np.int16)[::-1],
    "two axes": np.ones((2000, 1), np.int16),
    "subclass": np.ones(2000, np.int16).view(np.recarray),
    "unsigned": np.ones(2000, np.uint16),
    "texts": np.array(["a", "b"]),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_chunkers_treat_unexpected_objects_alike(twins: Any, manifest: Any, name: str) -> None:
    states = []
    for modules in twins:
        cutter = Cutter(modules, manifest, 80)
        cutter.apply(0, "push", "int16", 500)
        found = outcome(cutter.chunker.accept, HOSTILE[name])
        cutter.apply(1, "push", "int16", 5000)
        states.append((found, cutter.chunker.samples, len(cutter.chunker._queue)))
    assert states[0] == states[1]


def test_objects_without_values_raise(twins: Any) -> None:
    """As with slots, an attribute that was never set does not exist."""
    fast, _ = twins
    chunker = fast.chunker.Chunker.__new__(fast.chunker.Chunker)
    scheduler = fast.scheduler.Scheduler.__new__(fast.scheduler.Scheduler)
    session = fast.session.StreamSession.__new__(fast.session.StreamSession)
    stream = fast.state.StreamState.__new__(fast.state.StreamState)
    builder = EventBuilder.__new__(EventBuilder)
    for call in (
        lambda: chunker.accept(np.zeros(4, np.int16)),
        lambda: chunker._audio,
        lambda: scheduler.accept(stream, np.zeros(4, np.int16)),
        lambda: scheduler.accept(None, np.zeros(4, np.int16)),
        lambda: scheduler.accept(stream),
        lambda: scheduler._schedule(stream),
        lambda: scheduler.collect(stream),
        lambda: scheduler._take(None, None),
        lambda: scheduler._land_all([stream], [None], None, [0], [False]),
        lambda: scheduler._land_all([], [None]),
        lambda: scheduler._gather([], [], None, None, None, None),
        lambda: session.feed(np.zeros(4, np.int16)),
        lambda: session.events(),
        lambda: builder.step([], 1, (), 0.0, 80),
        lambda: builder.step(),
    ):
        with pytest.raises((AttributeError, TypeError, AssertionError)):
            call()


# -- sessions ----------------------------------------------------------------------------------------------------------

PUSHES = st.tuples(
    st.just("push"),
    st.sampled_from(["int16", "int16", "zeros", "float32", "strided", "big-endian", "read-only", "misaligned"]),
    st.one_of(st.integers(0, 3000), st.sampled_from([1280, 8960, 70_000])),
)
STEPS = st.one_of(
    PUSHES,
    PUSHES,
    st.tuples(st.just("push"), st.just("loud"), st.integers(1, 3000)),
    st.tuples(st.just("chunk"), st.sampled_from([80, 160, 560]), st.none()),
    st.tuples(st.just("invalid"), st.sampled_from(sorted(HOSTILE)), st.none()),
    st.tuples(
        st.sampled_from(["end_utterance", "events", "poll", "collect", "result", "restore"]), st.none(), st.none()
    ),
)


@pytest.fixture(scope="module")
def sparse(fake: Any) -> Any:
    """A fake that emits tokens in few frames only, and fails for loud audio."""

    class Sparse(fake.FakeBackend):
        def submit(self, batch: Any) -> Any:
            step = super().submit(batch)
            found = step.emissions
            columns = [found.tokens, found.frames, found.scores, found.sum_p_alpha]
            kept = [frames % 5 == 0 for frames in found.frames]
            rows = [[row[keep] for row, keep in zip(column, kept, strict=True)] for column in columns]
            step.emissions = found.of_rows(*rows, [bool(np.abs(row).max() > 0.5) for row in batch.audio])
            return step

    return Sparse


class Client:
    """A session of a model whose scheduler runs every chunk before the next operation."""

    def __init__(self, modules: SimpleNamespace, bundle: Any, backend: Any, options: dict[str, Any]) -> None:
        self.model = modules.model.Model(bundle, backend)
        self.options = options
        self.session = self.model.open_session(16000, 1, **options)

    def apply(self, seed: int, operation: str, first: Any, second: Any) -> Any:
        session = self.session
        match operation:
            case "push":
                audio = np.zeros(second, np.int16) if first == "zeros" else sound(seed, second, first)
                found = outcome(session.feed, audio)
            case "invalid":
                found = outcome(session.feed, HOSTILE[first])
            case "chunk":
                found = outcome(session.set_chunk_ms, first)
            case "end_utterance":
                found = outcome(session.end_utterance)
            case "collect":
                found = [(one.text, one.tokens, one.duration, one.decoded) for one in session.collect()]
            case "result":
                found = session.result.text, session.result.tokens, session.decoded, session.steps, session.chunk_ms
            case "finish":
                found = outcome(session.finish)
            case "poll":
                found = outcome(session.poll)
            case "restore":
                found = outcome(self.restore)
            case _:
                found = outcome(session.events)
        return found, outcome(self.session.wait)

    def restore(self) -> Any:
        """Continue the stream in a new session, from its snapshot."""
        self.session.wait()
        events = self.session.events()
        save = self.session.save_live()
        assert save is not None
        snapshot = save()
        self.session.close()
        self.session = self.model.open_session(16000, 1, snapshot=snapshot, **self.options)
        return events

    def counts(self) -> tuple[Any, ...]:
        session = self.session
        silence, preprocessor = session._silence, session.preprocessor
        return (
            (session.steps, session.chunk_ms, session._end_sample, session._prompt, session._received),
            (silence._zeros, preprocessor.received, session._chunker.samples, session._chunker.taken),
            (len(session._stream.items), session._stream.in_flight, session._stream.quiet_until),
        )


@given(st.booleans(), st.booleans(), st.lists(STEPS, min_size=1, max_size=12))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sessions_have_the_same_events_and_fields(
    twins: Any, bundle: Any, sparse: Any, rules: bool, overlap: bool, steps: Any
) -> None:
    options = {"endpoint": Endpoint(240, 2000)} if rules else {}
    clients = []
    for modules in twins:
        backend = sparse(bundle.manifest, capacity=2)
        backend.asynchronous = overlap
        clients.append(Client(modules, bundle, backend, {"chunk_ms": 80, **options}))
    fast, plain = clients
    try:
        for seed, step in enumerate(
            [("push", "int16", 400), *steps, ("finish",) * 3, ("events",) * 3, ("push", "int16", 9)]
        ):
            (found, failed), (expected, expected_failed) = fast.apply(seed, *step), plain.apply(seed, *step)
            assert failed == expected_failed, step
            if failed:  # during the call or after it
                break
            assert found == expected, step
            assert fast.counts() == plain.counts(), step
    finally:
        for client in clients:
            client.model.close()


# -- events ------------------------------------------------------------------------------------------------------------

MIXED = "我用iPhone打 «да», ภาษา! ¿que? (3)"


def event_values(event: Event) -> dict[str, Any]:
    """Return what an event stores; the grouper and the transcript, which are those of its utterance, as their types."""
    values = dict(event.__dict__)
    if (prefix := values.get("_prefix")) is not None:
        values["_prefix"] = (*prefix, prefix.text, prefix.tokens)[1:]
    return values | {"grouper": type(event.grouper)}


def builder_state(builder: EventBuilder) -> dict[str, Any]:
    """Return all fields of a builder and its parts."""
    current = builder._current
    parts = {
        compiled.EventBuilderFields: (builder, {"_current", "_tokenizer"}),
        compiled.UtteranceFields: (current, {"_detokenizer", "grouper", "transcript"}),
        compiled.DetokenizerFields: (current._detokenizer, {"_tokenizer"}),
        compiled.TranscriptFields: (current.transcript, {"_cache"}),
    }
    return {
        f"{fields.__name__}.{name}": getattr(part, name)
        for fields, (part, left_out) in parts.items()
        for name in set(fields.__slots__) - left_out
    }


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_builders_have_the_same_events_and_fields(
    bundle: Any, tagged: Tokenizer, character_tokenizer: Any, data: Any
) -> None:
    tokenizers = {
        "bytes": Tokenizer.of_bundle(bundle),
        "tags": tagged,
        "scripts": character_tokenizer(MIXED),
    }
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    backchannels = data.draw(st.booleans())
    fast, plain = (EventBuilder(tokenizer, "min", 16000, backchannels) for _ in range(2))
    tokens: list[Token] = []
    ids = st.integers(0, tokenizer.vocabulary - 1)
    steps = st.tuples(
        st.one_of(st.lists(ids, min_size=1, max_size=1), st.lists(ids, max_size=3)),
        st.sampled_from([None, None, None, None, "end", "resume"]),
        st.sampled_from([AUTO, "de-DE"]),
        st.floats(0, 1),
    )
    for new, change, language, clipped in data.draw(st.lists(steps, max_size=12)):
        for id_ in new:
            time = 0.08 * len(tokens)
            end = time + 0.08 if clipped < 0.9 else 0.0
            tag = tokenizer.languages.get(id_)
            tokens.append(Token(id_, tokenizer.piece(id_), time, end, -1.0, 0.5, tag, id_ in tokenizer.tags))
        count = len(tokens)
        ends = (UtteranceEnd(count - len(new), 1280 * count, "forced"),) if change == "end" else ()
        if change == "resume":
            builders = fast, plain
            fast, plain = (EventBuilder(tokenizer, "min", 16000, backchannels) for _ in builders)
            for builder, before in zip((fast, plain), builders, strict=True):
                builder.resume(before.state(), tokens)
        found = fast.step(tokens, count, ends, 0.1 * count, 80, language)
        expected = plain._step(tokens, count, ends, 0.1 * count, 80, language)
        assert [*map(event_values, found)] == [*map(event_values, expected)]
        assert builder_state(fast) == builder_state(plain)
        for event in found:
            if event.kind == "partial":
                assert event.grouper is fast._current.grouper
                assert event.__dict__["_prefix"].transcript is fast._current.transcript


def test_events_in_c_leak_nothing(bundle: Any) -> None:
    tokenizer = Tokenizer.of_bundle(bundle)
    id_ = tokenizer.encode("a")[-1]
    tokens = [Token(id_, tokenizer.piece(id_), 0.08 * i, 0.08 * (i + 1), -1.0, 0.5) for i in range(2000)]
    builder, language, chunk_ms = EventBuilder(tokenizer, "min", 16000), "de-" + str(len(tokens)), 10_000 + len(tokens)

    def run(counts: range) -> None:
        for count in counts:
            (event,) = builder.step(tokens, count, (), 0.08 * count, chunk_ms, language)
            assert event.new_text.strip() == "a" and event.tokens_from == count - 1
        with pytest.raises(TypeError):
            builder.step(tokens, counts[-1] + 1, None, 0.0, chunk_ms, language)
        with pytest.raises(TypeError):
            builder.step(tokens, counts[-1] + 1, (), 0.0, chunk_ms, language, None)

    run(range(1, 1001))
    gc.collect()
    shared = builder._current.grouper, builder._current.transcript, builder._current._text_end, language, chunk_ms
    before = [*map(sys.getrefcount, shared)], [*map(sys.getrefcount, tokens)]
    run(range(1001, 2001))
    gc.collect()
    assert [*map(sys.getrefcount, shared)] == before[0]
    # Each token is in the list here and in that of the utterance.
    assert {*map(sys.getrefcount, tokens)} == {max(before[1])}


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_stream_allocates_nothing_that_stays(twins: Any, bundle: Any, fake: Any) -> None:
    fast, _ = twins
    audio, shared = sound(0, 1280, "int16"), bundle.manifest.chunk(80)

    def columns(hypothesis: Any) -> list[list[Any]]:
        return [getattr(hypothesis, name) for name in compiled.HypothesisFields.__slots__]

    def kinds() -> int:
        gc.collect()
        return sum(type(one) in (fast.items.WorkItem, fast.items.StepOutput) for one in gc.get_objects())

    with fast.model.Model(bundle, fake.FakeBackend(bundle.manifest, capacity=2)) as model:
        session = model.open_session(16000, 1, chunk_ms=80)
        scheduler, stream = session._scheduler, session._stream

        def run(count: int) -> None:
            for _ in range(count):
                session.feed(audio)
                session.wait()
                scheduler.collect(stream)
                session.events()

        run(50)
        tracemalloc.start()
        try:
            kept, references, before = kinds(), sys.getrefcount(shared), tracemalloc.get_traced_memory()[0]
            lists = [len(values) for values in columns(stream.hypothesis)]
            run(500)
            grown = sum(len(values) for values in columns(stream.hypothesis)) - sum(lists)
            after = tracemalloc.get_traced_memory()[0]
            assert (kinds(), sys.getrefcount(shared)) == (kept, references)
        finally:
            tracemalloc.stop()
        assert after - before < 50_000 + 60 * grown  # the tokens of a stream stay
        for name in ("_audio", "_block", "_scale", "_recording"):
            assert sys.getrefcount(getattr(session._chunker, name)) < 50


def test_errors_leak_nothing(twins: Any, manifest: Any) -> None:
    """Calls that raise release what they took."""
    fast, _ = twins
    chunker = fast.chunker.Chunker(manifest, manifest.chunk(80))
    chunker.accept(sound(0, 4000, "int16"))
    audio = sound(0, 100, "int16")
    for _ in range(10):
        with pytest.raises(TypeError):
            chunker.accept(3)
    chunker.finish()
    before = sys.getrefcount(audio)
    for _ in range(100):
        with pytest.raises(StreamError):
            chunker.accept(audio)
    assert sys.getrefcount(audio) == before


def test_cycles_of_streams_are_collected(twins: Any, manifest: Any) -> None:
    fast, _ = twins

    def count() -> int:
        gc.collect()
        return sum(type(one) is fast.state.StreamState for one in gc.get_objects())

    before = count()
    for _ in range(20):
        stream = fast.state.StreamState(fast.chunker.Chunker(manifest, manifest.chunk(80)), 0)
        stream.source = stream
        stream.items.append(stream)
        del stream
    assert count() == before


def test_a_lock_that_is_held_delays_accept_only_for_whole_chunks(twins: Any, bundle: Any, fake: Any) -> None:
    """Audio that completes no chunk needs no lock; a chunk is enqueued with it."""
    fast, _ = twins
    with fast.model.Model(bundle, fake.FakeBackend(bundle.manifest, capacity=2)) as model:
        session = model.open_session(16000, 1, chunk_ms=80)
        session.feed(sound(0, 10, "int16"))
        with session._scheduler._lock:
            session.feed(sound(0, 10, "int16"))
            thread = threading.Thread(target=session.feed, args=(sound(0, 2000, "int16"),))
            thread.start()
            assert session._stream.in_flight == 0 and len(session._stream.items) == 0
        thread.join()
        session.wait()
        assert session._chunker.taken == 2


def test_poll_returns_none_until_chunks_are_processed_and_waits_for_a_lock(twins: Any, bundle: Any, fake: Any) -> None:
    """It reads nothing while another thread holds the lock."""
    for modules in twins:
        with modules.model.Model(bundle, fake.FakeBackend(bundle.manifest, capacity=2)) as model:
            session = model.open_session(16000, 1, chunk_ms=80)
            stream, found = session._stream, list[Any]()
            session.feed(sound(0, 3000, "int16"))
            session.wait()
            with session._scheduler._lock:
                thread = threading.Thread(target=lambda poll=session.poll, found=found: found.append(poll()))
                thread.start()
                thread.join(0.05)
                assert thread.is_alive()
                stream.in_flight += 1
            thread.join()
            assert found == [None] and session.poll() is None
            stream.in_flight -= 1
            assert session.poll() and session.poll() == []
            stream.error = StreamError("it failed.")
            with pytest.raises(StreamError, match="it failed"):
                session.poll()
            stream.error = None


# -- without the compiled methods --------------------------------------------------------------------------------------


def test_the_tests_of_streams_pass_with_the_python_methods(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    names = "test_chunker.py", "test_reference.py", "test_scheduler.py", "test_session.py"
    files = [str(folder / name) for name in names]
    code = (
        f"import sys; sys.modules[{HOST!r}] = None\n"
        "import pytest\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-m', 'not slow', '-n', '0', *{files!r}]))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
