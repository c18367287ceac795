"""Word times and confidences: statistics compared with examples and other libraries, and the page with the result."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream.benchmarks import report
from nemostream.benchmarks.harness import records
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


def test_hits_agree_with_jiwer() -> None:
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    for _ in range(300):
        reference, words = ([rng.choice("abc") for _ in range(rng.randrange(1, 8))] for _ in range(2))
        hits = transcripts._hits(reference, words)
        assert len(hits) == len(words)
        # There may be several minimum alignments; this is one of them if the number of substitutions is possible.
        minimum = jiwer.process_words(" ".join(reference), " ".join(words))
        edits = minimum.substitutions + minimum.insertions + minimum.deletions
        substitutions = len(reference) + len(words) - 2 * sum(hits) - edits
        assert 0 <= substitutions <= min(len(reference), len(words)) - sum(hits)


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


def test_the_whole_benchmark_on_a_few_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "examples" / "demo_model" / "heldout"
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()[:3]]
    rows = [row | {"audio_filepath": str(folder / row["audio_filepath"])} for row in rows]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, value in {"VOICES": ("slt",), "DECIBELS": (10,), "NOISE_DRAWS": 1, "PAUSES": (1.2,)}.items():
        monkeypatch.setattr(transcripts, name, value)
    with nemostream.load(threads=1) as model:
        result = transcripts.measure_transcripts(model, tmp_path / "few.jsonl")
    text = report.write_report([result], tmp_path / "few.md")
    kinds = {row["case"]["measurement"] for row in result["rows"]}
    assert kinds >= {"confidence", "decoder"} and "expected calibration error" in text
    assert (tmp_path / "few-reliability.png").stat().st_size > 1000


def test_docs_page_contains_the_result() -> None:
    page = (ROOT / "docs" / "transcripts.md").read_text(encoding="utf-8")
    text = transcripts.show(records.read(RESULT), report._no_plot)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 10
    missing: list[Any] = [line for line in tables if line not in page]
    assert not missing, "docs/transcripts.md is out of date"
    assert f"{RESULT.stem}-reliability.svg" in page
