"""The benchmark of times and confidences: its arithmetic by hand and beside others', and the page that quotes it."""

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


def test_calibration_by_hand() -> None:
    found = [(0.05, False), (0.05, True), (0.95, True), (0.95, True), (0.95, False), (1.0, True)]
    values = transcripts.calibration(found)
    assert values["bins"][0] == [2, 0.05, 0.5] and values["bins"][9] == [4, pytest.approx(0.9625), 0.75]
    assert values["bins"][1:9] == [[0, 0.0, 0.0]] * 8
    assert values["ece"] == pytest.approx((2 * 0.45 + 4 * 0.2125) / 6)
    assert (values["words"], values["right"]) == (6, 4)


def test_the_area_is_the_chance_that_right_words_are_surer() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(300) < 0.7
    values = rng.random(300) * np.where(right, 1.0, 0.8)
    area = transcripts.calibration(list(zip(values.tolist(), right.tolist(), strict=True)))["area"]
    assert area == pytest.approx(np.mean([a > b for a in values[right] for b in values[~right]]))


def test_hits_are_as_many_as_jiwers() -> None:
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    for _ in range(300):
        wanted, got = ([rng.choice("abc") for _ in range(rng.randrange(1, 8))] for _ in range(2))
        hits = transcripts._hits(wanted, got)
        assert len(hits) == len(got)
        # Of alignments of least edits there may be several; ours is one if its substitutions can be so many.
        least = jiwer.process_words(" ".join(wanted), " ".join(got))
        edits = least.substitutions + least.insertions + least.deletions
        substitutions = len(wanted) + len(got) - 2 * sum(hits) - edits
        assert 0 <= substitutions <= min(len(wanted), len(got)) - sum(hits)


def test_the_power_of_a_token_is_had_again_from_its_entropy() -> None:
    measure = nemostream.Confidence("renyi", "lin")
    for sum_p_alpha in (1.0, 1.7, 4.2):
        sure = measure.token_measure(12)(-0.1, sum_p_alpha)
        assert transcripts._power(sure, measure.alpha, 12) == pytest.approx(sum_p_alpha)


def test_word_times_by_hand() -> None:
    phones = [("pau", 0.2), ("t", 0.3), ("uw", 0.4), ("pau", 0.5), ("s", 0.6), ("ih", 0.7), ("k", 0.8), ("s", 0.9)]
    sizes = {"two": 2, "six": 4}
    assert transcripts.word_times(["two", "six"], phones, sizes) == [(0.2, 0.4), (0.5, 0.9)]
    assert transcripts.word_times(["two", "two"], phones, sizes) == []


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
def test_flite_tells_when_it_speaks() -> None:
    audio, phones = transcripts.speak("kal16", "two, six")
    (_, two), (six, _) = transcripts.word_times(["two", "six"], phones, {"two": 2, "six": 4})
    pause = audio[round(16000 * (two + 0.02)) : round(16000 * (six - 0.02))]
    assert len(pause) > 500 and np.abs(pause).max() < 0.05 * np.abs(audio).max()  # what it says is silent, is


def test_the_whole_benchmark_on_a_few_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "examples" / "demo_model" / "heldout"
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()[:3]]
    rows = [row | {"audio_filepath": str(folder / row["audio_filepath"])} for row in rows]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, value in {"VOICES": ("slt",), "DECIBELS": (10,), "NOISES": 1, "PAUSES": (1.2,)}.items():
        monkeypatch.setattr(transcripts, name, value)
    with nemostream.load(threads=1) as model:
        result = transcripts.measure_transcripts(model, tmp_path / "few.jsonl")
    text = report.write_report([result], tmp_path / "few.md")
    kinds = {row["case"]["what"] for row in result["rows"]}
    assert kinds >= {"confidence", "decoder"} and "expected calibration error" in text
    assert (tmp_path / "few-reliability.png").stat().st_size > 1000


def test_the_page_quotes_the_result() -> None:
    page = (ROOT / "docs" / "transcripts.md").read_text(encoding="utf-8")
    told = transcripts.show(records.read(RESULT), report._no_plot)
    tables = [line for line in told.splitlines() if line.startswith("|")]
    assert len(tables) > 10
    missing: list[Any] = [line for line in tables if line not in page]
    assert not missing, "docs/transcripts.md is out of date"
    assert f"{RESULT.stem}-reliability.svg" in page
