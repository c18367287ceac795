"""Maximum number of WebSocket clients of a server on this machine.

    nemostream bench serve --streams 50 100 200 --manifest heldout.jsonl
    nemostream bench serve --bundle BUNDLE --chunk-ms 80 --streams 8

`nemostream serve` runs in a separate process; the clients run in this process and connect to `/v1/stream` over
loopback. Each client connects, sends a recording in real time with `--packet-ms` of audio per message, sends `finish`,
waits for the final text, and connects again. Start times are random. The measured time is from the moment the last
audio of a recording is due to the final text. A number of clients passes if, over `--seconds`:

* all texts are equal to those of the same utterances without a server, and no request fails or is rejected;
* the 99th percentile of the time to the final text is at most one chunk duration plus 200 ms;
* the clients are at most one packet late (99th percentile).

Clients and server share the machine; the cores that each of them uses are reported.
"""

from __future__ import annotations

import asyncio
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream import Endpoint
from nemostream.benchmarks.command import make_parser, open_bundle, run
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import read_manifest
from nemostream.benchmarks.harness.paced_streams import Job, Recording, RunResult, run_streams
from nemostream.benchmarks.harness.plots import Chart, Curve, CurveChart, CurvePanel, probe_curves
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress, percentile
from nemostream.benchmarks.harness.server_process import cpu_seconds, server_process
from nemostream.benchmarks.harness.targets import create_target
from nemostream.bundle import Bundle
from nemostream.cli.scrapes import Scrape
from nemostream.engines import speech
from nemostream.errors import OptionError

GRACE_MS = 200  # allowed time to the final text beyond the chunk duration
_RATE = 16000  # Hz
_SETTLING = 3.0  # seconds at the start that are not evaluated: all clients connect
_LEAD = 0.5  # seconds before the first client may start


def measure_serving(
    bundle: Bundle,
    streams: Sequence[int] = (50, 100, 200),
    chunk_ms: int = 560,
    *,
    seconds: float = 60.0,
    packet_ms: int = 100,
    manifest: Path | None = None,
    options: Sequence[str] = (),
    progress: Progress = no_progress,
) -> Record:
    """Measure each number of clients in `streams` and return the result.

    Clients send the recordings of the NeMo manifest `manifest`, by default the packaged clips. `options` are passed to
    `nemostream serve`. Raises `OptionError` for invalid options, and `BackendError` if the server does not start.
    """
    if not streams or min(streams) < 1 or seconds <= _SETTLING or packet_ms < 1:
        raise OptionError(f"streams and packet_ms must be positive, and seconds greater than {_SETTLING:.0f}.")
    chunk = bundle.manifest.chunk(chunk_ms)
    clips = pcm_clips(bundle, manifest)
    recordings = [Recording(clip.astype("<i2").tobytes(), len(clip) / _RATE) for clip in clips]
    with nemostream.load(bundle.path, chunk.ms, capacity=4) as model:
        texts = [_utterances(model, clip) for clip in clips]
    others, rows = OtherWork(), []
    command = [
        sys.executable,
        "-m",
        "nemostream",
        "serve",
        "--bundle",
        str(bundle.path),
        "--chunk-ms",
        str(chunk.ms),
        "--chunks",
        str(chunk.ms),
        "--port",
        "0",
        "--grpc-port",
        "-1",
        "--max-streams",
        str(2 * max(streams)),
        "--no-measure",
        *options,
    ]
    with server_process(command) as (server, url):
        for number in streams:
            progress(f"{number} clients for {seconds:.0f} s")
            server_cpu, begin, before = cpu_seconds(server.pid), time.perf_counter(), _step_metrics(url)
            results = asyncio.run(_run_clients(url, recordings, number, seconds, packet_ms / 1000))
            elapsed = time.perf_counter() - begin
            server_cores = (cpu_seconds(server.pid) - server_cpu) / elapsed
            case = {"streams": number, "chunk_ms": chunk.ms, "packet_ms": packet_ms}
            row = evaluate(results, recordings, texts, case, elapsed, server_cores)
            steps, step_rows, step_seconds = (b - a for a, b in zip(before, _step_metrics(url), strict=True))
            if steps:
                row["values"]["mean_batch"] = round(step_rows / steps, 2)
                row["values"]["step_ms"] = round(1000 * step_seconds / steps, 2)
            rows.append(row)
    return records.record(
        "serve",
        rows,
        model=records.model_of(bundle.manifest),
        method={
            "threads": records.cores(),
            "device": "cpu",
            "seconds": seconds,
            "packet_ms": packet_ms,
            "recordings": len(recordings),
            "grace_ms": GRACE_MS,
            "options": list(options),
            # The server has ended, so its CPU time is counted as this process's.
            "other_work_cores": round(others.cores(), 3),
        },
    )


