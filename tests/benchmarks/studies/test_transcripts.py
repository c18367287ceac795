"""Word times and confidences: statistics compared with examples and other libraries, and the page with the result."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

import nemostream
from nemostream.benchmarks import report
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.plots import CurveChart
from nemostream.benchmarks.studies import transcripts

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks" / "results" / "transcripts-demo-cpu-2-cores.json"


def test_calibration() -> None:
    found = [(0.05, False), (0.05, True), (0.95, True), (0.95, True), (0.95, False), (1.0, True)]
    values = transcripts.calibration(found)
    assert values["bins"][0] == [2, 0.05, 0.5] and values["bins"][9] == [4, pytest.approx(0.9625), 0.75]
    assert values["bins"][1:9] == [[0, 0.0, 0.0]] * 8
    assert values["ece"] == pytest.approx((2 * 0.45 + 4 * 0.2125) / 6)
    assert (values["words"], values["correct"]) == (6, 4)


def test_auroc_is_the_probability_of_a_higher_confidence() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(300) < 0.7
    values = rng.random(300) * np.where(correct, 1.0, 0.8)
    area = transcripts.calibration(list(zip(values.tolist(), correct.tolist(), strict=True)))["auroc"]
    assert area == pytest.approx(np.mean([a > b for a in values[correct] for b in values[~correct]]))


def cost(reference: list[str], words: list[str], hits: list[bool]) -> float:
    """Return the edit distance of an alignment that matches exactly the words in `hits` with equal reference words."""
    costs = np.full((len(reference) + 1, len(words) + 1), np.inf)
    for i, j in itertools.product(range(len(reference) + 1), range(len(words) + 1)):
        before = [0.0] if i == j == 0 else []
        if i:
            before.append(costs[i - 1, j] + 1)
        if j and not hits[j - 1]:
            before.append(costs[i, j - 1] + 1)
        if i and j and (reference[i - 1] == words[j - 1]) == hits[j - 1]:
            before.append(costs[i - 1, j - 1] + (not hits[j - 1]))
        costs[i, j] = min(before, default=np.inf)
    return float(costs[-1, -1])


def test_hits_are_those_of_a_minimum_alignment() -> None:
    """There may be several minimum alignments; this is one of them, with the edit distance that jiwer finds."""
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    for _ in range(300):
        reference, words = ([rng.choice("abc") for _ in range(rng.randrange(1, 8))] for _ in range(2))
        hits = transcripts._hits(reference, words)
        minimum = jiwer.process_words(" ".join(reference), " ".join(words))
        edits = minimum.substitutions + minimum.insertions + minimum.deletions
        assert len(hits) == len(words) and cost(reference, words, hits) == edits, (reference, words)


@pytest.mark.parametrize(
    ("reference", "words", "hits"),
    [
        ("one two three", "one too three", [True, False, True]),
        ("one two", "one and two", [True, False, True]),
        ("one and two", "one two", [True, True]),
        ("one two", "two one", [False, False]),  # two substitutions, rather than an insertion and a deletion
        ("", "one", [False]),
        ("one", "", []),
    ],
)
def test_hits_of_examples(reference: str, words: str, hits: list[bool]) -> None:
    assert transcripts._hits(reference.split(), words.split()) == hits


def test_sum_p_alpha_from_confidence() -> None:
    measure = nemostream.Confidence("renyi", "lin")
    for sum_p_alpha in (1.0, 1.7, 4.2):
        confidence = measure.token_measure(12)(-0.1, sum_p_alpha)
        assert transcripts._sum_p_alpha(confidence, measure.alpha, 12) == pytest.approx(sum_p_alpha)


def test_word_times() -> None:
    phones = [("pau", 0.2), ("t", 0.3), ("uw", 0.4), ("pau", 0.5), ("s", 0.6), ("ih", 0.7), ("k", 0.8), ("s", 0.9)]
    sizes = {"two": 2, "six": 4}
    assert transcripts.word_times(["two", "six"], phones, sizes) == [(0.2, 0.4), (0.5, 0.9)]
    assert transcripts.word_times(["two", "two"], phones, sizes) == []


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
def test_phone_times_of_flite() -> None:
    audio, phones = transcripts.synthesise("kal16", "two, six")
    (_, two), (six, _) = transcripts.word_times(["two", "six"], phones, {"two": 2, "six": 4})
    pause = audio[round(16000 * (two + 0.02)) : round(16000 * (six - 0.02))]
    assert len(pause) > 500 and np.abs(pause).max() < 0.05 * np.abs(audio).max()  # the audio is silent in the pause


def test_command_and_output_of_flite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phones are printed as name:end. Audio at another rate is resampled: a tone of 1 kHz stays one."""
    tone = np.sin(2 * np.pi * 1000 / 8000 * np.arange(8000)).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "tone.wav", tone, 8000)
    program = tmp_path / "flite"
    program.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$@" > '{tmp_path}/arguments'
while [ "$1" != -o ]; do shift; done
cp '{tmp_path}/tone.wav' "$2"
echo pau:0.200 t:0.300 uw:0.425 pau:0.525
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    audio, phones = transcripts.synthesise("slt", "two words")
    assert phones == [("pau", 0.2), ("t", 0.3), ("uw", 0.425), ("pau", 0.525)]
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:-1] == ["-voice", "slt", "-psdur", "-t", "two words", "-o"] and arguments[-1].endswith(".wav")
    assert audio.dtype == np.float32 and audio.shape == (16000,) and np.abs(np.fft.rfft(audio)).argmax() == 1000
    soundfile.write(tmp_path / "tone.wav", tone, 16000, subtype="FLOAT")
    assert np.array_equal(transcripts.synthesise("slt", "two words")[0], tone)


