"""Short benchmark of this machine, in less than a minute.

    nemostream bench quick
    nemostream bench quick --bundle BUNDLE --device cuda

Runs the packaged model, or a bundle, at every chunk size with one stream and with eight: time of a step and from pushed
audio to its text (p50 and p99), seconds of audio per second, and the transcript of the packaged recording. The packaged
model is small: its figures show that everything works and the cost of the host code, not the speed of the 0.6B model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nemostream
from nemostream.benchmarks import command
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import Progress, Record, no_progress
from nemostream.benchmarks.harness.roofline import measure_machine
from nemostream.benchmarks.harness.timed import timed_backend
from nemostream.benchmarks.latency import measure_latency
from nemostream.benchmarks.throughput import measure_throughput
from nemostream.bundle import Bundle
from nemostream.engines import speech
from nemostream.runtime.model import Model

_BATCHES = (1, 8)


def measure_quick(
    bundle: Bundle,
    repeats: int = 30,
    progress: Progress = no_progress,
    *,
    device: str = "cpu",
    engines: Path | None = None,
) -> Record:
    """Return the rows of `latency`, each with the RTFx of `throughput` for the same number of recordings.

    `device` is "cpu" (fp32), or "cuda" or "cuda:onnxruntime" (fp16). Engines that the folder `engines` does not contain
    are built. Raises `OptionError` for an unknown device, and `BackendError` if it is not available.
    """
    start = time.perf_counter()
    precision = "fp32" if device == "cpu" else "fp16"
    chunks = bundle.manifest.chunks
    chunk = next((chunk for chunk in chunks if chunk.ms == 560), chunks[-1])
    with (
        timed_backend(bundle, [chunk], precision, 1, device=device, engines=engines) as backend,
        Model(bundle, backend, chunk.ms) as model,
    ):
        transcript = model.transcribe(nemostream.demo_clip()).text
    # `measure_latency` measures the rates of a GPU itself.
    machine = measure_machine(records.cores(), 1 << 28, repeats=2, size=1024) if device == "cpu" else None
    latency = measure_latency(
        bundle,
        (precision,),
        _BATCHES,
        repeats=repeats,
        devices=(device,),
        engines=engines,
        machine=machine,
        progress=progress,
    )
    throughput = measure_throughput(
        bundle,
        speech(bundle.manifest) * 4,
        (precision,),
        _BATCHES,
        repeats=1,
        device=device,
        engines=engines,
        progress=progress,
    )
    for row, other in zip(latency["rows"], throughput["rows"], strict=True):
        row["values"]["rtfx"] = other["values"]["rtfx"]
    seconds = round(time.perf_counter() - start, 1)
    method = {**latency["method"], "transcript": transcript, "seconds": seconds}
    return records.record("quick", latency["rows"], model=latency["model"], method=method)


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Return the table of a result as Markdown and draw its plot; `plot(name)` returns axes."""
    head = ["chunk", "streams", "step p50", "step p99", "push to text p50", "push to text p99", "p99 ÷ chunk", "RTFx"]
    lines = []
    for row in result["rows"]:
        case, step, push = row["case"], row["figures"]["step"], row["figures"]["push"]
        line = [f"{case['chunk_ms']} ms", case["batch"]]
        line += [tables.digits(figure) for figure in (step["p50"], step["p99"], push["p50"], push["p99"])]
        lines.append([*line, f"{100 * push['p99'] / case['chunk_ms']:.0f} %", tables.digits(row["values"]["rtfx"])])
    axes = plot("latency")
    for batch in sorted({row["case"]["batch"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["case"]["batch"] == batch]
        sizes = [row["case"]["chunk_ms"] for row in rows]
        for figure, style in (("p50", "--"), ("p99", "-")):
            pushes = [row["figures"]["push"][figure] for row in rows]
            label = f"{batch} stream{'s' if batch > 1 else ''}, {figure}"
            axes.plot(sizes, pushes, style, marker=".", label=label)
    axes.plot(sizes, sizes, ":", color="black", label="real time")
    axes.set(xlabel="chunk, ms", ylabel="push to text, ms", xscale="log", yscale="log", title="Latency by chunk size")
    axes.set_xticks(sizes, [str(ms) for ms in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    method, load = result["method"], tables.other_load(row["values"]["other_work_cores"] for row in result["rows"])
    return (
        f"Times in milliseconds. The benchmark took {method['seconds']:.0f} s. {load}\n\n"
        f"{tables.markdown(head, lines)}\n\n"
        f"Transcript of the packaged recording: *{method['transcript']}*\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("quick", __doc__)
    parser.add_argument("--bundle", type=Path, help="bundle to run (default: the packaged model)")
    parser.add_argument("--device", default="cpu", help=command.DEVICES)
    parser.add_argument("--engines", type=Path, help="folder of engines (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps per case")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = command.open_bundle(options.bundle)
        return measure_quick(
            bundle, options.repeats, records.report_progress, device=options.device, engines=options.engines
        )

    command.run(measure, options)


if __name__ == "__main__":
    main()