def evaluate(
    results: RunResult,
    recordings: Sequence[Recording],
    texts: Sequence[str],
    case: dict[str, Any],
    seconds: float,
    server_cores: float,
) -> Row:
    """Return a row whose values include whether the number of clients passed, and the reasons why it failed.

    `texts` are the expected ones of the recordings, whose speech ends with their audio.
    """
    failures = []
    complete = [stream for stream in results.streams if not stream.error]
    errors = [stream.error for stream in results.streams if stream.error]
    wrong = sum(stream.text != texts[stream.recording] for stream in complete)
    finals = [
        1000 * (stream.ended - stream.start - recordings[stream.recording].speech_end)
        for stream in complete
        if stream.start >= _SETTLING
    ]
    lateness = [*results.lateness, *results.blocked]
    if not finals:
        failures.append("no results")
    elif (slow := percentile(finals, 99)) > case["chunk_ms"] + GRACE_MS:
        failures.append(f"p99 of the final text is {slow:.0f} ms")
    if wrong:
        failures.append(f"{wrong} texts differ from the offline transcripts")
    if errors:
        failures.append(f"{len(errors)} errors, first: {errors[0]}")
    if lateness and percentile(lateness, 99) > case["packet_ms"] / 1000:
        failures.append("the clients fell behind")
    if results.max_open < case["streams"]:
        failures.append(f"only {results.max_open} connections were open at the same time")
    values = {
        "passed": not failures,
        "failures": failures,
        "seconds": round(seconds, 2),
        "utterances": len(finals),
        "wrong": wrong,
        "audio_seconds": round(results.audio_seconds, 1),
        "rtfx": records.rtfx(results.audio_seconds, seconds),
        "server_cores": round(server_cores, 3),
        "client_cores": round(results.cpu_seconds / seconds, 3),
        "lateness_ms": records.figures([1000 * late for late in lateness]) if lateness else None,
    }
    return records.row(case, {"final text": finals} if finals else {}, values)


async def _run_clients(
    url: str, recordings: Sequence[Recording], streams: int, seconds: float, packet: float
) -> RunResult:
    """Run clients in this process; open recordings are sent to the end."""
    job = Job(streams, seconds, packet, asyncio.get_running_loop().time() + _LEAD)
    return await run_streams(create_target(f"nemostream+ws{url.removeprefix('http')}"), recordings, job, range(streams))


def _utterances(model: nemostream.Model, clip: Any) -> str:
    """Return the text of a clip with the end of utterances that the server detects by default."""
    return " ".join(event.text for event in model.listen(clip, endpoint=Endpoint()) if event.kind == "final")


def pcm_clips(bundle: Bundle, manifest: Path | None = None) -> list[Any]:
    """Return the recordings of a NeMo manifest, or the packaged clips, as 16-bit samples at 16 kHz."""
    clips = speech(bundle.manifest) if manifest is None else [each.samples(_RATE) for each in read_manifest(manifest)]
    return [np.clip(np.rint(32768 * clip), -32768, 32767).astype(np.int16) for clip in clips]


