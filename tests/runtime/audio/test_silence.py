"""Digital silence: which samples are skipped, and that the audio after them is a new recording."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemostream.runtime.audio.silence import SilenceSplitter
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.text.endpointing import Endpoint

RATE = 16000
MAX_ZEROS = 10 * RATE


def noise(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.2, samples).astype(np.float32)


def zeros(samples: int) -> np.ndarray:
    return np.zeros(samples, np.float32)


def skipped_samples(pcm: np.ndarray, max_zeros: int) -> np.ndarray:
    """The rule, sample by sample."""
    skipped, run = [], 0
    for frame in pcm:
        run = 0 if np.any(frame) else run + 1
        skipped.append(run > max_zeros)
    return np.array(skipped, bool)


@given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 39, 40, 41, 95])), max_size=8),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    channels=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_skipped_samples_do_not_depend_on_the_pushes(runs, sizes, channels):
    signal = np.concatenate([np.zeros(0), *(np.r_[np.ones(loud), np.zeros(still)] for loud, still in runs)])
    pcm = signal
    if channels:
        pcm = np.zeros((len(signal), channels))
        pcm[np.arange(len(signal)), np.arange(len(signal)) % channels] = signal  # in any of the channels
    splitter = SilenceSplitter(4)  # skips zeros after the 40th in a row
    kept, marks, at = [], [], 0
    for size in itertools.cycle(sizes):
        if at >= len(pcm):
            break
        for part, silent in splitter.split(pcm[at : at + size]):
            assert len(part)
            kept.append(part)
            marks += [silent] * len(part)
        at += size
    assert np.array_equal(np.concatenate([pcm[:0], *kept]), pcm)
    assert np.array_equal(np.array(marks, bool), skipped_samples(pcm, 40))


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def model(request, bundle, fake):
    backend = fake.FakeBackend(bundle.manifest, 3, 3)
    backend.asynchronous = request.param
    with Model(bundle, backend) as model:
        yield model


@given(
    first=st.integers(0, 30_000),
    silences=st.lists(st.sampled_from([1, 900, 1280, 70_001]), min_size=1, max_size=2),
    speech=st.integers(1, 20_000),
    ms=st.sampled_from([80, 160, 560, 1120]),
    sizes=st.lists(st.integers(300, 70_000), min_size=1, max_size=3),
    endpoint=st.sampled_from([None, Endpoint(decoder="reset")]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_audio_after_silence_is_a_new_recording(model, fake, first, silences, speech, ms, sizes, endpoint):
    """Each recording's tokens equal those of the recording alone; their times include the audio before it."""
    vocabulary = model.manifest.decoder.vocabulary
    parts, expected = [noise(1, first), zeros(MAX_ZEROS)], []
    began, silent = 0, 0
    for number, more in enumerate(silences):
        tokens, frames = fake.expected(np.concatenate(parts[silent:]), vocabulary)
        expected += [(token, began + 1280 * frame) for token, frame in zip(tokens, frames, strict=True)]
        began += sum(map(len, parts[silent:])) + more
        parts += [zeros(more), noise(2 + number, speech), zeros(MAX_ZEROS)]
        silent = len(parts) - 2
    tokens, frames = fake.expected(np.concatenate(parts[silent:-1]), vocabulary)
    expected += [(token, began + 1280 * frame) for token, frame in zip(tokens, frames, strict=True)]
    audio, at = np.concatenate(parts[:-1]), 0
    with model.stream(chunk_ms=ms, endpoint=endpoint) as stream:
        for size in itertools.cycle(sizes):
            if at >= len(audio):
                break
            stream.push(audio[at : at + size])
            at += size
        result = stream.finish()
    assert [(token.id, round(token.time * RATE)) for token in result.tokens] == expected
    assert result.duration == result.decoded == len(audio) / RATE
    assert result == model.transcribe(audio, chunk_ms=ms)


def test_silence_is_not_run_and_time_continues(bundle, fake):
    backend = fake.FakeBackend(bundle.manifest)
    with Model(bundle, backend) as model, model.stream(chunk_ms=560, endpoint=Endpoint(silence_ms=15_000)) as stream:
        stream.push_events(np.concatenate([noise(1, RATE), zeros(MAX_ZEROS)]))
        steps = len(backend.batches)
        events = stream.push_events(zeros(60 * RATE))
        assert len(backend.batches) == steps + 1  # the incomplete chunk, as at the end of a recording
        assert stream.result.decoded == pytest.approx(71, abs=0.56)
        # The silence rule keeps counting; the fake emits tokens at every frame of the first 11 seconds.
        (end,) = (event for event in events if event.kind == "end")
        assert (end.reason, end.end) == ("silence", pytest.approx(11 + 15, abs=0.3))
        stream.set_chunk_ms(80)
        stream.push_events(noise(2, RATE))
        assert backend.batches[-1][0] == 80 and backend.position[0] <= 13  # the slot was reset
        last = stream.finish_events()[-1]
        assert (last.reason, last.end) == ("finish", 72.0)


def test_silence_before_finish_or_end_utterance(model, fake):
    audio = np.concatenate([noise(1, 5000), zeros(MAX_ZEROS)])
    alone = model.transcribe(audio)
    for end in (0, 1, 1280, 100_000):
        result = model.transcribe(np.concatenate([audio, zeros(end)]))
        assert [token.id for token in result.tokens] == [token.id for token in alone.tokens]
        with model.stream() as stream:
            stream.push_events(np.concatenate([audio, zeros(end)]))
            assert stream.end_utterance()[-1].end == (len(audio) + end) / RATE
            # A forced end resets the count of zeros.
            stream.push_events(zeros(2000))
            stream.finish_events()
            tail = fake.expected(zeros(2000), model.manifest.decoder.vocabulary)[0]
            assert [token.id for token in stream.result.tokens] == [token.id for token in alone.tokens] + tail


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_resume_within_silence(model, tmp_path, monkeypatch, rate):
    speech = noise(3, 2 * rate)
    audio = np.concatenate([speech, zeros(14 * rate), speech, zeros(17 * rate + 1), speech])
    soundfile.write(tmp_path / "a.wav", audio, rate, subtype="FLOAT")
    expected = model.transcribe(tmp_path / "a.wav")
    monkeypatch.setattr(snapshot, "SECONDS", -1.0)  # always due

    class Stop(Exception):
        pass

    for stop in range(1, len(audio) // 65536 + 1):
        left = stop

        def interrupt(progress):
            nonlocal left
            left -= 1
            if not left:
                raise Stop

        with pytest.raises(Stop):
            model.transcribe(tmp_path / "a.wav", resume=tmp_path / "state", on_progress=interrupt)
        result = model.transcribe(tmp_path / "a.wav", resume=tmp_path / "state")
        assert (result.text, result.tokens, result.duration) == (expected.text, expected.tokens, expected.duration)
