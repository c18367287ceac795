"""The short benchmark joins the rows of two others."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nemostream.benchmarks import quick
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.plots import Bar, BarChart
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

    text = quick.show(result)
    assert text.startswith("Times in milliseconds. The benchmark took 20 s. Other processes used 0.01 cores.")
    assert "| streams | step p50 | step p99 | push to text p50 | push to text p99 | p99 ÷ chunk | RTFx |" in text
    assert "| 80 ms | 8 | 1.00 | 2.00 | 4.00 | 8.00 | 10 % | 20.0 |" in text
    assert text.endswith("Transcript of the packaged recording: *it works*\n")
    chart = quick.charts(result)["latency"]
    assert isinstance(chart, BarChart)
    assert chart.rows == ["80 ms, 1 stream", "560 ms, 1 stream", "80 ms, 8 streams", "560 ms, 8 streams"]
    assert chart.panels[0].bars[:2] == [
        Bar([5.0], "4.00 ms, p99 8.00 ms", (5.0, 10.0)),
        Bar([pytest.approx(400 / 560)], "4.00 ms, p99 8.00 ms", (pytest.approx(400 / 560), pytest.approx(800 / 560))),
    ]
    assert chart.title == "Text comes within 10 % of the chunk duration (p99)"
    calls.clear()
    quick.measure_quick(demo_bundle, 5, device="cuda")
    assert calls["latency"] == (("fp16",), (1, 8), 5, ("cuda",), None) and calls["throughput"][-1] == "cuda"
    chunks = tuple(chunk for chunk in demo_bundle.manifest.chunks if chunk.ms != 560)
    quick.measure_quick(replace(demo_bundle, manifest=replace(demo_bundle.manifest, chunks=chunks)))
    assert [ms for ms, *_ in opened] == [[560], [560], [1120]]  # the longest, if there is no 560 ms


def displayed(width: int, terminal: bool) -> str:
    cases = [{"chunk_ms": ms, "batch": batch} for ms in (80, 1120) for batch in (1, 8)]
    rows = [
        records.row(case, {"step": [99.9, 199.9], "push": [80.0, 1119.0]}, {"other_work_cores": 1.5, "rtfx": 99.9})
        for case in cases
    ]
    method = {"seconds": 55.4, "transcript": "say [bold]your[/bold] message"}
    result = records.record("quick", rows, model={"name": "demo [v2]"}, method=method)
    result["hardware"] |= {"gpu": None, "cpu": "CPU", "cores": 2}
    colours = "truecolor" if terminal else None
    console = Console(width=width, force_terminal=terminal, color_system=colours, highlight=False)
    with console.capture() as captured:
        quick.display(result, console)
    return captured.get()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_table_on_a_terminal(width: int, terminal: bool) -> None:
    """All figures are visible; colours and lines are for terminals only."""
    text = displayed(width, terminal)
    assert ("\x1b[" in text, "─" in text) == (terminal, terminal)
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    assert "…" not in text and (not terminal or max(map(len, lines)) <= width)
    if not terminal:
        assert "Transcript of the packaged recording: say [bold]your[/bold] message" in lines  # not wrapped
    assert lines[0] == "demo [v2] on CPU, 2 cores. Times in milliseconds."
    assert [line.split() for line in lines if line.endswith("RTFx")] == [
        ["chunk", "streams", "p50", "p99", "text", "p50", "text", "p99", "chunk", "RTFx"]
    ]
    assert [line.split() for line in lines if line.endswith("99.9")] == [
        [ms, "ms", batch, "99.9", "200", "80.0", "1119", share, "%", "99.9"]
        for ms, share in (("80", "1399"), ("1120", "100"))
        for batch in ("1", "8")
    ]
    assert " ".join(lines).endswith(
        "Transcript of the packaged recording: say [bold]your[/bold] message  The benchmark took 55 s. Other processes "
        "used 1.50 cores: the figures are unreliable."
    )
    assert "|" not in text and "**" not in text  # no Markdown
    if terminal:
        assert text.count("\x1b[1;31m1399 %") == 2 and text.count("\x1b[32m100 %") == 2  # slower than real time
