"""The rules for a number of streams, at their limits, and the search for the largest one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.benchmarks import capacity
from nemostream.benchmarks.harness import load, records
from nemostream.benchmarks.harness.plots import CurveChart, CurvePanel
from nemostream.bundle import Bundle
from nemostream.engines import speech
from nemostream.errors import OptionError


def outcome(**changes: Any) -> load.LoadResult:
    """Return 100 results of 560 ms chunks, one every 0.1 s, in 10 s of a run of 300 audio seconds."""
    result = load.LoadResult([(560, each / 10, 0.1) for each in range(100)], lateness=[0.001] * 100)
    result.seconds, result.audio_seconds = 10.0, 300.0
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def results(*latencies: float, ms: int = 560, begin: float = 2.0) -> list[tuple[int, float, float]]:
    return [(ms, begin + number / 100, latency) for number, latency in enumerate(latencies)]


STEPS = [(560, 3, 50.0)] * 100


@pytest.mark.parametrize(
    ("load_result", "steps", "failures"),
    [
        (outcome(), STEPS, []),
        # The 99th of 100 results or steps must be faster than the chunk.
        (outcome(results=results(*[0.1] * 98, 0.5599, 9.0)), STEPS, []),
        (outcome(results=results(*[0.1] * 98, 0.56, 0.56)), STEPS, ["p99 of the 560 ms result is 560 ms"]),
        (outcome(), [*STEPS[2:], (560, 1, 559.9), (560, 1, 900.0)], []),
        (outcome(), [*STEPS[2:], (560, 1, 560.0), (560, 1, 560.0)], ["p99 of the 560 ms step is 560 ms"]),
        # The median of the last third may exceed that of the first by a tenth of a chunk, 56 ms.
        (outcome(results=results(*[0.1] * 60, *[0.1559] * 30)), STEPS, []),
        (
            outcome(results=results(*[0.1] * 60, *[0.1565] * 30)),
            STEPS,
            ["latency of the 560 ms results grew by 56 ms"],
        ),
        (outcome(results=results(*[0.3] * 60, *[0.1] * 30)), STEPS, []),  # it may shrink
        # The load generator may be one packet of 20 ms late.
        (outcome(lateness=[0.0] * 98 + [0.020, 1.0]), STEPS, []),
        (outcome(lateness=[0.0] * 98 + [0.0201, 0.0201]), STEPS, ["the load generator fell behind"]),
        (outcome(overdue=1), STEPS, ["1 chunks had no result at the end"]),
        (outcome(errors=["no slot", "other"]), STEPS, ["2 errors, first: no slot"]),
        (outcome(results=[]), STEPS, ["no results"]),
        (outcome(results=results(0.1, begin=1.99)), STEPS, ["no 560 ms result after the first 2 s"]),
        # Each chunk size has its own limits.
        (
            outcome(results=[*results(*[0.1] * 99), *results(0.09, 0.09, 0.09, ms=80)]),
            [*STEPS, (80, 1, 5.0)],
            ["p99 of the 80 ms result is 90 ms"],
        ),
        (
            outcome(results=[*results(*[0.1] * 99), *results(0.01, 0.01, 0.0181, ms=80)]),
            [*STEPS, (80, 1, 5.0)],
            ["latency of the 80 ms results grew by 8 ms"],
        ),
    ],
)
def test_limits(load_result: load.LoadResult, steps: list[Any], failures: list[str]) -> None:
    values = capacity.evaluate(load_result, steps, {})["values"]
    assert values["failures"] == failures and values["passed"] == (not failures)


def test_figures_of_a_run() -> None:
    """Two chunk sizes; the results of the first two seconds do not count."""
    found = outcome(
        results=[(80, 1.0, 9.0), (80, 2.0, 0.010), (560, 2.5, 0.100), (80, 3.0, 0.012), (80, 4.0, 0.015)],
        finals=[0.25, 0.5],
        lateness=[0.001, 0.003],
    )
    row = capacity.evaluate(found, [(80, 1, 5.0), (560, 2, 30.0), (80, 4, 6.0), (80, 5, 7.0)], {"streams": 9})
    assert row["case"] == {"streams": 9}
    assert row["ms"] == {
        "step 80 ms": [5.0, 6.0, 7.0],
        "result 80 ms": [10.0, 12.0, 15.0],
        "step 560 ms": [30.0],
        "result 560 ms": [100.0],
        "final": [250.0, 500.0],
    }
    assert row["values"] == {
        "passed": True,
        "failures": [],
        "drift_ms": {"80": 5.0, "560": 0.0},
        "seconds": 10.0,
        "audio_seconds": 300.0,
        "rtfx": 30.0,
        "mean_batch": 3.0,
        "steps": 4,
        "lateness_ms": records.figures([1.0, 3.0]),
    }


def test_short_runs_settle_for_a_fifth() -> None:
    found = outcome(results=[(560, 0.19, 0.1), (560, 0.21, 0.2)], seconds=1.0, audio_seconds=5.0, lateness=[])
    row = capacity.evaluate(found, STEPS, {})
    assert row["ms"]["result 560 ms"] == [200.0]
    assert row["values"]["rtfx"] == 5.0 and row["values"]["lateness_ms"] is None
    nothing = capacity.evaluate(outcome(results=[], seconds=0.0), [], {})["values"]
    assert (nothing["rtfx"], nothing["mean_batch"], nothing["passed"]) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("latencies", "drift"),
    [
        ([1, 2, 3, 4, 5, 6, 9], 5),  # medians of 1, 2 and 6, 9 are the lower ones
        ([5, 1, 3, 7, 7, 7, 4, 8, 6], 3),  # 6 after 3
        ([3, 8], 5),
        ([3], 0),
    ],
)
def test_drift_by_hand(latencies: list[float], drift: float) -> None:
    """Pairs are ordered by time, not as given."""
    pairs = [(float(second), latency) for second, latency in enumerate(latencies)]
    assert capacity.latency_drift(pairs) == capacity.latency_drift(pairs[::-1]) == drift


@pytest.mark.parametrize(
    ("limit", "maximum", "tried", "found"),
    [
        (0, 64, [1], 0),
        (1, 1, [1], 1),
        (9, 512, [1, 2, 4, 8, 16, 12, 10, 9], 9),
        (100, 512, [1, 2, 4, 8, 16, 32, 64, 128, 96, 112, 104, 100], 100),
        (70, 80, [1, 2, 4, 8, 16, 32, 64, 80, 72, 68, 70], 70),  # 68 and 72 still differ by more than 5 %
        (80, 80, [1, 2, 4, 8, 16, 32, 64, 80], 80),
        (64, 64, [1, 2, 4, 8, 16, 32, 64], 64),
    ],
)
def test_numbers_that_are_tried(limit: int, maximum: int, tried: list[int], found: int) -> None:
    calls: list[int] = []

    def passes(streams: int) -> bool:
        calls.append(streams)
        return streams <= limit

    assert (capacity.search(passes, maximum), calls) == (found, tried)


class Run:
    """Measures capacities with load tests that fail above `limit` streams, or above `confirmed` over `SECONDS`."""

    SECONDS, PROBE = 60.0, 5.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int, confirmed: int) -> None:
        self.limit, self.confirmed = limit, confirmed
        self.loads: list[dict[str, Any]] = []
        self.opened: list[dict[str, Any]] = []
        monkeypatch.setattr(capacity, "run_load", self.run_load)
        monkeypatch.setattr(capacity, "timed_backend", self.backend)
        monkeypatch.setattr(capacity, "Model", self.model)
        monkeypatch.setattr(capacity, "StepRecorder", lambda backend: SimpleNamespace(steps=self.steps))
        monkeypatch.setattr(capacity, "OtherWork", lambda: SimpleNamespace(cores=lambda: 0.01234))
        self.steps: list[Any] = [(560, 1, 999.0)]  # of an earlier run; must not count

    def model(self, bundle: Bundle, recorder: Any, chunk_ms: int) -> Any:
        assert recorder.steps is self.steps and chunk_ms == 560  # the first of the chunk sizes
        return contextlib.nullcontext("model")

    @contextlib.contextmanager
    def backend(self, bundle: Bundle, chunks: Any, precision: str, slots: int, **options: Any) -> Iterator[Any]:
        self.opened.append({"ms": [chunk.ms for chunk in chunks], "precision": precision, "slots": slots, **options})
        yield SimpleNamespace(bytes_per_stream=777)

    def run_load(self, model: Any, clips: Any, streams: int, chunk_ms: Any, **options: Any) -> load.LoadResult:
        self.loads.append({"clips": len(clips), "streams": streams, "chunk_ms": chunk_ms, **options})
        self.steps += STEPS
        limit = self.confirmed if options.get("seconds") == self.SECONDS else self.limit
        return outcome(errors=["too many"] if streams > limit else [])

    def measure(self, bundle: Bundle, **options: Any) -> records.Record:
        options = {"seconds": self.SECONDS, "probe_seconds": self.PROBE, "max_streams": 64, "threads": 2} | options
        return capacity.measure_capacity(bundle, "int8", (560, 80), **options)


def test_found_number_is_confirmed_over_the_full_duration(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 streams pass the probes and fail the confirmation, then 57, then 54 (5 % less, rounded down) pass."""
    run = Run(monkeypatch, limit=60, confirmed=55)
    result = run.measure(demo_bundle)
    rows = [(row["case"]["streams"], row["case"]["confirming"], row["values"]["passed"]) for row in result["rows"]]
    probes = [(n, False, True) for n in (1, 2, 4, 8, 16, 32)] + [(64, False, False)] * 2
    probes += [(48, False, True), (56, False, True), (60, False, True), (62, False, False), (62, False, False)]
    confirmations = [(60, True, False), (57, True, False), (54, True, True)]
    assert rows == probes + confirmations and result["benchmark"] == "capacity"
    assert result["method"] == {
        "threads": 2,
        "device": "cpu",
        "packet_seconds": 0.02,
        "seconds": 60.0,
        "probe_seconds": 5.0,
        "max_streams": 64,
        "max_batch": capacity.DEFAULT_MAX_BATCH,
        "streams": 54,
        "bytes_per_stream": 777,
        "precision": "int8",
        "chunk_ms": "560+80",
        "other_work_cores": 0.012,
    }
    assert result["rows"][0]["case"] == {
        "chunk_ms": "560+80",
        "precision": "int8",
        "streams": 1,
        "confirming": False,
    }
    assert all(row["figures"]["step 560 ms"]["n"] == 100 for row in result["rows"])  # those of its own run
    (opened,) = run.opened
    assert (opened["ms"], opened["precision"], opened["slots"]) == ([560, 80], "int8", 128)
    assert opened["max_batch"] == min(capacity.DEFAULT_MAX_BATCH, 128) and opened["threads"] == 2
    assert [each["seconds"] for each in run.loads] == [5.0] * (len(rows) - 3) + [60.0] * 3
    seeds = [each["seed"] for each in run.loads if each["streams"] == 64]
    assert len(set(seeds)) == 2  # a repeated probe has other phases
    assert all(each["chunk_ms"] == (560, 80) for each in run.loads)


