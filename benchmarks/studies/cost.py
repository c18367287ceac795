"""Cost of a step by duration of the stream and by batch size.

    nemostream bench cost --bundle BUNDLE --chunk-ms 1120 --hours 1 --batch 1 2 4 8 16

**Duration**: one stream of `--hours` of audio, not paced, every step timed. A line is fitted to the medians of 100
equal segments. The state of a stream is bounded, so the line must be flat: the report shows the change over the whole
stream and its 95 % bootstrap interval over the segments.

**Batch size**: the median step for every batch size, and the model `fixed + per stream × batch`, fitted with both parts
at least zero. The fixed part is compared with the time to read the weights once, the part per stream with the time of
the useful products of one stream at the rate of the machine. A part is limited by memory or compute if this bound is at
least half of it, otherwise by overhead: calls, copies of caches, products too thin for the machine. Below the batch
size at which both parts are equal, the fixed part dominates; above it, the part per stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemostream.benchmarks import command
from nemostream.benchmarks.gpu.roofline import measure_for
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.plots import Chart, Curve, CurveChart, CurvePanel
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress
from nemostream.benchmarks.harness.roofline import Machine, encoder_work
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import AudioFeed, timed_backend
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import Backend, Batch

_SEGMENTS = 100
_WARM_UP = 5  # steps


def measure_cost(
    bundle: Bundle,
    precision: str = "fp32",
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    chunk_ms: Sequence[int] | None = None,
    *,
    hours: float = 1.0,
    repeats: int = 20,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    machine: Machine | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Measure costs and return the result.

    Raises `OptionError` for invalid options, and `BackendError` if a device or engine is missing.
    """
    if repeats < 1 or min(batches, default=0) < 1 or hours < 0:
        raise OptionError("repeats and batch sizes must be at least 1, and hours at least 0.")
    threads = threads or records.cores()
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    others, rows, fits = OtherWork(), [], []
    for chunk in chunks:
        with timed_backend(
            bundle, [chunk], precision, max(batches), device=device, threads=threads, engines=engines
        ) as backend:
            machine = machine or measure_for(backend, threads)
            case = {"chunk_ms": chunk.ms, "precision": precision}
            medians = []
            for batch in batches:
                progress(f"{chunk.ms} ms, batch {batch}")
                step_times = _batch_steps(bundle, backend, chunk, batch, repeats)
                medians.append(float(np.median(step_times)))
                rows.append(records.row({**case, "varied": "batch", "batch": batch}, {"step": step_times}))
            fixed, per_stream = fit_batch(batches, medians)
            work = encoder_work(bundle, chunk, precision, device.partition(":")[0])
            roofline = work.roofline_ms(machine, precision, 1)
            bounds = {"weights_ms": roofline["memory"], "products_ms": roofline["compute"]}
            fits.append({**case, "fixed_ms": fixed, "per_stream_ms": per_stream, **bounds})
            steps = round(3600 * hours * 1000 / chunk.ms)
            if steps >= 2:
                progress(f"{chunk.ms} ms, {hours:g} hours of one stream, {steps} steps")
                times = _stream_steps(backend, chunk, steps)
                segments = [float(np.median(part)) for part in np.array_split(times, min(_SEGMENTS, len(times)))]
                values = {"hours": hours, **fit_duration(segments)}
                rows.append(records.row({**case, "varied": "duration", "batch": 1}, {"segment": segments}, values))
    return records.record(
        "cost",
        rows,
        model=records.model_of(bundle.manifest),
        method={
            "repeats": repeats,
            "threads": threads,
            "device": device,
            "fits": fits,
            "machine": dict(machine.rates) if machine else {},
            "warm_up": _WARM_UP,
            "other_work_cores": round(others.cores(), 3),
        },
    )


