"""Benchmarks of features and boosting: they run, and their counts are correct. Times are not tested."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemostream.benchmarks.studies import features
from nemostream.bundle import Bundle
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import Emissions
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.text.tokenizer import Tokenizer

HELD_OUT = Path(__file__).parents[3] / "examples" / "demo_model" / "heldout" / "heldout.jsonl"


def test_features(demo_bundle: Bundle) -> None:
    messages: list[str] = []
    result = features.measure_features(demo_bundle, batch=3, steps=4, threads=1, progress=messages.append)
    assert messages == [f"step {number} of 4" for number in (1, 2, 3, 4)] and result["benchmark"] == "features"
    cases = len(features.DECODE_CASES)
    assert [row["case"]["decode"] for row in result["rows"][:cases]] == list(features.DECODE_CASES)
    assert [row["case"]["host"] for row in result["rows"][cases:]] == list(features.HOST_CASES)
    for row in result["rows"][cases:]:
        assert len(row["ms"]["host"]) == len(row["ms"]["added"]) == 4
        boosted = result["rows"][cases - 1]["values"]["share"]
        assert row["values"]["total_share"] == pytest.approx(row["values"]["share"] + boosted)
    plain, *others = result["rows"][:cases]
    assert plain["values"]["share"] == 0
    for row in result["rows"][:cases]:
        assert len(row["ms"]["decode"]) == len(row["ms"]["added"]) == 4
        added = np.array(row["ms"]["decode"]) - plain["ms"]["decode"]
        np.testing.assert_allclose(row["ms"]["added"], added, atol=1e-3)
        assert row["values"]["share"] == pytest.approx(np.median(added) / row["values"]["step_ms"], abs=1e-3)
        assert row["values"]["labels_per_second"] > 0
    assert result["method"] | {"other_work_cores": 0} == {
        "steps": 4,
        "warm_up": 3,
        "threads": 1,
        "phrases": 300,
        "weight": 1.0,
        "other_work_cores": 0,
    }
    # Confidences do not change the tokens.
    assert others[0]["values"]["labels_per_second"] == plain["values"]["labels_per_second"]
    assert features.table(result).count("\n| ") == 4 + len(features.DECODE_CASES) + len(features.HOST_CASES)


def test_replayed_tokens(demo_bundle: Bundle) -> None:
    """The host is measured with all tokens of the steps, in order."""
    rng, results = np.random.default_rng(0), {name: [] for name in features.HOST_CASES}
    rows = [[rng.integers(1, 11, rng.integers(0, 4)) for _ in range(3)] for _ in range(6)]
    emissions = [
        Emissions.of_rows(
            step,
            [np.full(len(row), 7 * index) for row in step],
            [np.zeros(len(row)) for row in step],
            [np.ones(len(row)) for row in step],
            np.zeros(3, bool),
        )
        for index, step in enumerate(rows)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, (work, endpoint) in features.HOST_CASES.items():

            def work_and_record(stream: Any, name: str = name, work: Any = work) -> None:
                work(stream)
                results[name].append([token.id for token in stream.result.tokens])

            patch.setitem(features.HOST_CASES, name, (work_and_record, endpoint))
        times = features._measure_host(demo_bundle, emissions, 560, 3)
    expected = [
        np.concatenate([step[row] for step in rows[: end + 1]]).tolist() for end in range(6) for row in range(3)
    ]
    assert all(found == expected for found in results.values()) and len(results) == 3
    assert all(len(found) == 6 for found in times.values())


def test_token_rate_with_random_weights(demo_bundle: Bundle) -> None:
    result = features.measure_features(demo_bundle, batch=7, threads=1, random_weights=True)
    assert result["method"]["steps"] == 30
    assert {(row["case"]["chunk_ms"], row["case"]["batch"]) for row in result["rows"]} == {(560, 7)}
    for row in result["rows"][: len(features.DECODE_CASES)]:
        assert row["values"]["labels_per_second"] == pytest.approx(features.TOKENS_PER_SECOND, rel=0.25)


def test_phrases_of_streams_differ() -> None:
    phrases = [features.random_phrases(seed, [1, 2, 3], 50) for seed in range(3)]
    assert len({boosting.digest.tobytes() for boosting in phrases}) == 3
    again = features.random_phrases(1, [1, 2, 3], 50)  # the same in every run
    assert again.digest.tobytes() == phrases[1].digest.tobytes()
    assert all(len(boosting) > features.PHRASES for boosting in phrases)


def test_boosting_counts(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phrases found, false positives and word error rate of given texts."""
    pytest.importorskip("jiwer", reason="needs the bench extra")
    from nemostream.benchmarks.studies import boosting

    texts = ["one two three four", "four five six", "seven eight"]
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()][:3]
    for row, text in zip(rows, texts, strict=True):
        row["audio_filepath"], row["text"] = str(HELD_OUT.parent / row["audio_filepath"]), text
    manifest = tmp_path / "some.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(demo_bundle.path / "tokenizer.model", demo_bundle.manifest.decoder.vocabulary)
    transcripts = ["one two three four", "one two three four six", "seven eight"]

    def decode(bundle: Any, chunk: Any, clips: Any, phrases: Boosting | None) -> list[list[int]]:
        assert len(clips) == 3
        return [tokenizer.encode(text) for text in (texts if phrases else transcripts)]

    monkeypatch.setattr(boosting, "decode", decode)
    result = boosting.measure_boosting(demo_bundle, manifest, weights=[1.0], decibels=[None])
    found = {(row["case"]["list"], row["case"]["weight"]): row["values"] for row in result["rows"]}
    assert list(found) == [("spoken", 0), ("spoken", 1), ("unspoken", 0), ("unspoken", 1)]
    plain = {"recordings": 3, "spoken": 2, "found": 1, "wer": pytest.approx(4 / 9)}
    assert found["spoken", 0] == plain | {"false_positives": 1}
    assert found["unspoken", 0] == plain | {"false_positives": 0}
    for name in ("spoken", "unspoken"):
        assert found[name, 1] == {"recordings": 3, "spoken": 2, "found": 2, "false_positives": 0, "wer": 0}
    assert "| none (2) | spoken | 1, 1, 44.4 % | 2, 0, 0.0 % |" in boosting.table(result)
    # A phrase file: one of its phrases is spoken, and is found only if it is boosted.
    unspoken = [" ".join(words) for words in itertools.product(("six", "nine"), repeat=10)][:599]
    (tmp_path / "list.txt").write_text("\n".join(["five six", *unspoken]))
    options = {"weights": [1.0], "decibels": [None], "phrase_file": tmp_path / "list.txt"}
    (plain, boosted, *others) = boosting.measure_boosting(demo_bundle, manifest, **options)["rows"]
    assert (plain["values"]["spoken"], plain["values"]["found"], boosted["values"]["found"]) == (1, 0, 1)
    assert len(others) == 2 and boosted["values"]["false_positives"] == 0
    (tmp_path / "list.txt").write_text("five six\n")
    with pytest.raises(OptionError, match=r"list.txt has 1 phrases; at least 600 are needed"):
        boosting.measure_boosting(demo_bundle, manifest, **options)
    manifest.write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(OptionError, match="too few words to make up 600 phrases"):
        boosting.measure_boosting(demo_bundle, manifest, weights=[1.0], decibels=[None])


