"""A first look at this machine, in well under a minute.

    nemostream bench quick
    nemostream bench quick --bundle BUNDLE --device cuda

The embedded model, or a bundle, at every chunk size: time of a step and from pushed audio to its text, p50 and p99, for
one stream and eight, seconds of audio recognised per second, and the text of the packaged recording. The embedded model
is small: its figures show that everything works and what the host costs, not what the 0.6B model takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nemostream
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import Record, Say
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
    say: Say = lambda message: None,
    *,
    device: str = "cpu",
    engines: Path | None = None,
) -> Record:
    """The result: the rows of `latency`, each with the RTFx of `throughput` of as many recordings at a time.

    `device` is "cpu" (fp32), or "cuda" or "cuda:onnxruntime" (fp16, with engines of the folder `engines`, which are
    built if they are not there). Raises `OptionError` for another, `BackendError` if it is not there.
    """
    begun = time.perf_counter()
    precision = "fp32" if device == "cpu" else "fp16"
    chunks = bundle.manifest.chunks
    chunk = next((chunk for chunk in chunks if chunk.ms == 560), chunks[-1])
    with (
        timed_backend(bundle, [chunk], precision, 1, device=device, engines=engines) as backend,
        Model(bundle, backend, chunk.ms) as model,
    ):
        said = model.transcribe(nemostream.demo_clip()).text
    # The roofline of a GPU is measured with its backend.
    machine = measure_machine(records.cores(), 1 << 28, repeats=2, size=1024) if device == "cpu" else None
    latency = measure_latency(
        bundle, (precision,), _BATCHES, repeats=repeats, devices=(device,), engines=engines, machine=machine, say=say
    )
    whole = measure_throughput(
        bundle, speech(bundle.manifest) * 4, (precision,), _BATCHES, repeats=1, device=device, engines=engines, say=say
    )
    for row, other in zip(latency["rows"], whole["rows"], strict=True):
        row["values"]["rtfx"] = other["values"]["rtfx"]
    method = {**latency["method"], "said": said, "seconds": round(time.perf_counter() - begun, 1)}
    return records.record("quick", latency["rows"], model=latency["model"], method=method)


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Table and plot of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    head = ["chunk", "streams", "step p50", "p99", "push to text p50", "p99", "share of the chunk", "RTFx"]
    lines = []
    for row in result["rows"]:
        case, step, push = row["case"], row["figures"]["step"], row["figures"]["push"]
        line = [f"{case['chunk_ms']} ms", case["batch"]]
        line += [tables.digits(figure) for figure in (step["p50"], step["p99"], push["p50"], push["p99"])]
        lines.append([*line, f"{100 * push['p99'] / case['chunk_ms']:.0f} %", tables.digits(row["values"]["rtfx"])])
    axes = plot("latency")
    for batch in sorted({row["case"]["batch"] for row in result["rows"]}):
        mine = [row for row in result["rows"] if row["case"]["batch"] == batch]
        sizes = [row["case"]["chunk_ms"] for row in mine]
        for figure, style in (("p50", "--"), ("p99", "-")):
            pushes = [row["figures"]["push"][figure] for row in mine]
            axes.plot(sizes, pushes, style, marker=".", label=f"{batch} streams, {figure}")
    axes.plot(sizes, sizes, ":", color="black", label="real time")
    axes.set(xlabel="chunk, ms", ylabel="push to text, ms", xscale="log", yscale="log", title="From speech to text")
    axes.legend(fontsize=7)
    method, busy = result["method"], tables.busy(row["values"]["other_work_cores"] for row in result["rows"])
    return (
        f"Milliseconds; all of it took {method['seconds']:.0f} s. {busy}\n\n{tables.markdown(head, lines)}\n\n"
        f"The packaged recording, transcribed: *{method['said']}*\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = records.parser("quick", __doc__)
    parser.add_argument("--bundle", type=Path, help="what to run (default: the packaged model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (engines by TensorRT) or cuda:onnxruntime")
    parser.add_argument("--engines", type=Path, help="folder of engines (default: they are not kept)")
    parser.add_argument("--repeats", type=int, default=30, help="steps timed of each")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = Bundle.open(options.bundle or nemostream.demo_bundle())
        return measure_quick(bundle, options.repeats, records.say, device=options.device, engines=options.engines)

    records.run(measure, options)


if __name__ == "__main__":
    main()