def test_no_number_passes(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, limit=0, confirmed=0)
    result = run.measure(demo_bundle)
    assert result["method"]["streams"] == 0 and [each["streams"] for each in run.loads] == [1, 1]
    run = Run(monkeypatch, limit=3, confirmed=0)
    result = run.measure(demo_bundle)
    assert result["method"]["streams"] == 0
    assert [row["case"]["streams"] for row in result["rows"] if row["case"]["confirming"]] == [3, 2, 1]


def test_fixed_number_of_streams(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's method: N streams, 3N clips, all at once, and no search."""
    run = Run(monkeypatch, limit=60, confirmed=60)
    result = run.measure(demo_bundle, simulate_realtime=5, max_batch=4)
    assert result["method"]["streams"] is None and len(result["rows"]) == 1
    (loaded,) = run.loads
    assert loaded == {"clips": 1, "streams": 5, "chunk_ms": (560, 80), "total_clips": 15, "random_phase": False}
    assert (run.opened[0]["slots"], run.opened[0]["max_batch"]) == (10, 4)
    assert result["rows"][0]["case"]["streams"] == 5 and result["rows"][0]["case"]["simulate_realtime"]
    assert len(result["rows"][0]["ms"]["step 560 ms"]) == 100
    assert len(speech(demo_bundle.manifest)) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"seconds": 0.0},
        {"probe_seconds": 0.0},
        {"max_streams": 0},
        {"max_batch": 0},
        {"simulate_realtime": 0},
    ],
)
def test_invalid_options(options: dict[str, Any], demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="must be positive"):
        capacity.measure_capacity(demo_bundle, **options)


