"""How many people can talk at once.

    nemostream bench capacity --bundle BUNDLE --chunk-ms 560
    nemostream bench capacity --chunk-ms 80 560 1120          # mixed, a third of the streams each
    nemostream bench capacity --simulate-realtime 16          # NVIDIA's method

Live streams are fed in real time (`load`), 20 ms of audio a packet, beginning at random moments, one clip after
another, in the same process as the engine. So many streams hold if, over `--seconds` (180):

* of every chunk size the slowest percent of steps, and of results (from the moment a chunk's last sample was spoken
  until its text is there), still come within one chunk;
* nothing drifts: results in the last third come no later, by more than a tenth of a chunk, than those in the first, and
  no chunk is left without a result for longer than a chunk;
* the load generator itself was never late by more than 20 ms (99 %), and nothing failed.

The most streams are found by doubling and then bisection with short probes (`--probe-seconds`), down to 5 %, and
confirmed over the full time; a number that does not hold gives way to one 5 % smaller. A probe that fails is repeated
once: the machine may have paused. The probes make the curve of latency over streams.

`--simulate-realtime N` is how NVIDIA measures its server (`riva_streaming_asr_client --simulate_realtime`): N parallel
streams, 3N clips, all beginning together; latency of results and of final results, and seconds of audio per second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nemostream
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.load import PACKET, Heard, Watched, talk
from nemostream.benchmarks.harness.records import OtherWork, Record, Row, Say, percentile
from nemostream.benchmarks.harness.timed import timed_backend
from nemostream.bundle import Bundle
from nemostream.engines import speech
from nemostream.errors import OptionError
from nemostream.runtime.model import Model

RESOLUTION = 0.05
_SETTLING = 2.0  # seconds at the start that are not judged: streams begin, pages are touched
_DRIFT = 0.1  # of a chunk


def measure_capacity(
    bundle: Bundle,
    precision: str = "fp32",
    chunk_ms: Sequence[int] = (560,),
    *,
    seconds: float = 180.0,
    probe_seconds: float = 15.0,
    most: int = 512,
    simulate: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    say: Say = lambda message: None,
) -> Record:
    """The result. Raises `OptionError` for what cannot be, `BackendError` if there is no engine."""
    if seconds <= 0 or probe_seconds <= 0 or most < 1 or (simulate is not None and simulate < 1):
        raise OptionError("seconds and numbers of streams must be positive.")
    chunks, clips = [bundle.manifest.chunk(ms) for ms in chunk_ms], speech(bundle.manifest)
    case = {"chunk_ms": "+".join(map(str, chunk_ms)), "precision": precision}
    # Twice: a stream that has ended may keep its slot for a step more.
    slots = 2 * (simulate or most)
    others, rows = OtherWork(), list[Row]()
    with timed_backend(bundle, chunks, precision, slots, device=device, threads=threads, engines=engines) as backend:
        watched = Watched(backend)
        with Model(bundle, watched, chunks[0].ms) as model:

            def probe(streams: int, seconds: float, confirming: bool = False) -> Row:
                say(f"{streams} streams for {seconds:.0f} s")
                watched.steps.clear()
                heard = talk(model, clips, streams, chunk_ms, seconds=seconds, seed=streams + len(rows))
                row = judge(heard, watched.steps, {**case, "streams": streams, "confirming": confirming})
                rows.append(row)
                return row

            if simulate:
                watched.steps.clear()
                heard = talk(model, clips[:1], simulate, chunk_ms, calls=3 * simulate, phases=False)
                rows.append(judge(heard, watched.steps, {**case, "streams": simulate, "simulate_realtime": True}))
                found = None
            else:
                found = search(lambda n: any(probe(n, probe_seconds)["values"]["holds"] for _ in range(2)), most)
                while found and not probe(found, seconds, True)["values"]["holds"]:
                    found = min(found - 1, math.floor(found * (1 - RESOLUTION)))
        size = getattr(backend, "bytes_per_stream", None)
    return records.record(
        "capacity",
        rows,
        model={
            "name": bundle.manifest.name,
            "layers": bundle.manifest.encoder.layers,
            "d_model": bundle.manifest.encoder.d_model,
        },
        method={
            "threads": threads or records.cores(),
            "device": device,
            "packet_seconds": PACKET,
            "seconds": seconds,
            "probe_seconds": probe_seconds,
            "most": most,
            "streams": found,
            "bytes_per_stream": size,
            "precision": precision,
            "chunk_ms": case["chunk_ms"],
            "other_work_cores": round(others.cores(), 3),
        },
    )


def search(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that holds, to within 5 %, by doubling and bisection; 0 if not even one does."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    if low == 0:
        return 0
    if high > most:
        if low == most or holds(most):
            return most
        high = most
    while high - low > max(1, RESOLUTION * low):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def judge(heard: Heard, steps: Sequence[tuple[int, int, float]], case: dict[str, Any]) -> Row:
    """A row, and in its values whether so many streams hold and what speaks against it."""
    reasons: list[str] = []
    times: dict[str, list[float]] = {}
    drift: dict[int, float] = {}
    settled = min(_SETTLING, heard.seconds / 5)
    kept = [(ms, moment, 1000 * latency) for ms, moment, latency in heard.results if moment >= settled]
    for ms in sorted({ms for ms, _, _ in heard.results}):
        moments = [(moment, latency) for size, moment, latency in kept if size == ms]
        took = [elapsed for size, _, elapsed in steps if size == ms]
        if not moments:
            reasons.append(f"no result of {ms} ms in time")
            continue
        times[f"step {ms} ms"], times[f"result {ms} ms"] = took, [latency for _, latency in moments]
        for what in ("step", "result"):
            slow = percentile(times[f"{what} {ms} ms"], 99)
            if slow >= ms:
                reasons.append(f"p99 of a {ms} ms {what} is {slow:.0f} ms")
        drift[ms] = later(moments)
        if drift[ms] > _DRIFT * ms:
            reasons.append(f"results of {ms} ms come {drift[ms]:.0f} ms later in the end")
    times["final"] = [1000 * final for final in heard.finals]
    if not heard.results:
        reasons.append("nothing was recognised")
    if heard.waiting:
        reasons.append(f"{heard.waiting} chunks were left waiting")
    if heard.lateness and percentile(heard.lateness, 99) > PACKET:
        reasons.append("the load generator came too late")
    if heard.errors:
        reasons.append(f"{len(heard.errors)} errors, the first: {heard.errors[0]}")
    rows = [rows for _, rows, _ in steps]
    values = {
        "holds": not reasons,
        "against": reasons,
        "drift_ms": {str(ms): round(by, 2) for ms, by in drift.items()},
        "seconds": round(heard.seconds, 2),
        "audio_seconds": round(heard.audio, 2),
        "rtfx": records.rtfx(heard.audio, heard.seconds) if heard.seconds else 0.0,
        "mean_batch": sum(rows) / len(rows) if rows else 0.0,
        "steps": len(steps),
        # Of every packet, so its samples would be nine tenths of the file.
        "late_ms": records.figures([1000 * late for late in heard.lateness]) if heard.lateness else None,
    }
    return records.row(case, times, values)


def later(moments: Sequence[tuple[float, float]]) -> float:
    """By how much the median latency of the last third of a run is above that of the first third."""
    ordered = sorted(moments)
    third = max(len(ordered) // 3, 1)
    first, last = ([latency for _, latency in part] for part in (ordered[:third], ordered[-third:]))
    return percentile(last, 50) - percentile(first, 50)


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Tables and plots of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    method = result["method"]
    head = ["streams", "chunk", "seconds", "batch", "what", "avg", "p50", "p90", "p95", "p99", "audio s/s", "holds"]
    lines = []
    for row in sorted(result["rows"], key=lambda row: (row["case"].get("confirming", False), row["case"]["streams"])):
        values, first = row["values"], True
        for what, found in row["figures"].items():
            figures = [tables.digits(found[name]) for name in ("avg", "p50", "p90", "p95", "p99")]
            verdict = "yes" if values["holds"] else "no: " + "; ".join(values["against"])
            kind = f"{values['seconds']:.0f}"
            lines.append(
                [
                    row["case"]["streams"],
                    row["case"]["chunk_ms"],
                    kind,
                    f"{values['mean_batch']:.1f}" if first else "",
                    what,
                    *figures,
                    f"{values['rtfx']:.1f}" if first else "",
                    verdict if first else "",
                ]
            )
            first = False
    size = f", a stream's state {method['bytes_per_stream'] / 1e6:.2f} MB" if method["bytes_per_stream"] else ""
    text = [headline(result) or "NVIDIA's method: so many parallel streams, three clips each, all beginning together."]
    text += [
        "",
        f"Milliseconds; {method['device']}, {method['threads']} threads{size}. "
        f"{tables.busy([method['other_work_cores']])}",
        "",
        tables.markdown(head, lines),
    ]
    _draw(result, plot("streams"))
    return "\n".join(text).strip() + "\n"


def headline(result: Record) -> str:
    method = result["method"]
    if method["streams"] is None:
        return ""
    more = [row for row in result["rows"] if row["case"]["streams"] > method["streams"] and row["values"]["against"]]
    bound = min(more, key=lambda row: row["case"]["streams"], default=None)
    why = f" What spoke against {bound['case']['streams']}: {bound['values']['against'][0]}." if bound else ""
    confirmed = [row for row in result["rows"] if row["case"].get("confirming") and row["values"]["holds"]]
    slow = "; ".join(
        f"{what}: p50 {tables.digits(found['p50'])}, p99 {tables.digits(found['p99'])}"
        for what, found in (confirmed[-1]["figures"].items() if confirmed else ())
        if what.startswith("result")
    )
    return (
        f"**{method['streams']} real-time streams** of {method['chunk_ms']} ms, {method['precision']}, "
        f"{result['model']['layers']} layers of {result['model']['d_model']}, held for {method['seconds']:.0f} s on "
        f"{result['hardware']['gpu'] or str(result['hardware']['cores']) + ' cores of ' + result['hardware']['cpu']}"
        f"{' (ms from speech to text; ' + slow + ')' if slow else ''}.{why}"
    )


def _draw(result: Record, axes: Any) -> None:
    rows = sorted(result["rows"], key=lambda row: row["case"]["streams"])
    names = sorted({what for row in rows for what in row["figures"] if what.startswith("result")})
    for what in names:
        for figure, style in (("p50", "--"), ("p99", "-")):
            points = [(row["case"]["streams"], row["figures"][what][figure]) for row in rows if what in row["figures"]]
            axes.plot(*zip(*points, strict=True), style, marker=".", label=f"{what}, {figure}")
    axes.set(xlabel="real-time streams", ylabel="ms from speech to result", yscale="log", title="Latency over streams")
    axes.legend(fontsize=7)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = records.parser("capacity", __doc__)
    records.engine_options(parser)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seconds", type=float, default=180.0, help="that a number of streams must hold")
    parser.add_argument("--probe-seconds", type=float, default=15.0, help="of each try while searching")
    parser.add_argument("--most", type=int, default=512, help="streams to try")
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
            Bundle.open(options.bundle or nemostream.demo_bundle()),
            options.precision,
            options.chunk_ms or [560],
            seconds=options.seconds,
            probe_seconds=options.probe_seconds,
            most=options.most,
            simulate=options.simulate_realtime,
            device=options.device,
            threads=options.threads,
            engines=options.engines,
            say=records.say,
        )

    records.run(measure, options)


if __name__ == "__main__":
    main()
