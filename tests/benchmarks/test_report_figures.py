"""Tables and plots of latency results, changes between results, and files of reports."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the bench extra")

import numpy as np

from nemostream.benchmarks import latency, report
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.plots import Bar, BarChart

BOUND = {"memory": 0.5, "compute": 0.1, "roofline": 0.5, "bound_by": "memory"}


def latency_row(batch: int, backend: str, **times: list[float]) -> records.Row:
    case = {"chunk_ms": 80, "batch": batch, "precision": "fp32", "backend": backend}
    values = {"other_work_cores": 0.01 * batch, "launches": 3.5, "roofline_ms": BOUND, "bytes_per_stream": 1_260_000}
    return records.row(case, times, values)


def latency_result() -> records.Record:
    parts = {"features": [0.25], "encoder": [1.0], "decode": [0.5], "copies": [0.125]}
    rows = [
        latency_row(1, "cpu", step=[1.0, 2.0, 3.0], push=[5.0], host=[0.0625], **parts),
        latency_row(4, "cuda", step=[9.0], device=[1.0], push=[10.0], **parts),
    ]
    method = {"threads": 2, "repeats": 3, "warm_up": 5, "device": "cpu cuda"}
    method["machine"] = {"cpu": {"read (sum)": 12.0}, "cuda": {"copy": 3000.0}}
    return records.record("latency", rows, model={"name": "m", "layers": 3, "d_model": 4}, method=method)


def test_latency_tables() -> None:
    """On a GPU, the roofline is compared with the time on the device."""
    lines = latency.show(latency_result()).splitlines()
    assert lines[0].startswith("Times in milliseconds; 2 CPU threads; 3 steps per case after 5 warm-up steps")
    tables = [line for line in lines if line.startswith("|") and "---" not in line]
    assert tables == [
        "| chunk | batch | precision | backend | time | avg | min | p50 | p90 | p95 | p99 | roofline, ms | "
        "roofline ÷ p50 |",
        "| 80 ms | 1 | fp32 | cpu | step | 2.00 | 1.00 | 2.00 | 3.00 | 3.00 | 3.00 | 0.500, memory | 25 % |",
        "| 80 ms | 1 | fp32 | cpu | push | 5.00 | 5.00 | 5.00 | 5.00 | 5.00 | 5.00 |  |  |",
        "| 80 ms | 4 | fp32 | cuda | step | 9.00 | 9.00 | 9.00 | 9.00 | 9.00 | 9.00 |  |  |",
        "| 80 ms | 4 | fp32 | cuda | device | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 0.500, memory | 50 % |",
        "| 80 ms | 4 | fp32 | cuda | push | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 |  |  |",
        "| chunk | batch | precision | backend | features | encoder | decode | copies | host | launches |",
        "| 80 ms | 1 | fp32 | cpu | 0.250 | 1.00 | 0.500 | 0.125 | 0.062 | 3.50 |",
        "| 80 ms | 4 | fp32 | cuda | 0.250 | 1.00 | 0.500 | 0.125 |  | 3.50 |",
    ]
    assert lines[-4:] == [
        "Other processes used 0.04 cores.",
        "Measured rates, cpu: read (sum) 12 GB/s.",
        "Measured rates, cuda: copy 3000 GB/s.",
        "State per stream: 1.26 MB.",
    ]


def test_latency_plots() -> None:
    """A row for each chunk size and batch, and a panel for each precision and backend."""
    breakdown, roofline = latency.charts(latency_result()).values()
    assert isinstance(breakdown, BarChart) and isinstance(roofline, BarChart)
    assert breakdown.rows == roofline.rows == ["80 ms, 1 stream", "80 ms, 4 streams"]
    assert [panel.heading for panel in breakdown.panels] == ["fp32, cpu", "fp32, cuda"]
    first, missing = breakdown.panels[0].bars
    assert first == Bar([0.25, 1.0, 0.5, 0.125, 0.0625], "2.00 ms") and missing is None
    assert breakdown.panels[1].bars == [None, Bar([0.25, 1.0, 0.5, 0.125, 0.0], "1.00 ms")]
    assert breakdown.parts == latency.PARTS
    assert breakdown.title == "The encoder takes 50 to 100 % of the time of a step"
    assert [panel.bars for panel in roofline.panels] == [
        [Bar([4.0], "4.0", (2.0, 6.0)), None],
        [None, Bar([2.0], "2.0", (2.0, 2.0))],
    ]
    assert roofline.reference == 1.0
    assert roofline.title == "A step takes 2.0 to 4.0 times as long as the roofline of its encoder"
    assert latency.charts(latency_result() | {"rows": []}) == {}


RESULTS = report.ROOT / "benchmarks" / "results"
COMMITTED = report.committed(report.ROOT)
TABLES = sorted(path.stem for path in RESULTS.glob("*.md") if path.stem in COMMITTED)


@pytest.mark.parametrize("name", TABLES)
def test_committed_tables_are_those_of_the_results(name: str) -> None:
    text = report.show(COMMITTED[name])
    assert text.strip() in (RESULTS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_plots_are_those_of_the_results(name: str) -> None:
    """They have the names and all texts that the results give."""
    charts = report.charts(COMMITTED[name])
    assert sorted(charts) == sorted(path.stem.removeprefix(f"{name}-") for path in RESULTS.glob(f"{name}-*.svg"))
    for kind, chart in charts.items():
        picture = (RESULTS / f"{name}-{kind}.svg").read_text(encoding="utf-8")
        shown = html.unescape(" ".join(re.findall(r">([^<>]+)</(?:text|title)>", picture))).replace("\u00a0", " ")
        texts = [chart.title, chart.subtitle, report.footer([COMMITTED[name]])]
        texts += [panel.heading for panel in chart.panels]
        if isinstance(chart, BarChart):
            texts += [*chart.rows, *chart.parts]
            texts += [each for panel in chart.panels for each in (panel.unit, *(bar.text for bar in panel.bars if bar))]
        else:
            texts += [chart.x_label, *(curve.label for panel in chart.panels for curve in panel.curves)]
        assert [text for text in texts if text not in shown] == []


def test_overview_of_the_readme() -> None:
    """All systems at both chunk sizes with eight streams; figures are the medians of the records."""
    ((name, (chart, footer)),) = report._overviews(COMMITTED).items()
    assert name == "step-times" and (RESULTS / f"{name}.svg").is_file() and isinstance(chart, BarChart)
    assert [panel.heading for panel in chart.panels] == ["80 ms chunks, 8 streams", "560 ms chunks, 8 streams"]
    found: dict[tuple[int, str], list[float]] = {}
    for result in COMMITTED.values():
        for row in result["rows"] if result["benchmark"] == "baseline" else []:
            if row["case"]["batch"] == 8:
                found[row["case"]["chunk_ms"], row["case"]["runner"]] = sorted(row["ms"]["step"])
    assert sorted(chart.rows) == sorted({runner for _, runner in found})
    assert set(chart.emphasised or ()) == {"nemostream, fp32", "nemostream, int8"}
    for chunk_ms, panel in zip((80, 560), chart.panels, strict=True):
        for runner, bar in zip(chart.rows, panel.bars, strict=True):
            if (chunk_ms, runner) not in found:
                assert bar is None
                continue
            samples = found[chunk_ms, runner]
            assert len(samples) == 11  # their quartiles are the third, the sixth and the ninth
            assert bar and bar.interval == (samples[2], samples[8]) and bar.parts == [samples[5]]
            number, unit, *_ = bar.text.replace(",", "").split()
            assert abs(float(number) / samples[5] - 1) < 5e-3 and unit == "ms"
    assert footer.startswith(
        "Intel(R) Xeon(R) Processor, 2 cores · model random-0.6b, 24 layers, d_model 1024 · commit "
    )
    assert "](benchmarks/results/step-times.svg)" in (report.ROOT / "README.md").read_text(encoding="utf-8")


def test_titles_have_the_figures_of_the_results() -> None:
    """Computed here from the records."""

    def title(name: str, kind: str) -> str:
        return report.charts(COMMITTED[name])[kind].title

    def rows(name: str, **case: Any) -> list[records.Row]:
        return [row for row in COMMITTED[name]["rows"] if case.items() <= row["case"].items()]

    (first,), (last,) = (rows("accuracy-demo-cpu-2-cores", chunk_ms=ms, precision="fp32") for ms in (80, 1120))
    for row in (first, last):
        rate = 100 * row["values"]["errors"] / row["values"]["words"]
        assert f"{rate:.1f} % at {row['case']['chunk_ms']} ms" in title("accuracy-demo-cpu-2-cores", "wer")
    for chunk_ms, batch in ((80, 1), (560, 8)):
        name = f"baseline-{chunk_ms}ms-batch-{batch}-cpu-2-cores"
        pairs = [rows(name, runner=runner)[0]["ms"]["step"] for runner in ("NeMo, fp32", "nemostream, fp32")]
        factor = np.median(np.divide(*pairs))
        assert title(name, "steps").startswith(f"NeMo takes {factor:.1f} times as long as nemostream, sherpa-onnx ")
    (confirmed,) = rows("capacity-demo-cpu-2-cores", streams=176, confirming=True)
    slow = sorted(confirmed["ms"]["result 560 ms"])[int(np.ceil(0.99 * len(confirmed["ms"]["result 560 ms"]))) - 1]
    assert title("capacity-demo-cpu-2-cores", "streams") == (
        f"176 real-time streams with 560 ms chunks: p99 latency {slow:.1f} ms"
    )
    served = sorted(rows("serve-demo-cpu-2-cores", streams=300)[0]["ms"]["final text"])
    assert f"comes {served[(len(served) + 1) // 2 - 1]:.1f} ms (p99 " in title("serve-demo-cpu-2-cores", "final")
    measured = rows("throughput-demo-cpu-2-cores")
    fastest = max(row["values"]["audio_seconds"] / np.median(row["ms"]["whole set"]) for row in measured)
    assert title("throughput-demo-cpu-2-cores", "rtfx").startswith(f"Up to {1000 * fastest:.0f} seconds of audio")
    one, two = (rows("finals-demo-cpu-2-cores", set="clean", mode=mode)[0] for mode in ("1120", "80+1120"))
    seconds = (np.median(one["ms"]["final"]) - np.median(two["ms"]["final"])) / 1000
    assert f"{seconds:.2f} s earlier" in title("finals-demo-cpu-2-cores", "finals")
    for row in (one, two):
        assert f"{100 * row['values']['visible_wer'][0]:.0f} %" in title("finals-demo-cpu-2-cores", "visible")
    shares = [row["figures"]["encoder"]["p50"] / row["figures"]["step"]["p50"] for row in rows("latency-cpu-2-cores")]
    assert f" {100 * min(shares):.0f} to {100 * max(shares):.0f} % " in title("latency-cpu-2-cores", "breakdown")
    error = min(row["values"]["ece"] for row in rows("transcripts-demo-cpu-2-cores", measurement="confidence"))
    assert title("transcripts-demo-cpu-2-cores", "reliability").endswith(f"expected calibration error {error:.3f}")
    for fit in COMMITTED["cost-demo-cpu-2-cores"]["method"]["fits"]:
        assert f"{fit['per_stream_ms']:.3g} ms ({fit['chunk_ms']} ms" in title("cost-demo-cpu-2-cores", "batch")


def test_where_a_result_was_measured() -> None:
    result = latency_result()
    result |= {"command": "/x/python -m nemostream.benchmarks.latency --bundle /a/b", "time": "T", "commit": None}
    result["hardware"] = {"gpu": "GPU", "cpu": "CPU", "cores": 2, "memory_gib": 23.5}
    result["versions"] = {"python": "3", "nemostream": "1", "numpy": "2", "onnx": "4"}
    assert report.measured_on(result) == (
        "`nemostream bench latency --bundle b`, T, commit unknown. GPU; CPU, 2 cores, 23.5 GiB. numpy 2, onnx 4. "
        "Model: m, 3 layers, d_model 4."
    )
    result["hardware"]["gpu"], result["commit"], result["model"] = None, "abc", {}
    assert report.measured_on(result).endswith("commit abc. CPU, 2 cores, 23.5 GiB. numpy 2, onnx 4. Model: ?.")
    assert report.describe({"name": "m"}) == "m"


def test_files_of_several_results(tmp_path: Path) -> None:
    """Each benchmark has its plots, and is compared with earlier results of the same benchmark only."""
    cost = json.loads((report.ROOT / "benchmarks" / "results" / "cost-demo-cpu-2-cores.json").read_text())
    text, files = report.write_report([latency_result(), cost], tmp_path / "r.md", [latency_result()])
    assert text == (tmp_path / "r.md").read_text(encoding="utf-8")
    names = ("latency-breakdown", "latency-roofline", "cost-batch", "cost-duration")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(f"r-{name}.png" for name in names)
    assert sorted(files) == sorted(tmp_path.iterdir())
    pictures = re.findall(r"^!\[(.*)\]\((.*)\)$", text, re.MULTILINE)
    assert [name for _, name in pictures] == [f"r-{name}.svg" for name in names]
    charts = [*report.charts(latency_result()).values(), *report.charts(cost).values()]
    assert [title for title, _ in pictures] == [chart.title for chart in charts]
    assert text.count("### Changes since") == 1
    assert text.index("## latency") < text.index("### Changes since") < text.index("## cost")


def times(*samples: float) -> records.Record:
    row = records.row({"batch": 1}, {"step": list(samples)}, {})
    return records.record("latency", [row], model={}, method={})


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (100.0, 103.1, "slower"),
        (100.0, 102.9, ""),  # two runs differ by up to 3 %
        (100.0, 97.1, ""),
        (100.0, 96.9, "faster"),
    ],
)
def test_smallest_change_of_a_time(before: float, after: float, verdict: str) -> None:
    (change,) = report.compare(times(*[after] * 9), times(*[before] * 9))
    assert (change.before, change.after, change.verdict) == (before, after, verdict)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (100, 110, ""),
        (100, 111, "better"),
        (100, 90, ""),
        (100, 89, "worse"),
        (3, 4, ""),
        (3, 5, "better"),
        (0, 2, "better"),
    ],
)
def test_smallest_change_of_a_number_of_streams(before: int, after: int, verdict: str) -> None:
    """Two steps of the search: 10 %, and at least one stream."""

    def result(streams: int) -> records.Record:
        method = {"streams": streams, "chunk_ms": "80", "precision": "fp32"}
        return records.record("capacity", [], model={}, method=method)

    (change,) = report.compare(result(after), result(before))
    assert (change.metric, change.before, change.after, change.verdict) == ("streams", before, after, verdict)
    text = report.changes(result(after), result(before))
    assert (f"| {after / before:.2f} |" if before else "| before | after |  |") in text
    assert ("within noise" in text) == (not verdict)


def test_precisions_are_not_compared() -> None:
    def result(benchmark: str, precision: str) -> records.Record:
        return records.record(benchmark, [], model={}, method={"streams": 5, "chunk_ms": "80", "precision": precision})

    assert report.compare(result("capacity", "fp32"), result("capacity", "int8")) == []
    assert report.compare(result("serve", "fp32"), result("serve", "fp32")) == []


def test_changes_of_rates_use_the_same_words() -> None:
    """Errors and words of each utterance: 5 and 10 % of 40 words."""

    def result(*errors: int) -> records.Record:
        values = {"by_utterance": [[each, words] for each, words in zip(errors, (10, 30), strict=True)]}
        return records.record("accuracy", [records.row({"set": "s"}, {}, values)], model={}, method={})

    (change,) = report.compare(result(1, 3), result(0, 2))
    assert (change.metric, change.before, change.after, change.increase) == ("WER, %", 5.0, 10.0, "worse")


def test_differing_device_is_reported() -> None:
    new, old = times(1.0), times(1.0)
    new["method"] = {"device": "cuda"}
    old["method"] = {"device": "cpu"}
    text = report.changes(new, old)
    assert "**The device differs**" in text and "hardware differs" not in text
    old["commit"], old["time"] = None, "T"
    assert report.changes(new, old).startswith("### Changes since T, commit unknown\n\nTimes are medians.")


def test_headlines_are_of_the_first_result_of_each_benchmark() -> None:
    def capacity(streams: int) -> records.Record:
        method = {"streams": streams, "chunk_ms": "80", "precision": "fp32", "seconds": 60.0}
        return records.record("capacity", [], model={"layers": 1, "d_model": 2}, method=method)

    lines = report._headlines({"a": latency_result(), "b": capacity(7), "c": capacity(9)})
    assert len(lines) == 3 and lines[0].startswith("* **7 real-time streams**") and lines[1] == ""


def test_pages_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From all results in the checkout whose benchmark has a report, with their plots; the rest of the README stays."""
    begin = "<!-- performance: written by `nemostream bench report --pages` -->"
    end = "<!-- performance: end -->"
    readme, page, results = (
        tmp_path / "README.md",
        tmp_path / "docs" / "performance.md",
        tmp_path / "benchmarks/results",
    )
    readme.write_text(f"before – this\n\n{begin}\n\nold\n\n{end}\n\nafter\n", encoding="utf-8")
    page.parent.mkdir()
    committed = report.ROOT / "benchmarks" / "results"
    records.write(records.read(committed / "baseline-80ms-batch-1-cpu-2-cores.json"), results / "b.json")
    records.write(latency_result(), results / "a.json")
    records.write(records.read(committed / "boosting-demo.json"), results / "c.json")  # on another page
    (results / "d.json").write_text('{"schema": "another"}')
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main(["--pages"])
    assert capsys.readouterr().err == f"written: {readme}\nwritten: {page}\n"
    before, headline, after = readme.read_text(encoding="utf-8").partition("* **One step of 1 streams at 80 ms**")
    chart = report.charts(records.read(results / "b.json"))["steps"]
    picture = f"![{chart.title}](benchmarks/results/step-times.svg)"
    assert (before, bool(headline)) == (f"before – this\n\n{begin}\n\n{picture}\n\n", True)
    _, _, after = after.partition("\n")
    assert after == (
        "\nAll tables, plots, methods and machines are in [docs/performance.md](docs/performance.md).\n\n"
        f"{end}\n\nafter\n"
    )
    text = page.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[:3] == [
        "# Performance",
        "",
        "This page is generated by `nemostream bench report --pages` from the results in `benchmarks/results`. The",
    ]
    assert [line.rpartition("](")[2] or line for line in lines if line.startswith(("## ", "!["))] == [
        "## a",
        "../benchmarks/results/a-breakdown.svg)",
        "../benchmarks/results/a-roofline.svg)",
        "## b",
        "../benchmarks/results/b-steps.svg)",
    ]
    assert f"![{chart.title}](" in text
    assert "| 80 ms | 1 | fp32 | cpu | push | 5.00 |" in text
    assert text.endswith("b-steps.svg)\n")
    drawn = ["a-breakdown.svg", "a-roofline.svg", "b-steps.svg", "step-times.svg"]
    assert sorted(path.name for path in results.iterdir() if path.suffix != ".json") == drawn
