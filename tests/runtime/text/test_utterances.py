"""Utterances of streams on the fake backend: independent of pushes, in a fixed order, with both decoder policies."""

from __future__ import annotations

import asyncio
import itertools
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemostream.errors import AudioError, CapacityError, OptionError, StreamError
from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import Endpoint

CHUNKS = (80, 160, 560, 1120)


@pytest.fixture(scope="session")
def quiet(fake):
    """A fake that emits no tokens for silence and every third token otherwise; a decoder reset changes its tokens."""

    class Quiet(fake.FakeBackend):
        def reset_decoder(self, slots):
            super().reset_decoder(slots)
            for slot in slots.tolist():
                assert self.in_flight[slot] == 0, "a step is in flight during the reset"
                self.checksum[slot] = zlib.crc32(b"forgot", self.checksum[slot])

        def submit(self, batch):
            loud = {
                (row, self.position[slot] + i)
                for row, slot in enumerate(batch.slots.tolist())
                for i, segment in enumerate(batch.audio[row].reshape(-1, 1280))
                if segment.any()
            }
            step = super().submit(batch)
            emissions = step.emissions
            keep = [
                np.array([(row, frame) in loud and i % 3 == 0 for i, frame in enumerate(frames.tolist())], bool)
                for row, frames in enumerate(emissions.frames)
            ]
            tokens, frames = (
                tuple(row[kept] for row, kept in zip(rows, keep, strict=True))
                for rows in (emissions.tokens, emissions.frames)
            )
            scores = tuple(-row.astype(np.float32) / 100 for row in tokens)  # independent of the position in the step
            step.emissions = emissions.of_rows(tokens, frames, scores, [1 - row for row in scores], emissions.failed)
            return step

    return Quiet


@pytest.fixture
def serve(bundle, quiet):
    """Create models, one at a time, and close them."""
    made = []

    def make(overlap: bool = True, capacity: int = 4):
        if made:
            made.pop().close()
        backend = quiet(bundle.manifest, capacity, 4)
        backend.asynchronous = overlap
        made.append(Model(bundle, backend))
        return made[-1], backend

    yield make
    for model in made:
        model.close()


def speech(seed: int, spans: list[tuple[int, int]]) -> np.ndarray:
    """Return alternating noise and silence, in frames of 80 ms aligned with the model's frames."""
    rng = np.random.default_rng(seed)
    parts = [np.zeros(200, np.float32)]  # the lead silence fills the first frame
    for loud, still in spans:
        parts += [rng.standard_normal(1280 * loud).astype(np.float32) * 0.1 + 1, np.zeros(1280 * still, np.float32)]
    return np.concatenate(parts)


def follow(stream, audio: np.ndarray, sizes: list[int]) -> list:
    events, at = [], 0
    for size in itertools.cycle(sizes):
        if at >= len(audio):
            break
        events += stream.push_events(audio[at : at + size])
        at += size
    return events + stream.finish_events()


def utterances(events: list) -> list[tuple]:
    """Return the parts of events that must not depend on the pushes."""
    return [
        (e.kind, e.utterance, e.text, e.start, e.end, e.reason, e.tokens) for e in events if e.kind in ("final", "end")
    ]


def check_grammar(events: list, audio_seconds: float) -> None:
    """Check ``(partial* final? end)*``, consecutive numbers, texts that only grow, and the end at the finish."""
    number, previous, final = 0, None, False
    for event in events:
        assert event.utterance == number
        if event.kind == "end":
            assert event.text == event.stable == "" and event.tokens == () and event.reason is not None
            number, previous, final = number + final, None, False
            continue
        assert not final and event.reason is None, "only an end may follow a final"
        final = event.kind == "final"
        assert event.start == event.tokens[0].time and event.end == event.tokens[-1].end
        assert event.text.startswith(event.stable)
        if previous is not None:
            assert event.text.startswith(previous.text) and event.stable.startswith(previous.stable)
            assert event.tokens[: len(previous.tokens)] == previous.tokens
            whole = "".join(previous.stable.split())
            assert "".join(word.text for word in event.words).startswith(whole)
        previous = event
    assert events[-1].kind == "end" and events[-1].reason == "finish"
    times = [event.end for event in events if event.kind == "end"]
    # An utterance may end by silence in the last frames, which extend beyond the end of the audio.
    assert times == sorted(times) and audio_seconds <= times[-1] <= audio_seconds + 0.16
    assert sum(event.reason == "finish" for event in events) == 1


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 25)), min_size=1, max_size=6)


