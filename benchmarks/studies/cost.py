"""What a step costs as a stream grows long, and as a batch grows wide.

    nemostream bench cost --bundle BUNDLE --chunk-ms 1120 --hours 1 --batch 1 2 4 8 16

**Length**: one stream of so many hours, unpaced, every step timed; a line is fitted through the medians of a hundred
equal stretches. State is bounded, so it must be flat: the change over the whole stream, and the range that the noise of
the stretches allows it (95 %), are told.

**Width**: the median step for every batch size, and the model `fixed + per stream x batch`, fitted with neither below
zero. The fixed part is beside the time that reading the weights once takes, the part per stream beside the time of a
stream's useful products at the machine's rate. What is at least half explained by its bound is said to be bound by it,
memory or compute; the rest is overhead: calls, caches copied, products too thin for the machine. Below the batch at
which both parts are equal a step is bound by the fixed one, beyond by the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import OtherWork, Record, Say
from nemostream.benchmarks.harness.roofline import Machine, encoder_work, measure_for
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import Feed, timed_backend
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import Backend, Batch

_STRETCHES = 100
_WARM_UP = 5


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
    say: Say = lambda message: None,
) -> Record:
    """The result. Raises `OptionError` for what cannot be, `BackendError` if there is no engine."""
    if repeats < 1 or min(batches, default=0) < 1 or hours < 0:
        raise OptionError("repeats and batch sizes must be at least 1, and hours not below 0.")
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
                say(f"{chunk.ms} ms, batch {batch}")
                times = _steps(bundle, backend, chunk, batch, repeats)
                medians.append(float(np.median(times)))
                rows.append(records.row({**case, "what": "width", "batch": batch}, {"step": times}))
            fixed, each = fit_width(batches, medians)
            floor = encoder_work(bundle, chunk, precision, device.partition(":")[0]).floor_ms(machine, precision, 1)
            bounds = {"weights_ms": floor["memory"], "products_ms": floor["compute"]}
            fits.append({**case, "fixed_ms": fixed, "per_stream_ms": each, **bounds})
            steps = round(3600 * hours * 1000 / chunk.ms)
            if steps >= 2:
                say(f"{chunk.ms} ms, {hours:g} hours of one stream, {steps} steps")
                whole = _long(bundle, backend, chunk, steps)
                parts = [float(np.median(part)) for part in np.array_split(whole, min(_STRETCHES, len(whole)))]
                values = {"hours": hours, **fit_length(parts)}
                rows.append(records.row({**case, "what": "length", "batch": 1}, {"stretch": parts}, values))
    return records.record(
        "cost",
        rows,
        model={
            "name": bundle.manifest.name,
            "layers": bundle.manifest.encoder.layers,
            "d_model": bundle.manifest.encoder.d_model,
        },
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


def fit_width(batches: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """`fixed` and `each`, neither below zero, of the line `fixed + each x batch` that is nearest to the times.

    Nearest by relative error, so that small batches count as much as large ones.
    """
    x, y = np.array(batches, float), np.array(times, float)
    columns = np.stack([1 / y, x / y], axis=1)
    fixed, each = np.linalg.lstsq(columns, np.ones(len(y)), rcond=None)[0]
    if fixed < 0:
        return 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    if each < 0:
        return float((1 / y).sum() / ((1 / y) ** 2).sum()), 0.0
    return float(fixed), float(each)


def bound_by(fit: Mapping[str, Any]) -> tuple[str, str, float]:
    """What binds the fixed part, what each stream's, and the batch from which on the second is the larger."""
    fixed, each = fit["fixed_ms"], fit["per_stream_ms"]
    first = "memory" if fit["weights_ms"] >= fixed / 2 else "overhead"
    second = "compute" if fit["products_ms"] >= each / 2 else "overhead"
    return first, second, fixed / each if each else float("inf")


def fit_length(parts: Sequence[float]) -> dict[str, float]:
    """Change from the first to the last of equal stretches by the line through them, its share of the median, and the
    range (95 %, by bootstrap over the stretches) that the change is in."""
    y = np.array(parts)
    x = np.linspace(0, 1, len(y))
    slope = float(np.polyfit(x, y, 1)[0])
    rng, found = np.random.default_rng(0), []
    for _ in range(1000):
        chosen = rng.integers(0, len(y), len(y))
        if len(set(chosen.tolist())) > 1:
            found.append(np.polyfit(x[chosen], y[chosen], 1)[0])
    low, high = np.quantile(found, [0.025, 0.975]) if found else (slope, slope)
    median = float(np.median(y))
    return {"change_ms": slope, "low_ms": float(low), "high_ms": float(high), "share": slope / median}


