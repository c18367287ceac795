"""Shares of features in a step, computed by hand, and the tables of the studies."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream.benchmarks import report
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.studies import boosting, features
from nemostream.bundle import Bundle
from nemostream.runtime.decoding import greedy

RESULTS = report.ROOT / "benchmarks" / "results"


def test_added_times_and_shares() -> None:
    """Each case is compared with the first one of the same step; a step is its encoder and the first case."""
    decode, host = list(features.DECODE_CASES), list(features.HOST_CASES)
    times = {
        "encode": [90.0, 80.0, 100.0],
        decode[0]: [10.0, 15.0, 20.0],  # steps of 100, 95 and 120 ms: the median is 100
        decode[1]: [12.0, 16.0, 25.0],  # 2, 1, 5 more
        decode[2]: [13.0, 25.0, 26.0],  # 3, 10, 6 more
        decode[3]: [20.0, 23.0, 40.0],  # 10, 8, 20 more
    }
    host_times = {host[0]: [1.0, 2.0, 3.0], host[1]: [1.5, 2.0, 4.0], host[2]: [6.0, 4.0, 6.0]}
    rates = {name: 3.0 + number for number, name in enumerate(decode)}
    rows = features._rows(times, rates, host_times, {"chunk_ms": 560, "batch": 2})
    assert [row["case"].get("decode", row["case"].get("host")) for row in rows] == decode + host
    assert rows[0]["case"] == {"decode": decode[0], "chunk_ms": 560, "batch": 2}
    assert [row["ms"]["added"] for row in rows] == [
        [0.0, 0.0, 0.0],
        [2.0, 1.0, 5.0],
        [3.0, 10.0, 6.0],
        [10.0, 8.0, 20.0],
        [0.0, 0.0, 0.0],
        [0.5, 0.0, 1.0],
        [5.0, 2.0, 3.0],
    ]
    assert [row["values"]["share"] for row in rows] == pytest.approx([0.0, 0.02, 0.06, 0.10, 0.0, 0.005, 0.03])
    assert [row["values"]["step_ms"] for row in rows] == [100.0] * 7
    assert [row["values"]["labels_per_second"] for row in rows[:4]] == [3.0, 4.0, 5.0, 6.0]
    assert [row["values"]["total_share"] for row in rows[4:]] == pytest.approx([0.10, 0.105, 0.13])
    assert rows[6]["ms"]["host"] == [6.0, 4.0, 6.0] and rows[3]["ms"]["decode"] == [20.0, 23.0, 40.0]


@pytest.mark.parametrize("name", features.DECODE_CASES)
def test_share_of_boosted_streams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def label_looping(net: Any, encoded: Any, counts: Any, state: Any, phrases: Any, max_pairs: int) -> Any:
        calls.append((list(phrases), greedy.label_scores is features._score_only, max_pairs))
        return ["labels"], None

    monkeypatch.setattr(features, "label_looping", label_looping)
    net = SimpleNamespace(max_pairs=7)
    inputs = features.DecodeInput(net, np.zeros((5, 1)), np.zeros(5), None, list("abcde"))  # type: ignore[arg-type]
    assert features.DECODE_CASES[name](inputs) == ["labels"]
    boosted = {
        "scores only": [],
        "confidence": [],
        "confidence, half of the streams boosted": ["a", "b", "c", None, None],  # rows 0, 1, 2 of 5
        "confidence, all streams boosted": ["a", "b", "c", "d", "e"],
    }
    phrases = boosted[name] or ([None] * 5 if calls[0][0] else [])
    assert calls == [(phrases, name == "scores only", 7)]
    assert greedy.label_scores is not features._score_only


def test_scores_without_confidence_are_the_same() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 40)).astype(np.float32) * 3
    largest = logits.argmax(axis=1)
    expected = np.log(np.exp(logits.max(axis=1)) / np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(features._score_only(logits.copy(), largest)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(greedy.label_scores(logits.copy(), largest)[0], expected, rtol=1e-5)


def test_share_of_random_blanks() -> None:
    """3.5 labels and 12.5 blanks a second: 3.5 of 16 results of the joint are labels, for every net."""
    net = SimpleNamespace(blank=4, max_symbols=10, max_pairs=99, join=lambda encoded, predicted: np.zeros((9999, 5)))
    drawn = features.RandomBlankTransducer(net, 12.5)
    frames = np.random.default_rng(0).standard_normal((9999, 1))
    logits = drawn.join(frames, np.zeros((9999, 1)))
    assert (logits[:, 4] < 0).mean() == pytest.approx(3.5 / 16, abs=0.01)
    assert (drawn.blank, drawn.max_symbols, drawn.max_pairs) == (4, 10, 99)
    assert np.array_equal(drawn.join(frames, np.zeros((9999, 1))), logits) and not logits[:, :4].any()


def test_work_of_the_host() -> None:
    """Results are collected, or events are read, and the words of each computed."""
    calls: list[str] = []

    class Event:
        @property
        def words(self) -> None:
            calls.append("words")

    def events() -> list[Event]:
        calls.append("events")
        return [Event(), Event()]

    stream: Any = SimpleNamespace(collect=lambda: calls.append("collect"), events=events)
    found = {}
    for name, (work, endpoint) in features.HOST_CASES.items():
        calls.clear()
        work(stream)
        found[name] = list(calls), endpoint and endpoint.decoder
    assert found == {
        "results": (["collect"], None),
        "events, utterance ends": (["events"], "reset"),
        "events, utterance ends, words": (["events", "words", "words"], "reset"),
    }


def test_frames_of_emissions_count_from_the_start_of_the_stream() -> None:
    decoded: Any = [SimpleNamespace(tokens=[3, 5], frames=[0, 6], scores=[-0.5, -1.0], sum_p_alpha=[1.0, 2.0])]
    found = features._emissions(decoded, 14)
    assert found.frames[0].tolist() == [14, 20] and found.tokens[0].tolist() == [3, 5]
    assert found.scores[0].tolist() == [-0.5, -1.0] and found.sum_p_alpha[0].tolist() == [1.0, 2.0]
    assert found.failed.tolist() == [False]


def test_phrases_have_two_to_seven_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(features, "Boosting", lambda phrases, vocabulary: made.append((phrases, vocabulary)))
    features.random_phrases(1, [7] * 400, 50)
    ((phrases, vocabulary),) = made
    assert vocabulary == 50 and len(phrases) == 300 and {weight for _, weight in phrases} == {1.0}
    assert {len(tokens) for tokens, _ in phrases} == {2, 3, 4, 5, 6, 7}
    tokens = np.concatenate([tokens for tokens, _ in phrases])
    assert 0.4 < (tokens == 7).mean() < 0.65 and tokens.min() >= 0 and tokens.max() < 50


# -- boosting ----------------------------------------------------------------------------------------------------------


def test_phrases_are_found_word_by_word() -> None:
    longest = {"call ann lee now": "ann lee", "say one two": "one two"}
    counts = boosting.count_phrases(
        ["call ann lee now", "say one two", "nothing", "call ann lee now"],
        ["call ann lee now", "say one twofold", "one two and bob", "call ann leeward now"],
        ["ann lee", "one two", "bob"],
        longest,
    )
    # Substituted: "two", "nothing" and "lee"; and three words are inserted.
    words = 4 + 3 + 1 + 4
    assert counts == {"recordings": 4, "spoken": 3, "found": 1, "false_positives": 2, "wer": pytest.approx(6 / words)}


def test_lists_of_phrases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spoken list is filled with the first unspoken phrases, the other list has the last ones."""
    monkeypatch.setattr(boosting, "LIST_SIZE", 3)
    texts = ["call ann lee now", "one two"]
    found = boosting.Phrases.of(texts, ["Ann", "ann lee", "u1", "u2", "u3", "u4", "one, two"])
    assert found.spoken == ["ann", "ann lee", "one two"]
    assert found.longest_in == {"call ann lee now": "ann lee", "one two": "one two"}
    assert found.lists == {"spoken": ["ann", "ann lee", "one two"], "unspoken": ["u2", "u3", "u4"]}
    assert found.spelling["one two"] == "one, two"
    few = boosting.Phrases.of(["one two"], ["one two", "u1", "u2", "u3", "u4"])
    assert few.lists == {"spoken": ["one two", "u1", "u2"], "unspoken": ["u2", "u3", "u4"]}


