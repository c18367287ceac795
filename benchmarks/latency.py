"""Time of a step, and time from the last sample of a chunk to its tokens.

    nemostream bench latency --bundle BUNDLE --precision fp32 int8 --batch 1 4 16
    nemostream bench latency --bundle BUNDLE --precision fp32 fp16 --device cpu cuda cuda:onnxruntime

Measured for every chunk size, batch, precision and backend (`harness.timed` explains `--device`), after warm-up and
with full caches:

* **step**: `Backend.submit` until its result, PCM to tokens, as called by the scheduler. On a GPU also **device**, the
  time between two events on the device around the same launches.
* **push**: the last samples of a chunk are pushed to each of `batch` live streams, until each has its new result. This
  includes conversion, scheduler, step and text. Streams pushed at slightly different times may share a step or not, as
  in production.

Breakdown of a step: *features*, *encoder* and *decode* are the calls into ONNX Runtime (on a GPU the stages of the
step, launched one by one), *copies* is the rest of the encoder half (gathering and scattering caches), *host* the rest
of the step. *launches* is the mean number of calls, or of launches on a GPU, per step. The roofline is that of the
encoder (`harness.roofline`); the table shows which share of the median step it is.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nemostream.benchmarks import command
from nemostream.benchmarks.gpu.roofline import measure_for
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.plots import Bar, BarChart, BarPanel, Chart
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress, quartiles
from nemostream.benchmarks.harness.roofline import Machine, encoder_work
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import DEVICE_PRECISIONS, AudioFeed, timed_backend
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import Backend, Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.model import Model

PARTS = ("features", "encoder", "decode", "copies", "host")
_WARM_UP = 5


def measure_latency(
    bundle: Bundle,
    precisions: Sequence[str] = ("fp32",),
    batches: Sequence[int] = (1, 4),
    chunk_ms: Sequence[int] | None = None,
    repeats: int = 50,
    *,
    devices: Sequence[str] = ("cpu",),
    threads: int | None = None,
    engines: Path | None = None,
    machine: Machine | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Measure latencies and return the result. With several devices, each runs the precisions that it supports.

    Raises `OptionError` for invalid options, and `BackendError` if a device is missing or an engine cannot be built.
    """
    if repeats < 1 or min(batches, default=0) < 1:
        raise OptionError("repeats and batch sizes must be at least 1.")
    threads = threads or records.cores()
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    rows: list[Row] = []
    machines: dict[str, Machine] = {}
    for device in devices:
        device_type = device.partition(":")[0]
        for precision in precisions:
            if len(devices) > 1 and precision not in DEVICE_PRECISIONS.get(device, (precision,)):
                continue
            for chunk in chunks:
                with timed_backend(
                    bundle, [chunk], precision, max(batches), device=device, threads=threads, engines=engines
                ) as backend:
                    if device_type not in machines:
                        machines[device_type] = machine or measure_for(backend, threads)
                    for batch in batches:
                        progress(f"{device}, {precision}, {chunk.ms} ms, batch {batch}")
                        case = {"chunk_ms": chunk.ms, "batch": batch, "precision": precision, "backend": device}
                        rows.append(_measure(bundle, backend, chunk, case, repeats, machines[device_type]))
                gc.collect()
    manifest = bundle.manifest
    return records.record(
        "latency",
        rows,
        model=records.model_of(manifest),
        method={
            "repeats": repeats,
            "warm_up": _WARM_UP,
            "threads": threads,
            "device": " ".join(devices),
            "machine": {device_type: dict(machine.rates) for device_type, machine in machines.items()},
        },
    )


