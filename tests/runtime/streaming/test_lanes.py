"""Streams with an accurate lane: finals equal those of a stream with its chunk size, no word is lost or repeated.

The oracle of a real model is a stream of one chunk size, which receives the audio up to the end of the utterance. In
other tests a fake emits a word per frame, whatever the chunk size is, so both lanes and all branches must agree.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import pickle
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.errors import CapacityError, OptionError, StreamError
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.streaming.snapshot import Checkpointer
from nemostream.runtime.text.endpointing import Endpoint

FRAME, LEAD = 1280, 1081
WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "again"]
RULES = {
    "silence": Endpoint(silence_ms=240),
    "long silence": Endpoint(silence_ms=800),
    "length": Endpoint(silence_ms=None, max_utterance_ms=1000),
    "none": Endpoint(silence_ms=None),
}


@pytest.fixture(scope="module")
def speaking(fake, bundle):
    """A fake that emits the word of each frame: word k for samples of (k + 1) / 100.

    With large chunks it emits words up to `early` frames earlier. It fails if `fails_at` returns True for a chunk size,
    slot and frame.
    """

    class Speaking(fake.FakeBackend):
        early = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tokenizer = nemostream.runtime.text.tokenizer.Tokenizer.of_bundle(bundle)
            self.words = [tokenizer.encode(word) for word in WORDS]
            self.fails_at = lambda chunk_ms, slot, frame: False
            self.copied: list[tuple[int, int]] = []

        def copy(self, sources, targets):
            super().copy(sources, targets)
            self.copied += zip(sources.tolist(), targets.tolist(), strict=True)

        def submit(self, batch):
            starts = [self.position[slot] for slot in batch.slots.tolist()]
            step = super().submit(batch)
            early = self.early if batch.chunk.frames >= 7 else 0
            tokens, frames, failed = [], [], []
            for slot, row, start, emitted in zip(
                batch.slots.tolist(), batch.audio, starts, step.emissions.frames, strict=True
            ):
                found = []
                for frame in sorted(set(emitted.tolist())):
                    word = round(float(row[(frame - start) * FRAME + FRAME // 2]) * 100) - 1
                    if word >= 0:
                        found += [(token, max(frame - early, start)) for token in self.words[word]]
                tokens.append(np.array([token for token, _ in found], np.int32))
                frames.append(np.array([frame for _, frame in found], np.int64))
                failed.append(self.fails_at(batch.chunk.ms, slot, start))
            scores = [-(1 + row) / 32 for row in tokens]
            step.emissions = step.emissions.of_rows(tokens, frames, scores, [1 - row for row in scores], failed)
            return step

    return Speaking


def spoken(words: list[int | None]) -> np.ndarray:
    """Return audio with a word, or none, in each frame after the lead silence."""
    levels = np.array([0.001 if word is None else (word + 1) / 100 for word in words], np.float32)
    return np.repeat(levels, FRAME)[LEAD:] if len(levels) else levels


def operate(stream: Any, operations: list[tuple[str, Any]], pushes: random.Random | None) -> list[Any]:
    """Apply operations to a live stream; return its events, a list for each operation."""
    events = []
    for name, value in operations:
        found = []
        if name == "push":
            audio = spoken(value)
            while len(audio):
                size = len(audio) if pushes is None else pushes.choice([1, 100, 1280, 5000, 30_000])
                found += stream.push_events(audio[:size])
                audio = audio[size:]
        elif name == "silence":
            found += stream.push_events(np.zeros(value, np.float32))
        elif name == "end":
            found += stream.end_utterance()
        elif name == "chunk":
            stream.set_chunk_ms(value)
        events.append(found)
    events.append(stream.finish_events())
    return events


def finals(events: list[list[Any]]) -> list[tuple[Any, ...]]:
    return [
        (event.kind, event.utterance, event.text, event.start, event.reason, event.language)
        for event in itertools.chain(*events)
        if event.kind in ("final", "end")
    ]


def check_grammar(events: list[Any]) -> None:
    """Partials only revise what is not stable, finals keep it, and `text_from` and so on lead to the whole text."""
    text, tokens, words, stable, utterance = "", (), (), "", 0
    for event in events:
        if event.kind == "end":
            text, tokens, words, stable = "", (), (), ""
            continue
        assert event.utterance >= utterance
        utterance = event.utterance
        assert event.text.startswith(event.stable) and event.stable.startswith(stable)
        text = text[: event.text_from] + event.new_text
        tokens = tokens[: event.tokens_from] + event.new_tokens
        words = words[: event.words_from] + event.new_words
        assert (text, tokens, words, event.stable_length) == (event.text, event.tokens, event.words, len(event.stable))
        assert " ".join(word.text for word in words) == text
        copied = pickle.loads(pickle.dumps(event))
        assert (copied.text, copied.words, copied.new_words) == (event.text, event.words, event.new_words)
        stable = event.stable


UTTERANCE = st.lists(st.one_of(st.none(), st.integers(0, len(WORDS) - 1)), max_size=30)
OPERATIONS = st.one_of(
    st.tuples(st.just("push"), UTTERANCE),
    st.tuples(st.just("push"), st.builds(lambda count: [None] * count, st.integers(0, 20))),
    st.tuples(st.just("push"), UTTERANCE),
    st.tuples(st.just("silence"), st.integers(1, 40_000)),
    st.tuples(st.just("end"), st.none()),
    st.tuples(st.just("chunk"), st.sampled_from([80, 160])),
)


@given(
    operations=st.lists(OPERATIONS, max_size=10),
    rule=st.sampled_from(sorted(RULES)),
    sizes=st.sampled_from([(80, 560), (80, 1120), (160, 560), (160, 1120), (560, 1120)]),
    overlap=st.booleans(),
    seed=st.none() | st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_lanes_that_agree_give_the_events_of_one(bundle, speaking, operations, rule, sizes, overlap, seed) -> None:
    """The ends and finals of each operation, and the text after it, whatever the pushes are."""
    chunk_ms, final_chunk_ms = sizes
    backend = speaking(bundle.manifest, capacity=5)
    backend.asynchronous = overlap
    with Model(bundle, backend) as model:
        options: dict[str, Any] = {"chunk_ms": chunk_ms, "endpoint": RULES[rule]}
        with model.stream(**options) as stream:
            expected = operate(stream, operations, None)
            result = stream.result
        with model.stream(**options, final_chunk_ms=final_chunk_ms) as stream:
            found = operate(stream, operations, None if seed is None else random.Random(seed))
            joined = stream.result
        assert finals(found) == finals(expected)
        for one, other in zip(found, expected, strict=True):
            texts = [[event.text for event in events if event.kind == "partial"] for events in (one, other)]
            if texts[1]:
                assert texts[0][-1] == texts[1][-1]
        check_grammar([*itertools.chain(*found)])
        assert [event.chunk_ms for event in itertools.chain(*found) if event.kind == "final"] == [
            final_chunk_ms for kind, *_ in finals(found) if kind == "final"
        ]
        assert [token.id for token in joined.tokens] == [token.id for token in result.tokens]
        assert (joined.text, joined.final, joined.duration) == (result.text, True, result.duration)
        assert len(model._scheduler._free) == 5


@given(
    words=st.lists(st.tuples(st.integers(0, len(WORDS) - 1), st.integers(3, 14)), min_size=1, max_size=12),
    rule=st.sampled_from(["silence", "long silence", "length"]),
    early=st.integers(0, 2),
    chunk_ms=st.sampled_from([80, 160]),
    seed=st.none() | st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_word_is_lost_or_repeated(bundle, speaking, words, rule, early, chunk_ms, seed) -> None:
    """The accurate lane emits words earlier than the fast one, also across the end of an utterance.

    Words are at least three frames apart, and equal words differ from their neighbours.
    """
    spoken_words = [word for word, _ in itertools.groupby(word for word, _ in words)]
    gaps = [gap for _, gap in words][: len(spoken_words)]
    frames: list[int | None] = [None] * 4
    for word, gap in zip(spoken_words, gaps, strict=True):
        frames += [word, *[None] * (gap - 1)]
    backend = speaking(bundle.manifest, capacity=3)
    backend.early = early
    with (
        Model(bundle, backend) as model,
        model.stream(chunk_ms=chunk_ms, final_chunk_ms=1120, endpoint=RULES[rule]) as stream,
    ):
        events = operate(stream, [("push", frames)], None if seed is None else random.Random(seed))
        found = " ".join(text for kind, _, text, *_ in finals(events) if kind == "final" and text)
        assert found.split() == [WORDS[word] for word in spoken_words], (words, rule, early, chunk_ms, finals(events))
        assert stream.result.text == found
        check_grammar([*itertools.chain(*events)])


def plain_tokens(model: Model, audio: np.ndarray, chunk_ms: int) -> list[Any]:
    with model.stream(chunk_ms=chunk_ms) as stream:
        stream.push(audio)
        return list(stream.finish().tokens)


@pytest.fixture(scope="module")
def demo(demo_bundle):
    with nemostream.load(demo_bundle.path, capacity=6) as model:
        yield model


@pytest.fixture(scope="module")
def speech(heldout) -> np.ndarray:
    """Three sentences with pauses, which are not digital silence."""
    rng = np.random.default_rng(0)
    pause = (rng.standard_normal(20_000) * 1e-3).astype(np.float32)
    return np.concatenate([part for audio in heldout[:3] for part in (audio, pause)])


@pytest.mark.parametrize("pushes", [None, 0, 1])
@pytest.mark.parametrize("sizes", [(80, 1120), (160, 560)])
def test_finals_of_a_model_equal_those_of_a_plain_stream(demo, speech, sizes, pushes) -> None:
    """Token for token, between the ends of two utterances: of a stream that ends with the utterance's step."""
    chunk_ms, final_chunk_ms = sizes
    step = FRAME * chunk_ms // 80
    steps = [speech[: step - LEAD], *(speech[at : at + step] for at in range(step - LEAD, len(speech), step))]
    received, ends = 0, []  # samples received when each utterance ended, and where it ended
    with demo.stream(chunk_ms=chunk_ms, endpoint=Endpoint()) as stream:
        for part in steps:
            received += len(part)
            ends += [(received, event.start) for event in stream.push_events(part) if event.kind == "end"]
        ends += [(len(speech), event.start) for event in stream.finish_events() if event.kind == "end"]
    expected, begin = [], 0.0
    for received, end in ends:
        tokens = plain_tokens(demo, speech[:received], final_chunk_ms)
        last = end if received < len(speech) else np.inf
        expected.append([(token.id, token.time, token.score) for token in tokens if begin <= token.time < last])
        begin = end
    assert len(ends) >= 3 and all(expected[:-1])
    rng, found = None if pushes is None else random.Random(pushes), []
    with demo.stream(chunk_ms=chunk_ms, final_chunk_ms=final_chunk_ms, endpoint=Endpoint()) as stream:
        events, at = [], 0
        while at < len(speech):
            size = len(speech) if rng is None else rng.choice([500, 1280, 7000, 40_000])
            events += stream.push_events(speech[at : at + size])
            at += size
        events += stream.finish_events()
    assert [event.start for event in events if event.kind == "end"] == [end for _, end in ends]
    for event in events:
        if event.kind == "end":
            found.append([])
        elif event.kind == "final":
            assert event.chunk_ms == final_chunk_ms
            found_tokens = [(token.id, token.time, token.score) for token in event.tokens]
            wanted = expected[len(found)]
            # Tags and punctuation between two utterances belong to neither.
            at = wanted.index(found_tokens[0])
            assert wanted[at : at + len(found_tokens)] == found_tokens
            rest = wanted[:at] + wanted[at + len(found_tokens) :]
            tokenizer = demo.context.tokenizer
            assert all(id_ in tokenizer.invisible or tokenizer.closing_punctuation[id_] for id_, _, _ in rest)
    assert len(found) == len(ends)
    check_grammar(events)