def test_recordings_of_each_noise_draw(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw has its own seed, and its transcripts are compared with the texts of the same recordings."""
    import soundfile

    entries = []
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", np.full(1600, 0.25 * (number + 1)), 16000, subtype="FLOAT")
        entries.append({"audio_filepath": f"{number}.wav", "text": ["one two six", "seven four nine"][number]})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    decoded: list[list[float]] = []

    def decode(bundle: Any, chunk: Any, clips: Any, phrases: Any) -> list[list[int]]:
        decoded.append([float(clip.mean()) for clip in clips])
        return [[] for _ in clips]

    noise: list[tuple[float, int]] = []

    def add_noise(clip: Any, decibels: float, seed: int) -> Any:
        noise.append((decibels, seed))
        return clip

    references: list[list[str]] = []

    def count(texts: Any, got: Any, listed: Any, longest: Any) -> dict[str, float]:
        references.append(list(texts))
        return {}

    monkeypatch.setattr(boosting, "decode", decode)
    monkeypatch.setattr(boosting, "add_noise", add_noise)
    monkeypatch.setattr(boosting, "count_phrases", count)
    monkeypatch.setattr(boosting, "LIST_SIZE", 2)
    progress: list[str] = []
    result = boosting.measure_boosting(demo_bundle, tmp_path / "m.jsonl", [2.0], [None, 5], progress=progress.append)
    boosted = ("list spoken, weight 2.0", "list unspoken, weight 2.0")
    assert decoded == [pytest.approx([0.25, 0.5])] * 3 + [pytest.approx([0.25, 0.5] * 8)] * 3
    assert noise == [(5, seed) for seed in range(8) for _ in range(2)]
    messages = [f"noise {noise}, {case}" for noise in ("none", "5 dB") for case in ("not boosted", *boosted)]
    assert progress == messages and result["benchmark"] == "boosting"
    texts = ["one two six", "seven four nine"]
    assert references == [texts] * 4 + [texts * 8] * 4
    cases = [tuple(row["case"].values()) for row in result["rows"]]
    assert cases == [(n, w, d) for d in (None, 5) for n in ("spoken", "unspoken") for w in (0.0, 2.0)]


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("features-demo-cpu-2-cores", features.table),
        ("features-full-cpu-2-cores", features.table),
        ("boosting-demo", boosting.table),
    ],
)
def test_committed_tables_are_those_of_the_results(name: str, table: Any) -> None:
    assert table(records.read(RESULTS / f"{name}.json")) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def test_cells_of_missing_cases_are_empty() -> None:
    values = {"spoken": 3, "found": 2, "false_positives": 1, "wer": 0.25}
    cases = [(None, "spoken", 0.0), (None, "spoken", 2.0), (5, "spoken", 0.0)]
    rows = [records.row({"list": name, "weight": weight, "decibels": db}, {}, values) for db, name, weight in cases]
    method = {"chunk_ms": 80, "list_size": 4, "spoken_phrases": 3, "noise_draws": 8}
    text = boosting.table(records.record("boosting", rows, model={"name": "m"}, method=method))
    assert text.splitlines()[2:] == [
        "| noise (phrases spoken) | list | not boosted | weight 2 |",
        "| --- | --- | --- | --- |",
        "| none (3) | spoken | 2, 1, 25.0 % | 2, 1, 25.0 % |",
        "| 5 dB (3) | spoken | 2, 1, 25.0 % |  |",
    ]


def test_committed_table_of_precisions() -> None:
    pytest.importorskip("onnx", reason="needs the build extra")
    from nemostream.benchmarks.studies import precision

    result = json.loads((RESULTS / "precision-cpu-2-cores.json").read_text(encoding="utf-8"))
    assert precision.show(result) == (RESULTS / "precision-cpu-2-cores.md").read_text(encoding="utf-8")


def test_rows_of_the_precisions(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word error rates and texts equal to those of fp32, of engines that transcribe given texts."""
    pytest.importorskip("jiwer", reason="needs the bench extra")
    pytest.importorskip("onnx", reason="needs the build extra")
    from nemostream.benchmarks.studies import precision

    rows = [{"audio_filepath": f"{n}.wav", "text": text} for n, text in enumerate(("One two.", "three", "four five"))]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {
        "fp32": ["one two", "three", "four"],
        "int8, CPU": ["one two", "tree", "four"],
        "fp16": ["one two", "three", "four"],
        "int8": ["two", "three", "five four five"],
        "fp8": ["", "", ""],
    }
    opened: list[Any] = []

    def model(bundle: Any, backend: str, ms: int) -> Any:
        def transcribe(path: Path) -> Any:
            assert path.parent == tmp_path
            return SimpleNamespace(text=texts[backend][int(path.stem)])

        opened.append((backend, ms))
        return contextlib.nullcontext(SimpleNamespace(transcribe=transcribe))

    def plan(name: str, cosine: float | None) -> Any:
        return SimpleNamespace(name=name, validation={} if cosine is None else {"cosine": cosine})

    monkeypatch.setattr(precision, "measure_ranges", lambda bundle, chunk, clips: {"range": chunk.ms})
    monkeypatch.setattr(precision, "build_engine", lambda *arguments, **options: (plan("int8, CPU", 0.99), True))
    monkeypatch.setattr(
        precision, "_gpu_plan", lambda bundle, chunk, kind, ranges, folder: plan(kind, None if kind == "fp8" else 0.5)
    )
    monkeypatch.setattr(
        precision, "OrtBackend", lambda bundle, plans: next(iter(plans.values())).name if plans else "fp32"
    )
    monkeypatch.setattr(precision.nemostream, "Model", model)
    found = precision.word_errors(demo_bundle, tmp_path / "m.jsonl", tmp_path)
    sizes = [chunk.ms for chunk in demo_bundle.manifest.chunks]
    assert opened == [(name, ms) for ms in sizes for name in texts]
    assert found[:5] == [
        {"chunk_ms": 80, "precision": name, "wer": errors / 5, "recordings": 3, "words": 5, **more}
        for name, errors, more in (
            ("fp32", 1, {"same_text_as_fp32": 3, "validation": None}),
            ("int8, CPU", 2, {"same_text_as_fp32": 2, "validation": {"cosine": 0.99}}),
            ("fp16", 1, {"same_text_as_fp32": 3, "validation": {"cosine": 0.5}}),
            ("int8", 2, {"same_text_as_fp32": 1, "validation": {"cosine": 0.5}}),
            ("fp8", 5, {"same_text_as_fp32": 0, "validation": None}),
        )
    ]
    assert len(found) == 5 * len(sizes)