def _step_metrics(url: str) -> tuple[float, float, float]:
    """Return the number of steps of the server since its start, their rows, and their seconds."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        return parse_step_metrics(response.read().decode())


def parse_step_metrics(text: str) -> tuple[float, float, float]:
    """Return number, rows and seconds of the steps in Prometheus metrics, summed over all labels."""
    total = Scrape.parse(text, at=0.0).total
    streams, seconds = "nemostream_step_streams", "nemostream_step_seconds"
    return total(f"{streams}_count"), total(f"{streams}_sum"), total(f"{seconds}_sum")


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    head = [
        "clients",
        "chunk",
        "utterances",
        "wrong texts",
        "avg",
        "p50",
        "p95",
        "p99",
        "server cores",
        "client cores",
        "mean batch",
        "passed",
    ]
    lines = []
    for row in result["rows"]:
        values, found = row["values"], row["figures"].get("final text", {})
        times = [tables.digits(found[name]) if found else "" for name in ("avg", "p50", "p95", "p99")]
        lines.append(
            [
                row["case"]["streams"],
                f"{row['case']['chunk_ms']} ms",
                values["utterances"],
                values["wrong"],
                *times,
                f"{values['server_cores']:.2f}",
                f"{values['client_cores']:.2f}",
                values.get("mean_batch", ""),
                tables.verdict(values),
            ]
        )
    method = result["method"]
    text = (
        "Time in milliseconds from the last audio of an utterance to its final text. "
        f"{method['recordings']} recordings, {method['packet_ms']} ms of audio per message, {method['seconds']:.0f} s "
        f"per row; clients and server on the same {method['threads']} cores. "
        f"{tables.other_load([method['other_work_cores']])}"
    )
    return f"{headline(result)}\n\n{text}\n\n{tables.markdown(head, lines)}\n".lstrip()


def headline(result: Record) -> str:
    """Return a sentence for the README; empty if no number of clients passed."""
    row = _best(result)
    if row is None:
        return ""
    found, hardware = row["figures"]["final text"], result["hardware"]
    return (
        f"**{row['case']['streams']} WebSocket streams** with {row['case']['chunk_ms']} ms chunks: "
        f"{result['model']['layers']} layers, d_model {result['model']['d_model']}, all texts equal to the offline "
        f"transcripts, final text {tables.digits(found['p50'])} ms (p99 {tables.digits(found['p99'])} ms) after the "
        f"last audio. Clients and server together on {hardware['cores']} cores of {hardware['cpu']}."
    )


def _best(result: Record) -> Row | None:
    """Return the row of the largest number of clients that passed."""
    passed = [row for row in result["rows"] if row["values"]["passed"]]
    return max(passed, key=lambda row: row["case"]["streams"], default=None)


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the times to the final text by number of clients."""
    rows = [row for row in result["rows"] if row["figures"]]
    if not rows:
        return {}
    curves: list[Curve] = []
    for series, figure in enumerate(("p99", "p95", "p50")):
        points = [
            (row["case"]["streams"], row["figures"]["final text"][figure], row["values"]["passed"]) for row in rows
        ]
        curves += probe_curves(figure, points, series)
    best = _best(result)
    title = "No number of clients passed"
    if best:
        found = best["figures"]["final text"]
        title = (
            f"{best['case']['streams']} WebSocket streams: the final text comes {tables.digits(found['p50'])} ms (p99 "
            f"{tables.digits(found['p99'])} ms) after the last audio"
        )
    limit = rows[0]["case"]["chunk_ms"] + GRACE_MS
    subtitle = (
        f"Time from the last audio of an utterance to its final text, {rows[0]['case']['chunk_ms']} ms chunks; clients "
        "and server on the same cores. Filled marks: passed; crosses: failed. Limit: the largest p99 that passes."
    )
    panel = CurvePanel("", curves, limit=limit)
    return {"final": CurveChart(title, subtitle, [panel], "concurrent WebSocket streams", " ms", log_y=True)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("serve", __doc__)
    parser.add_argument("--bundle", type=Path, help="bundle to serve (default: the packaged model)")
    parser.add_argument("--streams", type=int, nargs="+", default=[50, 100, 200], help="numbers of concurrent clients")
    parser.add_argument("--chunk-ms", type=int, default=560, help="chunk size in ms")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration for each number of clients")
    parser.add_argument("--packet-ms", type=int, default=100, help="audio per message, in ms")
    parser.add_argument("--manifest", type=Path, help="NeMo manifest of the recordings (default: the packaged clips)")
    options, rest = parser.parse_known_args(arguments)

    def measure() -> Record:
        return measure_serving(
            open_bundle(options.bundle),
            options.streams,
            options.chunk_ms,
            seconds=options.seconds,
            packet_ms=options.packet_ms,
            manifest=options.manifest,
            options=rest,
            progress=records.report_progress,
        )

    run(measure, options)


if __name__ == "__main__":
    main()
