"""Maximum number of concurrent real-time streams.

    nemostream bench capacity --bundle BUNDLE --chunk-ms 560
    nemostream bench capacity --chunk-ms 80 560 1120          # mixed: a third of the streams for each size
    nemostream bench capacity --simulate-realtime 16          # NVIDIA's method

Live streams are pushed in real time (`harness.load`) in the process of the engine: packets of 20 ms of audio, random
start times, one clip after another. A number of streams passes if, over `--seconds` (180):

* for every chunk size, the 99th percentile of the step time and of the latency (from the end of the audio of a chunk
  to its result) is below the chunk duration;
* the latency does not drift: the median of the last third exceeds that of the first third by at most a tenth of a
  chunk, and no chunk is without a result for longer than a chunk duration;
* the load generator is at most 20 ms late (99th percentile), and no errors occur.

The maximum is found by doubling and bisection with short probes (`--probe-seconds`) to within 5 %, and confirmed over
the full duration; if that fails, a number 5 % smaller is tried. A failed probe is repeated once because the machine may
have paused. The plot shows the latency of all probes.

`--simulate-realtime N` uses the method of NVIDIA's client (`riva_streaming_asr_client --simulate_realtime`): N parallel
streams, 3N clips, all starting at the same time. It reports the latency of results and final results, and the seconds
of audio per second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemostream.benchmarks import command
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.load import PACKET, SEARCH_RESOLUTION, LoadResult, StepRecorder, run_load
from nemostream.benchmarks.harness.plots import Chart, Curve, CurveChart, CurvePanel, probe_curves
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress, percentile
from nemostream.benchmarks.harness.timed import timed_backend
from nemostream.bundle import Bundle
from nemostream.engines import speech
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import DEFAULT_MAX_BATCH
from nemostream.runtime.model import Model

_SETTLING = 2.0  # seconds at the start that are not evaluated
_DRIFT = 0.1  # maximum drift, in chunk durations
_LATE = "the load generator fell behind"


def measure_capacity(
    bundle: Bundle,
    precision: str = "fp32",
    chunk_ms: Sequence[int] = (560,),
    *,
    seconds: float = 180.0,
    probe_seconds: float = 15.0,
    max_streams: int = 512,
    max_batch: int = DEFAULT_MAX_BATCH,
    simulate_realtime: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Search the maximum number of streams and return the result.

    Raises `OptionError` for invalid options and `BackendError` if there is no engine.
    """
    fixed = simulate_realtime
    if seconds <= 0 or probe_seconds <= 0 or min(max_streams, max_batch) < 1 or (fixed is not None and fixed < 1):
        raise OptionError("seconds, probe_seconds and numbers of streams must be positive.")
    chunks, clips = [bundle.manifest.chunk(ms) for ms in chunk_ms], speech(bundle.manifest)
    case = {"chunk_ms": "+".join(map(str, chunk_ms)), "precision": precision}
    # Twice as many: a stream that has ended may keep its slot for another step.
    slots = 2 * (fixed or max_streams)
    others, rows = OtherWork(), list[Row]()
    with timed_backend(
        bundle,
        chunks,
        precision,
        slots,
        device=device,
        threads=threads,
        engines=engines,
        max_batch=min(max_batch, slots),
    ) as backend:
        recorder = StepRecorder(backend)
        with Model(bundle, recorder, chunks[0].ms) as model:

            def probe(streams: int, seconds: float, confirming: bool = False) -> Row:
                progress(f"{streams} streams for {seconds:.0f} s")
                recorder.steps.clear()
                load = run_load(model, clips, streams, chunk_ms, seconds=seconds, seed=streams + len(rows))
                row = evaluate(load, recorder.steps, {**case, "streams": streams, "confirming": confirming})
                rows.append(row)
                return row

            if fixed:
                recorder.steps.clear()
                load = run_load(model, clips[:1], fixed, chunk_ms, total_clips=3 * fixed, random_phase=False)
                rows.append(evaluate(load, recorder.steps, {**case, "streams": fixed, "simulate_realtime": True}))
                found = None
            else:
                found = find_streams(probe, seconds, probe_seconds, max_streams)
        size = getattr(backend, "bytes_per_stream", None)
    return records.record(
        "capacity",
        rows,
        model=records.model_of(bundle.manifest),
        method={
            "threads": threads or records.cores(),
            "device": device,
            "packet_seconds": PACKET,
            "seconds": seconds,
            "probe_seconds": probe_seconds,
            "max_streams": max_streams,
            "max_batch": max_batch,
            "streams": found,
            "bytes_per_stream": size,
            "precision": precision,
            "chunk_ms": case["chunk_ms"],
            "other_work_cores": round(others.cores(), 3),
        },
    )


def find_streams(
    probe: Callable[[int, float, bool], Row], seconds: float, probe_seconds: float, max_streams: int, first: int = 1
) -> int:
    """Return the confirmed maximum number of streams; `probe` runs a number of streams for some seconds.

    The search begins with the number `first`.
    """
    found = search(
        lambda streams: any(probe(streams, probe_seconds, False)["values"]["passed"] for _ in range(2)),
        max_streams,
        first,
    )
    while found and not probe(found, seconds, True)["values"]["passed"]:
        found = min(found - 1, math.floor(found * (1 - SEARCH_RESOLUTION)))
    return found