def test_without_ends_the_result_is_that_of_the_large_chunks(demo, speech) -> None:
    with demo.stream(chunk_ms=80, final_chunk_ms=1120) as stream:
        results = stream.push(speech)
        result = stream.finish()
    assert [(token.id, token.score) for token in result.tokens] == [
        (token.id, token.score) for token in plain_tokens(demo, speech, 1120)
    ]
    assert len(results) == stream.steps and all(not one.final for one in results)
    assert result.text == demo.context.tokenizer.decode([token.id for token in result.tokens])


@pytest.mark.parametrize("samples", [0, 1, 500, 3000, 16_000])
@pytest.mark.parametrize("level", [0, 1e-3])
def test_short_and_silent_streams(demo, samples, level) -> None:
    audio = (np.random.default_rng(0).standard_normal(samples) * level).astype(np.float32)
    with demo.stream(chunk_ms=80, final_chunk_ms=1120, endpoint=Endpoint()) as stream:
        events = stream.push_events(audio)
        events += stream.end_utterance() + stream.finish_events()
    assert [(event.kind, event.reason) for event in events] == [("end", "forced"), ("end", "finish")]
    assert stream.result.text == "" and stream.result.final


def test_asynchronous_streams_have_the_same_finals(demo, speech) -> None:
    options: dict[str, Any] = {"chunk_ms": 80, "final_chunk_ms": 1120, "endpoint": Endpoint()}

    async def listen() -> list[Any]:
        async with demo.astream(**options) as stream:
            events = []
            for at in range(0, len(speech), 1280):
                events += await stream.push_events(speech[at : at + 1280])
            return events + await stream.finish_events()

    found = asyncio.run(listen())
    expected = [*demo.listen(speech, **options)]
    assert finals([found]) == finals([expected]) and len(finals([found])) >= 6
    check_grammar(found)