def _measure(
    bundle: Bundle, backend: Backend, chunk: ChunkConfig, case: dict[str, Any], repeats: int, machine: Machine
) -> Row:
    batch, precision = case["batch"], case["precision"]
    filled = -(-chunk.left // chunk.frames)  # steps until the caches are full
    feed = AudioFeed(bundle.manifest, speech(), batch, (filled + 2 * (_WARM_UP + repeats)) * chunk.frames)
    backend.reset(np.arange(batch))
    other_work, warm_up = OtherWork(), filled + _WARM_UP
    times, launches = _step_times(backend, feed, chunk, warm_up, repeats)
    if isinstance(backend, GpuBackend):
        steps = range(warm_up + repeats, warm_up + 2 * repeats)
        device_times, launches = _device_times(backend, feed, chunk, steps)
        times |= device_times
    with Model(bundle, _UnownedBackend(backend), chunk.ms) as model:
        times["push"] = push_times(model, feed, chunk, warm_up, repeats)
    device_type = "cuda" if isinstance(backend, GpuBackend) else "cpu"
    work = encoder_work(bundle, chunk, precision, device_type)
    values = {
        "bytes_per_stream": getattr(backend, "bytes_per_stream", None),
        "launches": launches,
        "roofline_ms": work.roofline_ms(machine, precision, batch),
        "other_work_cores": round(other_work.cores(), 3),
    }
    return records.row(case, times, values)


def _step_times(
    backend: Backend,
    feed: AudioFeed,
    chunk: ChunkConfig,
    warm_up: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], float]:
    """Return the milliseconds of `repeats` steps and their parts after `warm_up` steps, and the mean calls per step."""
    times: dict[str, list[float]] = {"step": [], **{part: [] for part in PARTS}}
    calls = []
    with _timed_stages(backend, chunk, clock) as stages:
        for step in range(warm_up + repeats):
            inputs = feed.batch(chunk, step * chunk.frames)
            stages.clear()
            start = clock()
            backend.submit(inputs).result()
            elapsed = clock() - start
            if step < warm_up:
                continue
            times["step"].append(1000 * elapsed)
            for part, seconds in _parts(stages, elapsed).items():
                times[part].append(1000 * seconds)
            calls.append(stages.get("calls", 0))
    return times, statistics.mean(calls)


