"""Cost of the accurate lane: compute of streams with `final_chunk_ms`, relative to the same streams without it.

    nemostream bench lanes --bundle FULL --random-weights --batch 1 8 64
    nemostream bench lanes --batch 1 8 64 --capacity

**In theory**, per second and stream: steps of both lanes, and one of the accurate lane for each end of utterance (the
branch). *Products* are the operations of the matrix products of the encoder (`harness.roofline`): the accurate lane
processes every frame again, so they about double. *Steps* are the calls of the model, each of which reads all weights,
if streams of both kinds have the same batch size.

**Measured**: `batch` streams receive audio in blocks of one chunk of the fast lane, all at the same time, as fast as
they process it. The time of a block ends when the events of all streams have been read. Utterances end at the first
word after 5 s, and the streams start at equal distances over 5 s, so that the accurate lanes and the ends are as spread
as those of independent streams. Blocks are measured once all streams have started, for at least 36 seconds of audio of
all streams together. *CPU* is the time of all threads of the process, which other processes change less than the time
of a block. *Rows* is the mean number of streams in a step of the accurate lane or a branch.

With `--capacity`, the largest number of real-time streams with and without the accurate lane (method: `bench
capacity`), both with utterances that end by the default rule.

A model with random weights emits tokens all the time or never: with `--random-weights`, blanks are drawn at random
(`studies.features`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemostream.benchmarks import command
from nemostream.benchmarks.capacity import evaluate, find_streams
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.load import StepRecorder, run_load
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress
from nemostream.benchmarks.harness.roofline import encoder_work
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import AudioFeed, blocked, timed_backend
from nemostream.benchmarks.studies.features import RandomBlankTransducer
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engines import speech as clips
from nemostream.errors import OptionError
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.session import Options
from nemostream.runtime.text.endpointing import Endpoint

UTTERANCE_MS = 5000
_STREAM_SECONDS, _MIN_SECONDS = 36.0, 4.48  # of all streams together, and of each
_SLOTS = 3  # of a stream: two lanes, and a branch


def measure_lanes(
    bundle: Bundle,
    precision: str = "fp32",
    batches: Sequence[int] = (1, 8, 64),
    chunk_ms: int = 80,
    final_chunk_ms: int = 1120,
    *,
    capacity: bool = False,
    seconds: float = 60.0,
    probe_seconds: float = 8.0,
    max_streams: int = 512,
    random_weights: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Measure the cost and, with `capacity`, the numbers of streams, and return the result.

    Raises `OptionError` for invalid options, and `BackendError` if a device or engine is missing.
    """
    if min(batches, default=0) < 1 or seconds <= 0 or probe_seconds <= 0 or max_streams < 1:
        raise OptionError("batch sizes, seconds and numbers of streams must be positive.")
    if chunk_ms >= final_chunk_ms:
        raise OptionError(f"final_chunk_ms is {final_chunk_ms}; it must be larger than chunk_ms, {chunk_ms}.")
    if random_weights and device != "cpu":
        raise OptionError(f"random_weights needs the device cpu, not {device}.")
    fast, accurate = chunks = [bundle.manifest.chunk(ms) for ms in (chunk_ms, final_chunk_ms)]
    others, rows = OtherWork(), list[Row]()
    options: Any = {"device": device, "threads": threads, "engines": engines}
    for batch in batches:
        with timed_backend(bundle, chunks, precision, _SLOTS * batch, max_batch=batch, **options) as backend:
            if random_weights:
                assert isinstance(backend, OrtBackend)
                frames_per_second = bundle.manifest.features.sample_rate / bundle.manifest.samples_per_frame
                backend.transducer = RandomBlankTransducer(backend.transducer, frames_per_second)  # type: ignore[assignment]
            recorder = StepRecorder(backend)
            with Model(bundle, recorder, chunk_ms) as model:
                for final_chunk in (None, accurate):
                    mode = _mode(fast, final_chunk)
                    progress(f"{mode} ms, batch {batch}")
                    times, values = _run(model, recorder, batch, fast, final_chunk)
                    case = {"measurement": "cost", "mode": mode, "batch": batch, "precision": precision}
                    rows.append(records.row(case, {"block": times}, values))
    if capacity:
        for final_chunk in (None, accurate):
            rows += _capacity(
                bundle, fast, final_chunk, precision, (seconds, probe_seconds, max_streams), options, progress
            )
    works = [encoder_work(bundle, chunk, precision, device.partition(":")[0]) for chunk in chunks]
    return records.record(
        "lanes",
        rows,
        model=records.model_of(bundle.manifest),
        method={
            "chunk_ms": chunk_ms,
            "final_chunk_ms": final_chunk_ms,
            "flops": [work.flops_per_row for work in works],
            "utterance_ms": UTTERANCE_MS,
            "seconds": seconds,
            "probe_seconds": probe_seconds,
            "random_weights": random_weights,
            "device": device,
            "threads": threads or records.cores(),
            "other_work_cores": round(others.cores(), 3),
        },
    )


