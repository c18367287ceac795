"""Rows and tables of word error rates, from given transcripts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream import engines
from nemostream.benchmarks import accuracy
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.corpora import CorpusUtterance, add_noise
from nemostream.benchmarks.harness.plots import CurveChart
from nemostream.bundle import Bundle

pytest.importorskip("jiwer", reason="needs the bench extra")
pytest.importorskip("whisper_normalizer", reason="needs the bench extra")


def transcript(text: str, tokens: list[int], duration: float = 2.0) -> Any:
    return SimpleNamespace(text=text, duration=duration, tokens=[SimpleNamespace(id=token) for token in tokens])


def test_comparison_with_the_tokens_of_nemo() -> None:
    """6 of NeMo's 8 tokens are emitted in order; one of three recordings is equal; NeMo has 1 error in 4 words."""
    nemo = [([1, 2, 3, 4], "a b"), ([5, 6], "c"), ([7, 8], "x")]
    results = [transcript("a b", [1, 2, 3, 4]), transcript("c", [6]), transcript("d", [9, 7])]
    found = accuracy._compare_with_nemo(nemo, ["a b", "c", "d"], results, str)
    assert found == {"nemo_wer": 0.25, "same_tokens": 0.75, "same_utterances": 1, "compared_utterances": 3}


