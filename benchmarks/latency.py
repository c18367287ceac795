"""How long a step takes, and how long after its last sample a chunk's tokens are there.

    nemostream bench latency --bundle BUNDLE --precision fp32 int8 --batch 1 4 16
    nemostream bench latency --bundle BUNDLE --precision fp32 fp16 --device cpu cuda cuda:onnxruntime

Every chunk size, batch, precision and backend (`timed`: what `--device` means), in the steady state (caches full) and
after warm-up. Two times:

* **step**: `Backend.submit` until its result, PCM to tokens, as the scheduler calls it. On a GPU also **device**, the
  time between two events on the device, of the same launches.
* **push**: the last samples of a chunk handed to each of `batch` live streams at once, until each has its new result:
  conversion, scheduler, step and text included. Streams pushed a moment apart may share a step or miss it; that is what
  their owners see.

Where the time goes: features, encoder and decode are the calls into ONNX Runtime (or the stages of the step on a GPU,
run one by one), copies is what else the encoder's half does (gathering and scattering caches), host the rest of the
step. `launches` counts the calls, or what a GPU is asked to start, on average of the steps. The floor is the encoder's
(`floor`), and beside it the share of it that the median step reached.
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

import nemostream
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import OtherWork, Record, Row, Say
from nemostream.benchmarks.harness.roofline import Machine, encoder_work, measure_for
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import CAN, Feed, timed_backend
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import Backend, Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.session import StreamSession

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
    say: Say = lambda message: None,
) -> Record:
    """The result. Of several devices each runs the precisions that it has.

    Raises `OptionError` for what cannot be, `BackendError` if a device is not there or its engine cannot be built.
    """
    if repeats < 1 or min(batches, default=0) < 1:
        raise OptionError("repeats and batch sizes must be at least 1.")
    threads = threads or records.cores()
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    rows: list[Row] = []
    machines: dict[str, Machine] = {}
    for device in devices:
        kind = device.partition(":")[0]
        for precision in precisions:
            if len(devices) > 1 and precision not in CAN.get(device, (precision,)):
                continue
            for chunk in chunks:
                with timed_backend(
                    bundle, [chunk], precision, max(batches), device=device, threads=threads, engines=engines
                ) as backend:
                    if kind not in machines:
                        machines[kind] = machine or measure_for(backend, threads)
                    for batch in batches:
                        say(f"{device}, {precision}, {chunk.ms} ms, batch {batch}")
                        case = {"chunk_ms": chunk.ms, "batch": batch, "precision": precision, "backend": device}
                        rows.append(_measure(bundle, backend, chunk, case, repeats, machines[kind]))
                gc.collect()
    manifest = bundle.manifest
    return records.record(
        "latency",
        rows,
        model={"name": manifest.name, "layers": manifest.encoder.layers, "d_model": manifest.encoder.d_model},
        method={
            "repeats": repeats,
            "warm_up": _WARM_UP,
            "threads": threads,
            "device": " ".join(devices),
            "machine": {kind: dict(machine.rates) for kind, machine in machines.items()},
        },
    )


def _measure(
    bundle: Bundle, backend: Backend, chunk: ChunkConfig, case: dict[str, Any], repeats: int, machine: Machine
) -> Row:
    batch, precision = case["batch"], case["precision"]
    filled = -(-chunk.left // chunk.frames)
    feed = Feed(bundle.manifest, speech(), batch, (filled + 2 * (_WARM_UP + repeats)) * chunk.frames)
    backend.reset(np.arange(batch))
    others, step = OtherWork(), 0
    times: dict[str, list[float]] = {"step": [], **{part: [] for part in PARTS}}
    values: dict[str, Any] = {"bytes_per_stream": getattr(backend, "bytes_per_stream", None)}
    calls = []
    with _clock(backend, chunk) as clock:
        for step in range(filled + _WARM_UP + repeats):
            inputs = feed.batch(chunk, step * chunk.frames)
            clock.clear()
            start = time.perf_counter()
            backend.submit(inputs).result()
            whole = time.perf_counter() - start
            if step < filled + _WARM_UP:
                continue
            times["step"].append(1000 * whole)
            for part, seconds in _parts(clock, whole).items():
                times[part].append(1000 * seconds)
            calls.append(clock.get("calls", 0))
    values["launches"] = statistics.mean(calls)
    if isinstance(backend, GpuBackend):
        times |= _on_the_device(backend, feed, chunk, range(step + 1, step + 1 + repeats), values)
    with Model(bundle, _Borrowed(backend), chunk.ms) as model:
        times["push"] = push_times(model, feed, chunk, filled + _WARM_UP, repeats)
    where = "cuda" if isinstance(backend, GpuBackend) else "cpu"
    values["floor_ms"] = encoder_work(bundle, chunk, precision, where).floor_ms(machine, precision, batch)
    values["other_work_cores"] = round(others.cores(), 3)
    return records.row(case, times, values)


def push_times(model: Model, feed: Feed, chunk: ChunkConfig, before: int, repeats: int) -> list[float]:
    """Milliseconds of every stream and chunk from push to result, of `repeats` chunks after as many as `before`."""
    lead, rate, found = model.manifest.lead, model.manifest.features.sample_rate, []
    streams = [StreamSession(model, rate, 1, chunk_ms=chunk.ms) for _ in range(feed.rows)]
    for step in range(before + repeats):
        begin, end = (max(edge * chunk.samples - lead, 0) for edge in (step, step + 1))
        pcm = (32767 * feed.audio[:, begin:end]).astype(np.int16)
        start = []
        for stream, samples in zip(streams, pcm, strict=True):
            start.append(time.perf_counter())
            stream.feed(samples)
        for stream, began in zip(streams, start, strict=True):
            stream.wait()
            stream.collect()
            if step >= before:
                found.append(1000 * (time.perf_counter() - began))
    for stream in streams:
        stream.close()
    return found


class _Borrowed:
    """A backend that outlives the model it is lent to."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def close(self) -> None: ...


