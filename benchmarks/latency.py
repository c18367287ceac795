"""How long a step takes, and how long after its last sample a chunk's tokens are there.

    nemostream bench latency --bundle BUNDLE --precision fp32 int8 --batch 1 4 16

Every chunk size, batch and precision on one backend, in the steady state (caches full) and after warm-up. Two times:

* **step**: `Backend.submit` until its result, PCM to tokens, as the scheduler calls it. On a GPU also **device**, the
  time between two events on the device, of the same launches.
* **push**: the last samples of a chunk handed to each of `batch` live streams at once, until each has its new result:
  conversion, scheduler, step and text included. Streams pushed a moment apart may share a step or miss it; that is what
  their owners see.

Where the time goes: features, encoder and decode are the calls into ONNX Runtime (or the stages of the step on a GPU,
run one by one), copies is what else the encoder's half does (gathering and scattering caches), host the rest of the
step. `launches` counts the calls, or what a GPU is asked to start per step. The floor is the encoder's (`floor`).
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream.benchmarks import record, tables
from nemostream.benchmarks.floor import Machine, encoder_work, measure_machine
from nemostream.benchmarks.gpu_speed import copy_rate, device_ms
from nemostream.benchmarks.record import OtherWork, Record, Row, Say
from nemostream.benchmarks.sides import Feed, timed_backend
from nemostream.benchmarks.synthetic import speech
from nemostream.errors import OptionError
from nemostream.runtime.backend import Backend, Batch
from nemostream.runtime.gpu import GpuBackend
from nemostream.runtime.ort import OrtBackend
from nemostream.runtime.recognition import Recognition
from nemostream.runtime.recognizer import Model
from nemostream.spec import Bundle, Chunk

PARTS = ("features", "encoder", "decode", "copies", "host")
_WARM_UP = 5


def measure_latency(
    bundle: Bundle,
    precisions: Sequence[str] = ("fp32",),
    batches: Sequence[int] = (1, 4),
    chunk_ms: Sequence[int] | None = None,
    repeats: int = 50,
    *,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    machine: Machine | None = None,
    say: Say = lambda message: None,
) -> Record:
    """The result. Raises `OptionError` for what cannot be, `BackendError` if there is no engine."""
    if repeats < 1 or min(batches, default=0) < 1:
        raise OptionError("repeats and batch sizes must be at least 1.")
    threads = threads or record.cores()
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    if machine is None and device == "cpu":
        machine = measure_machine(threads)
    rows = []
    for precision in precisions:
        for chunk in chunks:
            with timed_backend(
                bundle, [chunk], precision, max(batches), device=device, threads=threads, engines=engines
            ) as backend:
                if machine is None and isinstance(backend, GpuBackend):
                    rate = copy_rate(backend._device)
                    machine = Machine(rate, {}, {"copy": rate / 1e9})
                for batch in batches:
                    say(f"{precision}, {chunk.ms} ms, batch {batch}")
                    rows.append(_measure(bundle, backend, chunk, batch, precision, repeats, machine))
            gc.collect()
    manifest = bundle.manifest
    return record.record(
        "latency", rows,
        model={"name": manifest.name, "layers": manifest.encoder.layers, "d_model": manifest.encoder.d_model},
        method={"repeats": repeats, "warm_up": _WARM_UP, "threads": threads, "device": device,
                "machine": dict(machine.rates) if machine else {}},
    )  # fmt: skip


def _measure(
    bundle: Bundle, backend: Backend, chunk: Chunk, batch: int, precision: str, repeats: int, machine: Machine | None
) -> Row:
    filled = -(-chunk.left // chunk.frames)
    feed = Feed(bundle.manifest, speech(), batch, (filled + 2 * (_WARM_UP + repeats)) * chunk.frames)
    backend.reset(np.arange(batch))
    others, step = OtherWork(), 0
    times: dict[str, list[float]] = {"step": [], **{part: [] for part in PARTS}}
    values: dict[str, Any] = {"bytes_per_stream": getattr(backend, "bytes_per_stream", None)}
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
            values["launches"] = clock.get("calls", 0)
    if isinstance(backend, GpuBackend):
        times |= _on_the_device(backend, feed, chunk, range(step + 1, step + 1 + repeats), values)
    times["push"] = _push(bundle, backend, feed, chunk, filled, repeats)
    if machine:
        where = "cuda" if isinstance(backend, GpuBackend) else "cpu"
        work = encoder_work(bundle, chunk, precision, where)
        values["floor_ms"] = work.floor_ms(machine, precision, batch)
    values["other_work_cores"] = round(others.cores(), 3)
    return record.row({"chunk_ms": chunk.ms, "batch": batch, "precision": precision}, times, values)


def _push(bundle: Bundle, backend: Backend, feed: Feed, chunk: Chunk, filled: int, repeats: int) -> list[float]:
    """Milliseconds of every stream and chunk from push to result."""
    model, found = Model(bundle, _Borrowed(backend), chunk.ms), []
    lead, rate = bundle.manifest.lead, bundle.manifest.features.sample_rate
    streams = [Recognition(model, rate, 1, chunk_ms=chunk.ms) for _ in range(feed.rows)]
    try:
        for step in range(filled + _WARM_UP + repeats):
            begin, end = (max(edge * chunk.samples - lead, 0) for edge in (step, step + 1))
            pcm = (32767 * feed.audio[:, begin:end]).astype(np.int16)
            start = []
            for stream, samples in zip(streams, pcm, strict=True):
                start.append(time.perf_counter())
                stream.feed(samples)
            for stream, began in zip(streams, start, strict=True):
                stream.wait()
                stream.collect()
                if step >= filled + _WARM_UP:
                    found.append(1000 * (time.perf_counter() - began))
    finally:
        model.close()
    return found


class _Borrowed:
    """A backend that outlives the model it is lent to."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def close(self) -> None: ...


