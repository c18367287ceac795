"""Word error rates against cases worked out by hand, sets of every kind, and NeMo beside us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemostream.benchmarks import accuracy, report
from nemostream.errors import OptionError
from nemostream.spec import Bundle

pytest.importorskip("jiwer", reason="needs the bench extra")
pytest.importorskip("whisper_normalizer", reason="needs the bench extra")

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "examples" / "demo_model" / "heldout" / "heldout.jsonl"


@pytest.mark.parametrize(
    ("wanted", "said", "errors", "words"),
    [
        (["one two three"], ["one two three"], 0, 3),
        (["one two three"], ["one too three four"], 2, 3),  # a substitution, an insertion
        (["one two three"], [""], 3, 3),
        (["a b", "c"], ["a", "c d e"], 3, 3),  # summed over the set, not averaged
        (["", "a"], ["noise", "a"], 0, 1),  # nothing was said: left out, as the leaderboard does
        (["Hello, World!"], ["hello world"], 0, 2),
    ],
)
def test_word_errors_by_hand(wanted: list[str], said: list[str], errors: int, words: int) -> None:
    found = accuracy.word_errors(wanted, said, accuracy.normalizer("basic"))
    assert (found["errors"], found["words"], found["wer"]) == (errors, words, errors / words)


def test_normalizers() -> None:
    english = accuracy.normalizer("english")
    assert english("Mr. Smith's colour") == english("mister smith is color")
    assert accuracy.normalizer("none")("As It Is.") == "As It Is."
    with pytest.raises(OptionError, match="choose one of english, basic, none"):
        accuracy.normalizer("latin")


def test_the_cards_averages() -> None:
    """The card prints an average for each chunk size: a check on every figure that was copied from it."""
    table = [figures for _, figures in accuracy.LEADERBOARD.values()]
    averages = [sum(column) / len(column) for column in zip(*table, strict=True)]
    assert len(table) == 8
    assert averages == pytest.approx([6.93, 7.07, 7.67, 8.43], abs=0.006)


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"text": "a"}', '{"audio_filepath": "a.wav"}'])
def test_bad_manifests_are_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "text": "a"}\n\n' + line + "\n")
    with pytest.raises(OptionError, match="line 3"):
        accuracy.read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(OptionError, match="names no recording"):
        accuracy.read_manifest(tmp_path / "m.jsonl")
    with pytest.raises(OptionError, match="cannot be read"):
        accuracy.read_manifest(tmp_path / "missing.jsonl")


def test_unknown_sets_are_named() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(OptionError, match="librispeech-clean"):
        list(accuracy.read_hub("librispeach", 16000))


def test_a_set_of_the_hub_is_read(tmp_path: Path) -> None:
    """From a folder in the hub's format, at another rate than the model's."""
    pytest.importorskip("datasets")
    import io

    import numpy as np
    import pyarrow
    import pyarrow.parquet
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(8000) / 10).astype(np.float32), 8000, format="WAV")
    rows = {"audio": [{"bytes": file.getvalue(), "path": "a.wav"}], "text": ["a tone"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
    (found,) = accuracy.read_hub(f"{tmp_path}:default:train", 16000)
    assert found.text == "a tone" and len(found.audio) == pytest.approx(16000, abs=50)


@pytest.mark.nemo
def test_beside_nemo(demo_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("nemo")
    utterances = accuracy.read_manifest(HELD_OUT)[:8]
    result = accuracy.measure_accuracy(
        demo_bundle, {"held out": utterances, "packaged": accuracy.packaged(demo_bundle.manifest)}, ("fp32", "int8"),
        (80, 560), normalise="basic", checkpoint=ROOT / "examples" / "demo_model" / "demo.nemo",
        engines=tmp_path / "engines",
    )  # fmt: skip
    assert len(result["rows"]) == 2 * 2 * 2
    for row in result["rows"]:
        values = row["values"]
        if row["case"]["precision"] == "fp32":
            assert values["same_tokens"] == 1.0 and values["wer"] == values["nemo_wer"]
            assert values["same_utterances"] == values["utterances"]
        assert 0 <= values["wer"] < 0.5
        if row["case"]["set"] == "held out":
            assert values["words"] == sum(len(json.loads(x)["text"].split()) for x in HELD_OUT.open().readlines()[:8])
    text = report.write_report([result], tmp_path / "x.md")
    assert "| held out |" in text and (tmp_path / "x-pareto.png").exists()
