"""How many people a server on this machine can listen to.

    nemostream bench serve --streams 50 100 200 --manifest heldout.jsonl
    nemostream bench serve --bundle BUNDLE --chunk-ms 80 --streams 8

`nemostream serve` runs in a process of its own; callers in this one speak to `/v1/stream` over loopback: each connects,
sends a recording in real time, `--packet-ms` of audio a message, says that it is finished, waits for the last text, and
connects again, all beginning at random moments. Measured is the time from the moment a recording's last audio was due
until its final text is here. So many callers hold if, over `--seconds`:

* every text is the one that the model says of the recording offline, and nothing fails or is refused;
* the slowest percent of final texts comes within one chunk and 200 ms;
* the callers themselves were never late by more than a packet (99 %).

Callers and server share the machine, so its cores, and what each side took of them, are told.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import read_manifest
from nemostream.benchmarks.harness.records import OtherWork, Record, Row, Say, percentile
from nemostream.bundle import Bundle
from nemostream.engines import speech
from nemostream.errors import BackendError, OptionError

GRACE_MS = 200  # beyond a chunk, for a final text
_RATE = 16000
_SETTLING = 3.0  # seconds at the start that are not judged: everyone connects


@dataclass
class Calls:
    """What came of it."""

    finals: list[float] = field(default_factory=list)  # seconds from the last audio to the last text
    lateness: list[float] = field(default_factory=list)  # of the callers, seconds
    wrong: list[tuple[str, str]] = field(default_factory=list)  # (what offline says, what came)
    errors: list[str] = field(default_factory=list)
    audio: float = 0.0  # seconds sent
    open_now: int = 0
    open_most: int = 0


def measure_serving(
    bundle: Bundle,
    streams: Sequence[int] = (50, 100, 200),
    chunk_ms: int = 560,
    *,
    seconds: float = 60.0,
    packet_ms: int = 100,
    manifest: Path | None = None,
    options: Sequence[str] = (),
    say: Say = lambda message: None,
) -> Record:
    """The result. Callers say what `manifest` lists (NeMo's, 16 kHz mono), or the packaged speech; `options` are for
    `nemostream serve`. Raises `OptionError`, and `BackendError` if the server cannot start.
    """
    if not streams or min(streams) < 1 or seconds <= _SETTLING or packet_ms < 1:
        raise OptionError(f"streams and packet_ms must be positive, seconds more than {_SETTLING:.0f}.")
    chunk = bundle.manifest.chunk(chunk_ms)
    clips = _clips(bundle, manifest)
    with nemostream.load(bundle.path, chunk.ms, capacity=4) as model:
        said = [model.transcribe(clip).text for clip in clips]
    began, others, rows = time.perf_counter(), OtherWork(), []
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
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            if not url.startswith("http:"):
                raise BackendError(f"the server did not start; try it by hand: {' '.join(command)}")
            for number in streams:
                say(f"{number} callers for {seconds:.0f} s")
                before = _cpu(server.pid), time.process_time(), time.perf_counter(), _steps(url)
                calls = asyncio.run(_call(url, clips, said, number, seconds, packet_ms / 1000))
                took = time.perf_counter() - before[2]
                busy = (_cpu(server.pid) - before[0]) / took, (time.process_time() - before[1]) / took
                case = {"streams": number, "chunk_ms": chunk.ms, "packet_ms": packet_ms}
                row = judge(calls, case, took, *busy)
                steps, rows_of, spent = (after - had for after, had in zip(_steps(url), before[3], strict=True))
                if steps:
                    row["values"] |= {
                        "mean_batch": round(rows_of / steps, 2),
                        "step_ms": round(1000 * spent / steps, 2),
                    }
                rows.append(row)
            served = _cpu(server.pid)
        finally:
            server.terminate()
    return records.record(
        "serve",
        rows,
        model={
            "name": bundle.manifest.name,
            "layers": bundle.manifest.encoder.layers,
            "d_model": bundle.manifest.encoder.d_model,
        },
        method={
            "threads": records.cores(),
            "device": "cpu",
            "seconds": seconds,
            "packet_ms": packet_ms,
            "recordings": len(clips),
            "grace_ms": GRACE_MS,
            "options": list(options),
            "other_work_cores": round(max(0.0, others.cores() - served / (time.perf_counter() - began)), 3),
        },
    )


def judge(calls: Calls, case: dict[str, Any], seconds: float, server: float, callers: float) -> Row:
    """A row, and in its values whether so many callers hold and what speaks against it."""
    reasons = []
    finals = [1000 * final for final in calls.finals]
    most = case["chunk_ms"] + GRACE_MS
    if not finals:
        reasons.append("nothing was recognised")
    elif (slow := percentile(finals, 99)) > most:
        reasons.append(f"p99 of the final text is {slow:.0f} ms")
    if calls.wrong:
        reasons.append(f"{len(calls.wrong)} texts differ from the offline ones")
    if calls.errors:
        reasons.append(f"{len(calls.errors)} errors, the first: {calls.errors[0]}")
    if calls.lateness and percentile(calls.lateness, 99) > case["packet_ms"] / 1000:
        reasons.append("the callers came too late")
    if calls.open_most < case["streams"]:
        reasons.append(f"only {calls.open_most} were open at once")
    values = {
        "holds": not reasons,
        "against": reasons,
        "seconds": round(seconds, 2),
        "utterances": len(finals),
        "wrong": len(calls.wrong),
        "audio_seconds": round(calls.audio, 1),
        "rtfx": records.rtfx(calls.audio, seconds),
        "server_cores": round(server, 3),
        "callers_cores": round(callers, 3),
        "late_ms": records.figures([1000 * late for late in calls.lateness]) if calls.lateness else None,
    }
    return records.row(case, {"final text": finals} if finals else {}, values)


async def _call(
    url: str, clips: Sequence[Any], said: Sequence[str], streams: int, seconds: float, packet: float
) -> Calls:
    """`streams` callers for so long; whoever is speaking when the time is up says its clip to the end."""
    calls, rng = Calls(), np.random.default_rng(streams)
    begin = time.perf_counter() + 0.5
    orders = [
        (begin + rng.uniform(0, min(2.0, seconds / 4)), np.random.default_rng([streams, i])) for i in range(streams)
    ]
    async with asyncio.TaskGroup() as group:
        for moment, own in orders:
            group.create_task(_caller(url, clips, said, calls, moment, begin, begin + seconds, packet, own))
    return calls


async def _caller(
    url: str,
    clips: Sequence[Any],
    said: Sequence[str],
    calls: Calls,
    moment: float,
    begin: float,
    end: float,
    packet: float,
    rng: np.random.Generator,
) -> None:
    await asyncio.sleep(moment - time.perf_counter())
    while (start := time.perf_counter()) < end:
        which = int(rng.integers(len(clips)))
        try:
            text, final = await _utterance(url.replace("http:", "ws:") + "/v1/stream", clips[which], calls, packet)
        except Exception as error:
            calls.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(1)
            continue
        if start - begin >= _SETTLING:
            calls.finals.append(final)
        if text != said[which]:
            calls.wrong.append((said[which], text))


async def _utterance(url: str, pcm: Any, calls: Calls, packet: float) -> tuple[str, float]:
    from websockets.asyncio.client import connect

    size = round(_RATE * packet)
    async with connect(url, compression=None, ping_interval=None) as socket:
        await socket.recv()
        calls.open_now += 1
        calls.open_most = max(calls.open_most, calls.open_now)
        try:
            start = time.perf_counter()
            for at in range(0, len(pcm), size):
                piece = pcm[at : at + size]
                due = start + (at + len(piece)) / _RATE  # a packet can be sent when its last sample was spoken
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                calls.lateness.append(max(0.0, time.perf_counter() - due))
                await socket.send(piece.tobytes())
            calls.audio += len(pcm) / _RATE
            await socket.send('{"type": "finish"}')
            async for message in socket:
                event = json.loads(message)
                if event["type"] == "done":
                    return event["text"], time.perf_counter() - due
                if event["type"] == "error":
                    raise RuntimeError(event["message"])
            raise RuntimeError(f"the server hung up ({socket.close_code})")
        finally:
            calls.open_now -= 1


def _clips(bundle: Bundle, manifest: Path | None) -> list[Any]:
    """16-bit samples of what is said."""
    clips = speech(bundle.manifest) if manifest is None else [each.samples(_RATE) for each in read_manifest(manifest)]
    return [np.clip(np.rint(32768 * clip), -32768, 32767).astype(np.int16) for clip in clips]


def _steps(url: str) -> tuple[float, float, float]:
    """Of the server so far: steps, their rows, and their seconds."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    wanted = "nemostream_step_streams_count", "nemostream_step_streams_sum", "nemostream_step_seconds_sum"
    count, rows, seconds = (sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in wanted)
    return count, rows, seconds


def _cpu(process: int) -> float:
    """Seconds of processor time that a process took."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Tables and plots of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    head = [
        "callers",
        "chunk",
        "recordings",
        "wrong",
        "avg",
        "p50",
        "p95",
        "p99",
        "server cores",
        "callers' cores",
        "streams a step",
        "holds",
    ]
    lines = []
    for row in result["rows"]:
        values, found = row["values"], row["figures"].get("final text", {})
        times = [tables.digits(found[name]) if found else "" for name in ("avg", "p50", "p95", "p99")]
        verdict = "yes" if values["holds"] else "no: " + "; ".join(values["against"])
        lines.append(
            [
                row["case"]["streams"],
                f"{row['case']['chunk_ms']} ms",
                values["utterances"],
                values["wrong"],
                *times,
                f"{values['server_cores']:.2f}",
                f"{values['callers_cores']:.2f}",
                values.get("mean_batch", ""),
                verdict,
            ]
        )
    method = result["method"]
    text = (
        f"Milliseconds from a recording's last audio to its final text; {method['recordings']} recordings, "
        f"{method['packet_ms']} ms a message, {method['seconds']:.0f} s each, callers and server on the same "
        f"{method['threads']} cores; other work kept {method['other_work_cores']:.2f} cores busy."
    )
    _draw(result, plot("final"))
    return f"{headline(result)}\n\n{text}\n\n{tables.markdown(head, lines)}\n".lstrip()


def headline(result: Record) -> str:
    """One sentence, or nothing if not even one number of callers held."""
    held = [row for row in result["rows"] if row["values"]["holds"]]
    if not held:
        return ""
    row = max(held, key=lambda row: row["case"]["streams"])
    found, hardware = row["figures"]["final text"], result["hardware"]
    return (
        f"**{row['case']['streams']} WebSocket streams** at {row['case']['chunk_ms']} ms, {result['model']['layers']} "
        f"layers of {result['model']['d_model']}, every text equal to the offline one, final text "
        f"{tables.digits(found['p50'])} ms (p99 {tables.digits(found['p99'])}) after the last audio, callers and "
        f"server together on {hardware['cores']} cores of {hardware['cpu']}."
    )


def _draw(result: Record, axes: Any) -> None:
    rows = [row for row in result["rows"] if row["figures"]]
    for figure in ("p50", "p95", "p99"):
        points = [(row["case"]["streams"], row["figures"]["final text"][figure]) for row in rows]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=figure)
    axes.set(xlabel="callers", ylabel="ms from last audio to final text", title="Final text over callers")
    if rows:
        axes.legend(fontsize=7)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = records.parser("serve", __doc__)
    parser.add_argument("--bundle", type=Path, help="folder of a bundle; default: the packaged demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[50, 100, 200], help="callers at once")
    parser.add_argument("--chunk-ms", type=int, default=560)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of callers")
    parser.add_argument("--packet-ms", type=int, default=100, help="audio in a message")
    parser.add_argument("--manifest", type=Path, help="what callers say (NeMo's; default: the packaged speech)")
    options, rest = parser.parse_known_args(arguments)

    def measure() -> Record:
        return measure_serving(
            Bundle.open(options.bundle or nemostream.demo_bundle()),
            options.streams,
            options.chunk_ms,
            seconds=options.seconds,
            packet_ms=options.packet_ms,
            manifest=options.manifest,
            options=rest,
            say=records.say,
        )

    records.run(measure, options)


if __name__ == "__main__":
    main()