def test_streams_with_phrases_and_voice_activity_detection(demo, speech) -> None:
    """Both lanes have the phrases and the decisions of one detector."""
    options: dict[str, Any] = {"phrases": ["voicemail"], "vad": True}
    with demo.stream(chunk_ms=1120, **options) as stream:
        stream.push(speech)
        expected = stream.finish()
    with demo.stream(chunk_ms=80, final_chunk_ms=1120, **options) as stream:
        for at in range(0, len(speech), 3000):
            stream.push(speech[at : at + 3000])
        assert stream.finish().tokens == expected.tokens and expected.tokens


# -- faults, and changes while a stream runs ---------------------------------------------------------------------------

SENTENCE: list[int | None] = [None] * 3 + [word for k in range(6) for word in (k, None, None)]
PAUSE: list[int | None] = [None] * 14
TEXT = " ".join(WORDS[:6])


@pytest.fixture
def backend(speaking, bundle):
    return speaking(bundle.manifest, capacity=4)


@pytest.fixture(params=[False, True], ids=["no overlap", "overlap"])
def model(request, bundle, backend):
    backend.asynchronous = request.param
    with Model(bundle, backend) as model:
        yield model


def texts(events: list[Any]) -> list[tuple[str, int]]:
    return [(event.text, event.chunk_ms) for event in events if event.kind == "final"]


