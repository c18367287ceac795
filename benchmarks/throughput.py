"""How much recorded audio is recognised per second.

    nemostream bench throughput --bundle BUNDLE --manifest recordings.jsonl --batch 1 8 32

RTFx as the Open ASR leaderboard defines it: seconds of audio over seconds taken, sums over sums, all recordings of the
set, model loaded and warm (the set's first recording is done once before). `batch` recordings are under way at a time
and share steps. Files are read and resampled within the time. The whole set is done `--repeats` times, and the median
counts. Without `--manifest` the set is the packaged clips, `--copies` times over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nemostream
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import read_manifest
from nemostream.benchmarks.harness.records import OtherWork, Record, Say
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
    say: Say = lambda message: None,
) -> Record:
    """The result. `sources` are what `Model.transcribe` takes."""
    if not sources or min(batches, default=0) < 1 or repeats < 1:
        raise OptionError("there must be recordings, and batch sizes and repeats of at least 1.")
    if max(batches) > len(sources):
        raise OptionError(f"{max(batches)} recordings at a time need as many; there are {len(sources)}.")
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
                    say(f"{precision}, {chunk.ms} ms, {batch} at a time")
                    times = []
                    with ThreadPoolExecutor(batch) as pool:
                        for _ in range(repeats):
                            start = time.perf_counter()
                            audio = sum(result.duration for result in pool.map(model.transcribe, sources))
                            times.append(time.perf_counter() - start)
                    case = {"chunk_ms": chunk.ms, "batch": batch, "precision": precision}
                    values = {"audio_seconds": audio, "rtfx": records.rtfx(audio, statistics.median(times))}
                    rows.append(records.row(case, {"whole set": [1000 * seconds for seconds in times]}, values))
    return records.record(
        "throughput",
        rows,
        model={
            "name": bundle.manifest.name,
            "layers": bundle.manifest.encoder.layers,
            "d_model": bundle.manifest.encoder.d_model,
        },
        method={
            "recordings": len(sources),
            "repeats": repeats,
            "threads": threads or records.cores(),
            "device": device,
            "other_work_cores": round(others.cores(), 3),
        },
    )


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Table and plot of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
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
    axes = plot("rtfx")
    for precision, ms in dict.fromkeys((row["case"]["precision"], row["case"]["chunk_ms"]) for row in rows):
        points = [
            (row["case"]["batch"], row["values"]["rtfx"])
            for row in rows
            if (row["case"]["precision"], row["case"]["chunk_ms"]) == (precision, ms)
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{precision}, {ms} ms")
    axes.set(xlabel="recordings at a time", ylabel="RTFx", title="Seconds of audio per second")
    axes.legend(fontsize=7)
    head = ["chunk", "at a time", "precision", "audio, s", "took, s", "RTFx"]
    return (
        f"{method['recordings']} recordings, {method['device']}, {method['threads']} threads, the whole set "
        f"{method['repeats']} times: median [least–most]. {tables.busy([method['other_work_cores']])}\n\n"
        f"{tables.markdown(head, lines)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = records.parser("throughput", __doc__)
    records.engine_options(parser)
    parser.add_argument("--manifest", type=Path, help="NeMo manifest (default: the packaged clips)")
    parser.add_argument("--copies", type=int, default=32, help="of the packaged clips")
    parser.add_argument("--repeats", type=int, default=3, help="times that the whole set is done")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="recordings at a time")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = Bundle.open(options.bundle or nemostream.demo_bundle())
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
            device=options.device,
            threads=options.threads,
            engines=options.engines,
            say=records.say,
        )

    records.run(measure, options)


if __name__ == "__main__":
    main()