def fit_batch(batches: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Fit `fixed + per_stream × batch` to the times and return both parts, each at least zero.

    Minimises the squared relative error, so that all batch sizes have the same weight.
    """
    x, y = np.array(batches, float), np.array(times, float)
    columns = np.stack([1 / y, x / y], axis=1)
    fixed, per_stream = np.linalg.lstsq(columns, np.ones(len(y)), rcond=None)[0]
    if fixed < 0:
        return 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    if per_stream < 0:
        return float((1 / y).sum() / ((1 / y) ** 2).sum()), 0.0
    return float(fixed), float(per_stream)


def limits(fit: Mapping[str, Any]) -> tuple[str, str, float]:
    """Return what limits the fixed part and the part per stream, and the batch size at which both parts are equal."""
    fixed, per_stream = fit["fixed_ms"], fit["per_stream_ms"]
    fixed_limit = "memory" if fit["weights_ms"] >= fixed / 2 else "overhead"
    stream_limit = "compute" if fit["products_ms"] >= per_stream / 2 else "overhead"
    return fixed_limit, stream_limit, fixed / per_stream if per_stream else float("inf")


def fit_duration(segments: Sequence[float]) -> dict[str, float]:
    """Fit a line to the times of equal segments.

    Returns the change from the first to the last segment, its 95 % bootstrap interval over the segments (`low_ms`,
    `high_ms`), and the change relative to the median (`share`).
    """
    y = np.array(segments)
    x = np.linspace(0, 1, len(y))
    slope = float(np.polyfit(x, y, 1)[0])
    rng, slopes = np.random.default_rng(0), []
    for _ in range(1000):
        chosen = rng.integers(0, len(y), len(y))
        if len(set(chosen.tolist())) > 1:
            slopes.append(np.polyfit(x[chosen], y[chosen], 1)[0])
    low, high = np.quantile(slopes, [0.025, 0.975]) if slopes else (slope, slope)
    median = float(np.median(y))
    return {"change_ms": slope, "low_ms": float(low), "high_ms": float(high), "share": slope / median}


def _batch_steps(
    bundle: Bundle,
    backend: Backend,
    chunk: ChunkConfig,
    batch: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the milliseconds of steps with full caches."""
    filled = -(-chunk.left // chunk.frames) + _WARM_UP
    feed, times = AudioFeed(bundle.manifest, speech(), batch, (filled + repeats) * chunk.frames), []
    backend.reset(np.arange(batch))
    for step in range(filled + repeats):
        inputs = feed.batch(chunk, step * chunk.frames)
        start = clock()
        backend.submit(inputs).result()
        times.append(1000 * (clock() - start))
    return times[filled:]


def _stream_steps(
    backend: Backend, chunk: ChunkConfig, steps: int, clock: Callable[[], float] = time.perf_counter
) -> np.ndarray:
    """Return the milliseconds of each step of one stream that repeats the clip, after the warm-up steps."""
    clip, times = speech(), np.empty(steps)
    offsets = np.arange(chunk.samples)
    backend.reset(np.array([0]))
    for step in range(steps):
        audio = clip[(offsets + step * chunk.samples) % len(clip)]
        batch = Batch(chunk, np.array([0]), audio[None], np.array([chunk.samples]))
        start = clock()
        backend.submit(batch).result()
        times[step] = 1000 * (clock() - start)
    return times[min(_WARM_UP, steps - 2) :]


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    by_batch = [row for row in result["rows"] if row["case"]["varied"] == "batch"]
    by_duration = [row for row in result["rows"] if row["case"]["varied"] == "duration"]
    fits = result["method"]["fits"]
    batches = sorted({row["case"]["batch"] for row in by_batch})
    medians = {(row["case"]["chunk_ms"], row["case"]["batch"]): row["figures"]["step"]["p50"] for row in by_batch}
    lines = []
    for fit in fits:
        line = [f"{fit['chunk_ms']} ms", fit["precision"]]
        line += [tables.digits(medians[fit["chunk_ms"], batch]) for batch in batches]
        line += [tables.digits(fit[name]) for name in ("fixed_ms", "weights_ms", "per_stream_ms", "products_ms")]
        fixed_limit, stream_limit, batch = limits(fit)
        lines.append([*line, f"{fixed_limit} up to batch {batch:.1f}, then {stream_limit}"])
    head = ["chunk", "precision", *(f"batch {batch}" for batch in batches), "fixed", "read weights", "per stream"]
    text = [
        "Median time of a step in milliseconds by batch size, and the fitted model `fixed + per stream × batch`. *Read "
        "weights* is the time to read the weights once, the bound of the fixed part; *products* is the time of the "
        "products of one stream, the bound of the part per stream. A part is limited by overhead if its bound is less "
        "than half of it.",
        "",
        tables.markdown([*head, "products", "limited by"], lines),
    ]
    if by_duration:
        lines = [
            [
                f"{row['case']['chunk_ms']} ms",
                row["case"]["precision"],
                f"{row['values']['hours']:g}",
                tables.digits(row["figures"]["segment"]["p50"]),
                f"{row['values']['change_ms']:+.3f} [{row['values']['low_ms']:+.3f}, {row['values']['high_ms']:+.3f}]",
                f"{100 * row['values']['share']:+.1f} %",
            ]
            for row in by_duration
        ]
        head = ["chunk", "precision", "hours", "step, ms", "change from start to end, ms [95 %]", "relative change"]
        text += ["", "Change of the step time over one stream:", "", tables.markdown(head, lines)]
    method = result["method"]
    text += [
        "",
        f"{method['threads']} threads. {tables.other_load([method['other_work_cores']])} Measured rates: "
        f"{tables.rates(method['machine'])}.",
    ]
    return "\n".join(text) + "\n"


def charts(result: Record) -> dict[str, Chart]:
    """Return the plots of the step time by batch size, and by position in a long stream."""
    curves = []
    for series, fit in enumerate(result["method"]["fits"]):
        points = [
            (row["case"]["batch"], row["figures"]["step"]["p50"])
            for row in result["rows"]
            if row["case"]["varied"] == "batch" and row["case"]["chunk_ms"] == fit["chunk_ms"]
        ]
        line = [(batch, fit["fixed_ms"] + fit["per_stream_ms"] * batch) for batch, _ in points]
        curves += [Curve("", line, style="fit"), Curve(f"{fit['chunk_ms']} ms", points, style="points", series=series)]
    each = [
        f"{tables.digits(fit['per_stream_ms'])} ms ({fit['chunk_ms']} ms chunks)" for fit in result["method"]["fits"]
    ]
    found: dict[str, Chart] = {
        "batch": CurveChart(
            f"Each stream of a batch adds {_listed(each)} to a step",
            "Time of a step by batch size. Marks: medians; dotted: the fit, a fixed time and a time per stream.",
            [CurvePanel("", curves)],
            "streams in a batch",
            " ms",
        )
    }
    if long := [row for row in result["rows"] if row["case"]["varied"] == "duration"]:
        found["duration"] = _duration_chart(long)
    return found


def _duration_chart(rows: Sequence[Row]) -> CurveChart:
    curves = []
    for series, row in enumerate(rows):
        hours = np.linspace(0, row["values"]["hours"], len(row["ms"]["segment"]))
        points = list(zip(hours.tolist(), row["ms"]["segment"], strict=True))
        curves.append(Curve(f"{row['case']['chunk_ms']} ms", points, style="plain", series=series))
    changes = [f"{_start_and_end(row['ms']['segment'])} ({row['case']['chunk_ms']} ms chunks)" for row in rows]
    parts = len(rows[0]["ms"]["segment"])
    return CurveChart(
        f"In {rows[0]['values']['hours']:g} h of one stream, the step time goes {_listed(changes)}",
        f"Median time of the steps in {parts} equal parts of the stream. Title: medians of the first and last tenth.",
        [CurvePanel("", curves)],
        "position in the stream, hours",
        " ms",
    )


def _start_and_end(segments: Sequence[float]) -> str:
    count = -(-len(segments) // 10)
    first, last = (tables.digits(float(np.median(part))) for part in (segments[:count], segments[-count:]))
    return f"from {first} to {last} ms"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("cost", __doc__)
    command.add_engine_options(parser)
    command.add_chunk_option(parser)
    parser.add_argument("--precision", default="fp32", help="precision of the engine")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="streams per step")
    parser.add_argument("--hours", type=float, default=1.0, help="audio of the long stream, in hours (0: skip)")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps for each batch size")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        return measure_cost(
            command.open_bundle(options.bundle),
            options.precision,
            options.batch,
            options.chunk_ms,
            hours=options.hours,
            repeats=options.repeats,
            **command.engine_arguments(options),
        )

    command.run(measure, options)


if __name__ == "__main__":
    main()