OPTIONS: dict[str, Any] = {"chunk_ms": 80, "final_chunk_ms": 560, "endpoint": RULES["silence"]}


def test_an_accurate_lane_that_fails_leaves_the_fast_one(model, backend) -> None:
    """Its finals have the fast text and the chunk size of the fast lane, and are reported; nothing is lost."""
    fallbacks: list[Exception] = []
    model.watch(None, on_fallback=fallbacks.append)
    with model.stream(**OPTIONS) as stream:
        events = stream.push_events(spoken(SENTENCE + PAUSE))
        backend.fails_at = lambda chunk_ms, slot, frame: chunk_ms == 560
        for _ in range(3):
            events += stream.push_events(np.repeat(frames_of(SENTENCE + PAUSE), FRAME))
        events += stream.finish_events()
    assert texts(events) == [(TEXT, 560), *[(TEXT, 80)] * 3]
    assert len(fallbacks) == 3 and all(isinstance(error, StreamError) for error in fallbacks)
    check_grammar(events)
    assert sorted(model._scheduler._free) == [0, 1, 2, 3]


def test_a_branch_that_fails_concerns_one_final(model, backend, speaking) -> None:
    fallbacks: list[Exception] = []
    model.watch(None, on_fallback=fallbacks.append)
    copy = backend.copy
    with model.stream(**OPTIONS) as stream:
        calls = itertools.count()

        def failing(sources, targets):
            if next(calls) == 1:
                raise RuntimeError("the copy failed")
            copy(sources, targets)

        backend.copy = failing
        events = []
        for _ in range(3):
            events += stream.push_events(np.repeat(frames_of(SENTENCE + PAUSE), FRAME))
        events += stream.finish_events()
    assert texts(events) == [(TEXT, 560), (TEXT, 80), (TEXT, 560)]
    assert [str(error) for error in fallbacks] == ["the model failed: RuntimeError: the copy failed"]
    check_grammar(events)


