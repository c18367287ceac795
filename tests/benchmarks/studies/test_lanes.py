"""Cost of the accurate lane: what its steps process, figures from known times, and the numbers of streams tried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnx", reason="needs the build extra")

from nemostream.benchmarks import report
from nemostream.benchmarks.harness import load, records
from nemostream.benchmarks.harness.roofline import encoder_work
from nemostream.benchmarks.studies import lanes
from nemostream.bundle import Bundle
from nemostream.errors import OptionError
from nemostream.runtime.text.endpointing import Endpoint


def test_steps_of_both_lanes(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams of 4.48 s after 5.04 s: 56 blocks, and four chunks of 1,120 ms of each stream."""
    monkeypatch.setattr(lanes, "_STREAM_SECONDS", 4.48)
    result = lanes.measure_lanes(demo_bundle, batches=(2,))
    assert [row["case"]["mode"] for row in result["rows"]] == ["80", "80+1120"]
    for row in result["rows"]:
        values = row["values"]
        assert len(row["ms"]["block"]) == 56 and values["audio_seconds"] == pytest.approx(8.96)
        assert (values["steps"]["80"]["steps"], values["steps"]["80"]["rows"]) == (56, 112)
        assert values["ends"] >= 1 and min(values["steps"]["80"]["ms"], values["cpu_seconds"]) > 0
    one, two = (row["values"] for row in result["rows"])
    assert "1120" not in one["steps"] and one["ends"] == two["ends"]  # the ends are those of the fast lane
    assert two["steps"]["1120"]["rows"] == 2 * 4 + two["ends"]  # a branch needs one step
    flops = [encoder_work(demo_bundle, demo_bundle.manifest.chunk(ms)).flops_per_row for ms in (80, 1120)]
    assert result["method"]["flops"] == flops


def test_steps_by_chunk_size() -> None:
    recorder: Any = SimpleNamespace(steps=[(80, 2, 1.5), (1120, 1, 9.0), (80, 3, 2.5)])
    assert lanes._steps(recorder) == {
        "80": {"steps": 2, "rows": 5, "ms": 4.0},
        "1120": {"steps": 1, "rows": 1, "ms": 9.0},
    }


def cost_row(mode: str, blocks: list[float], cpu: float, ends: int = 0) -> records.Row:
    steps = {"80": {"steps": 2, "rows": 8, "ms": 1.0}, "1120": {"steps": 4, "rows": 6, "ms": 1.0}}
    values = {"audio_seconds": 10.0, "cpu_seconds": cpu, "ends": ends, "steps": steps}
    case = {"measurement": "cost", "mode": mode, "batch": 4, "precision": "fp32"}
    return records.row(case, {"block": blocks}, values)


def capacity_row(mode: str, streams: int, confirming: bool, failures: list[str]) -> records.Row:
    case = {"measurement": "capacity", "mode": mode, "streams": streams, "confirming": confirming}
    return records.row(case, {}, {"passed": not failures, "failures": failures, "p50": 5.0, "p99": streams / 2})


def test_report(tmp_path: Path) -> None:
    """10 s of streams take 1 s without the lane and 1.5 s with it; two utterances end in them."""
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    rows = [cost_row("80", [400.0, 600.0], 2.0, 2), cost_row("80+1120", [700.0, 800.0], 2.4, 2)]
    rows += [capacity_row("80", 8, False, []), capacity_row("80", 9, False, ["slow", "late"])]
    rows += [capacity_row("80", 8, True, []), capacity_row("80+1120", 1, False, ["no results"])]
    method = {"chunk_ms": 80, "final_chunk_ms": 1120, "flops": [1e9, 14e9], "device": "cpu", "threads": 2}
    result = records.record("lanes", rows, model={"name": "m"}, method={**method, "other_work_cores": 0.0})
    text, _ = report.write_report([result], tmp_path / "x.md")
    assert "with an end of utterance every 5.0 s" in text
    assert "| steps | 12.5 | 0.893 | 0.200 | +9 % |" in text  # 1.093 / 12.5
    assert "| products, GFLOP | 12.5 | 12.5 | 2.80 | +122 % |" in text
    assert "| 4 | 80 ms | fp32 | 100 |  | 200 |  | 500 | 600 |  |" in text
    assert "| 4 | 80 + 1120 ms | fp32 | 150 | +50 % | 240 | +20 % | 750 | 800 | 1.5 |" in text
    assert "| 80 ms | 8 | 5.00 | 4.00 | 9: slow |" in text
    assert "| 80 + 1120 ms | 0 |  |  |  |" in text


def test_numbers_of_streams(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to three streams pass without the lane, and one with it."""
    loads: list[dict[str, Any]] = []
    steps: list[tuple[int, int, float]] = []

    @contextlib.contextmanager
    def backend(bundle: Bundle, chunks: Any, precision: str, slots: int, **options: Any) -> Iterator[Any]:
        assert slots == 2 * 3 * 8 and precision == "fp32"  # two lanes and a branch each
        yield SimpleNamespace()

    def run_load(model: Any, clips: Any, streams: int, chunk_ms: Any, **options: Any) -> load.LoadResult:
        loads.append({"streams": streams, "chunk_ms": chunk_ms, **options})
        result = load.LoadResult([(80, each / 10, 0.02) for each in range(100)], lateness=[0.001] * 100)
        result.seconds = 10.0
        steps.append((80, 1, 4.0))
        limit = 1 if options["options"]["final_chunk_ms"] else 3
        result.errors = ["too many"] if streams > limit else []
        return result

    monkeypatch.setattr(lanes, "timed_backend", backend)
    monkeypatch.setattr(lanes, "StepRecorder", lambda backend: SimpleNamespace(steps=steps))
    monkeypatch.setattr(lanes, "Model", lambda bundle, recorder, ms: contextlib.nullcontext())
    monkeypatch.setattr(lanes, "run_load", run_load)
    fast, accurate = demo_bundle.manifest.chunk(80), demo_bundle.manifest.chunk(1120)
    for final_chunk, found in ((None, 3), (accurate, 1)):
        rows = lanes._capacity(demo_bundle, fast, final_chunk, "fp32", (9.0, 2.0, 8), {}, records.no_progress)
        assert (rows[-1]["case"]["streams"], rows[-1]["case"]["confirming"]) == (found, True)
        assert rows[-1]["values"]["passed"] and rows[-1]["values"]["p99"] == 20.0 and rows[-1]["ms"] == {}
        assert any(row["values"]["failures"] == ["1 errors, first: too many"] for row in rows)
    assert {each["seconds"] for each in loads} == {2.0, 9.0} and all(each["chunk_ms"] == [80] for each in loads)
    assert {each["options"]["final_chunk_ms"] for each in loads} == {None, 1120}
    assert all(each["options"]["endpoint"] == Endpoint() for each in loads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, "must be positive"),
        ({"batches": ()}, "must be positive"),
        ({"seconds": 0.0}, "must be positive"),
        ({"final_chunk_ms": 80}, "must be larger than chunk_ms, 80"),
        ({"random_weights": True, "device": "cuda"}, "needs the device cpu"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str, demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match=message):
        lanes.measure_lanes(demo_bundle, **options)
