"""Streams that are saved and continued by another session without their earlier audio, as servers do it.

The oracle is the stream that was never interrupted: all events must be equal, except the amount of audio received.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.bundle import Bundle, LanguageConfig
from nemostream.runtime.audio.vad import VadFilter
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.streaming.live import LiveStream
from nemostream.runtime.text.endpointing import Endpoint

FRAME = 1280
RULES = {
    "silence": Endpoint(silence_ms=240),
    "reset": Endpoint(silence_ms=400, decoder="reset"),
    "length": Endpoint(silence_ms=None, max_utterance_ms=1000),
    "none": Endpoint(silence_ms=None),
}
LANGUAGES = LanguageConfig("de-DE", {"en-US": 0, "de-DE": 3, "fr-FR": 4}, 5)


class Detector:
    """A substitute for silero's graph: the probability of speech is a checksum of all audio so far."""

    def speech_probability(self, window_N: np.ndarray, state: np.ndarray) -> tuple[float, np.ndarray]:
        value = zlib.crc32(window_N.tobytes(), zlib.crc32(state.tobytes()))
        return (0.9 if value % 100 < 20 else 0.0), np.random.default_rng(value).standard_normal(state.shape, np.float32)


@pytest.fixture(scope="module")
def prompted(tagged_bundle) -> Bundle:
    return Bundle(tagged_bundle.path, dataclasses.replace(tagged_bundle.manifest, languages=LANGUAGES))


@pytest.fixture(scope="module")
def telling(fake, tagged):
    """A fake whose tokens, of all kinds, are a checksum of all audio; frames below 0.01 have none."""

    class Telling(fake.FakeBackend):
        def submit(self, batch):
            starts = [self.position[slot] for slot in batch.slots.tolist()]
            step = super().submit(batch)
            tokens, frames = [], []
            rows = zip(*(getattr(step.emissions, name) for name in ("tokens", "frames")), strict=True)
            for audio, start, (digits, at) in zip(batch.audio, starts, rows, strict=True):
                row = []
                for frame in sorted(set(at.tolist())):
                    if np.abs(audio[FRAME * (frame - start) : FRAME * (frame - start + 1)]).max() > 0.01:
                        row += [(7 * digit % tagged.vocabulary, frame) for digit in digits[at == frame][:2].tolist()]
                tokens.append(np.array([token for token, _ in row], np.int32))
                frames.append(np.array([frame for _, frame in row], np.int64))
            scores = tuple(-0.01 * (row + 1).astype(np.float32) for row in tokens)
            step.emissions = step.emissions.of_rows(tokens, frames, scores, scores, step.emissions.failed)
            return step

    return Telling


def operate(
    model: Model, rate: int, operations: list[tuple[str, Any]], options: dict[str, Any], saves: random.Random | None
) -> tuple[list[list[tuple[Any, ...]]], int]:
    """Return the fields of the events of each operation, and how often the stream was continued by a new session.

    With two lanes, partials depend on which lane is faster, and so do the increments of the final after them, finals
    without text, which withdraw partials, and the numbers of utterances after these.
    """
    session = model.open_session(rate, 1, **options)
    stream, found, continued, options, utterance = LiveStream(session), [], 0, dict(options), 0
    one_lane = not options.get("final_chunk_ms")
    for name, value in [*operations, ("finish", None)]:
        if name == "push":
            events = []
            while len(value):
                size = len(value) if saves is None else saves.choice([1, 100, 1279, 5000])
                events += stream.push_events(value[:size])
                value = value[size:]
        elif name == "end":
            events = stream.end_utterance()
        elif name == "finish":
            events = stream.finish_events()
        else:
            events = []
            if name == "chunk":
                stream.set_chunk_ms(value)
            elif name == "final":
                stream.set_final_chunk_ms(value)
            else:
                stream.set_language(value)
            options[{"chunk": "chunk_ms", "final": "final_chunk_ms", "language": "language"}[name]] = value
        for event in events:
            assert event.utterance == (utterance := max(utterance, event.utterance))
        found.append([fields(event, one_lane) for event in events if one_lane or event.kind == "end" or is_text(event)])
        if saves is not None and (complete := session.save_live()) is not None:
            data = snapshot.dump({"a": 1}, complete())
            options["final_chunk_ms"] = session.final_chunk_ms
            stream.close()
            about, saved = snapshot.load(io.BytesIO(data), len(data))
            assert about == {"a": 1}
            session = model.open_session(rate, 1, snapshot=saved, **options)
            stream, continued = LiveStream(session), continued + 1
    stream.close()
    return found, continued