@given(
    spans=SPANS,
    rule=st.sampled_from([Endpoint(), Endpoint(silence_ms=240), Endpoint(silence_ms=None, max_utterance_ms=1000)]),
    sizes=st.lists(st.integers(700, 20_000), min_size=1, max_size=4),
    overlap=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_utterances_do_not_depend_on_pushes_and_chunk_size(serve, tokenizer_model, spans, rule, sizes, overlap):
    oracle, audio = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model), speech(len(spans), spans)
    model, _ = serve(overlap)
    expected = None
    for ms in CHUNKS:
        with model.stream(chunk_ms=ms, endpoint=rule) as stream:
            events = follow(stream, audio, sizes)
            result = stream.result
        check_grammar(events, len(audio) / 16000)
        expected = expected or utterances(events)
        assert utterances(events) == expected
        finals = [event for event in events if event.kind == "final"]
        assert [token for event in finals for token in event.tokens] == list(result.tokens)
        assert all(event.text == oracle.decode([token.id for token in event.tokens]) for event in finals)
        assert result == model.transcribe(audio, chunk_ms=ms)


def test_expected_utterances(serve):
    model, _ = serve()
    audio = speech(1, [(3, 20), (2, 5), (1, 30)])
    with model.stream(chunk_ms=80) as stream:  # no rule: one utterance until the finish
        assert [(e.kind, e.reason) for e in follow(stream, audio, [1280]) if e.kind != "partial"] == [
            ("final", None),
            ("end", "finish"),
        ]
    with model.stream(chunk_ms=80, endpoint=Endpoint()) as stream:
        events = follow(stream, audio, [1280])
    kinds = [(e.kind, e.utterance, len(e.tokens), round(e.start, 2), round(e.end, 2), e.reason) for e in events]
    assert (
        kinds
        == [
            ("partial", 0, 1, 0.08, 0.16, None),
            ("partial", 0, 2, 0.08, 0.24, None),
            ("partial", 0, 3, 0.08, 0.32, None),
            ("final", 0, 3, 0.08, 0.32, None),
            ("end", 0, 0, 1.2, 1.2, "silence"),
            ("partial", 1, 1, 1.92, 2.0, None),
            ("partial", 1, 2, 1.92, 2.08, None),
            ("partial", 1, 3, 1.92, 2.56, None),
            ("final", 1, 3, 1.92, 2.56, None),
            ("end", 1, 0, 3.44, 3.44, "silence"),
            ("end", 2, 0, len(audio) / 16000, len(audio) / 16000, "finish"),
        ]
        or kinds
    )


