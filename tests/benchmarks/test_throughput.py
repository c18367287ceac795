"""Seconds of audio per second, from recordings that take known times."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.benchmarks import throughput
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.plots import Bar, BarChart
from nemostream.bundle import Bundle
from nemostream.errors import OptionError


def test_time_of_a_set(clock: Any) -> None:
    """Three runs over four recordings of 1, 2, 3 and 4 s; two at a time."""
    together, seconds, lock = threading.Barrier(2), iter([0.5] * 4 + [0.25] * 4 + [1.0] * 4), threading.Lock()
    texts: list[int] = []

    def transcribe(source: int) -> Any:
        together.wait(60)  # fails if recordings are not transcribed concurrently
        with lock:
            texts.append(source)
            clock.sleep(next(seconds))
        return SimpleNamespace(duration=float(source))

    model: Any = SimpleNamespace(transcribe=transcribe)
    audio, times = throughput.time_set(model, [1, 2, 3, 4], 2, 3, clock)
    assert audio == 10.0 and times == pytest.approx([2.0, 1.0, 4.0])
    assert sorted(texts) == sorted([1, 2, 3, 4] * 3)


def test_rows(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording warms each model up; RTFx is the audio divided by the median time."""
    log: list[Any] = []

    @contextlib.contextmanager
    def timed_backend(bundle: Bundle, chunks: Any, precision: str, rows: int, **options: Any) -> Any:
        assert options == {"device": "cuda", "threads": 2, "engines": "engines"}
        log.append((precision, [chunk.ms for chunk in chunks], rows))
        yield "backend"

    def time_set(model: Any, sources: Any, batch: int, repeats: int) -> tuple[float, list[float]]:
        log.append((batch, repeats, len(sources)))
        return 120.0, [3.0, 1.0, 2.0]

    model = SimpleNamespace(transcribe=lambda source: log.append(source))
    monkeypatch.setattr(throughput, "timed_backend", timed_backend)
    monkeypatch.setattr(throughput, "Model", lambda *arguments: contextlib.nullcontext(model))
    monkeypatch.setattr(throughput, "time_set", time_set)
    result = throughput.measure_throughput(
        demo_bundle,
        ["a", "b", "c"],
        ("fp32", "int8"),
        (1, 3),
        (80, 560),
        device="cuda",
        threads=2,
        engines="engines",  # type: ignore[arg-type]
    )
    each = [(1, 3, 3), (3, 3, 3)]
    assert log == [
        *(("fp32", [80], 6), "a", *each, ("fp32", [560], 6), "a", *each),
        *(("int8", [80], 6), "a", *each, ("int8", [560], 6), "a", *each),
    ]
    assert result["benchmark"] == "throughput" and len(result["rows"]) == 8
    assert result["rows"][3]["case"] == {"chunk_ms": 560, "batch": 3, "precision": "fp32"}
    for row in result["rows"]:
        assert row["ms"] == {"whole set": [3000.0, 1000.0, 2000.0]}
        assert row["values"] == {"audio_seconds": 120.0, "rtfx": 60.0}
    assert {name: result["method"][name] for name in ("recordings", "repeats", "threads", "device")} == {
        "recordings": 3,
        "repeats": 3,
        "threads": 2,
        "device": "cuda",
    }
    result["rows"][3]["values"]["rtfx"] = 90.0
    text = throughput.show(result)
    assert "| 80 ms | 1 | fp32 | 120 | 2.00 [1.00–3.00] | 60.0 |" in text
    assert text.startswith("3 recordings; cuda, 2 threads. Time for the whole set, 3 runs: median")
    chart = throughput.charts(result)["rtfx"]
    assert isinstance(chart, BarChart)
    assert chart.rows == ["80 ms, fp32", "560 ms, fp32", "80 ms, int8", "560 ms, int8"]
    assert [panel.heading for panel in chart.panels] == ["1 recording at a time", "3 recordings at a time"]
    # Of 120 s of audio in 1 to 3 s.
    assert [panel.bars[1] for panel in chart.panels] == [
        Bar([60.0], "60.0", (40.0, 120.0)),
        Bar([90.0], "90.0", (40.0, 120.0)),
    ]
    assert chart.title == "Up to 90.0 seconds of audio per second: 560 ms chunks, fp32, 3 recordings at a time"


@pytest.mark.parametrize(
    ("sources", "options"),
    [([], {}), (["a"], {"batches": ()}), (["a"], {"batches": (1, 0)}), (["a"], {"batches": (1,), "repeats": 0})],
)
def test_invalid_options(sources: list[str], options: dict[str, Any], demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="at least one recording is needed, and batch sizes and repeats must be at"):
        throughput.measure_throughput(demo_bundle, sources, **options)


def test_batches_need_as_many_recordings(demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="batch 3 needs at least as many recordings; there are 2"):
        throughput.measure_throughput(demo_bundle, ["a", "b"], batches=(1, 3))


def test_rtfx() -> None:
    assert records.rtfx(120.0, 30.0) == 4.0
