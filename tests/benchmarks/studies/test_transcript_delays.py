"""Delays, confidences and decoder states of the transcripts study, from given transcripts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.studies import transcripts
from nemostream.runtime.text.words import Token

pytest.importorskip("jiwer", reason="needs the bench extra")
pytest.importorskip("whisper_normalizer", reason="needs the bench extra")


def word(text: str, start: float, end: float) -> Any:
    return SimpleNamespace(text=text, start=start, end=end)


def test_delays_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive if the transcribed word begins or ends after the synthesised one; other words do not count."""
    phones = {
        "one": [("w", 0.1), ("n", 0.2)],
        "two": [("t", 0.1), ("u", 0.3)],
        # "one" from 0.5 to 0.7 s, "two" from 1.0 to 1.3 s
        "one two": [("pau", 0.5), ("w", 0.6), ("n", 0.7), ("pau", 1.0), ("t", 1.1), ("u", 1.3)],
        "two two": [("t", 0.1)],  # another number of phones: is skipped
    }
    monkeypatch.setattr(transcripts, "VOICES", ("a", "b"))
    spoken: list[tuple[str, str]] = []

    def synthesise(voice: str, text: str) -> Any:
        spoken.append((voice, text))
        return np.ones(5000, np.float32), phones[text]

    monkeypatch.setattr(transcripts, "synthesise", synthesise)
    lengths: list[int] = []

    def transcribe(audio: np.ndarray, chunk_ms: int) -> Any:
        lengths.append(len(audio))
        late = chunk_ms / 1000
        words = [word("One,", 0.5 + late, 0.75 + late), word("too", 0.8, 0.9), word("two.", 0.9 + late, 1.3)]
        return SimpleNamespace(words=words if chunk_ms == 80 else words[:2])

    manifest = SimpleNamespace(chunks=[SimpleNamespace(ms=80), SimpleNamespace(ms=560)])
    model: Any = SimpleNamespace(manifest=manifest, transcribe=transcribe)
    short, long = transcripts._measure_times(model, ["one two", "two two"], lambda message: None)
    assert short["case"] == {"measurement": "times", "chunk_ms": 80}
    assert short["ms"] == {
        "start": pytest.approx([80.0, -20.0] * 2),
        "end": pytest.approx([130.0, 0.0] * 2),
    }
    assert short["values"] == {"words": 4, "reference_words": 4}
    assert long["ms"]["start"] == pytest.approx([560.0] * 2)
    assert long["values"] == {"words": 2, "reference_words": 4}
    assert set(lengths) == {5000 + 16000}  # a second of silence follows
    # There is one recording of each word for each voice, to count its phones, and one of each text.
    assert sorted(spoken) == sorted((voice, text) for voice in "ab" for text in phones)


