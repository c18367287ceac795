"""Cost by batch size and duration, from steps that take known times."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the build extra")

from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.plots import CurveChart
from nemostream.benchmarks.harness.roofline import Machine, Work
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import AudioFeed
from nemostream.benchmarks.studies import cost
from nemostream.bundle import Bundle
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import Batch


class Backend:
    """Steps take 1, 2, 3, ... ms."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.batches: list[Batch] = []
        self.resets: list[list[int]] = []

    def reset(self, slots: np.ndarray) -> None:
        self.resets.append(slots.tolist())

    def submit(self, batch: Batch) -> Any:
        self.batches.append(batch)
        return SimpleNamespace(result=lambda: self.clock.sleep(0.001 * len(self.batches)))


def test_steps_of_a_batch(demo_bundle: Bundle, clock: Any) -> None:
    """The caches are full after 10 chunks of 7 of 70 frames, and five steps warm up: the 16th step is the first."""
    chunk, backend = demo_bundle.manifest.chunk(560), Backend(clock)
    times = cost._batch_steps(demo_bundle, backend, chunk, 3, 4, clock)  # type: ignore[arg-type]
    assert times == pytest.approx([16.0, 17.0, 18.0, 19.0]) and backend.resets == [[0, 1, 2]]
    feed = AudioFeed(demo_bundle.manifest, speech(), 3, 19 * 7)
    for step, batch in enumerate(backend.batches):
        assert np.array_equal(batch.audio, feed.batch(chunk, 7 * step).audio)


def test_steps_of_a_stream(demo_bundle: Bundle, clock: Any) -> None:
    """The first five steps do not count; the clip is repeated without a gap."""
    chunk, backend = demo_bundle.manifest.chunk(1120), Backend(clock)
    times = cost._stream_steps(backend, chunk, 40, clock)  # type: ignore[arg-type]
    assert times.tolist() == pytest.approx([float(n) for n in range(6, 41)]) and backend.resets == [[0]]
    audio = np.concatenate([batch.audio[0] for batch in backend.batches])
    assert len(audio) > 2 * len(speech()) and np.array_equal(audio, np.resize(speech(), len(audio)))
    for batch in backend.batches:
        assert batch.slots.tolist() == [0] and batch.lengths.tolist() == [chunk.samples]
    assert cost._stream_steps(Backend(clock), chunk, 3, clock).tolist() == pytest.approx([2.0, 3.0])  # type: ignore[arg-type]


def test_fit_minimises_relative_errors() -> None:
    """Of 10 + 2 batch with errors of a tenth in turn, the slope of a relative fit is a weighted mean."""
    x, y = np.array([1.0, 2.0, 4.0, 8.0]), np.array([13.2, 12.6, 19.8, 23.4])
    fixed, per_stream = cost.fit_batch(x.tolist(), y.tolist())  # type: ignore[arg-type]

    def error(fixed: float, per_stream: float) -> float:
        return float((((fixed + per_stream * x) / y - 1) ** 2).sum())

    best = error(fixed, per_stream)
    for change in (-0.01, 0.01):
        assert error(fixed + change, per_stream) > best < error(fixed, per_stream + change)
    # Proportional, and constant: the only part has the least relative error too.
    assert cost.fit_batch([1, 2], [1.0, 4.0]) == (0.0, pytest.approx((1 + 0.5) / (1 + 0.25)))
    assert cost.fit_batch([1, 2], [4.0, 1.0]) == (pytest.approx((0.25 + 1) / (0.0625 + 1)), 0.0)


def test_change_over_a_stream() -> None:
    found = cost.fit_duration([2.0, 3.0, 4.0, 5.0, 6.0])  # 4 ms from the first to the last segment
    assert found == pytest.approx({"change_ms": 4.0, "low_ms": 4.0, "high_ms": 4.0, "share": 1.0})
    falling = cost.fit_duration([8.0, 6.0, 4.0])
    assert (falling["change_ms"], falling["share"]) == pytest.approx((-4.0, -4 / 6))
    noisy = cost.fit_duration([1.0, 3.0] * 20)
    assert noisy["low_ms"] < noisy["change_ms"] < noisy["high_ms"]
    # The 95 % interval of the slope of 40 residuals of standard deviation 1 is about 2 * 1 / sqrt(40 / 12).
    assert noisy["high_ms"] - noisy["low_ms"] == pytest.approx(2 * 1.96 / np.sqrt(40 / 12), rel=0.1)


