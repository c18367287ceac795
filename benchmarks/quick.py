"""Short benchmark of this machine, in less than a minute.

    nemostream bench quick
    nemostream bench quick --bundle BUNDLE --device cuda

Runs the packaged model, or a bundle, at every chunk size with one stream and with eight: time of a step and from pushed
audio to its text (p50 and p99), seconds of audio per second, and the transcript of the packaged recording. The packaged
model is small: its figures show that everything works and the cost of the host code, not the speed of the 0.6B model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

import nemostream
from nemostream.benchmarks import command
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.plots import Bar, BarChart, BarPanel, Chart
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


_HEAD = ["chunk", "streams", "step p50", "step p99", "push to text p50", "push to text p99", "p99 ÷ chunk", "RTFx"]


def _lines(result: Record) -> list[list[str]]:
    lines = []
    for row in result["rows"]:
        case, step, push = row["case"], row["figures"]["step"], row["figures"]["push"]
        line = [f"{case['chunk_ms']} ms", str(case["batch"])]
        line += [tables.digits(figure) for figure in (step["p50"], step["p99"], push["p50"], push["p99"])]
        lines.append([*line, f"{100 * push['p99'] / case['chunk_ms']:.0f} %", tables.digits(row["values"]["rtfx"])])
    return lines


def _duration_and_load(result: Record) -> str:
    load = tables.other_load(row["values"]["other_work_cores"] for row in result["rows"])
    return f"The benchmark took {result['method']['seconds']:.0f} s. {load}"


def show(result: Record) -> str:
    """Return the table of a result as Markdown."""
    return (
        f"Times in milliseconds. {_duration_and_load(result)}\n\n{tables.markdown(_HEAD, _lines(result))}\n\n"
        f"Transcript of the packaged recording: *{result['method']['transcript']}*\n"
    )


def display(result: Record, console: Console | None = None) -> None:
    """Print the table of a result for a terminal of 80 columns; without lines and colours if it is not a terminal."""
    console = console or Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for name in _HEAD:
        table.add_column(re.sub(r" (?=p\d\d$|text|chunk)", "\n", name, count=1), justify="right", no_wrap=True)
    sizes = [row["case"]["chunk_ms"] for row in result["rows"]]
    for line, row, following in zip(_lines(result), result["rows"], [*sizes[1:], None], strict=True):
        late = row["figures"]["push"]["p99"] >= row["case"]["chunk_ms"]
        line[6] = f"[bold red]{line[6]}[/]" if late else f"[green]{line[6]}[/]"
        table.add_row(*line, end_section=following != row["case"]["chunk_ms"])
    name, machine = escape(result["model"]["name"]), escape(tables.machine(result["hardware"]))
    console.print(f"[bold]{name}[/] on {machine}. Times in milliseconds.")
    console.print(Padding(table, (0 if console.is_terminal else 1, 0)))
    remarks = (
        "step: one chunk of every stream, from samples to tokens. push to text: from the last samples of a chunk to "
        "its text; below 100 % of the chunk is real time. RTFx: seconds of audio transcribed per second.",
        f"Transcript of the packaged recording: [italic]{escape(result['method']['transcript'])}[/]",
        re.sub(r"\*\*(.*)\*\*", r"[bold red]\1[/]", _duration_and_load(result)),
    )
    console.print("\n\n".join(remarks), soft_wrap=not console.is_terminal)


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the times from push to text, relative to the chunk duration."""
    rows = sorted(result["rows"], key=lambda row: (row["case"]["batch"], row["case"]["chunk_ms"]))
    names, bars = [], []
    for row in rows:
        case, push = row["case"], row["figures"]["push"]
        names.append(f"{case['chunk_ms']} ms, {tables.counted(case['batch'], 'stream')}")
        median, slow = (100 * push[figure] / case["chunk_ms"] for figure in ("p50", "p99"))
        text = f"{tables.digits(push['p50'])} ms, p99 {tables.digits(push['p99'])} ms"
        bars.append(Bar([median], text, (median, slow)))
    slowest = max(bar.end for bar in bars)
    title = f"Text comes within {slowest:.0f} % of the chunk duration (p99)"
    subtitle = (
        "Time from pushing the last samples of a chunk to its text, relative to the chunk duration, by chunk size and "
        "streams. Bars: median; whiskers: p99. More than 100 % is slower than real time."
    )
    return {"latency": BarChart(title, subtitle, names, [BarPanel("", "% of the chunk duration", bars)])}


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

    command.run(measure, options, display)


if __name__ == "__main__":
    main()