# -- report ------------------------------------------------------------------------------------------------------------


def a_row(streams: int, confirming: bool, p50: float, failures: list[str]) -> records.Row:
    case = {"chunk_ms": "80+560", "precision": "fp32", "streams": streams, "confirming": confirming}
    times = {"step 80 ms": [4.0], "result 80 ms": [p50, p50, p50 + 30.0], "final": [99.0]}
    values = {"passed": not failures, "failures": failures, "seconds": 60.4, "mean_batch": 2.345, "rtfx": 12.345}
    return records.row(case, times, values)


def a_result(streams: int | None = 10) -> records.Record:
    rows = [
        a_row(16, False, 50.0, ["no results", "1 errors, first: x"]),
        a_row(12, False, 40.0, ["the load generator fell behind"]),
        a_row(10, True, 20.0, []),
        a_row(8, False, 10.0, []),
    ]
    method = {"streams": streams, "chunk_ms": "80+560", "seconds": 60.0, "precision": "fp32", "threads": 2}
    method |= {"device": "cpu", "bytes_per_stream": 1_234_567, "other_work_cores": 0.003}
    result = records.record("capacity", rows, model={"name": "m", "layers": 3, "d_model": 4}, method=method)
    result["hardware"] |= {"gpu": None, "cores": 2, "cpu": "CPU"}
    return result