# -- where the time goes -----------------------------------------------------------------------------------------------


class _Timed:
    """A session whose runs are counted and timed."""

    def __init__(self, session: Any, clock: dict[str, float], part: str) -> None:
        self._session, self._clock, self._part = session, clock, part

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        if name not in ("run", "run_with_iobinding"):
            return found

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return found(*arguments, **options)
            finally:
                self._clock[self._part] = self._clock.get(self._part, 0.0) + time.perf_counter() - start
                self._clock["calls"] = self._clock.get("calls", 0) + 1

        return timed


@contextmanager
def _clock(backend: Backend, chunk: Chunk) -> Iterator[dict[str, float]]:
    """Seconds per part of the steps run meanwhile, on ONNX Runtime; empty for other backends."""
    clock: dict[str, float] = {}
    if not isinstance(backend, OrtBackend):
        yield clock
        return
    step, net, encode = backend._steps[chunk.ms], backend._transducer, backend.encode
    before = step.features, step.encoder, net._decoder, net._joint

    def timed(batch: Batch) -> Any:
        start = time.perf_counter()
        try:
            return encode(batch)
        finally:
            clock["encode"] = clock.get("encode", 0.0) + time.perf_counter() - start

    step.features, step.encoder = (_Timed(each, clock, part) for each, part in zip(before[:2], PARTS[:2], strict=True))
    net._decoder, net._joint = (_Timed(each, clock, "decode") for each in before[2:])
    backend.encode = timed  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        step.features, step.encoder, net._decoder, net._joint = before
        del backend.encode


def _parts(clock: dict[str, float], whole: float) -> dict[str, float]:
    if "encode" not in clock:
        return {}
    features, encoder, decode = (clock.get(part, 0.0) for part in PARTS[:3])
    copies = clock["encode"] - features - encoder
    return dict(zip(PARTS, (features, encoder, decode, copies, whole - clock["encode"] - decode), strict=True))