def _steps(bundle: Bundle, backend: Backend, chunk: ChunkConfig, batch: int, repeats: int) -> list[float]:
    """Milliseconds of steps in the steady state."""
    filled = -(-chunk.left // chunk.frames) + _WARM_UP
    feed, times = Feed(bundle.manifest, speech(), batch, (filled + repeats) * chunk.frames), []
    backend.reset(np.arange(batch))
    for step in range(filled + repeats):
        inputs = feed.batch(chunk, step * chunk.frames)
        start = time.perf_counter()
        backend.submit(inputs).result()
        times.append(1000 * (time.perf_counter() - start))
    return times[filled:]


def _long(bundle: Bundle, backend: Backend, chunk: ChunkConfig, steps: int) -> np.ndarray:
    """Milliseconds of every step of one stream that goes round the clip."""
    clip, times = speech(), np.empty(steps)
    at = np.arange(chunk.samples)
    backend.reset(np.array([0]))
    for step in range(steps):
        audio = clip[(at + step * chunk.samples) % len(clip)]
        batch = Batch(chunk, np.array([0]), audio[None], np.array([chunk.samples]))
        start = time.perf_counter()
        backend.submit(batch).result()
        times[step] = 1000 * (time.perf_counter() - start)
    return times[min(_WARM_UP, steps - 2) :]


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Tables and plots of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    wide = [row for row in result["rows"] if row["case"]["what"] == "width"]
    long = [row for row in result["rows"] if row["case"]["what"] == "length"]
    fits = result["method"]["fits"]
    batches = sorted({row["case"]["batch"] for row in wide})
    lines = []
    for fit in fits:
        mine = {
            row["case"]["batch"]: row["figures"]["step"]["p50"]
            for row in wide
            if row["case"]["chunk_ms"] == fit["chunk_ms"]
        }
        line = [f"{fit['chunk_ms']} ms", fit["precision"], *(tables.digits(mine[batch]) for batch in batches)]
        line += [tables.digits(fit[name]) for name in ("fixed_ms", "weights_ms", "per_stream_ms", "products_ms")]
        first, second, batch = bound_by(fit)
        lines.append([*line, f"{first} up to batch {batch:.1f}, then {second}"])
    head = ["chunk", "precision", *(f"batch {batch}" for batch in batches), "fixed", "weights once", "per stream"]
    text = [
        "Median step in milliseconds by batch; the model `fixed + per stream × batch`, beside the time to read the "
        "weights once and the time of one stream's products; what binds, a part being overhead if its bound "
        "explains less than half of it.",
        "",
        tables.markdown([*head, "products of one", "bound by"], lines),
    ]
    if long:
        lines = [
            [
                f"{row['case']['chunk_ms']} ms",
                row["case"]["precision"],
                f"{row['values']['hours']:g}",
                tables.digits(row["figures"]["stretch"]["p50"]),
                f"{row['values']['change_ms']:+.3f} [{row['values']['low_ms']:+.3f}, {row['values']['high_ms']:+.3f}]",
                f"{100 * row['values']['share']:+.1f} %",
            ]
            for row in long
        ]
        head = ["chunk", "precision", "hours", "step, ms", "change from start to end, ms [95 %]", "share"]
        text += ["", "One stream, from its first step to its last:", "", tables.markdown(head, lines)]
        axes = plot("length")
        for row in long:
            parts = row["ms"]["stretch"]
            axes.plot(np.linspace(0, row["values"]["hours"], len(parts)), parts, label=f"{row['case']['chunk_ms']} ms")
        axes.set(xlabel="hours of one stream", ylabel="step, ms", ylim=(0, None), title="The cost of length")
        axes.legend(fontsize=7)
    axes = plot("width")
    for fit in fits:
        points = [
            (row["case"]["batch"], row["figures"]["step"]["p50"])
            for row in wide
            if row["case"]["chunk_ms"] == fit["chunk_ms"]
        ]
        axes.plot(*zip(*points, strict=True), "o", label=f"{fit['chunk_ms']} ms")
        axes.plot(batches, [fit["fixed_ms"] + fit["per_stream_ms"] * batch for batch in batches], ":", color="grey")
    axes.set(xlabel="batch", ylabel="step, ms (p50)", ylim=(0, None), title="The cost of width")
    axes.legend(fontsize=7)
    method = result["method"]
    text += [
        "",
        f"{method['threads']} threads. {tables.busy([method['other_work_cores']])} Measured: "
        f"{tables.rates(method['machine'])}.",
    ]
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = records.parser("cost", __doc__)
    records.engine_options(parser)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--hours", type=float, default=1.0, help="length of the one stream; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=20, help="steps timed of each batch size")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        return measure_cost(
            Bundle.open(options.bundle or nemostream.demo_bundle()),
            options.precision,
            options.batch,
            options.chunk_ms,
            hours=options.hours,
            repeats=options.repeats,
            device=options.device,
            threads=options.threads,
            engines=options.engines,
            say=records.say,
        )

    records.run(measure, options)


if __name__ == "__main__":
    main()