def test_headline() -> None:
    assert capacity.headline(a_result()) == (
        "**10 real-time streams** with 80 + 560 ms chunks for 60 s: fp32, 3 layers, d_model 4, 2 cores of CPU. Latency "
        "from end of audio to text, 80 ms chunks: p50 20.0 ms, p99 50.0 ms. With 12 streams, the load "
        "generator on the same cores sends audio too late, so larger numbers cannot be measured."
    )
    slow = a_result()
    slow["rows"][1]["values"]["failures"] = ["p99 of the 80 ms result is 90 ms", "the load generator fell behind"]
    assert capacity.headline(slow).endswith(" p99 50.0 ms. With 12 streams, p99 of the 80 ms result is 90 ms.")
    assert capacity.headline(a_result(None)) == ""
    on_gpu = a_result()
    on_gpu["hardware"]["gpu"], on_gpu["rows"] = "GPU", []
    assert capacity.headline(on_gpu).endswith("d_model 4, GPU.")


def test_table_and_plot(tmp_path: Path) -> None:
    lines = capacity.show(a_result()).splitlines()
    assert lines[2] == (
        "Times in milliseconds. *step*: time of a step; *result*: from the end of the audio of a chunk to its result; "
        "*final*: from the last sample of a clip to its final result. cpu, 2 threads, 1.23 MB of state per stream. "
        "Other processes used 0.00 cores."
    )
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [(row[0], row[4]) for row in table[2:]] == [
        (n, name) for n in ("8", "12", "16", "10") for name in ("step 80 ms", "result 80 ms", "final")
    ]
    assert table[2] == ["8", "80+560", "60", "2.3", "step 80 ms", "4.00", "4.00", "4.00", "4.00", "4.00", "12.3", "yes"]
    assert table[3] == ["8", "80+560", "60", "", "result 80 ms", "20.0", "10.0", "40.0", "40.0", "40.0", "", ""]
    assert table[5][-1] == "no: the load generator fell behind"
    assert table[8][-1] == "no: no results; 1 errors, first: x"
    chart = capacity.charts(a_result())["streams"]
    assert isinstance(chart, CurveChart)
    (panel,) = chart.panels  # there are no results with 560 ms chunks
    assert panel.limit == 80
    assert {curve.label: curve.points for curve in panel.curves if curve.label} == {
        "p99": [(8, 40.0), (10, 50.0), (12, 70.0), (16, 80.0)],
        "p50": [(8, 10.0), (10, 20.0), (12, 40.0), (16, 50.0)],
    }
    marks = [(curve.style, curve.points) for curve in panel.curves if not curve.label and curve.series == 0]
    assert marks == [("points", [(8, 40.0), (10, 50.0)]), ("crosses", [(12, 70.0), (16, 80.0)])]
    assert chart.title == "10 real-time streams with 80 + 560 ms chunks: p99 latency 50.0 ms"


def test_repeated_probes_have_one_line_through_their_median() -> None:
    """And a mark for each probe, crosses for those that failed."""
    result = a_result()
    result["rows"] = [a_row(8, False, p50, failures) for p50, failures in ((10.0, []), (40.0, ["x"]), (20.0, []))]
    result["rows"].append(a_row(4, False, 5.0, []))
    (panel,) = capacity.charts(result)["streams"].panels
    assert isinstance(panel, CurvePanel)
    line, passed, failed = panel.curves[3:]
    assert (line.label, line.points) == ("p50", [(4, 5.0), (8, 20.0)])
    assert passed.points == [(4, 5.0), (8, 10.0), (8, 20.0)] and failed.points == [(8, 40.0)]
    nvidia = capacity.charts(a_result(None) | {"rows": result["rows"][:1]})["streams"]
    assert nvidia.title == "Latency of 8 parallel streams"
    assert capacity.charts(a_result() | {"rows": []}) == {}
