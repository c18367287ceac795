"""The benchmarks of what comes with the tokens: they run, and what they count is right. No time is judged."""

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
    result = features.measure_features(demo_bundle, batch=3, steps=4, threads=1)
    after = len(features.CASES)
    assert [row["case"]["features"] for row in result["rows"][:after]] == list(features.CASES)
    assert [row["case"]["host"] for row in result["rows"][after:]] == list(features.HOST)
    for row in result["rows"][after:]:
        assert len(row["ms"]["host"]) == len(row["ms"]["more"]) == 4
        boosted = result["rows"][after - 1]["values"]["share"]
        assert row["values"]["both"] == pytest.approx(row["values"]["share"] + boosted)
    plain, *others = result["rows"][:after]
    assert plain["values"]["share"] == 0
    for row in result["rows"][:after]:
        assert len(row["ms"]["decode"]) == len(row["ms"]["more"]) == 4
        more = np.array(row["ms"]["decode"]) - plain["ms"]["decode"]
        np.testing.assert_allclose(row["ms"]["more"], more, atol=1e-3)
        assert row["values"]["share"] == pytest.approx(np.median(more) / row["values"]["step_ms"], abs=1e-3)
        assert row["values"]["labels_per_second"] > 0
    # What is said does not depend on whether anybody asks how sure it is.
    assert others[0]["values"]["labels_per_second"] == plain["values"]["labels_per_second"]
    assert features.table(result).count("\n| ") == 4 + len(features.CASES) + len(features.HOST)


def test_what_is_said_again_is_what_was_said(demo_bundle: Bundle) -> None:
    """The host is measured on the tokens of the steps, all of them, in their order."""
    rng, heard = np.random.default_rng(0), {name: [] for name in features.HOST}
    rows = [[rng.integers(1, 11, rng.integers(0, 4)) for _ in range(3)] for _ in range(6)]
    spoken = [
        Emissions(
            tuple(row.astype(np.int32) for row in step),
            tuple(np.full(len(row), 7 * at, np.int64) for row in step),
            tuple(np.zeros(len(row), np.float32) for row in step),
            tuple(np.ones(len(row), np.float32) for row in step),
            np.zeros(3, bool),
        )
        for at, step in enumerate(rows)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, (what, endpoint) in features.HOST.items():

            def told(stream: Any, name: str = name, what: Any = what) -> None:
                what(stream)
                heard[name].append([token.id for token in stream.result.tokens])

            patch.setitem(features.HOST, name, (told, endpoint))
        times = features._host(demo_bundle, spoken, 560, 3)
    wanted = [np.concatenate([step[row] for step in rows[: at + 1]]).tolist() for at in range(6) for row in range(3)]
    assert all(found == wanted for found in heard.values()) and len(heard) == 3
    assert all(len(found) == 6 for found in times.values())


def test_random_weights_speak_as_fast_as_people(demo_bundle: Bundle) -> None:
    result = features.measure_features(demo_bundle, batch=16, steps=12, threads=1, random_weights=True)
    for row in result["rows"][: len(features.CASES)]:
        assert row["values"]["labels_per_second"] == pytest.approx(features.TOKENS_PER_SECOND, rel=0.25)


def test_phrases_of_streams_differ() -> None:
    lists = [features.some_phrases(seed, [1, 2, 3], 50) for seed in range(3)]
    assert len({boosting.digest.tobytes() for boosting in lists}) == 3
    assert all(len(boosting) > features.PHRASES for boosting in lists)


def test_boosting_counts(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of given texts: phrases found, phrases that nobody said, words wrong."""
    pytest.importorskip("jiwer", reason="needs the bench extra")
    from nemostream.benchmarks.studies import boosting

    texts = ["one two three four", "four five six", "seven eight"]
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()][:3]
    for row, text in zip(rows, texts, strict=True):
        row["audio_filepath"], row["text"] = str(HELD_OUT.parent / row["audio_filepath"]), text
    manifest = tmp_path / "some.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(demo_bundle.path / "tokenizer.model", demo_bundle.manifest.decoder.vocabulary)
    heard = ["one two three four", "one two three four six", "seven eight"]

    def decode(bundle: Any, chunk: Any, clips: Any, phrases: Boosting | None) -> list[list[int]]:
        assert len(clips) == 3
        return [tokenizer.encode(text) for text in (texts if phrases else heard)]

    monkeypatch.setattr(boosting, "decode", decode)
    result = boosting.measure_boosting(demo_bundle, manifest, weights=[1.0], decibels=[None])
    found = {(row["case"]["list"], row["case"]["weight"]): row["values"] for row in result["rows"]}
    assert list(found) == [("spoken", 0), ("spoken", 1), ("others", 0), ("others", 1)]
    plain = {"recordings": 3, "phrases_said": 2, "found": 1, "wer": pytest.approx(4 / 9)}
    assert found["spoken", 0] == plain | {"false": 1}
    assert found["others", 0] == plain | {"false": 0}
    for name in ("spoken", "others"):
        assert found[name, 1] == {"recordings": 3, "phrases_said": 2, "found": 2, "false": 0, "wer": 0}
    assert "| none (2 said) | spoken | 1, 1, 44.4 % | 2, 0, 0.0 % |" in boosting.table(result)
    # A list of one's own: one phrase of it is said, and is found only where it is boosted.
    unsaid = [" ".join(words) for words in itertools.product(("six", "nine"), repeat=10)][:599]
    (tmp_path / "list.txt").write_text("\n".join(["five six", *unsaid]))
    listed = {"weights": [1.0], "decibels": [None], "listed": tmp_path / "list.txt"}
    (plain, boosted, *others) = boosting.measure_boosting(demo_bundle, manifest, **listed)["rows"]
    assert (plain["values"]["phrases_said"], plain["values"]["found"], boosted["values"]["found"]) == (1, 0, 1)
    assert len(others) == 2 and boosted["values"]["false"] == 0
    (tmp_path / "list.txt").write_text("five six\n")
    with pytest.raises(OptionError, match=r"list.txt has 1 phrases; this benchmark wants 600"):
        boosting.measure_boosting(demo_bundle, manifest, **listed)
    manifest.write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(OptionError, match="too few words to make up 600 phrases"):
        boosting.measure_boosting(demo_bundle, manifest, weights=[1.0], decibels=[None])


def test_recordings_are_decoded_as_the_model_decodes_them(demo_bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
    """More recordings than slots, of different lengths; beside `transcribe`."""
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