def search(passes: Callable[[int], bool], maximum: int, first: int = 1) -> int:
    """Return the largest number up to `maximum` that passes, to within 5 %; 0 if none does.

    Doubles the number `first`, then bisects.
    """
    low, high = 0, min(first, maximum)
    while high <= maximum and passes(high):
        low, high = high, 2 * high
    if high > maximum:
        if low == maximum or passes(maximum):
            return maximum
        high = maximum
    while high - low > max(1, SEARCH_RESOLUTION * low):
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def evaluate(load: LoadResult, steps: Sequence[tuple[int, int, float]], case: dict[str, Any]) -> Row:
    """Return a row whose values include whether the number of streams passed, and the reasons why it failed."""
    failures: list[str] = []
    times: dict[str, list[float]] = {}
    drift: dict[int, float] = {}
    settled = min(_SETTLING, load.seconds / 5)
    results = [(ms, audio_end, 1000 * latency) for ms, audio_end, latency in load.results if audio_end >= settled]
    for ms in sorted({ms for ms, _, _ in load.results}):
        latencies = [(audio_end, latency) for size, audio_end, latency in results if size == ms]
        if not latencies:
            failures.append(f"no {ms} ms result after the first {settled:.0f} s")
            continue
        times[f"step {ms} ms"] = [elapsed for size, _, elapsed in steps if size == ms]
        times[f"result {ms} ms"] = [latency for _, latency in latencies]
        for name in ("step", "result"):
            slow = percentile(times[f"{name} {ms} ms"], 99)
            if slow >= ms:
                failures.append(f"p99 of the {ms} ms {name} is {slow:.0f} ms")
        drift[ms] = latency_drift(latencies)
        if drift[ms] > _DRIFT * ms:
            failures.append(f"latency of the {ms} ms results grew by {drift[ms]:.0f} ms")
    times["final"] = [1000 * final for final in load.finals]
    if not load.results:
        failures.append("no results")
    if load.overdue:
        failures.append(f"{load.overdue} chunks had no result at the end")
    if load.lateness and percentile(load.lateness, 99) > PACKET:
        failures.append(_LATE)
    if load.errors:
        failures.append(f"{len(load.errors)} errors, first: {load.errors[0]}")
    rows = [rows for _, rows, _ in steps]
    values = {
        "passed": not failures,
        "failures": failures,
        "drift_ms": {str(ms): round(by, 2) for ms, by in drift.items()},
        "seconds": round(load.seconds, 2),
        "audio_seconds": round(load.audio_seconds, 2),
        "rtfx": records.rtfx(load.audio_seconds, load.seconds) if load.seconds else 0.0,
        "mean_batch": sum(rows) / len(rows) if rows else 0.0,
        "steps": len(steps),
        # Statistics only: the samples of all packets would be 90 % of the file.
        "lateness_ms": records.figures([1000 * late for late in load.lateness]) if load.lateness else None,
    }
    return records.row(case, times, values)