def test_errors_of_flite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flite").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "flite").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        transcripts.synthesise("slt", "two")


@pytest.mark.parametrize("flite", [None, "/usr/bin/flite"])
def test_measurements(flite: str | None, demo_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measurement has the recordings and texts of the manifest; times need flite."""
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", np.full(160, number / 4), 16000, subtype="FLOAT")
    entries = [{"audio_filepath": f"{number}.wav", "text": f"text {number}"} for number in range(2)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    model: Any = SimpleNamespace(manifest=demo_bundle.manifest, chunk_ms=160)
    calls: list[Any] = []
    messages: list[str] = []

    def measure(name: str) -> Any:
        def measured(given: Any, *inputs: Any) -> list[Any]:
            *clips, texts, progress = inputs
            means = [[float(clip.mean()) for clip in each] for each in clips]
            calls.append((name, given is model, means, texts, progress == messages.append))
            return [records.row({"measurement": name}, {})]

        return measured

    monkeypatch.setattr(shutil, "which", {"flite": flite}.get)
    for name in ("_measure_times", "_measure_confidence", "_measure_decoder_resets"):
        monkeypatch.setattr(transcripts, name, measure(name))
    result = transcripts.measure_transcripts(model, tmp_path / "m.jsonl", messages.append)
    texts = ["text 0", "text 1"]
    expected = [("_measure_times", True, [], texts, True)] if flite else []
    expected += [(f"_measure_{name}", True, [[0.0, 0.25]], texts, True) for name in ("confidence", "decoder_resets")]
    assert calls == expected and [row["case"]["measurement"] for row in result["rows"]] == [call[0] for call in calls]
    assert messages == ([] if flite else ["flite is not installed: word times are skipped"])
    assert result["benchmark"] == "transcripts" and result["model"]["name"] == "demo"
    assert result["method"] == {
        "voices": ("slt", "rms", "awb", "kal16"),
        "decibels": (20, 15, 10, 5),
        "noise_draws": 4,
        "bins": 10,
        "pauses": (1.2, 2.0, 4.0, 8.0),
        "silence_ms": 800,
        "chunk_ms": 160,
        "manifest": "m.jsonl",
    }


def test_the_whole_benchmark_on_a_few_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "examples" / "demo_model" / "heldout"
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()[:3]]
    rows = [row | {"audio_filepath": str(folder / row["audio_filepath"])} for row in rows]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, value in {"VOICES": ("slt",), "DECIBELS": (10,), "NOISE_DRAWS": 1, "PAUSES": (1.2,)}.items():
        monkeypatch.setattr(transcripts, name, value)
    with nemostream.load(threads=1) as model:
        result = transcripts.measure_transcripts(model, tmp_path / "few.jsonl")
    text, _ = report.write_report([result], tmp_path / "few.md")
    kinds = {row["case"]["measurement"] for row in result["rows"]}
    assert kinds >= {"confidence", "decoder"} and "expected calibration error" in text
    assert (tmp_path / "few-reliability.png").stat().st_size > 1000


def test_plot_of_calibration() -> None:
    """A panel for each measure, with the points of the bins that contain words; the diagonal is perfect."""
    empty = [[0, 0.0, 0.0]]
    rows = [
        records.row(
            {"measurement": "confidence", "measure": measure, "norm": "exp", "alpha": 0.5},
            {},
            {"words": 8, "correct": 6, "bins": bins, "ece": error, "auroc": 0.98765},
        )
        for measure, error, bins in (
            ("tsallis", 0.01234, [[2, 0.05, 0.5], *empty * 8, [6, 0.975, 0.875]]),
            ("max_prob", 0.01256, [*empty * 9, [8, 0.95, 0.75]]),
        )
    ]
    text = transcripts._show_confidence(rows)
    assert text.startswith("Confidence, 8 words, 75.0 % correct:\n\n")
    assert "| tsallis, exp | 0.012 | 0.988 |\n| max_prob, alpha 0.5 | 0.013 | 0.988 |" in text.replace(" (default)", "")
    result = records.record("transcripts", rows, model={}, method={})
    chart = transcripts.charts(result)["reliability"]
    assert isinstance(chart, CurveChart)
    assert [panel.heading.partition(",")[0] for panel in chart.panels] == ["tsallis", "max_prob"]
    assert [panel.note for panel in chart.panels] == ["calibration error 0.012", "calibration error 0.013"]
    assert [panel.curves[0].points for panel in chart.panels] == [[(0, 0), (1, 1)]] * 2
    assert [panel.curves[1].points for panel in chart.panels] == [[(0.05, 0.5), (0.975, 0.875)], [(0.95, 0.75)]]
    assert chart.title == "The measure “tsallis, exp (default)” is calibrated best: expected calibration error 0.012"


@pytest.mark.parametrize(("count", "correct"), [(1, 0), (1, 1), (7, 3), (200, 10), (3514, 2470)])
def test_wilson_interval(count: int, correct: int) -> None:
    """Its ends are the shares p whose normal approximation has the observed share at 1.96 standard deviations."""
    share = correct / count
    for end in transcripts.wilson_interval(count, share):
        assert (share - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / count, abs=1e-12)
    low, high = transcripts.wilson_interval(count, share)
    assert -1e-12 <= low <= share <= high <= 1 + 1e-12 and low < high


def test_docs_page_contains_the_result() -> None:
    page = (ROOT / "docs" / "transcripts.md").read_text(encoding="utf-8")
    text = transcripts.show(records.read(RESULT))
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 10
    missing: list[Any] = [line for line in tables if line not in page]
    assert not missing, "docs/transcripts.md is out of date"
    assert f"{RESULT.stem}-reliability.svg" in page
