"""The short benchmark joins the rows of two others."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.benchmarks import quick
from nemostream.benchmarks.harness import records
from nemostream.bundle import Bundle


def test_rows(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}
    given: list[Any] = []
    cases = [{"chunk_ms": ms, "batch": batch} for ms in (80, 560) for batch in (1, 8)]

    def latency(bundle: Bundle, precisions: Any, batches: Any, **options: Any) -> records.Record:
        clock.sleep(20.25)
        calls["latency"] = (precisions, batches, options["repeats"], options["devices"], options["machine"])
        given.append((options["engines"], options["progress"] == progress))
        rows = [
            records.row(case, {"step": [1.0, 2.0], "push": [4.0, 8.0]}, {"other_work_cores": 0.01}) for case in cases
        ]
        return records.record("latency", rows, model={"name": "demo"}, method={"repeats": 2})

    def throughput(bundle: Bundle, sources: Any, precisions: Any, batches: Any, **options: Any) -> records.Record:
        calls["throughput"] = (len(sources), precisions, batches, options["repeats"], options["device"])
        given.append((options["engines"], options["progress"] == progress))
        rows = [records.row(case, {}, {"rtfx": 10.0 * number}) for number, case in enumerate(cases, 1)]
        return records.record("throughput", rows, model={}, method={})

    model = SimpleNamespace(transcribe=lambda source: SimpleNamespace(text="it works"))
    monkeypatch.setattr(quick, "time", SimpleNamespace(perf_counter=clock))
    opened: list[Any] = []
    progress, engines = list[str]().append, Path("engines")

    def timed_backend(bundle: Bundle, chunks: Any, precision: str, rows: int, **options: Any) -> Any:
        opened.append(([chunk.ms for chunk in chunks], precision, rows, options["device"]))
        given.append(options["engines"])
        return contextlib.nullcontext()

    monkeypatch.setattr(quick, "timed_backend", timed_backend)
    monkeypatch.setattr(quick, "Model", lambda bundle, backend, ms: contextlib.nullcontext(model))
    monkeypatch.setattr(quick, "measure_machine", lambda threads, array_bytes, **options: ("machine", array_bytes))
    monkeypatch.setattr(quick, "measure_latency", latency)
    monkeypatch.setattr(quick, "measure_throughput", throughput)
    result = quick.measure_quick(demo_bundle, 30, progress, engines=engines)
    assert given == [engines, (engines, True), (engines, True)] and result["benchmark"] == "quick"
    assert calls == {
        "latency": (("fp32",), (1, 8), 30, ("cpu",), ("machine", 256 << 20)),
        "throughput": (4 * len(quick.speech(demo_bundle.manifest)), ("fp32",), (1, 8), 1, "cpu"),
    }
    assert [(*row["case"].values(), row["values"]["rtfx"]) for row in result["rows"]] == [
        (80, 1, 10.0),
        (80, 8, 20.0),
        (560, 1, 30.0),
        (560, 8, 40.0),
    ]
    assert result["method"] == {"repeats": 2, "transcript": "it works", "seconds": 20.2}
    assert result["model"] == {"name": "demo"} and opened == [([560], "fp32", 1, "cpu")]

    figure = pytest.importorskip("matplotlib.figure", reason="needs the bench extra")
    axes = figure.Figure().subplots()
    text = quick.show(result, lambda name: axes)
    assert text.startswith("Times in milliseconds. The benchmark took 20 s. Other processes used 0.01 cores.")
    assert "| streams | step p50 | step p99 | push to text p50 | push to text p99 | p99 ÷ chunk | RTFx |" in text
    assert "| 80 ms | 8 | 1.00 | 2.00 | 4.00 | 8.00 | 10 % | 20.0 |" in text
    assert text.endswith("Transcript of the packaged recording: *it works*\n")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn == {
        "1 stream, p50": [[80.0, 4.0], [560.0, 4.0]],
        "1 stream, p99": [[80.0, 8.0], [560.0, 8.0]],
        "8 streams, p50": [[80.0, 4.0], [560.0, 4.0]],
        "8 streams, p99": [[80.0, 8.0], [560.0, 8.0]],
        "real time": [[80.0, 80.0], [560.0, 560.0]],
    }
    labels = (axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale())
    assert labels == ("Latency by chunk size", "chunk, ms", "push to text, ms", "log", "log")
    calls.clear()
    quick.measure_quick(demo_bundle, 5, device="cuda")
    assert calls["latency"] == (("fp16",), (1, 8), 5, ("cuda",), None) and calls["throughput"][-1] == "cuda"
    chunks = tuple(chunk for chunk in demo_bundle.manifest.chunks if chunk.ms != 560)
    quick.measure_quick(replace(demo_bundle, manifest=replace(demo_bundle.manifest, chunks=chunks)))
    assert [ms for ms, *_ in opened] == [[560], [560], [1120]]  # the longest, if there is no 560 ms