def latency_drift(latencies: Sequence[tuple[float, float]]) -> float:
    """Return the median latency of the last third of a run minus that of the first third; pairs are (time, latency)."""
    ordered = sorted(latencies)
    third = max(len(ordered) // 3, 1)
    first, last = ([latency for _, latency in part] for part in (ordered[:third], ordered[-third:]))
    return percentile(last, 50) - percentile(first, 50)


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    method = result["method"]
    head = [
        "streams",
        "chunk, ms",
        "duration, s",
        "mean batch",
        "time",
        "avg",
        "p50",
        "p90",
        "p95",
        "p99",
        "RTFx",
        "passed",
    ]
    lines = []
    for row in sorted(result["rows"], key=lambda row: (row["case"].get("confirming", False), row["case"]["streams"])):
        values, case = row["values"], row["case"]
        verdict = tables.verdict(values)
        for number, (name, found) in enumerate(row["figures"].items()):
            figures = [tables.digits(found[figure]) for figure in ("avg", "p50", "p90", "p95", "p99")]
            batch, rtfx = f"{values['mean_batch']:.1f}", f"{values['rtfx']:.1f}"
            if number:  # printed once for each number of streams
                batch = rtfx = verdict = ""
            line = [case["streams"], case["chunk_ms"], f"{values['seconds']:.0f}", batch, name, *figures]
            lines.append([*line, rtfx, verdict])
    size = f", {method['bytes_per_stream'] / 1e6:.2f} MB of state per stream" if method["bytes_per_stream"] else ""
    text = [headline(result) or "NVIDIA's method: N parallel streams, 3N clips, all starting at the same time."]
    text += [
        "",
        "Times in milliseconds. *step*: time of a step; *result*: from the end of the audio of a chunk to its result; "
        f"*final*: from the last sample of a clip to its final result. {method['device']}, {method['threads']} "
        f"threads{size}. {tables.other_load([method['other_work_cores']])}",
        "",
        tables.markdown(head, lines),
    ]
    return "\n".join(text).strip() + "\n"


def headline(result: Record) -> str:
    """Return a sentence for the README; empty for a result of NVIDIA's method."""
    method = result["method"]
    if method["streams"] is None:
        return ""
    more = [row for row in result["rows"] if row["case"]["streams"] > method["streams"] and row["values"]["failures"]]
    limit = min(more, key=lambda row: row["case"]["streams"], default=None)
    reason = f" {_limit(limit['case']['streams'], limit['values']['failures'][0])}" if limit else ""
    confirmed = [row for row in result["rows"] if row["case"].get("confirming") and row["values"]["passed"]]
    latencies = "; ".join(
        f"{name.removeprefix('result ')} chunks: p50 {tables.digits(found['p50'])} ms, "
        f"p99 {tables.digits(found['p99'])} ms"
        for name, found in (confirmed[-1]["figures"].items() if confirmed else ())
        if name.startswith("result")
    )
    hardware, model = result["hardware"], result["model"]
    return (
        f"**{method['streams']} real-time streams** with {_sizes(method)} ms chunks for {method['seconds']:.0f} s: "
        f"{method['precision']}, {model['layers']} layers, d_model {model['d_model']}, "
        f"{hardware['gpu'] or str(hardware['cores']) + ' cores of ' + hardware['cpu']}."
        f"{' Latency from end of audio to text, ' + latencies + '.' if latencies else ''}{reason}"
    )


def _limit(streams: int, failure: str) -> str:
    """Return a sentence about the smallest number of streams that failed, and its first failure."""
    if failure == _LATE:
        return (
            f"With {streams} streams, the load generator on the same cores sends audio too late, so larger numbers "
            "cannot be measured."
        )
    return f"With {streams} streams, {failure}."


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the latencies of all probes, with a panel for each chunk size."""
    method = result["method"]
    rows = sorted(result["rows"], key=lambda row: row["case"]["streams"])
    sizes = sorted({int(name.split()[1]) for row in rows for name in row["figures"] if name.startswith("result")})
    panels = []
    for ms in sizes:
        probes = [row for row in rows if f"result {ms} ms" in row["figures"]]
        curves: list[Curve] = []
        for series, figure in enumerate(("p99", "p50")):
            points = [
                (row["case"]["streams"], row["figures"][f"result {ms} ms"][figure], row["values"]["passed"])
                for row in probes
            ]
            curves += probe_curves(figure, points, series)
        panels.append(CurvePanel(f"{ms} ms chunks" if len(sizes) > 1 else "", curves, limit=ms))
    if not panels:
        return {}
    subtitle = (
        "Latency from the end of the audio of a chunk to its result. Each mark is a probe of the search: filled "
        "passed, crosses failed. Lines: median of probes with the same number of streams. Limit: the chunk duration."
    )
    found = method["streams"]
    title = f"Latency of {tables.counted(rows[0]['case']['streams'], 'parallel stream')}"
    if found is not None:
        title = f"{tables.counted(found, 'real-time stream')} with {_sizes(method)} ms chunks{_latencies(result)}"
    return {"streams": CurveChart(title, subtitle, panels, "concurrent real-time streams", " ms", log_y=True)}


def _sizes(method: Mapping[str, Any]) -> str:
    return " + ".join(str(method["chunk_ms"]).split("+"))


def _latencies(result: Record) -> str:
    """Return the p99 latencies of the confirmed number of streams, by chunk size, as the end of a title."""
    confirmed = [row for row in result["rows"] if row["case"].get("confirming") and row["values"]["passed"]]
    if not confirmed:
        return ""
    found = [times["p99"] for name, times in confirmed[-1]["figures"].items() if name.startswith("result")]
    return f": p99 latency {tables.low_to_high(min(found), max(found))} ms"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("capacity", __doc__)
    command.add_engine_options(parser)
    parser.add_argument("--chunk-ms", type=int, nargs="+", default=[560], help="chunk sizes in ms")
    parser.add_argument("--precision", default="fp32", help="precision of the engine")
    parser.add_argument("--seconds", type=float, default=180.0, help="duration of the confirmation, in seconds")
    parser.add_argument("--probe-seconds", type=float, default=15.0, help="duration of a probe, in seconds")
    parser.add_argument("--max-streams", type=int, default=512, help="largest number of streams to try")
    parser.add_argument("--max-batch", type=int, default=DEFAULT_MAX_BATCH, help="maximum number of streams in a step")
    parser.add_argument(
        "--simulate-realtime",
        "--simulate_realtime",
        type=int,
        metavar="N",
        help="NVIDIA's method: N parallel streams, 3N clips, no search",
    )
    options = parser.parse_args(arguments)

    def measure() -> Record:
        return measure_capacity(
            command.open_bundle(options.bundle),
            options.precision,
            options.chunk_ms,
            seconds=options.seconds,
            probe_seconds=options.probe_seconds,
            max_streams=options.max_streams,
            max_batch=options.max_batch,
            simulate_realtime=options.simulate_realtime,
            **command.engine_arguments(options),
        )

    command.run(measure, options)


if __name__ == "__main__":
    main()
