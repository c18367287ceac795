"""Sessions: what results and events report between steps, and that invalid audio changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from nemostream.errors import AudioError, StreamError
from nemostream.runtime.audio.preprocessor import BLOCK
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.live import EventStream
from nemostream.runtime.text.endpointing import Endpoint

FRAME, LEAD = 1280, 1081
TIMEOUT = 20


def noise(seed: int, samples: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


@pytest.fixture
def backend(bundle: Any, fake: Any) -> Any:
    return fake.FakeBackend(bundle.manifest, capacity=2)


@pytest.fixture(params=[False, True], ids=["no overlap", "overlap"])
def model(request: Any, bundle: Any, backend: Any) -> Iterator[Model]:
    backend.asynchronous = request.param
    with Model(bundle, backend) as model:
        yield model


def summary(result: Any) -> tuple[Any, ...]:
    return result.chunk_ms, result.decoded, result.duration, len(result.tokens), result.final


def test_results_describe_their_step_while_later_steps_are_pending(model: Model) -> None:
    """Chunks of 560, 80 and 80 ms, an end of utterance, a chunk of 160 ms."""
    audio = noise(0, 9 * FRAME - LEAD + 1250)  # the last 1250 samples need a step at the end of the utterance
    with closing(model.open_session(16000, 1)) as session:
        assert summary(session.result) == (560, 0.0, 0.0, 0, False)
        session.feed(audio[: 7 * FRAME - LEAD])
        session.set_chunk_ms(80)
        session.feed(audio[7 * FRAME - LEAD :])
        session.wait()
        received = len(audio) / 16000
        # The property covers all steps, and consumes none.
        assert [summary(session.result) for _ in range(2)] == [(80, 0.72, received, 27, False)] * 2
        assert (session.steps, session.chunk_ms, session.decoded) == (0, 560, 0.0)
        first, *others = session.collect()
        assert summary(first) == (560, 0.56, received, 21, False)
        assert [summary(one) for one in others] == [
            (80, 0.64, received, 24, False),
            (80, 0.72, received, 27, False),
        ]
        assert (session.steps, session.chunk_ms, session.decoded) == (3, 80, 0.72)
        assert session.collect() == []
        for result in (first, *others):
            assert result.tokens == session.result.tokens[: len(result.tokens)]
        session.set_chunk_ms(160)
        session.end_utterance()
        session.feed(noise(1, 2 * FRAME - LEAD))
        session.wait()
        received = (len(audio) + 2 * FRAME - LEAD) / 16000
        decoded = (len(audio) + 2 * FRAME) / 16000  # the frames of the new utterance begin at its start
        assert summary(session.result) == (160, min(decoded, received), received, 36, False)
        assert [summary(one) for one in session.collect()] == [
            (160, 0.8, received, 30, False),
            (160, min(decoded, received), received, 36, False),
        ]
        assert session.steps == 5
        session.feed(noise(2, 1000))
        session.finish()
        session.wait()
        final = session.final()
        assert session.final() is final and session.result is final and final.final
        assert session.steps == 5  # of the results that were returned
        session.discard_results()
        assert session.steps == 6


def test_tokens_end_within_their_recording(model: Model, fake: Any) -> None:
    """An end of utterance clips the tokens before it, a finish those after it."""
    first, second = noise(0, 5000), noise(1, 3000)
    with closing(model.open_session(16000, 1)) as session:
        session.feed(first)
        session.end_utterance()
        session.wait()
        before = session.result.tokens
        session.feed(second)
        session.finish()
        session.wait()
        tokens = session.final().tokens
    expected = []
    for begin, samples in ((0, len(first)), (len(first), len(second))):
        for frame in range(fake.encoder_frames(samples)):
            start = begin + FRAME * frame
            expected += [(start / 16000, min(start + FRAME, begin + samples) / 16000)] * 3
    assert [(token.time, token.end) for token in tokens] == expected
    assert [token.end for token in before] == [token.end for token in tokens[: len(before)]]


def test_invalid_audio_of_many_blocks_changes_nothing(model: Model) -> None:
    audio = noise(2, 3 * BLOCK)
    invalid = audio.copy()
    invalid[-1] = np.nan
    with closing(model.open_session(16000, 1)) as session:
        session.feed(audio[:100])
        with pytest.raises(AudioError, match=f"at sample {3 * BLOCK - 1} of this push"):
            session.feed(invalid)
        assert session.result.duration == 100 / 16000
        session.feed(audio[100:])
        session.finish()
        session.wait()
        found = session.final()
    assert found == model.transcribe(audio)


def test_a_finished_session_rejects_audio_and_ends_of_utterances(model: Model) -> None:
    with closing(model.open_session(48000, 1)) as session:
        session.feed(noise(3, 30_000))
        session.finish()
        session.finish()  # has no effect
        session.wait()
        final = session.final()
        for call in (session.end_utterance, lambda: session.feed(noise(3, 5)), lambda: session.feed(np.zeros(3, int))):
            with pytest.raises(StreamError, match="was finished; open a new one"):
                call()
        assert session.final() is final == model.transcribe(noise(3, 30_000), sample_rate=48000)


def test_the_last_event_follows_all_steps(model: Model, backend: Any) -> None:
    blocked, released = threading.Event(), threading.Event()

    def block(batch: Any) -> None:
        blocked.set()
        assert released.wait(TIMEOUT)

    audio = noise(4, 30_000)
    with closing(model.open_session(16000, 1, endpoint=Endpoint())) as session:
        backend.on_result = block
        session.feed(audio)
        session.finish()
        assert session.ended and blocked.wait(TIMEOUT)
        assert session.events() == []
        released.set()
        session.wait()
        events = session.events()
        assert [event.kind for event in events[-2:]] == ["final", "end"] and events[-1].end == len(audio) / 16000
        assert all(event.kind == "partial" for event in events[:-2])
        assert [len(event.tokens) for event in events[:-1]] == [21, 42, 63, 75, 75]
        assert {event.chunk_ms for event in events} == {560} and {event.audio for event in events} == {30_000 / 16000}
        assert max(token.end for token in events[-2].tokens) == 30_000 / 16000
        assert session.events() == []


def test_the_final_result_covers_outputs_that_were_not_collected(model: Model) -> None:
    audio = noise(5, 40_000)
    wanted = model.transcribe(audio)
    for collected in (0, 1, 2):
        with closing(model.open_session(16000, 1)) as session:
            for part in np.array_split(audio, 3)[:collected]:
                session.feed(part)
                session.wait()
                session.collect()
            for part in np.array_split(audio, 3)[collected:]:
                session.feed(part)
            session.finish()
            session.wait()
            assert session.final() == wanted


def test_audio_is_pushed_to_the_filter_before_its_chunks_are_decided(model: Model, monkeypatch: Any) -> None:
    """All audio, digital silence that is skipped included, in order."""
    audio = np.concatenate([noise(6, 20_000), np.zeros(180_000, np.float32), noise(7, 20_000)])

    class Filter:
        lead_ms = 80

        def __init__(self) -> None:
            self.pushed = np.zeros(0, np.float32)

        def push(self, samples: np.ndarray) -> None:
            self.pushed = np.concatenate([self.pushed, samples])

        def passes(self, begin: int, end: int) -> bool:
            assert len(self.pushed) >= end
            return True

        def restart(self, at: int) -> None:
            assert len(self.pushed) > at

    vad = Filter()
    monkeypatch.setattr(model, "_new_vad_filter", lambda: vad)
    with closing(model.open_session(16000, 1, vad=True)) as session:
        assert session.has_vad
        for at in range(0, len(audio), 7000):
            session.feed(audio[at : at + 7000])
        session.finish()
        session.wait()
        found = session.final()
    assert np.array_equal(vad.pushed, audio)
    assert found == model.transcribe(audio)
    with closing(model.open_session(16000, 1)) as session:
        assert not session.has_vad


class RecordedSession:
    """A session that records its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def feed(self, block: Any) -> None:
        self.calls.append(("feed", len(block)))

    def wait(self, backlog: int = 0) -> None:
        self.calls.append(("wait", backlog))

    def events(self) -> list[Any]:
        self.calls.append("events")
        return [f"event {len(self.calls)}"]

    def finish(self) -> None:
        self.calls.append("finish")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("recorded", [False, True])
def test_events_of_live_audio_are_complete_and_a_recording_is_read_ahead(recorded: bool) -> None:
    opened: list[Any] = []

    def open_session(sample_rate: int, channels: int) -> Any:
        opened.append((sample_rate, channels))
        return session

    session, audio = RecordedSession(), np.zeros((BLOCK + 5, 2), np.float32)
    source = audio if recorded else iter([audio[:BLOCK], audio[BLOCK:]])
    events = EventStream(open_session, source, 8000, 2)
    assert opened == []
    assert list(events) == ["event 3", "event 6", "event 9"]
    wait = ("wait", 2 if recorded else 0)
    blocks = [("feed", BLOCK), wait, "events", ("feed", 5), wait, "events"]
    assert session.calls == [*blocks, "finish", ("wait", 0), "events", "close"]
    assert opened == [(8000, 2)]
    session = RecordedSession()
    iterator = iter(EventStream(open_session, iter([audio]), 8000, 2))
    next(iterator)
    iterator.close()
    assert session.calls == [("feed", BLOCK + 5), ("wait", 0), "events", "close"]