def test_confidences_of_clean_and_noisy_recordings(demo_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measure rates the same words; the second of two words is wrong."""
    monkeypatch.setattr(transcripts, "DECIBELS", (10, 5))
    monkeypatch.setattr(transcripts, "NOISE_DRAWS", 3)
    noise: list[tuple[float, int]] = []

    def add_noise(clip: Any, ratio: float, seed: int) -> Any:
        noise.append((ratio, seed))
        return clip

    monkeypatch.setattr(transcripts, "add_noise", add_noise)
    vocabulary = demo_bundle.manifest.decoder.vocabulary + 1
    invertible = nemostream.Confidence("renyi", "lin")
    confidence = invertible.token_measure(vocabulary)
    scores = [(-0.1, 1.2), (-0.7, 2.0)]
    tokens = [
        Token(5, f" {text}", 0.1, 0.2, score, confidence(score, spread))
        for text, (score, spread) in zip(("one", "three"), scores, strict=True)
    ]
    result = nemostream.Result("one three", tuple(tokens), 1.0, 560, True)

    def transcribe_many(recordings: Any, confidence: Any) -> Any:
        assert confidence == invertible
        return [result for _ in recordings]

    model: Any = SimpleNamespace(manifest=demo_bundle.manifest, transcribe_many=transcribe_many)
    clip = np.zeros(100, np.float32)
    rows = transcripts._measure_confidence(model, [clip, clip], ["one two", "one two"], lambda message: None)
    assert noise == [(ratio, seed) for ratio in (10, 5) for seed in range(3) for _ in range(2)]
    assert len(rows) == len(transcripts.MEASURES)
    for row, measure in zip(rows, transcripts.MEASURES, strict=True):
        assert row["case"] == {
            "measurement": "confidence",
            "measure": measure.measure,
            "norm": measure.norm,
            "alpha": measure.alpha,
        }
        assert (row["values"]["words"], row["values"]["correct"], row["values"]["auroc"]) == (28, 14, 1.0)
        expected = [measure.token_measure(vocabulary)(score, spread) for score, spread in scores]
        mean = sum(count * mean for count, mean, _ in row["values"]["bins"]) / 28
        assert mean == pytest.approx(sum(expected) / 2, abs=1e-5) and expected[0] != expected[1]


def test_areas_under_the_curve_by_hand() -> None:
    """Of two correct and two wrong words, three of four pairs are in order."""
    pairs = [(0.9, True), (0.3, True), (0.6, False), (0.1, False)]
    assert transcripts.calibration(pairs)["auroc"] == 0.75
    assert transcripts.calibration([(value, not hit) for value, hit in pairs])["auroc"] == 0.25
    assert transcripts.calibration([(0.5, True), (0.5, False), (0.5, True)])["auroc"] == 0.5  # of equal confidences
    assert np.isnan(transcripts.calibration([(0.5, True)])["auroc"])


def test_bins_include_their_lower_edge() -> None:
    bins = transcripts.calibration([(0.1, True), (0.0999, False), (1.0, True), (0.9, False)])["bins"]
    assert [count for count, _, _ in bins] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert bins[9] == [2, pytest.approx(0.95), 0.5]


def test_decoder_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream with kept and with reset state, and separate streams: errors of all, in the order of the audio."""
    clips = [np.full(1600, number, np.float32) for number in (1, 2, 3)]
    texts = ["one", "two", "three four"]
    received: list[Any] = []

    def listen(audio: np.ndarray, chunk_ms: int, endpoint: Any) -> Any:
        order = [int(value) for value in dict.fromkeys(np.round(audio[np.abs(audio) > 0.5]).tolist())]
        received.append((order, len(audio), endpoint.silence_ms, endpoint.decoder))
        found = [texts[number - 1] for number in order]
        if endpoint.decoder == "keep":
            found = [text.replace("four", "for") for text in found]
        events = [SimpleNamespace(kind="final", text=text.upper()) for text in found]
        return [SimpleNamespace(kind="partial", text="nothing"), *events]

    def transcribe(clip: np.ndarray, chunk_ms: int) -> Any:
        return SimpleNamespace(text="" if clip[0] == 2 else texts[int(clip[0]) - 1])

    manifest = SimpleNamespace(chunks=[SimpleNamespace(ms=80)])
    model: Any = SimpleNamespace(manifest=manifest, listen=listen, transcribe=transcribe)
    monkeypatch.setattr(transcripts, "PAUSES", (0.1, 0.2))
    rows = transcripts._measure_decoder_resets(model, clips, texts, lambda message: None)
    found = [(row["case"]["decoder"], row["values"]) for row in rows]
    assert found == [
        ("keep", {"wer": 0.25, "utterances": 3, "recordings": 3}),
        ("reset", {"wer": 0.0, "utterances": 3, "recordings": 3}),
        ("separate streams", {"wer": 0.25, "utterances": 3, "recordings": 3}),
    ]
    # Three clips of 0.1 s, with pauses of 0.1, 0.2 and 0.1 s.
    assert received == [(received[0][0], 3 * 1600 + 6400, 800, decoder) for decoder in ("keep", "reset")]
    assert sorted(received[0][0]) == [1, 2, 3]


def test_recordings_at_another_rate_are_rejected(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)
    with pytest.raises(nemostream.AudioError, match="sample rate of 8000 Hz; this benchmark needs 16000 Hz"):
        transcripts._read_audio(tmp_path / "a.wav")


def test_spans_of_delays() -> None:
    samples = [float(n) for n in range(1, 101)]
    assert transcripts._span(samples) == "50 [5–95]"
    row = records.row({"chunk_ms": 80}, {"start": samples, "end": [2.0]}, {"words": 3, "reference_words": 4})
    assert "| 80 ms | 50 [5–95] | 2 [2–2] | 3 of 4 |" in transcripts._show_times([row])