def _on_the_device(
    backend: GpuBackend, feed: Feed, chunk: Chunk, steps: range, values: dict[str, Any]
) -> dict[str, list[float]]:
    """Times between events: the whole step as it is launched, and its stages one by one."""
    times: dict[str, list[float]] = {name: [] for name in ("device", *PARTS[:4])}
    device, pending = backend._device, list[Any]()
    for step in steps:
        inputs = feed.batch(chunk, step * chunk.frames)
        whole = device_ms(device, [functools.partial(_submit, backend, inputs, pending)])
        pending.pop().result()
        device.adopt()
        recording, _ = backend._prepare(inputs)  # the same chunk again: stage by stage, not decoded
        works = recording.undecoded  # begin, features, gather, the encoder, scatter, finish
        features, gather, encoder, scatter = (
            device_ms(device, piece) for piece in (works[:2], works[2:3], works[3:4], works[4:5])
        )
        works[5]()
        device.mark().wait()
        backend._lane = 1 - backend._lane
        decode = max(whole - features - gather - encoder - scatter, 0.0)
        for name, milliseconds in zip(times, (whole, features, encoder, decode, gather + scatter), strict=True):
            times[name].append(milliseconds)
        values["launches"] = len(recording.stages)
    return times


def _submit(backend: GpuBackend, inputs: Batch, pending: list[Any]) -> None:
    pending.append(backend.submit(inputs))


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Tables and plots of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    method, rows = result["method"], result["rows"]
    head = ["chunk", "batch", "precision", "what", "avg", "p50", "p90", "p95", "p99", "floor", "× floor"]
    lines = []
    for row in rows:
        case, floor = row["case"], row["values"].get("floor_ms")
        for what in ("step", "device", "push"):
            if found := row["figures"].get(what):
                line = [f"{case['chunk_ms']} ms", case["batch"], case["precision"], what]
                line += [tables.digits(found[name]) for name in ("avg", "p50", "p90", "p95", "p99")]
                reached = floor and what == ("device" if "device" in row["figures"] else "step")
                bound = [f"{tables.digits(floor['floor'])}, {floor['binding']}"] if reached else [""]
                lines.append([*line, *bound, f"{found['p50'] / floor['floor']:.2f}" if reached else ""])
    text = [f"Milliseconds, {method['device']}, {method['threads']} threads, {method['repeats']} steps each.", ""]
    text += [tables.markdown(head, lines), "", "Where a step's time goes, medians in milliseconds:", ""]
    parted = [row for row in rows if row["figures"].get("encoder")]
    lines = [
        [f"{row['case']['chunk_ms']} ms", row["case"]["batch"], row["case"]["precision"],
         *(tables.digits(row["figures"][part]["p50"]) if part in row["figures"] else "" for part in PARTS),
         row["values"].get("launches", "")]
        for row in parted
    ]  # fmt: skip
    text.append(tables.markdown(["chunk", "batch", "precision", *PARTS, "launches"], lines))
    busy = max((row["values"]["other_work_cores"] for row in rows), default=0)
    machine = ", ".join(f"{name} {rate:.0f} G/s" for name, rate in method["machine"].items())
    size = rows[0]["values"].get("bytes_per_stream") if rows else None
    text += ["", f"Other work kept at most {busy:.2f} cores busy. Measured: {machine}."]
    text += [f"A stream's state is {size / 1e6:.2f} MB."] if size else []
    _draw_parts(parted, plot("breakdown"))
    _draw_floor(rows, plot("floor"))
    return "\n".join(text) + "\n"


def _name(row: Row) -> str:
    return "{chunk_ms} ms × {batch}\n{precision}".format(**row["case"])


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
    bounded = [row for row in rows if row["values"].get("floor_ms")]
    ratios = [row["figures"]["step"]["p50"] / row["values"]["floor_ms"]["floor"] for row in bounded]
    axes.bar(range(len(bounded)), ratios)
    axes.axhline(1.0, color="black", linewidth=0.7)
    axes.set_xticks(range(len(bounded)), [_name(row) for row in bounded], fontsize=6)
    axes.set(ylabel="step ÷ floor", title="How near to what the machine allows")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser("latency", __doc__)
    record.engine_options(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="of engines; a CPU makes int8 itself")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=50, help="steps timed of each")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = Bundle.open(options.bundle or nemostream.demo_bundle())
        return measure_latency(
            bundle, options.precision, options.batch, options.chunk_ms, options.repeats, device=options.device,
            threads=options.threads, engines=options.engines, say=record.say,
        )  # fmt: skip

    record.run(measure, options)


if __name__ == "__main__":
    main()