def frames_of(words: list[int | None]) -> np.ndarray:
    return np.array([0.001 if word is None else (word + 1) / 100 for word in words], np.float32)


def test_a_lane_is_enabled_and_disabled_while_a_stream_runs(model) -> None:
    sentence = np.repeat(frames_of(SENTENCE + PAUSE), FRAME)
    with model.stream(chunk_ms=80, endpoint=RULES["silence"]) as stream:
        assert stream.final_chunk_ms is None
        events = stream.push_events(sentence)
        events += stream.push_events(sentence[: 10 * FRAME])
        stream.set_final_chunk_ms(560)  # from the next utterance on
        events += stream.push_events(sentence[10 * FRAME :])
        assert stream.final_chunk_ms == 560
        events += stream.push_events(sentence)
        stream.set_final_chunk_ms(1120)
        events += stream.push_events(sentence)
        events += stream.push_events(sentence[: 10 * FRAME])
        stream.set_final_chunk_ms(None)
        assert stream.final_chunk_ms is None and len(model._scheduler._free) >= 2
        events += stream.push_events(sentence[10 * FRAME :])
        events += stream.push_events(sentence)
        stream.set_final_chunk_ms(560)
        events += stream.push_events(sentence)
        events += stream.push_events(sentence)
        events += stream.finish_events()
        result = stream.result
    sizes = [80, 80, 560, 1120, 80, 80, 80, 560]
    assert texts(events) == [(TEXT, size) for size in sizes]
    assert [event.utterance for event in events if event.kind == "final"] == list(range(8))
    assert result.text == " ".join([TEXT] * 8)
    check_grammar(events)
    with pytest.raises(StreamError, match="was finished"):
        stream.set_final_chunk_ms(560)
    assert len(model._scheduler._free) == 4


def test_both_lanes_and_a_slot_for_branches_are_counted(model) -> None:
    """Of four slots, one is reserved for branches while a stream has an accurate lane."""
    with model.stream(**OPTIONS), model.stream(chunk_ms=80) as other:
        with pytest.raises(CapacityError, match="3 of 4 slots are taken and the others are reserved for finals"):
            model.stream(chunk_ms=80)
        with pytest.raises(CapacityError, match="reserved for finals"):
            other.set_final_chunk_ms(560)
        other.push(frames_of([1] * 100))  # it continues
    with model.stream(), model.stream(), model.stream():
        with pytest.raises(CapacityError):
            model.stream(**OPTIONS)
        model.stream().close()


def test_branches_wait_for_a_slot(model, backend) -> None:
    """All final of many utterances at once need the reserved slot in turn."""
    sentence = np.repeat(frames_of(SENTENCE + PAUSE), FRAME)
    with model.stream(**OPTIONS) as stream, model.stream(chunk_ms=80) as other:
        events = stream.push_events(np.tile(sentence, 8))
        assert texts(events) == [(TEXT, 560)] * 8
        assert {target for _, target in backend.copied} <= {2, 3} and len(backend.copied) == 8
        other.push(sentence)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_ms": 80, "final_chunk_ms": 90}, "90"),
        ({"chunk_ms": 560, "final_chunk_ms": 80}, "final_chunk_ms is 80"),
    ],
)
def test_invalid_sizes(model, options, message) -> None:
    with pytest.raises(OptionError, match=message):
        model.stream(**options)
    with model.stream(chunk_ms=options["chunk_ms"]) as stream, pytest.raises(OptionError, match=message):
        stream.set_final_chunk_ms(options["final_chunk_ms"])
    assert len(model._scheduler._free) == 4


# -- snapshots ---------------------------------------------------------------------------------------------------------


def saved_and_restored(model: Model, path: Path, audio: np.ndarray, at: int, **options: Any) -> list[Any]:
    """Return the final results of a stream, and of one that was saved after `at` samples and restored."""
    results = []
    with closing(model.open_session(16000, 1, checkpointer=Checkpointer(path, {}), **options)) as session:
        session.feed(audio[:at])
        session.wait()
        assert session.saveable
        Checkpointer(path, {}).save(session.save())
        session.feed(audio[at:])
        session.finish()
        session.wait()
        results.append(session.final())
    with closing(model.open_session(16000, 1, checkpointer=Checkpointer(path, {}), **options)) as session:
        assert session.replaying
        for part in (audio[:at], audio[at:]):  # blocks as before, as when a file is read again
            session.feed(part)
            session.wait()
        session.finish()
        session.wait()
        results.append(session.final())
    path.unlink()
    return results