def test_rows_and_report(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take 10 + 2 batch ms; 0.01 hours of 1,120 ms chunks are 32 steps."""
    calls: list[Any] = []

    def batch_steps(bundle: Bundle, backend: Any, chunk: Any, batch: int, repeats: int) -> list[float]:
        assert (bundle.manifest.name, chunk.ms, repeats) == ("demo", 1120, 3)
        return [9.0 + 2 * batch, 10.0 + 2 * batch, 15.0 + 2 * batch]

    def stream_steps(backend: Any, chunk: Any, steps: int) -> np.ndarray:
        calls.append(steps)
        return np.arange(250.0) + 100

    def encoder_work(bundle: Bundle, chunk: Any, precision: str, device: str) -> Work:
        calls.append((chunk.ms, precision, device))
        return Work(6_000_000, 3e6)

    monkeypatch.setattr(cost, "_batch_steps", batch_steps)
    monkeypatch.setattr(cost, "_stream_steps", stream_steps)
    monkeypatch.setattr(cost, "encoder_work", encoder_work)
    monkeypatch.setattr(cost, "timed_backend", lambda *arguments, **options: contextlib.nullcontext())
    monkeypatch.setattr(cost, "OtherWork", lambda: SimpleNamespace(cores=lambda: 0.01234))
    machine = Machine(1e9, {"int8": 2e9}, {"read": 1.0})
    result = cost.measure_cost(
        demo_bundle, "int8", (1, 4, 8), (1120,), hours=0.01, repeats=3, threads=2, machine=machine
    )
    assert calls == [(1120, "int8", "cpu"), 32] and result["benchmark"] == "cost"
    (fit,) = result["method"]["fits"]
    assert fit == {
        "chunk_ms": 1120,
        "precision": "int8",
        "fixed_ms": pytest.approx(10.0),
        "per_stream_ms": pytest.approx(2.0),
        "weights_ms": 6.0,  # 6 MB at 1 GB/s
        "products_ms": 1.5,  # 3 MFLOP at 2 GFLOP/s
    }
    *by_batch, long = result["rows"]
    assert [(row["case"]["batch"], row["ms"]["step"]) for row in by_batch] == [
        (1, [11.0, 12.0, 17.0]),
        (4, [17.0, 18.0, 23.0]),
        (8, [25.0, 26.0, 31.0]),
    ]
    assert {row["case"]["varied"] for row in by_batch} == {"batch"}
    assert long["case"] == {"chunk_ms": 1120, "precision": "int8", "varied": "duration", "batch": 1}
    # 250 steps in 100 segments: 50 of three steps, whose medians are 101, 104, ..., and then 50 of two.
    segments = long["ms"]["segment"]
    assert len(segments) == 100 and segments[:3] == [101.0, 104.0, 107.0] and segments[50:52] == [250.5, 252.5]
    assert long["values"] == {"hours": 0.01} | cost.fit_duration(segments)
    assert result["method"]["other_work_cores"] == 0.012 and result["method"]["machine"] == {"read": 1.0}

    fit |= {"fixed_ms": 10.0, "per_stream_ms": 2.0}  # without the rounding errors of the fit
    long["values"] |= {"change_ms": 0.1234, "low_ms": -0.5, "high_ms": 0.75, "share": 0.0567}
    text = cost.show(result)
    assert (
        "| 1120 ms | int8 | 12.0 | 18.0 | 26.0 | 10.0 | 6.00 | 2.00 | 1.50 | memory up to batch 5.0, then compute |"
    ) in text
    median = records.percentile(segments, 50)
    assert f"| 1120 ms | int8 | 0.01 | {median:.0f} | +0.123 [-0.500, +0.750] | +5.7 % |" in text
    batch, duration = cost.charts(result).values()
    assert isinstance(batch, CurveChart) and isinstance(duration, CurveChart)
    line, points = batch.panels[0].curves
    assert points.points == [(1, 12.0), (4, 18.0), (8, 26.0)] == line.points and line.style == "fit"
    assert batch.title == "Each stream of a batch adds 2.00 ms (1120 ms chunks) to a step"
    (curve,) = duration.panels[0].curves
    assert next(iter(curve.points)) == (0.0, 101.0) and curve.points[-1] == (pytest.approx(0.01), segments[-1])
    first, last = np.median(segments[:10]), np.median(segments[-10:])
    assert (
        duration.title
        == f"In 0.01 h of one stream, the step time goes from {first:.0f} to {last:.0f} ms (1120 ms chunks)"
    )


def test_no_long_stream(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of the machine are measured once, with the backend and threads of the first chunk size."""
    rated: list[Any] = []

    def measure_for(backend: Any, threads: int) -> Machine:
        rated.append((backend, threads))
        return Machine(1.0, {}, {"read": 3.0})

    monkeypatch.setattr(cost, "measure_for", measure_for)
    monkeypatch.setattr(cost, "_batch_steps", lambda *arguments: [1.0])
    monkeypatch.setattr(cost, "encoder_work", lambda *arguments: Work(1, 1.0))
    monkeypatch.setattr(cost, "timed_backend", lambda *arguments, **options: contextlib.nullcontext("backend"))
    result = cost.measure_cost(demo_bundle, batches=(1,), hours=0, threads=3)
    assert [row["case"]["varied"] for row in result["rows"]] == ["batch"] * 4
    assert rated == [("backend", 3)] and result["method"]["machine"] == {"read": 3.0}
    for invalid in ({"hours": -0.1}, {"repeats": 0}, {"batches": (1, 0)}, {"batches": ()}):
        with pytest.raises(OptionError, match="hours at least 0"):
            cost.measure_cost(demo_bundle, **invalid)  # type: ignore[arg-type]