def is_text(event: Any) -> bool:
    return event.kind == "final" and bool(event.text)


def fields(event: Any, one_lane: bool) -> tuple[Any, ...]:
    names = ("kind", "text", "stable", "start", "end", "chunk_ms", "reason", "language", "set_language")
    others = ("utterance", "text_from", "tokens_from", "new_text", "new_tokens", "words_from", "new_words")
    return tuple(getattr(event, name) for name in (*names, "tokens", "words", *(others if one_lane else ())))


def sound(seed: int, samples: int) -> np.ndarray:
    """Return int16 or float noise with quiet parts."""
    rng = np.random.default_rng(seed)
    levels = np.repeat(rng.choice([0.001, 0.1], 40), samples // 40 + 1)[:samples]
    audio = (rng.standard_normal(samples) * levels).astype(np.float32)
    audio = np.clip(audio, -1, 1)
    return (audio * 32767).astype(np.int16) if seed % 3 == 0 else audio


PUSH = st.tuples(st.just("push"), st.builds(sound, st.integers(0, 99), st.sampled_from([1, 400, 5000, 30_000, 60_000])))
SILENCE = st.tuples(st.just("push"), st.builds(np.zeros, st.sampled_from([100, 8000, 200_000]), st.just(np.float32)))
OPERATION = st.one_of(
    PUSH,
    PUSH,
    PUSH,
    SILENCE,
    st.tuples(st.just("end"), st.none()),
    st.tuples(st.just("chunk"), st.sampled_from([80, 160])),
    st.tuples(st.just("language"), st.sampled_from(["en-US", "fr-FR"])),
)


@given(
    operations=st.lists(OPERATION, max_size=8),
    rule=st.sampled_from(sorted(RULES)),
    rate=st.sampled_from([16000, 16000, 8000, 44100]),
    options=st.sampled_from([{}, {"phrases": ["go on"]}, {"vad": True}]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_stream_that_is_saved_at_any_time_has_the_same_events(
    prompted, telling, operations, rule, rate, options, seed
) -> None:
    with Model(prompted, telling(prompted.manifest, capacity=2)) as model:
        model._new_vad_filter = lambda: VadFilter(Detector())
        options = {"chunk_ms": 80, "endpoint": RULES[rule], **options}
        expected, _ = operate(model, rate, operations, options, None)
        found, continued = operate(model, rate, operations, options, random.Random(seed))
        assert found == expected
        assert continued == len(operations)
        assert len(model._scheduler._free) == 2


@given(
    operations=st.lists(st.one_of(OPERATION, st.tuples(st.just("final"), st.just(1120))), max_size=8),
    rule=st.sampled_from(sorted(RULES)),
    sizes=st.sampled_from([(80, 560), (80, 1120), (160, 560)]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_stream_with_two_lanes_that_is_saved_has_the_same_finals(
    prompted, telling, operations, rule, sizes, seed
) -> None:
    with Model(prompted, telling(prompted.manifest, capacity=5)) as model:
        options = {"chunk_ms": sizes[0], "final_chunk_ms": sizes[1], "endpoint": RULES[rule]}
        expected, _ = operate(model, 16000, operations, options, None)
        found, _ = operate(model, 16000, operations, options, random.Random(seed))
        assert found == expected
        assert len(model._scheduler._free) == 5


@pytest.mark.parametrize("options", [{"chunk_ms": 80}, {"chunk_ms": 160, "final_chunk_ms": 1120}])
@pytest.mark.parametrize("rate", [16000, 8000])
def test_a_model_continues_exactly(demo_bundle, heldout, options, rate) -> None:
    """Tokens, scores and words of the demo model are those of the stream that was not interrupted."""
    pause = (np.random.default_rng(0).standard_normal(20_000) * 1e-3).astype(np.float32)
    speech = np.concatenate([part for audio in heldout[:3] for part in (audio, pause)])
    operations = [("push", speech[at : at + 7000]) for at in range(0, len(speech), 7000)]
    with nemostream.load(demo_bundle.path, capacity=4) as model:
        options = options | {"endpoint": Endpoint()}
        expected, _ = operate(model, rate, operations, options, None)
        found, continued = operate(model, rate, operations, options, random.Random(0))
    assert found == expected
    assert continued > len(operations) // 2
    assert sum(event[0] == "final" and bool(event[1]) for event in itertools.chain(*found)) >= 3
