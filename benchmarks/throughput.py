"""Seconds of recorded audio transcribed per second.

    nemostream bench throughput --bundle BUNDLE --manifest recordings.jsonl --batch 1 8 32

RTFx as defined by the Open ASR leaderboard: total audio duration divided by the total time for all recordings of the
set, with the model loaded and warmed up by one recording. `batch` recordings are transcribed concurrently and share
steps. The time includes reading and resampling files. The whole set is transcribed `--repeats` times; the median is
used. Without `--manifest`, the set consists of `--copies` copies of the packaged clips.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemostream.benchmarks import command
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import read_manifest
from nemostream.benchmarks.harness.plots import Bar, BarChart, BarPanel, Chart
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress
from nemostream.benchmarks.harness.timed import timed_backend
from nemostream.bundle import Bundle
from nemostream.engines import speech
from nemostream.errors import OptionError
from nemostream.runtime.model import Model


def measure_throughput(
    bundle: Bundle,
    sources: Sequence[Any],
    precisions: Sequence[str] = ("fp32",),
    batches: Sequence[int] = (1, 8),
    chunk_ms: Sequence[int] | None = None,
    repeats: int = 3,
    *,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Measure RTFx and return the result; `sources` are inputs for `Model.transcribe`.

    Raises `OptionError` for invalid options, and `BackendError` if a device or engine is missing.
    """
    if not sources or min(batches, default=0) < 1 or repeats < 1:
        raise OptionError("at least one recording is needed, and batch sizes and repeats must be at least 1.")
    if max(batches) > len(sources):
        raise OptionError(f"batch {max(batches)} needs at least as many recordings; there are {len(sources)}.")
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    others, rows = OtherWork(), []
    for precision in precisions:
        for chunk in chunks:
            with (
                timed_backend(
                    bundle, [chunk], precision, 2 * max(batches), device=device, threads=threads, engines=engines
                ) as backend,
                Model(bundle, backend, chunk.ms) as model,
            ):
                model.transcribe(sources[0])
                for batch in batches:
                    progress(f"{precision}, {chunk.ms} ms, {batch} concurrent recordings")
                    audio, times = time_set(model, sources, batch, repeats)
                    case = {"chunk_ms": chunk.ms, "batch": batch, "precision": precision}
                    values = {"audio_seconds": audio, "rtfx": records.rtfx(audio, statistics.median(times))}
                    rows.append(records.row(case, {"whole set": [1000 * seconds for seconds in times]}, values))
    return records.record(
        "throughput",
        rows,
        model=records.model_of(bundle.manifest),
        method={
            "recordings": len(sources),
            "repeats": repeats,
            "threads": threads or records.cores(),
            "device": device,
            "other_work_cores": round(others.cores(), 3),
        },
    )


def time_set(
    model: Model, sources: Sequence[Any], batch: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, list[float]]:
    """Transcribe all sources `repeats` times, `batch` concurrently. Return the audio seconds, and those of each run."""
    times = []
    with ThreadPoolExecutor(batch) as pool:
        for _ in range(repeats):
            start = clock()
            audio = sum(result.duration for result in pool.map(model.transcribe, sources))
            times.append(clock() - start)
    return audio, times


def show(result: Record) -> str:
    """Return the table of a result as Markdown."""
    rows, method = result["rows"], result["method"]
    lines = [
        [
            f"{row['case']['chunk_ms']} ms",
            row["case"]["batch"],
            row["case"]["precision"],
            tables.digits(row["values"]["audio_seconds"]),
            tables.spread([ms / 1000 for ms in row["ms"]["whole set"]]),
            tables.digits(row["values"]["rtfx"]),
        ]
        for row in rows
    ]
    head = ["chunk", "concurrent recordings", "precision", "audio, s", "time, s", "RTFx"]
    return (
        f"{method['recordings']} recordings; {method['device']}, {method['threads']} threads. Time for the whole set, "
        f"{method['repeats']} runs: median [minimum–maximum]. {tables.other_load([method['other_work_cores']])}\n\n"
        f"{tables.markdown(head, lines)}\n"
    )


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the seconds of audio per second."""
    rows = result["rows"]
    found = {(_setup(row), row["case"]["batch"]): row for row in rows}
    names = list(dict.fromkeys(_setup(row) for row in rows))
    panels = []
    for batch in sorted({row["case"]["batch"] for row in rows}):
        bars = [_bar(found[name, batch]) if (name, batch) in found else None for name in names]
        panels.append(BarPanel(tables.counted(batch, "recording") + " at a time", "seconds of audio per second", bars))
    best = max(rows, key=lambda row: row["values"]["rtfx"])
    title = (
        f"Up to {tables.digits(best['values']['rtfx'])} seconds of audio per second: "
        f"{best['case']['chunk_ms']} ms chunks, {best['case']['precision']}, "
        f"{tables.counted(best['case']['batch'], 'recording')} at a time"
    )
    subtitle = (
        f"Seconds of audio transcribed per second (RTFx) by chunk size, precision and concurrent recordings. Median of "
        f"{result['method']['repeats']} runs; whiskers: slowest and fastest run."
    )
    return {"rtfx": BarChart(title, subtitle, names, panels)}


def _setup(row: Row) -> str:
    return f"{row['case']['chunk_ms']} ms, {row['case']['precision']}"


def _bar(row: Row) -> Bar:
    audio, rate, times = row["values"]["audio_seconds"], row["values"]["rtfx"], row["ms"]["whole set"]
    low, high = (records.rtfx(audio, ms / 1000) for ms in (max(times), min(times)))
    return Bar([rate], tables.digits(rate), (low, high))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("throughput", __doc__)
    command.add_engine_options(parser)
    command.add_chunk_option(parser)
    parser.add_argument("--manifest", type=Path, help="NeMo manifest (default: the packaged clips)")
    parser.add_argument("--copies", type=int, default=32, help="copies of the packaged clips")
    parser.add_argument("--repeats", type=int, default=3, help="runs over the whole set")
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="precisions of the engines")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="concurrent recordings")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = command.open_bundle(options.bundle)
        if options.manifest:
            sources: list[Any] = [
                each.source(bundle.manifest.features.sample_rate) for each in read_manifest(options.manifest)
            ]
        else:
            sources = speech(bundle.manifest) * options.copies
        return measure_throughput(
            bundle,
            sources,
            options.precision,
            options.batch,
            options.chunk_ms,
            options.repeats,
            **command.engine_arguments(options),
        )

    command.run(measure, options)


if __name__ == "__main__":
    main()
