"""Word error rates by precision: the counts are correct."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

import nemostream
from nemostream.bundle import Bundle

pytest.importorskip("jiwer", reason="needs the bench extra")
pytest.importorskip("onnx", reason="needs the build extra")

from nemostream.benchmarks.studies import precision

HELD_OUT = Path(__file__).parents[3] / "examples" / "demo_model" / "heldout" / "heldout.jsonl"


@cache
def distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Return the Levenshtein distance, by its definition."""
    if not a or not b:
        return len(a) + len(b)
    substitution = a[0] != b[0]
    return min(distance(a[1:], b[1:]) + substitution, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)


def normalised(text: str) -> tuple[str, ...]:
    """Return the words without case and punctuation."""
    return tuple(re.sub("[^a-z ]", " ", text.lower()).split())


@pytest.mark.slow
def test_words(demo_bundle: Bundle, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()][:6]
    manifest = tmp_path / "some.jsonl"
    for row in rows:
        row["audio_filepath"] = str(HELD_OUT.parent / row["audio_filepath"])
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = precision.word_errors(demo_bundle, manifest, tmp_path / "engines")
    assert [(row["chunk_ms"], row["precision"]) for row in figures] == [
        (ms, kind) for ms in (80, 160, 560, 1120) for kind in ("fp32", "int8, CPU", "fp16", "int8", "fp8")
    ]
    words = [normalised(row["text"]) for row in rows]
    with nemostream.load(chunk_ms=560) as model:
        got = [normalised(model.transcribe(row["audio_filepath"]).text) for row in rows]
    errors = sum(distance(a, b) for a, b in zip(words, got, strict=True))
    assert figures[10]["wer"] == pytest.approx(errors / sum(map(len, words)))
    assert figures[10]["words"] == sum(map(len, words)) and figures[10]["same_text_as_fp32"] == 6
    assert figures[11]["validation"]["cosine"] > 0.99