def push_times(
    model: Model,
    feed: AudioFeed,
    chunk: ChunkConfig,
    warm_up: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the milliseconds from push to result of each stream for `repeats` chunks after `warm_up` chunks."""
    lead, rate, times = model.manifest.lead, model.manifest.features.sample_rate, []
    streams = [model.open_session(rate, 1, chunk_ms=chunk.ms) for _ in range(feed.rows)]
    for step in range(warm_up + repeats):
        begin, end = (max(edge * chunk.samples - lead, 0) for edge in (step, step + 1))
        pcm = (32767 * feed.audio[:, begin:end]).astype(np.int16)
        start = []
        for stream, samples in zip(streams, pcm, strict=True):
            start.append(clock())
            stream.feed(samples)
        for stream, began in zip(streams, start, strict=True):
            stream.wait()
            stream.collect()
            if step >= warm_up:
                times.append(1000 * (clock() - began))
    for stream in streams:
        stream.close()
    return times


class _UnownedBackend:
    """A backend that stays open when the model that uses it is closed."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def close(self) -> None: ...


# -- breakdown of a step -----------------------------------------------------------------------------------------------


@contextmanager
def _timed_stages(
    backend: Backend, chunk: ChunkConfig, clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, float]]:
    """Yield the seconds per stage of the steps in the `with` block and their number of "calls"; empty on a GPU."""
    stages: dict[str, float] = {}
    if not isinstance(backend, OrtBackend):
        yield stages
        return

    def wrap(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        part = "decode" if name in ("decoder", "joint") else name

        def timed(*arguments: Any, **options: Any) -> Any:
            start = clock()
            try:
                return stage(*arguments, **options)
            finally:
                stages[part] = stages.get(part, 0.0) + clock() - start
                if part != "encode":
                    stages["calls"] = stages.get("calls", 0) + 1

        return timed

    with backend.wrapped_stages(chunk, wrap):
        yield stages


def _parts(stages: dict[str, float], elapsed: float) -> dict[str, float]:
    """Return the seconds of each part of a step that took `elapsed` seconds."""
    if "encode" not in stages:
        return {}
    features, encoder, decode = (stages.get(part, 0.0) for part in PARTS[:3])
    copies = stages["encode"] - features - encoder
    return dict(zip(PARTS, (features, encoder, decode, copies, elapsed - stages["encode"] - decode), strict=True))


def _device_times(
    backend: GpuBackend, feed: AudioFeed, chunk: ChunkConfig, steps: range
) -> tuple[dict[str, list[float]], float]:
    """Return the milliseconds between events on the device, of whole steps and of their stages; and the launches."""
    times: dict[str, list[float]] = {name: [] for name in ("device", *PARTS[:4])}
    device, pending, launches = backend.device, list[Any](), 0.0
    for step in steps:
        inputs = feed.batch(chunk, step * chunk.frames)
        whole = device.elapsed_ms([functools.partial(_submit, backend, inputs, pending)])
        submitted = pending.pop()
        submitted.result()
        stages = backend.stages(inputs)  # of the same chunk again, without decoding
        features, gather, encoder, scatter = (
            device.elapsed_ms(stages[name] for name in names)
            for names in (("begin", "features"), ("gather",), ("encoder",), ("scatter",))
        )
        stages["finish"]()
        device.record_event().wait()
        decode = max(whole - features - gather - encoder - scatter, 0.0)
        for name, milliseconds in zip(times, (whole, features, encoder, decode, gather + scatter), strict=True):
            times[name].append(milliseconds)
        launches = submitted.launches
    return times, launches


def _submit(backend: GpuBackend, inputs: Batch, pending: list[Any]) -> None:
    pending.append(backend.submit(inputs))


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    method, rows = result["method"], result["rows"]
    figures = ("avg", "min", "p50", "p90", "p95", "p99")
    case = ["chunk", "batch", "precision", "backend"]
    lines = []
    for row in rows:
        bound = row["values"]["roofline_ms"]
        for time_name in ("step", "device", "push"):
            if found := row["figures"].get(time_name):
                line = [*_case(row), time_name, *(tables.digits(found[name]) for name in figures)]
                roofline, share = "", ""
                if time_name == _roofline_time(row):
                    roofline = f"{tables.digits(bound['roofline'])}, {bound['bound_by']}"
                    share = tables.percent(bound["roofline"] / found["p50"], 0)
                lines.append([*line, roofline, share])
    text = [
        f"Times in milliseconds; {method['threads']} CPU threads; {method['repeats']} steps per case after "
        f"{method['warm_up']} warm-up steps with full caches. *step*: PCM to tokens; *push*: from pushing the last "
        "samples of a chunk to its text.",
        "",
        tables.markdown([*case, "time", *figures, "roofline, ms", "roofline ÷ p50"], lines),
        "",
        "Breakdown of a step, median milliseconds:",
        "",
    ]
    split = [row for row in rows if row["figures"].get("encoder")]
    lines = [
        [
            *_case(row),
            *(tables.digits(row["figures"][part]["p50"]) if part in row["figures"] else "" for part in PARTS),
            tables.digits(row["values"]["launches"]),
        ]
        for row in split
    ]
    text += [tables.markdown([*case, *PARTS, "launches"], lines), ""]
    text.append(tables.other_load(row["values"]["other_work_cores"] for row in rows))
    text += [f"Measured rates, {name}: {tables.rates(rates)}." for name, rates in method["machine"].items()]
    size = rows[0]["values"].get("bytes_per_stream") if rows else None
    text += [f"State per stream: {size / 1e6:.2f} MB."] if size else []
    return "\n".join(text) + "\n"


def _case(row: Row) -> list[Any]:
    case = row["case"]
    return [f"{case['chunk_ms']} ms", case["batch"], case["precision"], case["backend"]]


def _roofline_time(row: Row) -> str:
    """Return the name of the time to compare with the roofline."""
    return "device" if "device" in row["figures"] else "step"


def charts(result: Record) -> dict[str, Chart]:
    """Return the plots of the parts of a step, and of the times relative to the roofline."""
    rows = result["rows"]
    split = [row for row in rows if row["figures"].get("encoder")]
    drawn: dict[str, Chart] = {"roofline": _roofline_chart(rows)} if rows else {}
    return {"breakdown": _breakdown_chart(split), **drawn} if split else drawn


def _breakdown_chart(rows: Sequence[Row]) -> BarChart:
    shares = [row["figures"]["encoder"]["p50"] / _whole(row)["p50"] for row in rows]

    def bar(row: Row) -> Bar:
        parts = [row["figures"].get(part, {"p50": 0.0})["p50"] for part in PARTS]
        return Bar(parts, f"{tables.digits(_whole(row)['p50'])} ms")

    share = tables.low_to_high(100 * min(shares), 100 * max(shares), "{:.0f}")
    title = f"The encoder takes {share} % of the time of a step"
    subtitle = "Medians of the parts of a step, in ms, by chunk size and streams per step."
    return BarChart(title, subtitle, *_panels(rows, "ms", bar), parts=PARTS)


def _roofline_chart(rows: Sequence[Row]) -> BarChart:
    def ratio(row: Row, ms: float) -> float:
        return float(ms / row["values"]["roofline_ms"]["roofline"])

    def bar(row: Row) -> Bar:
        median = ratio(row, _whole(row)["p50"])
        low, high = quartiles(row["ms"][_roofline_time(row)])
        return Bar([median], f"{median:.1f}", (ratio(row, low), ratio(row, high)))

    ratios = [ratio(row, _whole(row)["p50"]) for row in rows]
    title = f"A step takes {tables.low_to_high(min(ratios), max(ratios))} times as long as the roofline of its encoder"
    subtitle = (
        "Median time of a step ÷ the time that memory bandwidth and arithmetic of this machine allow for the encoder, "
        "by chunk size and streams per step. Dashed: the roofline; whiskers: 25th to 75th percentile."
    )
    return BarChart(title, subtitle, *_panels(rows, "time of a step ÷ roofline", bar), reference=1.0)


def _whole(row: Row) -> dict[str, float]:
    """Return the figures of the time that the roofline is compared with."""
    return dict(row["figures"][_roofline_time(row)])


def _panels(rows: Sequence[Row], unit: str, bar: Callable[[Row], Bar]) -> tuple[list[str], list[BarPanel]]:
    """Return the rows of a chart, by chunk size and batch, and a panel for each precision and backend."""
    backends = {row["case"]["backend"] for row in rows}
    found: dict[str, dict[str, Bar]] = {}
    for row in rows:
        case = row["case"]
        setup = case["precision"] + (f", {case['backend']}" if len(backends) > 1 else "")
        name = f"{case['chunk_ms']} ms, {tables.counted(case['batch'], 'stream')}"
        found.setdefault(setup, {})[name] = bar(row)
    names = list(dict.fromkeys(name for bars in found.values() for name in bars))
    return names, [BarPanel(setup, unit, [bars.get(name) for name in names]) for setup, bars in found.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("latency", __doc__)
    command.add_engine_options(parser, several_devices=True)
    command.add_chunk_option(parser)
    parser.add_argument(
        "--precision", nargs="+", default=["fp32"], help="precisions of the engines; missing engines are built"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="streams per step")
    parser.add_argument("--repeats", type=int, default=50, help="timed steps per case")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = command.open_bundle(options.bundle)
        return measure_latency(
            bundle,
            options.precision,
            options.batch,
            options.chunk_ms,
            options.repeats,
            **command.engine_arguments(options),
        )

    command.run(measure, options)


if __name__ == "__main__":
    main()