def test_decode_agrees_with_transcribe(demo_bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
    """More recordings than slots, of different lengths."""
    pytest.importorskip("jiwer", reason="needs the bench extra")
    import nemostream
    from nemostream.benchmarks.studies import boosting

    some = [clip[: 16000 + 700 * index] for index, clip in enumerate(list(clips.values()) * 10)]
    assert len(some) > boosting._SLOTS
    got = boosting.decode(demo_bundle, demo_bundle.manifest.chunk(560), some, None)
    with nemostream.load(demo_bundle.path, threads=1) as model:
        for index in (0, 5, 63, 64, 69):
            assert got[index] == [token.id for token in model.transcribe(some[index]).tokens]
    assert sum(map(len, got)) > 20


def test_decode_boosts_the_phrases(demo_bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
    """Phrases with a large weight are emitted although the audio does not contain them, as in `transcribe`."""
    pytest.importorskip("jiwer", reason="needs the bench extra")
    import nemostream
    from nemostream.benchmarks.studies import boosting

    clip, chunk, phrases = next(iter(clips.values()))[:32000], demo_bundle.manifest.chunk(560), {"seven": 40.0}
    tokenizer = Tokenizer(demo_bundle.path / "tokenizer.model", demo_bundle.manifest.decoder.vocabulary)
    found = boosting.decode(demo_bundle, chunk, [clip], Boosting.from_phrases(phrases, tokenizer))
    with nemostream.load(demo_bundle.path, threads=1) as model:
        assert "seven" not in model.transcribe(clip).text
        expected = model.transcribe(clip, phrases=phrases)
    assert found == [[token.id for token in expected.tokens]] and "seven" in expected.text