@pytest.mark.parametrize("at", [1, 1279, 10_000, 30_000, 45_000, 47_000, 60_000, 90_000])
def test_a_stream_with_lanes_is_saved_and_restored(model, backend, tmp_path, at) -> None:
    sentence = np.repeat(frames_of(SENTENCE + PAUSE), FRAME)
    audio = np.tile(sentence, 3)
    audio[50_000:58_000] = 0  # digital silence
    with model.stream(**OPTIONS) as stream:
        stream.push(audio)
        expected = stream.finish()
    assert expected.text and saved_and_restored(model, tmp_path / "state", audio, at, **OPTIONS) == [expected] * 2


@pytest.mark.parametrize("options", [{}, {"vad": True, "phrases": ["tone"]}])
def test_a_stream_of_a_model_with_lanes_is_saved_and_restored(demo, speech, tmp_path, options) -> None:
    options = {**options, "chunk_ms": 80, "final_chunk_ms": 1120, "endpoint": Endpoint()}
    with demo.stream(**options) as stream:
        stream.push(speech)
        expected = stream.finish()
    for at in (20_000, 75_000, 100_001):
        assert saved_and_restored(demo, tmp_path / "state", speech, at, **options) == [expected] * 2


def test_a_lane_that_failed_is_not_saved(model, backend, tmp_path) -> None:
    checkpointer = Checkpointer(tmp_path / "state", {})
    with closing(model.open_session(16000, 1, checkpointer=checkpointer, **OPTIONS)) as session:
        session.feed(np.repeat(frames_of(SENTENCE), FRAME))
        session.wait()
        assert session.saveable
        backend.fails_at = lambda chunk_ms, slot, frame: chunk_ms == 560
        session.feed(np.repeat(frames_of(SENTENCE + PAUSE), FRAME))
        session.wait()
        assert not session.saveable


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("lane", "counts", np.array([99, 0, 0, 0, 0])),
        ("lane", "counts", np.array([0, 0, 0, 99, 0])),
        ("lane", "outputs", np.array([[5, 8960], [4, 17_920]])),
        ("lane", "outputs", np.array([[99, 8960]])),
        ("lane", "before", np.array([[1, -9]])),
        ("lane", "found", np.array([99, 1])),
        ("lane", "found", np.array([5])),
        ("joined", "ids", np.array([1 << 40])),
        ("joined", "values", np.array([[np.nan] * 4])),
        ("lanechunker", "counts", np.zeros(7, np.int64)),
        ("lanehypothesis", "tokens", np.array([1], np.int32)),
    ],
)
def test_damaged_snapshots_of_lanes_are_rejected(model, tmp_path, part, name, value) -> None:
    path = tmp_path / "state"
    audio = np.repeat(frames_of(SENTENCE + PAUSE + SENTENCE), FRAME)
    with closing(model.open_session(16000, 1, checkpointer=Checkpointer(path, {}), **OPTIONS)) as session:
        session.feed(audio)
        session.wait()
        saved = session.save()
    parts = {key: dict(arrays) for key, arrays in saved.parts.items()}
    parts[part][name] = value
    Checkpointer(path, {}).save(dataclasses.replace(saved, parts=parts))
    with pytest.raises(OptionError, match="is damaged"):
        model.open_session(16000, 1, checkpointer=Checkpointer(path, {}), **OPTIONS)
    assert len(model._scheduler._free) == 4


def test_a_transcription_with_lanes_is_resumed_only_with_the_same_size(demo, speech, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    path = tmp_path / "state"
    options: dict[str, Any] = {"chunk_ms": 80, "final_chunk_ms": 1120, "resume": path, "keep_state": True}
    expected = demo.transcribe(speech, chunk_ms=1120)
    assert demo.transcribe(speech, **options).tokens == expected.tokens and path.exists()
    assert demo.transcribe(speech, **options).tokens == expected.tokens
    with pytest.raises(OptionError, match="final_chunk_ms 1120, not 560"):
        demo.transcribe(speech, **options | {"final_chunk_ms": 560})