def test_rows(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of each set by chunk size and precision, in the order of the sets; the card's figure by chunk size."""
    texts = {"fp32": "one two three", "int8": "one three four"}
    used: list[Any] = []

    @contextlib.contextmanager
    def model(bundle: Bundle, chunk: Any, precision: str, device: str, threads: Any, engines: Any) -> Any:
        assert bundle is demo_bundle
        used.append((chunk.ms, precision, device, threads))
        yield SimpleNamespace(text=texts[precision])

    def transcribe(model: Any, utterances: Any, rate: int) -> Any:
        references = [utterance.text for utterance in utterances]
        return references, [transcript(model.text, [1], 1.5) for _ in references]

    monkeypatch.setattr(accuracy, "_model", model)
    monkeypatch.setattr(accuracy, "_transcribe", transcribe)
    monkeypatch.setattr(accuracy, "_result_times", lambda model, chunk: [10.0, 30.0])
    silence = np.zeros(0, np.float32)
    sets = {"tedlium": [CorpusUtterance(silence, "one two three")] * 2, "own": [CorpusUtterance(silence, "one two")]}
    messages: list[str] = []
    options: dict[str, Any] = {"normalise": "basic", "threads": 2, "progress": messages.append}
    result = accuracy.measure_accuracy(demo_bundle, sets, ("fp32", "int8"), (80, 560), **options)
    assert messages[:3] == ["tedlium, 80 ms, fp32", "own, 80 ms, fp32", "tedlium, 80 ms, int8"] and len(messages) == 8
    assert used == [(80, "fp32", "cpu", 2), (80, "int8", "cpu", 2), (560, "fp32", "cpu", 2), (560, "int8", "cpu", 2)]
    found = [(*row["case"].values(), row["values"]["errors"], row["values"]["words"]) for row in result["rows"]]
    assert found == [
        ("tedlium", 80, "fp32", 0, 6),
        ("tedlium", 80, "int8", 4, 6),  # a deletion and an insertion in each
        ("tedlium", 560, "fp32", 0, 6),
        ("tedlium", 560, "int8", 4, 6),
        ("own", 80, "fp32", 1, 2),
        ("own", 80, "int8", 2, 2),  # a substitution and an insertion
        ("own", 560, "fp32", 1, 2),
        ("own", 560, "int8", 2, 2),
    ]
    cards = [row["values"].get("card_wer") for row in result["rows"]]
    assert cards == [*[pytest.approx(0.041)] * 2, *[pytest.approx(0.0354)] * 2, *[None] * 4]
    assert [row["values"]["audio_seconds"] for row in result["rows"]] == [3.0] * 4 + [1.5] * 4
    assert all(row["ms"] == {"result": [10.0, 30.0]} for row in result["rows"])
    assert all("nemo_wer" not in row["values"] for row in result["rows"])
    assert result["benchmark"] == "accuracy"
    assert result["method"] == {"normalizer": "basic", "device": "cpu", "nemo": False, "repeats": 20}


def test_rows_with_nemo(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo transcribes each recording once at each chunk size; its errors are those of the same references."""
    from nemostream.benchmarks.harness import nemo

    calls: list[Any] = []

    class Offline:
        def __init__(self, checkpoint: Any, device: str) -> None:
            calls.append((checkpoint, device))

        def transcribe(self, samples: Any, chunk: Any) -> tuple[list[int], str]:
            calls.append((len(samples), chunk.ms))
            return [1, 2], "one two"

    monkeypatch.setattr(nemo, "NemoOffline", Offline)
    monkeypatch.setattr(accuracy, "_model", lambda *arguments: contextlib.nullcontext("model"))
    monkeypatch.setattr(accuracy, "_result_times", lambda model, chunk: [10.0])
    results = [transcript("one", [1]), transcript("one two", [1, 2])]
    monkeypatch.setattr(accuracy, "_transcribe", lambda model, utterances, rate: (["one two", "two"], results))
    sets = {
        "own": [CorpusUtterance(np.zeros(5, np.float32), "one two"), CorpusUtterance(np.zeros(7, np.float32), "two")]
    }
    options: dict[str, Any] = {"normalise": "none", "checkpoint": "c.nemo", "device": "cpu"}
    result = accuracy.measure_accuracy(demo_bundle, sets, ("fp32", "int8"), (80, 560), **options)
    assert calls == [("c.nemo", "cpu"), (5, 80), (7, 80), (5, 560), (7, 560)]
    for row in result["rows"]:
        values = row["values"]
        assert (values["wer"], values["nemo_wer"]) == (2 / 3, 1 / 3)
        assert (values["same_tokens"], values["same_utterances"], values["compared_utterances"]) == (0.75, 1, 2)
    assert result["method"]["nemo"] and len(result["rows"]) == 4


def test_no_reference_has_words() -> None:
    empty = {"wer": 0.0, "errors": 0, "words": 0, "utterances": 0, "by_utterance": []}
    assert accuracy.word_errors([""], ["noise"], str) == accuracy.word_errors([], [], str) == empty


@pytest.mark.parametrize(
    ("device", "precision", "maker"),
    [("cpu", "fp32", None), ("cpu", "int8", "onnxruntime"), ("cuda", "fp32", "tensorrt"), ("cuda", "int8", "tensorrt")],
)
def test_engines_of_the_measured_model(
    device: str, precision: str, maker: str | None, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine of the chunk size is built and validated before the backend is opened; fp32 on a CPU needs none."""
    calls: list[Any] = []

    def build_engine(bundle: Any, chunk: Any, precision: str, store: Any, *, backend: str, max_batch: int) -> None:
        calls.append((bundle, chunk.ms, precision, store.folder, backend, max_batch))

    def open_backend(bundle: Any, **options: Any) -> Any:
        calls.append((bundle, options))
        return "backend"

    monkeypatch.setattr(engines, "build_engine", build_engine)
    monkeypatch.setattr(engines, "open_backend", open_backend)
    monkeypatch.setattr(nemostream, "Model", lambda bundle, backend, ms: (bundle, backend, ms))
    chunk = demo_bundle.manifest.chunk(160)
    model: Any = accuracy._model(demo_bundle, chunk, precision, device, 3, tmp_path)
    assert model == (demo_bundle, "backend", 160)
    options = {"device": device, "precision": precision, "threads": 3, "engines": tmp_path}
    opened = (demo_bundle, {**options, "capacity": 32, "max_batch": 16})
    assert calls == [*([(demo_bundle, 160, precision, tmp_path, maker, 16)] if maker else []), opened]


def test_recordings_are_read_a_few_at_a_time() -> None:
    """64 recordings are read before the first of them is transcribed; results are in the order of the recordings."""
    read: list[int] = []
    seen: dict[int, int] = {}

    def utterances() -> Any:
        for number in range(70):
            read.append(number)
            yield CorpusUtterance(np.full(3, number, np.float32), f"text {number}")

    def transcribe(samples: np.ndarray, sample_rate: int) -> Any:
        number = int(samples[0])
        seen[number] = len(read)
        return number, len(samples), sample_rate

    model: Any = SimpleNamespace(transcribe=transcribe)
    texts, results = accuracy._transcribe(model, utterances(), 16000)
    assert texts == [f"text {number}" for number in range(70)]
    assert results == [(number, 3, 16000) for number in range(70)]
    assert {seen[number] for number in range(64)} == {64} and {seen[number] for number in range(64, 70)} == {70}


def test_latency_is_measured_with_full_caches(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 frames of context are ten chunks of 7 frames, or 35 of 2; five more warm up."""
    calls: list[Any] = []

    def push_times(model: Any, feed: Any, chunk: Any, warm_up: int, repeats: int) -> list[float]:
        calls.append((feed.audio.shape, chunk.ms, warm_up, repeats))
        return [1.0]

    monkeypatch.setattr(accuracy, "push_times", push_times)
    model: Any = SimpleNamespace(manifest=demo_bundle.manifest)
    for ms in (560, 160, 1120):
        assert accuracy._result_times(model, demo_bundle.manifest.chunk(ms)) == [1.0]
    assert calls == [
        ((1, (15 + 20) * 8960), 560, 15, 20),
        ((1, (40 + 20) * 2560), 160, 40, 20),
        ((1, (10 + 20) * 17920), 1120, 10, 20),
    ]


def test_table_and_plot() -> None:
    def row(name: str, ms: int, precision: str, p50: float, wer: float, **values: Any) -> records.Row:
        case = {"set": name, "chunk_ms": ms, "precision": precision}
        counts = [[200 * wer * share, 50] for share in (0.1, 0.2, 0.3, 0.4)]
        values = {"words": 200, "wer": wer, "utterances": 4, "by_utterance": counts} | values
        return records.row(case, {"result": [p50]}, values)

    nemo = {"nemo_wer": 0.05, "same_tokens": 0.98761, "same_utterances": 3, "compared_utterances": 4}
    rows = [
        row("ami", 80, "fp32", 5.4, 0.0625, card_wer=0.1829, **nemo),
        row("ami", 560, "fp32", 7.0, 0.04),
        row("ami", 80, "int8", 2.0, 0.08),
        row("ami", 560, "int8", 3.0, 0.05),
    ]
    result = records.record("accuracy", rows, model={}, method={"normalizer": "basic"})
    text = accuracy.show(result)
    assert "| ami | 200 | 80 ms | fp32 | 85 | 6.25 % | 5.00 % | +1.25 | 98.76 % | 3 of 4 | 18.29 % |" in text
    assert "| ami | 200 | 560 ms | fp32 | 567 | 4.00 % |  |  |  |  |  |" in text
    chart = accuracy.charts(result)["wer"]
    assert isinstance(chart, CurveChart)
    (panel,) = chart.panels
    assert panel.heading == "ami: 4 recordings, 200 words" and chart.x_ticks == {0.0: "80 ms", 1.0: "560 ms"}
    fp32, int8, card = panel.curves
    assert (fp32.label, fp32.points) == ("fp32", [(-0.06, pytest.approx(6.25)), (0.94, pytest.approx(4.0))])
    assert (int8.label, int8.points) == ("int8", [(0.06, pytest.approx(8.0)), (1.06, pytest.approx(5.0))])
    assert all(low <= rate <= high for (_, rate), (low, high) in zip(fp32.points, fp32.intervals, strict=True))
    assert (card.label, card.points, card.style) == ("model card", [(0.0, 18.29), (1.0, 11.88)], "points")
    assert chart.title == "On ami, WER is 6.2 % at 80 ms and 4.0 % at 560 ms"  # fewer errors in every recording
    rows[0]["values"]["by_utterance"] = [[20, 50], [0, 50], [0, 50], [0, 50]]  # more errors in one recording only
    title = accuracy.charts(result)["wer"].title
    assert title == "No significant difference between chunk sizes on ami: WER 6.2 % at 80 ms, 4.0 % at 560 ms"


@pytest.mark.parametrize("decibels", [20, 0, -10])
def test_noise_has_the_given_ratio(decibels: float) -> None:
    clip = np.sin(np.arange(160_000) / 10).astype(np.float32) * 0.3
    noise = add_noise(clip, decibels, 5) - clip
    assert 10 * np.log10((clip**2).mean() / (noise**2).mean()) == pytest.approx(decibels, abs=0.05)
    assert np.array_equal(add_noise(clip, decibels, 5) - clip, noise)
    other = add_noise(clip, decibels, 6) - clip
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02