@given(spans=SPANS, ms=st.sampled_from(CHUNKS), sizes=st.lists(st.integers(700, 20_000), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decoder_resets_at_the_same_frames_with_and_without_overlap(serve, fake, spans, ms, sizes):
    """The fake emits other tokens after a reset, and rejects a reset during a step."""
    audio, rule = speech(7, spans), Endpoint(silence_ms=240, decoder="reset")
    found = []
    for overlap in (False, True):
        model, backend = serve(overlap)
        with model.stream(chunk_ms=ms, endpoint=rule) as stream:
            events = follow(stream, audio, sizes)
        found.append((utterances(events), backend.decoder_resets))
        # At the end of a step, with no step in flight; once for each step in which an utterance ended.
        frames = ms // 80
        last = -(-fake.encoder_frames(len(audio)) // frames) * frames  # later resets have no effect
        assert all(position % frames == 0 for _, position in backend.decoder_resets)
        ends = [e for e in events if e.reason == "silence"]
        first = [e.start for e in events if e.kind == "final"]
        expected = []
        for number, end in enumerate(ends):
            edge = -(-round(end.end / 0.08) // frames) * frames
            following = first[number + 1] if number + 1 < len(first) else np.inf
            if following >= edge * 0.08 - 1e-9 and edge < last:
                expected.append(edge)
        assert [position for _, position in backend.decoder_resets] == expected
    assert found[0] == found[1]


def test_streams_of_both_policies_share_batches(serve):
    model, backend = serve(overlap=True)
    audio = speech(3, [(4, 15), (5, 15), (2, 15)])
    rules = [Endpoint(decoder="reset"), Endpoint(), None, Endpoint(decoder="reset")]

    def transcribe(rule):
        with model.stream(chunk_ms=160, endpoint=rule) as stream:
            return utterances(follow(stream, audio, [4000]))

    alone = [transcribe(rule) for rule in rules]
    backend.batches.clear()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(transcribe, rules))
    assert together == alone and alone[0] != alone[1]


# -- forced ends -------------------------------------------------------------------------------------------------------


@given(
    parts=st.lists(st.tuples(st.integers(0, 30_000), st.sampled_from(CHUNKS)), min_size=1, max_size=4),
    overlap=st.booleans(),
    rate=st.sampled_from([16000, 48000]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_between_forced_ends_are_independent_streams_in_one_slot(serve, parts, overlap, rate):
    """Each part has the tokens that it has alone; its times include the parts before."""
    model, _ = serve(overlap, capacity=2)
    events, expected, offset = [], [], 0
    with model.stream(sample_rate=rate, chunk_ms=parts[0][1], endpoint=Endpoint()) as stream:
        slot = stream._session._stream.slot
        for number, (samples, ms) in enumerate(parts):
            audio = np.random.default_rng(number).standard_normal(samples).astype(np.float32) * 0.1
            stream.set_chunk_ms(ms)
            stream.push_events(audio)
            with model.stream(sample_rate=rate, chunk_ms=ms, endpoint=Endpoint()) as alone:
                alone.push_events(audio)
                last = alone.finish_events()
            new = stream.end_utterance() if number < len(parts) - 1 else stream.finish_events()
            expected.append((last, offset))
            events.append(new)
            offset = stream._session._stream.chunker.samples
        assert stream._session._stream.slot in (slot, None)
    for number, ((alone, offset), new) in enumerate(zip(expected, events, strict=True)):
        assert [e.kind for e in new][-2:] == [e.kind for e in alone][-2:]
        assert new[-1].reason == ("forced" if number < len(parts) - 1 else "finish")
        assert new[-1].end == pytest.approx(alone[-1].end + offset / 16000)
        if len(alone) > 1:
            assert new[-2].text == alone[-2].text
            shift = [b.time - a.time for a, b in zip(alone[-2].tokens, new[-2].tokens, strict=True)]
            assert shift == pytest.approx([offset / 16000] * len(shift))


def test_forced_ends_are_events_and_an_empty_utterance_keeps_its_number(serve):
    model, _ = serve()
    with model.stream(chunk_ms=80) as stream:
        (end,) = stream.end_utterance()
        assert (end.kind, end.reason, end.utterance, end.end) == ("end", "forced", 0, 0.0)
        stream.push_events(speech(1, [(3, 0)]))
        final, end = stream.end_utterance()
        assert (final.kind, end.reason, end.utterance) == ("final", "forced", 0)
        assert stream.result.text == final.text and not stream.result.final
        (end,) = stream.finish_events()
        assert (end.reason, end.utterance) == ("finish", 1)
        assert stream.finish_events() == [] and stream.result.final
        with pytest.raises(StreamError, match="was finished; open a new one"):
            stream.end_utterance()


def test_results_and_events_of_one_stream_agree(serve):
    """`push` returns results, `push_events` events; neither removes anything from the result."""
    model, _ = serve()
    audio = speech(5, [(5, 20), (5, 20)])
    with model.stream(chunk_ms=80, endpoint=Endpoint()) as stream:
        partials = stream.push(audio[:8000])
        before = stream.result
        assert before == stream.result and before.tokens == partials[-1].tokens
        events = stream.push_events(audio[8000:])
        assert stream.result.tokens[: len(before.tokens)] == before.tokens
        events += stream.finish_events()
        assert stream.finish() == stream.result == model.transcribe(audio, chunk_ms=80)
    assert [e.kind for e in events][-1] == "end"


# -- whole sources -----------------------------------------------------------------------------------------------------


def test_listen_accepts_every_kind_of_source(serve, tmp_path):
    model, _ = serve()
    audio = speech(9, [(6, 20), (3, 20), (4, 2)])
    soundfile.write(tmp_path / "a.wav", audio, 16000, subtype="FLOAT")
    blocks = [audio[at : at + 3000] for at in range(0, len(audio), 3000)]

    async def source():
        for block in blocks:
            await asyncio.sleep(0)
            yield block

    async def gather(source):
        return [event async for event in model.listen(source)]

    async def main():  # as in a notebook, in a running event loop
        return [await gather(s) for s in (tmp_path / "a.wav", str(tmp_path / "a.wav"), audio, iter(blocks), source())]

    expected = utterances(list(model.listen(audio)))
    assert [kind for kind, *_ in expected] == ["final", "end"] * 3
    for one in (tmp_path / "a.wav", blocks, iter(blocks)):
        assert utterances(list(model.listen(one))) == expected
    found = asyncio.run(main())
    assert [utterances(events) for events in found] == [expected] * 5
    for events in found:
        check_grammar(events, len(audio) / 16000)
    stereo = np.stack([audio, audio], axis=1)
    assert utterances(list(model.listen(stereo))) == expected
    assert utterances(list(model.listen(iter([stereo]), channels=2))) == expected


def test_closing_listen_early_releases_the_slot(serve):
    model, _ = serve(capacity=1)
    audio = speech(9, [(6, 20), (3, 20)])

    async def main():
        events = model.listen(audio).__aiter__()
        await anext(events)
        await events.aclose()

    def free() -> bool:
        """Return whether the slot is released, which happens when the step in flight is complete."""
        for _ in range(2000):
            if model._scheduler._free:
                return True
            threading.Event().wait(0.002)
        return False

    for _ in range(3):
        events = iter(model.listen(audio))
        next(events)
        events.close()
        assert free()
        asyncio.run(main())
        assert free()


def test_invalid_sources_are_rejected(serve):
    model, _ = serve(capacity=1)

    async def source():
        yield np.zeros(5, np.float32)

    for invalid, message in (
        (source(), "an asynchronous source needs `async for`"),
        (7, "unsupported audio source of type int; pass a path, a numpy array"),
        ([0.5], "audio must be a numpy array, not float"),
        (np.zeros(0, np.float32), "the audio is empty"),
        ("no.wav", "no.wav does not exist"),
    ):
        for _ in range(2):
            with pytest.raises(AudioError, match=message):
                list(model.listen(invalid))
    with pytest.raises(TypeError, match="voice"):
        list(model.listen(np.zeros(5, np.float32), voice=1))
    assert list(model.listen(np.zeros(500, np.float32)))[-1].reason == "finish"


# -- phrases -----------------------------------------------------------------------------------------------------------


def test_phrases_are_set_in_the_backend_and_kept_after_a_forced_end(serve):
    model, backend = serve(capacity=2)
    boosts = []
    backend.on_phrases = lambda slot, phrases: boosts.append((slot, backend.position[slot], phrases))
    with model.stream(chunk_ms=80, phrases=["the fox", "dog"]) as stream, model.stream() as other:
        stream.push(speech(1, [(3, 0)]))
        other.push(speech(1, [(9, 0)]))
        assert [(slot, position) for slot, position, _ in boosts] == [(0, 0)]
        stream.end_utterance()
        stream.push(speech(1, [(3, 0)]))
        assert [(slot, position) for slot, position, _ in boosts] == [(0, 0)] * 2
        assert boosts[0][2] is boosts[1][2]
    assert backend.phrases[1] is None
    model.transcribe(speech(1, [(3, 0)]), phrases={"the fox": 3.0})
    assert len(boosts) == 3


def test_invalid_phrases_are_rejected_without_losing_a_slot(serve):
    model, backend = serve(capacity=1)
    for phrases, message in (
        ([], "phrases is empty"),
        ("fox", "pass a list of phrases"),
        ([""], "is empty"),
        ({"fox": -1.0}, "'fox' has weight -1.0"),
    ):
        for _ in range(2):
            with pytest.raises(OptionError, match=message):
                model.stream(phrases=phrases)

    def full(slot, phrases):
        raise CapacityError("there is no room for more phrases.")

    backend.on_phrases = full
    with model.stream(phrases=["fox"]) as stream, pytest.raises(CapacityError, match="no room for more phrases"):
        stream.push(np.ones(30_000, np.float32))
        stream.finish()
    backend.on_phrases = lambda slot, phrases: None
    for _ in range(1000):  # its slot is released when its last step is complete
        try:
            model.transcribe(np.ones(3000, np.float32), phrases=["fox"])
            return
        except CapacityError:
            pass
    raise AssertionError("the slot was lost")
