"""Word error rates compared with examples computed by hand, all kinds of data sets, and comparison with NeMo."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from nemostream.benchmarks import accuracy, report
from nemostream.benchmarks.harness import corpora
from nemostream.bundle import Bundle
from nemostream.clips import CLIP_TEXT
from nemostream.errors import AudioError, BackendError, OptionError

pytest.importorskip("jiwer", reason="needs the bench extra")
pytest.importorskip("whisper_normalizer", reason="needs the bench extra")

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "examples" / "demo_model" / "heldout" / "heldout.jsonl"


@pytest.mark.parametrize(
    ("references", "texts", "errors", "words"),
    [
        (["one two three"], ["one two three"], 0, 3),
        (["one two three"], ["one too three four"], 2, 3),  # a substitution, an insertion
        (["one two three"], [""], 3, 3),
        (["a b", "c"], ["a", "c d e"], 3, 3),  # summed over the set, not averaged
        (["", "a"], ["noise", "a"], 0, 1),  # empty reference: skipped, like on the leaderboard
        (["Hello, World!"], ["hello world"], 0, 2),
    ],
)
def test_word_errors(references: list[str], texts: list[str], errors: int, words: int) -> None:
    found = accuracy.word_errors(references, texts, accuracy.normalizer("basic"))
    assert (found["errors"], found["words"], found["wer"]) == (errors, words, errors / words)


def test_normalizers() -> None:
    english = accuracy.normalizer("english")
    assert english("Mr. Smith's colour") == english("mister smith is color")
    assert accuracy.normalizer("none")("As It Is.") == "As It Is."
    with pytest.raises(OptionError, match="choose one of english, basic, none"):
        accuracy.normalizer("latin")


@pytest.mark.parametrize(
    ("reference", "text", "errors", "words"),
    [
        ("明天下雨。", "明天下雪", 1, 4),  # by character
        ("我用iPhone打电话", "我用 iPhone 打電話", 2, 6),  # words of other scripts are words
        ("東京タワー、", "東京タワ", 1, 5),
        ("น้อง ดี", "นองดี", 1, 6),  # a tone mark
        ("한국어 문장", "한국어 문장이", 1, 2),  # Korean has spaces
        ("हिंदी में", "हिदी में", 1, 2),  # a vowel mark is not removed
        ("İstanbul IŞIK", "istanbul ışık", 0, 2),
        ("Straße", "strasse", 1, 1),
    ],
)
def test_scripts(reference: str, text: str, errors: int, words: int) -> None:
    found = accuracy.word_errors([reference], [text], accuracy.normalizer("basic"))
    assert (found["errors"], found["words"]) == (errors, words)


def test_errors_of_each_utterance_add_up() -> None:
    references = ["a b c", "", "d", "e f"]
    found = accuracy.word_errors(references, ["a x", "noise", "d d d", "e f"], accuracy.normalizer("basic"))
    assert found["by_utterance"] == [[2, 3], [2, 1], [0, 2]]  # a substitution and a deletion; two insertions; none
    assert (found["errors"], found["words"], found["utterances"]) == (4, 6, 3)


def test_averages_of_the_model_card() -> None:
    """The model card contains the average for each chunk size, which checks all copied figures."""
    table = [figures for _, figures in corpora.LEADERBOARD.values()]
    averages = [sum(column) / len(column) for column in zip(*table, strict=True)]
    assert len(table) == 8
    assert averages == pytest.approx([6.93, 7.07, 7.67, 8.43], abs=0.006)


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"text": "a"}', '{"audio_filepath": "a.wav"}'])
def test_invalid_manifests_are_rejected(line: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "text": "a"}\n\n' + line + "\n")
    with pytest.raises(OptionError, match="line 3"):
        corpora.read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(OptionError, match="contains no recordings"):
        corpora.read_manifest(tmp_path / "m.jsonl")
    with pytest.raises(OptionError, match="cannot be read"):
        corpora.read_manifest(tmp_path / "missing.jsonl")


def test_parts_of_a_file(tmp_path: Path) -> None:
    """A manifest may contain parts of one file, with another sample rate than the model."""
    samples = np.repeat(np.array([0.1, 0.2, 0.3], np.float32), 8000)
    soundfile.write(tmp_path / "all.wav", np.stack([samples, samples], axis=1), 8000, subtype="FLOAT")
    rows = [
        {"audio_filepath": "all.wav", "offset": 0.0, "duration": 1.0, "text": "one"},
        {"audio_filepath": "all.wav", "offset": 1.25, "duration": 0.5, "text": "two"},
        {"audio_filepath": "all.wav", "offset": 2.0, "text": "three"},
        {"audio_filepath": "all.wav", "duration": 2.9, "text": "all"},  # rounded, as by NeMo's tools
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, three, everything = corpora.read_manifest(tmp_path / "m.jsonl")
    for part, seconds, level in ((one, 1.0, 0.1), (two, 0.5, 0.2), (three, 1.0, 0.3)):
        found = part.samples(16000)
        assert len(found) == 16000 * seconds
        assert found[1000:-1000] == pytest.approx(level, abs=1e-3)
        assert isinstance(part.source(16000), np.ndarray)
    assert len(everything.samples(16000)) == 48000
    assert everything.source(16000) == tmp_path / "all.wav"
    with pytest.raises(AudioError, match=r"missing\.wav cannot be read"):
        corpora.CorpusUtterance(tmp_path / "missing.wav", "").samples(16000)


def test_manifest_paths_relative_to_the_parent_folder(tmp_path: Path) -> None:
    """As in ../shared/speech/digits."""
    below = tmp_path / "digits"
    below.mkdir()
    soundfile.write(below / "a.wav", np.zeros(1600, np.float32), 16000)
    rows = [{"audio_filepath": name, "text": "one"} for name in ("digits/a.wav", "a.wav", "missing.wav")]
    (below / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [each.audio for each in corpora.read_manifest(below / "m.jsonl")]
    assert [Path(str(path)).exists() for path in found] == [True, True, False]
    assert Path(str(found[0])).samefile(Path(str(found[1]))) and found[2] == below / "missing.wav"


def test_utterances_with_offsets(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Two utterances in one file are transcribed separately."""
    clip = corpora.packaged(demo_bundle.manifest)[0].samples(16000)
    soundfile.write(tmp_path / "two.flac", np.concatenate([clip, clip]), 16000)
    seconds = len(clip) / 16000
    rows = [
        {"audio_filepath": "two.flac", "offset": at, "duration": seconds, "text": CLIP_TEXT} for at in (0.0, seconds)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    utterances = corpora.read_manifest(tmp_path / "m.jsonl")
    result = accuracy.measure_accuracy(demo_bundle, {"two": utterances}, chunk_ms=(560,), normalise="basic")
    (row,) = result["rows"]
    assert (row["values"]["errors"], row["values"]["words"], row["values"]["utterances"]) == (
        0,
        2 * len(CLIP_TEXT.split()),
        2,
    )
    assert row["values"]["audio_seconds"] == pytest.approx(2 * seconds, abs=0.01)
    assert accuracy.latency(row) == 560 + row["figures"]["result"]["p50"] and len(row["ms"]["result"]) == 20


def a_hub(folder: Path, names: dict[str, tuple[str, str]], texts: dict[str, str]) -> None:
    """Write a data set in the format of the hub: a tone for each configuration and split, at 8 kHz."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    configs: dict[str, list[dict[str, str]]] = {}
    for name, (config, split) in names.items():
        file = io.BytesIO()
        soundfile.write(file, np.sin(np.arange(8000) / 10).astype(np.float32), 8000, format="WAV")
        rows = [{"audio": {"bytes": file.getvalue(), "path": "a.wav"}, "text": text} for text in (texts[name], "again")]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
        configs.setdefault(config, []).append({"split": split, "path": f"{name}.parquet"})
    head = [{"config_name": config, "data_files": files} for config, files in configs.items()]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(head)}\n---\n")


def test_sets_of_the_leaderboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name selects its configuration and split in a repository that contains all of them."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(corpora, "_HUB", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    a_hub(
        tmp_path / "hub",
        {n: where for n, (where, _) in corpora.LEADERBOARD.items()},
        {n: n for n in corpora.LEADERBOARD},
    )
    for name in corpora.LEADERBOARD:
        whole, first = corpora.Hub(name), corpora.Hub(name, limit=1)
        assert [utterance.text for utterance in whole] == [name, "again"] == [utterance.text for utterance in whole]
        (found,) = first
        assert found.text == name and len(found.samples(16000)) == 16000


def test_any_set_of_the_hub(tmp_path: Path, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    a_hub(tmp_path / "hub", {"it": ("default", "train")}, {"it": "ignore_time_segment_in_scoring"})
    hub = corpora.Hub(f"{tmp_path / 'hub'}:default:train")
    assert [utterance.text for utterance in hub] == ["", "again"]
    result = accuracy.measure_accuracy(demo_bundle, {"ami": hub}, chunk_ms=(80, 560), normalise="basic")
    assert [row["values"]["card_wer"] for row in result["rows"]] == pytest.approx([0.1829, 0.1188])  # by its name
    assert {row["values"]["words"] for row in result["rows"]} == {1}
    assert "model card" in report.write_report([result], tmp_path / "x.md")[0]


def test_unknown_sets_are_rejected() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(OptionError, match="librispeech-clean"):
        corpora.Hub("librispeach")
    with pytest.raises(BackendError, match="cannot be loaded"):
        list(corpora.Hub("/nowhere/at/all:default:train"))


def test_more_than_fits_into_a_block(demo_bundle: Bundle) -> None:
    """A set is read a few recordings at a time; all results are complete and in order."""
    clip = corpora.packaged(demo_bundle.manifest)[0]
    quiet = corpora.CorpusUtterance(np.zeros(16000, np.float32), "nothing")
    read: list[int] = []

    class Many:
        def __iter__(self) -> Any:
            for number in range(70):
                read.append(number)
                yield clip if number == 66 else quiet

    with accuracy._model(demo_bundle, demo_bundle.manifest.chunk(1120), "fp32", "cpu", None, None) as model:
        texts, results = accuracy._transcribe(model, Many(), 16000)
    assert read == list(range(70)) and len(texts) == len(results) == 70
    assert [number for number, result in enumerate(results) if result.text] == [66]


@pytest.mark.nemo
def test_comparison_with_nemo(demo_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("nemo")
    utterances = corpora.read_manifest(HELD_OUT)[:8]
    result = accuracy.measure_accuracy(
        demo_bundle,
        {"held out": utterances, "packaged": corpora.packaged(demo_bundle.manifest)},
        ("fp32", "int8"),
        (80, 560),
        normalise="basic",
        checkpoint=ROOT / "examples" / "demo_model" / "demo.nemo",
        engines=tmp_path / "engines",
    )
    assert len(result["rows"]) == 2 * 2 * 2
    for row in result["rows"]:
        values = row["values"]
        if row["case"]["precision"] == "fp32":
            assert values["same_tokens"] == 1.0 and values["wer"] == values["nemo_wer"]
            assert values["same_utterances"] == values["utterances"] == values["compared_utterances"]
        assert 0 <= values["wer"] < 0.5
        if row["case"]["set"] == "held out":
            assert values["words"] == sum(len(json.loads(x)["text"].split()) for x in HELD_OUT.open().readlines()[:8])
    text, _ = report.write_report([result], tmp_path / "x.md")
    assert "| held out |" in text and (tmp_path / "x-wer.png").exists()