# -- where the time goes -----------------------------------------------------------------------------------------------


@contextmanager
def _clock(backend: Backend, chunk: ChunkConfig) -> Iterator[dict[str, float]]:
    """Seconds per stage of the steps in the `with` block, and the number of "calls", on ONNX Runtime; else empty."""
    clock: dict[str, float] = {}
    if not isinstance(backend, OrtBackend):
        yield clock
        return

    def wrap(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        part = "decode" if name in ("decoder", "joint") else name

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return stage(*arguments, **options)
            finally:
                clock[part] = clock.get(part, 0.0) + time.perf_counter() - start
                if part != "encode":
                    clock["calls"] = clock.get("calls", 0) + 1

        return timed

    with backend.wrapped_stages(chunk, wrap):
        yield clock


def _parts(clock: dict[str, float], whole: float) -> dict[str, float]:
    if "encode" not in clock:
        return {}
    features, encoder, decode = (clock.get(part, 0.0) for part in PARTS[:3])
    copies = clock["encode"] - features - encoder
    return dict(zip(PARTS, (features, encoder, decode, copies, whole - clock["encode"] - decode), strict=True))


def _on_the_device(
    backend: GpuBackend, feed: Feed, chunk: ChunkConfig, steps: range, values: dict[str, Any]
) -> dict[str, list[float]]:
    """Times between events: the whole step as it is launched, and its stages one by one."""
    times: dict[str, list[float]] = {name: [] for name in ("device", *PARTS[:4])}
    device, pending = backend.device, list[Any]()
    for step in steps:
        inputs = feed.batch(chunk, step * chunk.frames)
        whole = device.elapsed_ms([functools.partial(_submit, backend, inputs, pending)])
        submitted = pending.pop()
        submitted.result()
        stages = backend.stages(inputs)  # the same chunk again: stage by stage, not decoded
        features, gather, encoder, scatter = (
            device.elapsed_ms(stages[name] for name in names)
            for names in (("begin", "features"), ("gather",), ("encoder",), ("scatter",))
        )
        stages["finish"]()
        device.record_event().wait()
        decode = max(whole - features - gather - encoder - scatter, 0.0)
        for name, milliseconds in zip(times, (whole, features, encoder, decode, gather + scatter), strict=True):
            times[name].append(milliseconds)
        values["launches"] = submitted.launches
    return times


def _submit(backend: GpuBackend, inputs: Batch, pending: list[Any]) -> None:
    pending.append(backend.submit(inputs))


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Tables and plots of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    method, rows = result["method"], result["rows"]
    figures = ("avg", "min", "p50", "p90", "p95", "p99")
    case = ["chunk", "batch", "precision", "backend"]
    lines = []
    for row in rows:
        floor, whole = row["values"]["floor_ms"], _whole(row)
        for what in ("step", "device", "push"):
            if found := row["figures"].get(what):
                line = [*_case(row), what, *(tables.digits(found[name]) for name in figures)]
                bound = [f"{tables.digits(floor['floor'])}, {floor['binding']}"] if what == whole else [""]
                reached = tables.percent(floor["floor"] / found["p50"], 0) if what == whole else ""
                lines.append([*line, *bound, reached])
    text = [
        f"Milliseconds; {method['threads']} threads of a CPU, {method['repeats']} steps each, after "
        f"{method['warm_up']} to warm up with caches full.",
        "",
        tables.markdown([*case, "what", *figures, "floor", "of the floor"], lines),
        "",
        "Where a step's time goes, medians in milliseconds:",
        "",
    ]
    parted = [row for row in rows if row["figures"].get("encoder")]
    lines = [
        [
            *_case(row),
            *(tables.digits(row["figures"][part]["p50"]) if part in row["figures"] else "" for part in PARTS),
            tables.digits(row["values"]["launches"]),
        ]
        for row in parted
    ]
    text += [tables.markdown([*case, *PARTS, "launches"], lines), ""]
    text.append(tables.busy(row["values"]["other_work_cores"] for row in rows))
    text += [f"Measured, {kind}: {tables.rates(rates)}." for kind, rates in method["machine"].items()]
    size = rows[0]["values"].get("bytes_per_stream") if rows else None
    text += [f"A stream's state is {size / 1e6:.2f} MB."] if size else []
    _draw_parts(parted, plot("breakdown"))
    _draw_floor(rows, plot("floor"))
    return "\n".join(text) + "\n"


def _case(row: Row) -> list[Any]:
    case = row["case"]
    return [f"{case['chunk_ms']} ms", case["batch"], case["precision"], case["backend"]]


def _whole(row: Row) -> str:
    """The time to be compared with the floor."""
    return "device" if "device" in row["figures"] else "step"


def _name(row: Row) -> str:
    return "{chunk_ms} ms × {batch}\n{precision}\n{backend}".format(**row["case"])


def _draw_parts(rows: Sequence[Row], axes: Any) -> None:
    bottom = np.zeros(len(rows))
    for part in PARTS:
        height = np.array([row["figures"].get(part, {"p50": 0.0})["p50"] for row in rows])
        axes.bar(range(len(rows)), height, bottom=bottom, label=part)
        bottom += height
    axes.set_xticks(range(len(rows)), [_name(row) for row in rows], fontsize=6)
    axes.set(ylabel="ms (p50)", title="Where a step's time goes")
    axes.legend(fontsize=7)


def _draw_floor(rows: Sequence[Row], axes: Any) -> None:
    ratios = [row["figures"][_whole(row)]["p50"] / row["values"]["floor_ms"]["floor"] for row in rows]
    axes.bar(range(len(rows)), ratios)
    axes.axhline(1.0, color="black", linewidth=0.7)
    axes.set_xticks(range(len(rows)), [_name(row) for row in rows], fontsize=6)
    axes.set(ylabel="step ÷ floor", title="How near to what the machine allows")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = records.parser("latency", __doc__)
    records.engine_options(parser, several=True)
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="of engines, made when they are not there")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=50, help="steps timed of each")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = Bundle.open(options.bundle or nemostream.demo_bundle())
        return measure_latency(
            bundle,
            options.precision,
            options.batch,
            options.chunk_ms,
            options.repeats,
            devices=options.device,
            threads=options.threads,
            engines=options.engines,
            say=records.say,
        )

    records.run(measure, options)


if __name__ == "__main__":
    main()