def _mode(fast: ChunkConfig, accurate: ChunkConfig | None) -> str:
    return f"{fast.ms}+{accurate.ms}" if accurate else str(fast.ms)


def _run(
    model: Model,
    recorder: StepRecorder,
    batch: int,
    fast: ChunkConfig,
    accurate: ChunkConfig | None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], dict[str, Any]]:
    """Return the milliseconds of each measured block, and what was done in all of them."""
    spread = math.ceil(UTTERANCE_MS / fast.ms)  # blocks until all streams have started
    measured = math.ceil(1000 * max(_MIN_SECONDS, _STREAM_SECONDS / batch) / fast.ms)
    manifest = model.manifest
    feed = AudioFeed(manifest, speech(), batch, (spread + measured) * fast.frames)
    begins = [row * spread // batch for row in range(batch)]
    options: Options = {
        "chunk_ms": fast.ms,
        "final_chunk_ms": accurate.ms if accurate else None,
        "endpoint": Endpoint(silence_ms=None, max_utterance_ms=UTTERANCE_MS),
    }
    rate, times, ends, cpu = manifest.features.sample_rate, list[float](), 0, 0.0
    streams = [model.open_session(rate, 1, **options) for _ in range(batch)]
    for block in range(spread + measured):
        if block == spread:
            recorder.steps.clear()
            cpu = time.process_time()
        active = [row for row in range(batch) if begins[row] <= block]
        with blocked(model._scheduler) as resume:  # so that one step processes all streams
            for row in active:
                begin, end = (max((block - begins[row] + n) * fast.samples - manifest.lead, 0) for n in (0, 1))
                streams[row].feed(feed.audio[row, begin:end])
            start = clock()
            resume.set()
            found = []
            for row in active:
                streams[row].wait()
                found += streams[row].events()
            if block >= spread:
                times.append(round(1000 * (clock() - start), 1))
                ends += sum(event.kind == "end" for event in found)
    cpu = time.process_time() - cpu
    for stream in streams:
        stream.close()
    seconds = batch * measured * fast.ms / 1000
    values = {"audio_seconds": seconds, "cpu_seconds": round(cpu, 3), "ends": ends, "steps": _steps(recorder)}
    return times, values


def _steps(recorder: StepRecorder) -> dict[str, dict[str, float]]:
    """Return number, total rows and total milliseconds of the steps by chunk size."""
    count, rows, elapsed = Counter[int](), Counter[int](), Counter[int]()
    for ms, size, duration in recorder.steps:
        count[ms] += 1
        rows[ms] += size
        elapsed[ms] += duration  # type: ignore[assignment]
    return {str(ms): {"steps": count[ms], "rows": rows[ms], "ms": round(float(elapsed[ms]), 2)} for ms in sorted(count)}


def _capacity(
    bundle: Bundle,
    fast: ChunkConfig,
    accurate: ChunkConfig | None,
    precision: str,
    limits: tuple[float, float, int],
    options: Any,
    progress: Progress,
) -> list[Row]:
    """Return a row for each number of streams that was tried, without the times of single steps."""
    seconds, probe_seconds, max_streams = limits
    chunks, mode, rows = [fast, *([accurate] if accurate else [])], _mode(fast, accurate), list[Row]()
    recordings = clips(bundle.manifest)
    stream_options: Options = {"final_chunk_ms": accurate.ms if accurate else None, "endpoint": Endpoint()}
    with timed_backend(bundle, chunks, precision, 2 * _SLOTS * max_streams, max_batch=64, **options) as backend:
        recorder = StepRecorder(backend)
        with Model(bundle, recorder, fast.ms) as model:

            def probe(streams: int, seconds: float, confirming: bool) -> Row:
                progress(f"{mode} ms, {streams} streams for {seconds:.0f} s")
                recorder.steps.clear()
                load = run_load(
                    model,
                    recordings,
                    streams,
                    [fast.ms],
                    seconds=seconds,
                    seed=streams + len(rows),
                    options=stream_options,
                )
                row = evaluate(load, recorder.steps, {})
                case = {"measurement": "capacity", "mode": mode, "streams": streams, "confirming": confirming}
                result = row["figures"].get(f"result {fast.ms} ms", {})
                values = {name: row["values"][name] for name in ("passed", "failures")}
                values |= {name: round(result[name], 2) for name in ("p50", "p99") if name in result}
                rows.append(records.row(case | {"precision": precision}, {}, values | {"steps": _steps(recorder)}))
                return rows[-1]

            find_streams(probe, seconds, probe_seconds, max_streams)
    return rows


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    rows = [row for row in result["rows"] if row["case"]["measurement"] == "cost"]
    tried = [row for row in result["rows"] if row["case"]["measurement"] == "capacity"]
    method, text = result["method"], [*_theory(result, rows), "", "Measured:", "", _cost_table(result, rows)]
    if tried:
        text += ["", "Real-time streams:", "", _capacity_table(tried)]
    text += ["", f"{method['device']}, {method['threads']} threads. {tables.other_load([method['other_work_cores']])}"]
    return "\n".join(text) + "\n"


def _theory(result: Record, rows: Sequence[Row]) -> list[str]:
    method = result["method"]
    per_second = [1000 / method[name] for name in ("chunk_ms", "final_chunk_ms")]
    fast, accurate = method["flops"]
    two = [row["values"] for row in rows if "+" in row["case"]["mode"]]
    ends = sum(values["ends"] for values in two) / sum(values["audio_seconds"] for values in two)
    products = [per_second[0] * fast, per_second[1] * accurate, ends * accurate]
    steps = [*per_second, ends]
    lines = [
        [name, *(tables.digits(part) for part in parts), f"+{100 * sum(parts[1:]) / parts[0]:.0f} %"]
        for name, parts in (("steps", steps), ("products, GFLOP", [part / 1e9 for part in products]))
    ]
    head = ["per second and stream", f"{method['chunk_ms']} ms lane", f"{method['final_chunk_ms']} ms lane"]
    title = f"In theory, with an end of utterance every {1 / ends:.1f} s:" if ends else "In theory, without ends:"
    return [title, "", tables.markdown([*head, "branches", "extra"], lines)]


def _cost_table(result: Record, rows: Sequence[Row]) -> str:
    lines = []
    final = str(result["method"]["final_chunk_ms"])
    cost: dict[tuple[int, str], tuple[float, float]] = {}  # ms per second of audio and stream: elapsed, CPU
    for row in rows:
        case, values = row["case"], row["values"]
        fast, two, _ = case["mode"].partition("+")
        elapsed = sum(row["ms"]["block"]) / values["audio_seconds"]
        cpu = 1000 * values.get("cpu_seconds", 0.0) / values["audio_seconds"]
        cost[case["batch"], case["mode"]] = elapsed, cpu
        line = [case["batch"], case["mode"].replace("+", " + ") + " ms", case["precision"]]
        rows_per_step = ""
        for time_of_mode, reference in zip((elapsed, cpu), cost[case["batch"], fast], strict=True):
            extra = f"{100 * (time_of_mode / reference - 1):+.0f} %" if two and reference else ""
            line += [tables.digits(time_of_mode) if time_of_mode else "", extra]
        if two:
            step = values["steps"][final]
            rows_per_step = f"{step['rows'] / step['steps']:.1f}"
        figures = [tables.digits(statistics.median(row["ms"]["block"])), tables.digits(row["figures"]["block"]["p99"])]
        lines.append([*line, *figures, rows_per_step])
    head = ["streams", "chunks", "precision", "ms per second of a stream", "extra", "CPU ms", "extra", "block, p50"]
    return tables.markdown([*head, "p99", f"rows of a {final} ms step"], lines)


def _capacity_table(rows: Sequence[Row]) -> str:
    lines = []
    for mode in dict.fromkeys(row["case"]["mode"] for row in rows):
        found = [row for row in rows if row["case"]["mode"] == mode]
        passed = [row for row in found if row["case"]["confirming"] and row["values"]["passed"]]
        line = [mode.replace("+", " + ") + " ms"]
        if not passed:
            lines.append([*line, 0, "", "", ""])
            continue
        streams, values = passed[-1]["case"]["streams"], passed[-1]["values"]
        failed = [row for row in found if row["case"]["streams"] > streams and not row["values"]["passed"]]
        limit = min(failed, key=lambda row: row["case"]["streams"], default=None)
        reason = f"{limit['case']['streams']}: {limit['values']['failures'][0]}" if limit else ""
        lines.append([*line, streams, *(tables.digits(values[name]) for name in ("p50", "p99")), reason])
    return tables.markdown(["chunks", "streams", "partial, ms, p50", "p99", "smallest number that failed"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("lanes", __doc__)
    command.add_engine_options(parser)
    parser.add_argument("--precision", default="fp32", help="precision of the engine")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="numbers of streams")
    parser.add_argument("--chunk-ms", type=int, default=80, help="chunk size of partials in ms")
    parser.add_argument("--final-chunk-ms", type=int, default=1120, help="chunk size of finals in ms")
    parser.add_argument("--random-weights", action="store_true", help="the bundle has random weights")
    parser.add_argument("--capacity", action="store_true", help="also search the number of real-time streams")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the confirmation, in seconds")
    parser.add_argument("--probe-seconds", type=float, default=8.0, help="duration of a probe, in seconds")
    parser.add_argument("--max-streams", type=int, default=512, help="largest number of streams to try")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        return measure_lanes(
            command.open_bundle(options.bundle),
            options.precision,
            options.batch,
            options.chunk_ms,
            options.final_chunk_ms,
            capacity=options.capacity,
            seconds=options.seconds,
            probe_seconds=options.probe_seconds,
            max_streams=options.max_streams,
            random_weights=options.random_weights,
            **command.engine_arguments(options),
        )

    command.run(measure, options)


if __name__ == "__main__":
    main()
