"""Number of real-time streams of any streaming speech server, through its own protocol.

    nemostream bench load nemostream+ws://127.0.0.1:8000 --manifest heldout.jsonl --normalizer basic --pid 4711
    nemostream bench load riva://server:50051 --manifest heldout.jsonl --price 2.5 --label "Riva, L40S"
    nemostream bench load sherpa+ws://127.0.0.1:6006 --streams 50 --seconds 120
    nemostream bench load --compare bench-results/a.json bench-results/b.json

`harness/targets.py` lists the targets (nemostream, Riva, OpenAI realtime and HTTP, sherpa-onnx, vLLM) and has the
interface for others (MODULE:CLASS@ADDRESS). The server runs already. The load generator runs in `--processes` processes
of its own, with higher priority if the system permits it.

Each stream sends recordings in real time, `--packet-ms` of audio per message when its last sample exists, after 0, 280,
560 or 840 ms of quiet noise (so that words are at different positions in a chunk) and followed by `--pause` seconds of
it, waits for the last result, and connects again. Streams start at random times, with the recordings in random order.
First, one stream sends each recording once (*unloaded*). Then the number of streams is doubled, from `--first-streams`,
and bisected with probes of `--probe-seconds` to within 5 %, and the largest number that passes is held for `--seconds`,
at least two minutes; if the hold fails, a number 5 % smaller is held. With `--streams`, each number is measured for
`--seconds` instead. A number passes if:

* no stream fails or is disconnected, and the server reads the audio in time;
* p95 of the partial latency and of finals is at most `--limit-ms` above that of the unloaded run;
* the partial latency does not grow: its median in the last third exceeds that of the first third by at most half of
  the limit.

Definitions. Recordings of which the time in question is in the first three seconds of a run, or after its end, are not
timed.

* *Partial latency* (speech to text): from the end of a word in the audio until the word is in the received text at its
  final place, and not changed later. Words are compared without case and punctuation. The ends are those of the model
  `--bundle`, which transcribes the recordings offline; words of the server that are not in its transcript are not
  timed. Without half of its words no partial latency is reported, and a number of streams fails if the unloaded run
  has one. The model reports the end of a word late (docs/transcripts.md): `--delay-ms` is subtracted, by default the
  median delay of the packaged model, 220 ms, and 0 for other models. It is the same for all servers. The delay of
  single words varies, so a latency can be negative.
* *Final* (end of speech to final): from the last 20 ms of a recording that are at most 30 dB below its loudest 20 ms
  until the last utterance with text is final. It contains the silence after which the server ends an utterance. If the
  server waits for the end of the audio, it contains the pause: the row counts these finals as *by request*. With
  `--pause 0` all finals are by request.
* *Texts that differ*: of the texts received under load, those that differ from the unloaded run's of the same
  recording.
* *WER*: of the complete texts, against the transcripts of the manifest; each recording counts once, with the mean of
  its errors.
* *CPU seconds per audio hour*: of the processes `--pid` and their descendants on this machine; *GPU seconds*: mean
  utilisation by `nvidia-smi` times duration, of all GPUs of this machine, if there are any.
* *Cost*: `--price` per hour of the machine, divided by the number of streams, for 1,000 hours of streams.

The load generator is late if the 99th percentile of its lateness exceeds 20 ms: of the packets that it sends, and of
its event loop. Packets after a message that the server did not accept in time do not count. A run with a late generator
has no figures. If it is the unloaded run, the run that limits the search, or every run of `--streams`, the benchmark
ends with an error instead of a result.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream.benchmarks import command
from nemostream.benchmarks.accuracy import NORMALIZERS, normalizer, plain, require_word_errors, word_errors
from nemostream.benchmarks.capacity import find_streams, latency_drift
from nemostream.benchmarks.finals import LEADS, PAUSE, make_take
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import CorpusUtterance, packaged, read_manifest
from nemostream.benchmarks.harness.paced_streams import MAX_LATENESS, Generator, Recording, RunResult, StreamResult
from nemostream.benchmarks.harness.plots import (
    Bar,
    BarChart,
    BarPanel,
    Chart,
    Curve,
    CurveChart,
    CurvePanel,
    probe_curves,
)
from nemostream.benchmarks.harness.records import Progress, Record, Row, no_progress, percentile
from nemostream.benchmarks.harness.server_process import cpu_seconds, descendants
from nemostream.benchmarks.harness.targets import API_KEY, create_target
from nemostream.bundle import Bundle
from nemostream.errors import NemostreamError, OptionError, StreamError

MIN_HOLD = 120.0  # seconds
PERCENT = 95  # of the latencies that the limit applies to
_SETTLING = 3.0  # seconds at the start of a run that are not timed
_MIN_MATCHED = 0.5  # share of the words of the alignment, without which no partial latency is reported
_PARTIAL, _FINAL = "partial", "final"  # names of the figures
_NAMES = {_PARTIAL: "speech to text", _FINAL: "end of speech to final"}
_UNLOADED, _PROBE, _HOLD = "unloaded", "probe", "hold"  # phases
_DEMO_DELAY_MS = 220  # of the ends of words of the packaged model (docs/transcripts.md)
_KEPT_ERRORS = 3  # different errors that a row lists


@dataclass(frozen=True)
class Item:
    """A recording with its transcript and the ends of its words in seconds, by the alignment."""

    recording: Recording
    text: str
    ends: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Baseline:
    """What the unloaded run measured: texts by recording, and the percentile of the latencies by name."""

    texts: Sequence[str]
    ms: Mapping[str, float]


def measure_load(
    target: str,
    utterances: Sequence[CorpusUtterance],
    bundle: Bundle,
    *,
    label: str | None = None,
    streams: Sequence[int] | None = None,
    first_streams: int = 8,
    max_streams: int = 1024,
    seconds: float = MIN_HOLD,
    probe_seconds: float = 15.0,
    limit_ms: float = 500.0,
    packet_ms: int = 40,
    pause: float = PAUSE,
    delay_ms: int | None = None,
    processes: int = 1,
    pids: Sequence[int] = (),
    price: float | None = None,
    normalise: str = "english",
    progress: Progress = no_progress,
) -> Record:
    """Measure a server and return the result; `bundle` aligns the words of the recordings.

    Raises `OptionError` for invalid options, `AudioError` if a recording cannot be read, `BackendError` if a package
    is missing, `StreamError` if a stream of the unloaded run fails, and `NemostreamError` if
    the load generator was late.
    """
    if min(seconds, probe_seconds, limit_ms, packet_ms, processes, first_streams, max_streams, *(streams or ())) <= 0:
        raise OptionError("durations, numbers of streams and processes, and the limit must be positive.")
    if streams is None and seconds < MIN_HOLD:
        raise OptionError(f"seconds is {seconds:g}; a hold takes at least {MIN_HOLD:.0f} s (or set the streams).")
    if pause < 0 or (price is not None and price <= 0):
        raise OptionError("the pause must not be negative, and the price must be positive.")
    for pid in pids:
        if not Path(f"/proc/{pid}").exists():
            raise OptionError(f"there is no process {pid} (--pid) on this machine.")
    require_word_errors()
    rate = create_target(target).sample_rate
    progress("aligning the words of the recordings")
    if delay_ms is None:
        delay_ms = _DEMO_DELAY_MS if bundle.path == nemostream.demo_bundle() else 0
    items = align(utterances, bundle, rate, pause, delay_ms)
    rows: list[Row] = []
    name = label or target.partition("?")[0]
    with Generator(target, [item.recording for item in items], packet_ms / 1000, processes) as generator:

        def run(number: int, duration: float, phase: str, baseline: Baseline | None = None) -> tuple[Row, RunResult]:
            kind = "" if baseline else ", unloaded"
            progress(f"{tables.counted(number, 'stream')} for {duration:.0f} s{kind}")
            with Usage(pids) as usage:
                result = generator.run(number, duration, seed=len(rows), once=baseline is None)
            case = {"server": name, "streams": number, "phase": phase}
            row = evaluate(result, items, case, duration, baseline, limit_ms, normalizer(normalise))
            row["values"] |= usage.per_audio_hour(result.audio_seconds) if row["values"]["valid"] else {}
            rows.append(row)
            return row, result

        length = sum(len(item.recording.pcm) for item in items) / (2 * rate)
        unloaded, result = run(1, length, _UNLOADED)
        _check_unloaded(unloaded)
        latencies = {name: found[f"p{PERCENT}"] for name, found in unloaded["figures"].items()}
        baseline = Baseline([each.text for each in result.streams], latencies)
        if streams is None:

            def probe(number: int, duration: float, confirming: bool = False) -> Row:
                return run(number, duration, _HOLD if confirming else _PROBE, baseline)[0]

            found = find_streams(probe, seconds, probe_seconds, max_streams, first_streams)
            _check_limit(rows, found)
        else:
            measured = [run(number, seconds, _HOLD, baseline)[0] for number in streams]
            if not any(row["values"]["valid"] for row in measured):
                raise NemostreamError(_late_sentence(measured[0]))
            found = max((row["case"]["streams"] for row in measured if row["values"]["passed"]), default=0)
    for row in rows:
        if price is not None and row["case"]["phase"] == _HOLD:
            row["values"]["cost_per_1000_stream_hours"] = cost(price, row["case"]["streams"])
    return records.record(
        "load",
        rows,
        model={"name": name},
        method={
            "target": target,
            "streams": found,
            "searched": streams is None,
            "max_streams": max_streams,
            "seconds": seconds,
            "probe_seconds": probe_seconds,
            "limit_ms": limit_ms,
            "percent": PERCENT,
            "packet_ms": packet_ms,
            "pause": pause,
            "processes": processes,
            "price": price,
            "normalizer": normalise,
            "aligned_by": bundle.manifest.name,
            "delay_ms": delay_ms,
            "recordings": len(items),
            "corpus": _digest(items),
        },
    )


def align(
    utterances: Sequence[CorpusUtterance], bundle: Bundle, rate: int, pause: float, delay_ms: int = 0
) -> list[Item]:
    """Return the recordings at `rate` Hz between quiet noise, the last of it `pause` seconds, and their words' ends.

    Recordings begin at different times of a chunk, as in `bench finals`. The ends are `delay_ms` before those that the
    model reports.
    """
    import soxr

    model_rate, items = bundle.manifest.features.sample_rate, []
    chunk_ms = max(chunk.ms for chunk in bundle.manifest.chunks)
    with nemostream.load(bundle.path, chunk_ms, capacity=4, delay_ms=delay_ms) as model:
        for number, utterance in enumerate(utterances):
            clip, lead = utterance.samples(model_rate), LEADS[number % len(LEADS)]
            ends = [(key, lead + word.end) for word in model.transcribe(clip).words for key in plain(word.text).split()]
            take = make_take(clip, utterance.text, lead, model_rate, pause=pause)
            samples = take.samples if rate == model_rate else soxr.resample(take.samples, model_rate, rate)
            pcm = np.clip(np.rint(32768 * samples), -32768, 32767).astype("<i2").tobytes()
            items.append(Item(Recording(pcm, take.speech_end / model_rate), utterance.text, ends))
    return items


def _digest(items: Sequence[Item]) -> str:
    """Return a digest of what does not depend on the target: results with the same digest can be compared."""
    parts = [f"{item.text} {item.recording.speech_end} {list(item.ends)}" for item in items]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _check_unloaded(row: Row) -> None:
    values = row["values"]
    if not values["valid"]:
        raise NemostreamError(_late_sentence(row))
    if values["errors"] or values["disconnects"]:
        raise StreamError(
            f"a stream failed without load: {values['messages'][0].rstrip('.')}; check that the server runs at TARGET, "
            f"and its API key in {API_KEY}."
        )
    if not row["figures"]:
        raise StreamError("the server returned no text without load: check the address, the options and the language.")


def _check_limit(rows: Sequence[Row], found: int) -> None:
    """Raise `NemostreamError` if the smallest number above `found` that failed did so for a late generator only."""
    failed = [row for row in rows if row["case"]["streams"] > found and not row["values"]["passed"]]
    smallest = min((row["case"]["streams"] for row in failed), default=0)
    limiting = [row for row in failed if row["case"]["streams"] == smallest]
    if limiting and not any(row["values"]["valid"] for row in limiting):
        raise NemostreamError(f"{_late_sentence(limiting[0])} {tables.counted(found, 'stream')} passed.")


def _late_sentence(row: Row) -> str:
    late = row["values"]["lateness_ms"]
    return (
        f"the load generator was late with {tables.counted(row['case']['streams'], 'stream')}: p99 {late:.0f} ms, "
        f"allowed {1000 * MAX_LATENESS:.0f} ms; use more --processes or another machine for the load generator."
    )


def cost(price: float, streams: int) -> float:
    """Return the price of 1,000 hours of streams, for a machine of `price` per hour that serves `streams`."""
    return 1000 * price / streams


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluate(
    run: RunResult,
    items: Sequence[Item],
    case: Mapping[str, Any],
    seconds: float,
    baseline: Baseline | None,
    limit_ms: float,
    normalise: Callable[[str], str],
) -> Row:
    """Return a row whose values include whether the number of streams passed, and the reasons why it failed.

    `baseline` is None for the unloaded run itself. The row of a run with a late load generator has no figures.
    """
    lateness = 1000 * max(percentile(each, 99) if each else 0.0 for each in (run.lateness, run.ticks))
    generator = {"lateness_ms": round(lateness, 2), "generator_cpu_seconds": round(run.cpu_seconds, 2)}
    if lateness > 1000 * MAX_LATENESS:
        failure = f"the load generator was late (p99 {lateness:.0f} ms)"
        return records.row(case, {}, {"passed": False, "valid": False, "failures": [failure], **generator})
    begin, end = (min(_SETTLING, seconds / 5), seconds) if baseline else (0.0, float("inf"))
    complete = [stream for stream in run.streams if not stream.error]
    words = [each for stream in complete for each in word_latencies(stream, items[stream.recording].ends)]
    matched, aligned = len(words), sum(len(items[stream.recording].ends) for stream in complete)
    is_aligned = matched >= _MIN_MATCHED * aligned
    partials = [(at, latency) for at, latency in words if begin <= at <= end] if is_aligned else []
    finals, requested = list[float](), 0
    for stream in complete:
        speech_end = stream.start + items[stream.recording].recording.speech_end
        if stream.final is not None and begin <= speech_end <= end:
            finals.append(stream.final - speech_end)
            requested += stream.final >= stream.finished
    errors = Counter(stream.error for stream in run.streams if stream.error)
    disconnects = sum(stream.disconnected for stream in run.streams)
    times = {_PARTIAL: [1000 * latency for _, latency in partials], _FINAL: [1000 * final for final in finals]}
    failures = []
    if not finals:
        failures.append("no finals")
    if not is_aligned and baseline and _PARTIAL in baseline.ms:
        failures.append(f"only {matched} of {aligned} words were received")
    if errors:
        failures.append(f"{tables.counted(errors.total(), 'failed stream')}, first: {next(iter(errors))}")
    if run.max_open < case["streams"]:
        failures.append(f"only {run.max_open} streams were open at the same time")
    if run.blocked and max(run.blocked) > MAX_LATENESS:
        failures.append(f"the server did not accept {len(run.blocked)} messages in time")
    drift = latency_drift(partials) * 1000 if len(partials) > 2 and baseline else 0.0
    if drift > limit_ms / 2:
        failures.append(f"the partial latency grew by {drift:.0f} ms")
    for name, samples in times.items():
        if baseline and samples and name in baseline.ms:
            slow = percentile(samples, PERCENT)
            if slow > baseline.ms[name] + limit_ms:
                failures.append(f"p{PERCENT} of {_NAMES[name]} is {slow:.0f} ms, unloaded {baseline.ms[name]:.0f} ms")
    by_recording = _errors_by_recording(complete, items, normalise)
    spoken = sum(count for _, count in by_recording)
    values = {
        "passed": not failures,
        "valid": True,
        "failures": failures,
        "seconds": round(seconds, 1),
        "audio_seconds": round(run.audio_seconds, 1),
        "texts": len(complete),
        "differing": sum(stream.text != baseline.texts[stream.recording] for stream in complete) if baseline else 0,
        "errors": errors.total() - disconnects,
        "disconnects": disconnects,
        "messages": list(errors)[:_KEPT_ERRORS],
        "wer": sum(count for count, _ in by_recording) / spoken if spoken else None,
        "by_utterance": by_recording,
        "finals_by_request": requested,
        "matched_words": round(matched / aligned, 3) if aligned else None,
        "drift_ms": round(drift, 1),
        "blocked": len(run.blocked),
        **generator,
    }
    return records.row(case, {name: [round(x, 1) for x in samples] for name, samples in times.items()}, values)


def _errors_by_recording(
    streams: Sequence[StreamResult], items: Sequence[Item], normalise: Callable[[str], str]
) -> list[list[float]]:
    """Return [errors, words] of each recording, with the mean of the errors of its streams."""
    found: dict[int, list[tuple[int, int]]] = {}
    for stream in streams:
        counts = _word_errors(items[stream.recording].text, stream.text, normalise)
        found.setdefault(stream.recording, []).append(counts)
    return [[round(statistics.mean(errors for errors, _ in each), 3), each[0][1]] for _, each in sorted(found.items())]


@cache
def _word_errors(reference: str, text: str, normalise: Callable[[str], str]) -> tuple[int, int]:
    found = word_errors([reference], [text], normalise)
    return found["errors"], found["words"]


def settled_words(texts: Sequence[tuple[float, str]]) -> list[tuple[str, float]]:
    """Return the words of the last text, and the time since which each has been at its place in all texts.

    `texts` are pairs of a time and the whole text since then.
    """
    last = plain(texts[-1][1]).split() if texts else []
    since, places = [0.0] * len(last), set(range(len(last)))
    for at, text in reversed(texts):
        shown = plain(text).split()
        places = {place for place in places if place < len(shown) and shown[place] == last[place]}
        for place in places:
            since[place] = at
    return list(zip(last, since, strict=True))


def word_latencies(stream: StreamResult, ends: Sequence[tuple[str, float]]) -> list[tuple[float, float]]:
    """Return, of each word that the alignment has too, the time of its end in the audio and its latency, in seconds."""
    settled = settled_words(stream.texts)
    found = []
    for aligned, received in records.matches([word for word, _ in ends], [word for word, _ in settled]):
        end = stream.start + ends[aligned][1]
        found.append((end, settled[received][1] - end))
    return found


# -- CPU and GPU -------------------------------------------------------------------------------------------------------


class Usage:
    """CPU seconds of processes and their descendants, and GPU seconds of this machine, during a `with` block."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids, self._utilisations, self._stopped = pids, list[float](), threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Usage:
        self._cpu, self._start = self._cpu_seconds(), time.monotonic()
        if self._pids:
            self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._cpu, self._seconds = self._cpu_seconds() - self._cpu, time.monotonic() - self._start
        if self._pids:
            self._sampler.join()

    def per_audio_hour(self, audio_seconds: float) -> dict[str, float]:
        """Return the values of a row; empty if no processes were given."""
        if not self._pids or not audio_seconds:
            return {}
        used = {"cpu": self._cpu}
        if self._utilisations:
            used["gpu"] = statistics.mean(self._utilisations) * self._seconds
        return {f"{name}_seconds_per_audio_hour": round(3600 * x / audio_seconds, 1) for name, x in used.items()}

    def _cpu_seconds(self) -> float:
        total = 0.0
        for pid in descendants(self._pids):
            with suppress(OSError):  # it ended
                total += cpu_seconds(pid)
        return total

    def _sample(self) -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self._stopped.is_set():
            try:
                output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
                self._utilisations.append(sum(float(line) / 100 for line in output.splitlines()))
            except (OSError, subprocess.CalledProcessError, ValueError):  # no GPU, or no utilisation ("[N/A]")
                return
            self._stopped.wait(1.0)


# -- report ------------------------------------------------------------------------------------------------------------


def compare(results: Sequence[Record]) -> Record:
    """Return one result with the rows of several servers, with the machine and method of the first.

    Raises `OptionError` if they are not results of this benchmark with the same recordings.
    """
    if any(result["benchmark"] != "load" for result in results):
        raise OptionError("only results of `nemostream bench load` can be compared.")
    for name in ("corpus", "pause", "limit_ms", "packet_ms"):
        if len(values := {result["method"][name] for result in results}) > 1:
            raise OptionError(f"the results differ in {name}: {', '.join(map(str, sorted(values)))}.")
    names = [row["case"]["server"] for result in results for row in result["rows"][:1]]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise OptionError(f"two results have the label {twice!r}; measure with different --label.")
    machines = {tables.machine(each["hardware"]) for each in results}
    method = results[0]["method"] | {
        "streams": {name: result["method"]["streams"] for name, result in zip(names, results, strict=True)},
        "target": [result["method"]["target"] for result in results],
        "price": None,
        "generator_machines": sorted(machines),
        "searched": all(result["method"]["searched"] for result in results),
    }
    rows = [row for result in results for row in result["rows"]]
    model = results[0]["model"]  # of all servers, or else their names are in the rows
    if any(result["model"] != model for result in results):
        model = {"name": f"{len(names)} servers"}
    return results[0] | {"rows": rows, "method": method, "model": model}


def _servers(result: Record) -> dict[str, list[Row]]:
    servers: dict[str, list[Row]] = {}
    for row in result["rows"]:
        servers.setdefault(row["case"]["server"], []).append(row)
    return servers


def _best(rows: Sequence[Row]) -> Row | None:
    """Return the row of the largest number of streams that was held."""
    held = [row for row in rows if row["case"]["phase"] == _HOLD and row["values"]["passed"]]
    return max(held, key=lambda row: row["case"]["streams"], default=None)


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    method, servers = result["method"], _servers(result)
    text = (
        f"{tables.counted(method['recordings'], 'recording')}, {method['packet_ms']} ms of audio per message, "
        f"{method['pause']:g} s of quiet noise after each recording. Times in milliseconds; speech to text: from the "
        f"end of a word (aligned by the model *{method['aligned_by']}*, less {method['delay_ms']} ms) until it is "
        f"received; final: from the end of speech. A number passes if p{method['percent']} is at most "
        f"{method['limit_ms']:g} ms above the unloaded run."
    )
    if machines := method.get("generator_machines", ())[1:]:
        text += f" **The results are from {len(machines) + 1} machines.**"
    parts = [text]
    if len(servers) > 1:
        if not method["searched"]:
            parts.append("The numbers of streams were given: the servers may hold more than the largest that passed.")
        held = [row for rows in servers.values() if (row := _best(rows))]
        parts.append(_table(sorted(held, key=lambda row: -row["case"]["streams"])))
        parts += [f"No number of streams passed: {name}." for name, rows in servers.items() if not _best(rows)]
    else:
        parts.append(_finding(result))
    for name, rows in servers.items():
        parts += [f"**{name}**"] if len(servers) > 1 else []
        parts.append(_table(sorted(rows, key=_order), with_server=False))
    return "\n\n".join(parts) + "\n"


def _order(row: Row) -> tuple[bool, bool, int]:
    return row["case"]["phase"] != _UNLOADED, row["case"]["phase"] == _HOLD, row["case"]["streams"]


def _table(rows: Sequence[Row], with_server: bool = True) -> str:
    percents = ("p50", "p95", "p99")
    head = ["server", "phase", "streams", *(f"speech to text, {name}" for name in percents)]
    head += [*(f"final, {name}" for name in percents), "by request", "WER", "texts that differ", "errors"]
    head += ["disconnects", "CPU s per audio hour", "GPU s per audio hour", "cost of 1,000 stream hours", "passed"]
    lines = []
    for row in rows:
        case, values = row["case"], row["values"]
        line = [case["server"] if with_server else "", "" if with_server else case["phase"], case["streams"]]
        for name in (_PARTIAL, _FINAL):
            found = row["figures"].get(name)
            line += [f"{found[percent]:.0f}" if found else "" for percent in percents]
        if values["valid"]:
            line += [
                f"{values['finals_by_request']} of {len(row['ms'][_FINAL])}" if values["finals_by_request"] else ""
            ]
            line += [tables.percent(values["wer"], 1)]
            line += ["" if case["phase"] == _UNLOADED else f"{values['differing']} of {values['texts']}"]
            line += [values["errors"], values["disconnects"]]
        else:
            line += [""] * 5
        for name in ("cpu_seconds_per_audio_hour", "gpu_seconds_per_audio_hour", "cost_per_1000_stream_hours"):
            line.append(tables.digits(values[name]) if name in values else "")
        lines.append([*line, "" if with_server or case["phase"] == _UNLOADED else tables.verdict(values)])
    return tables.markdown(head, lines)


def _finding(result: Record) -> str:
    """Return a sentence about the number of streams: the title of the plot."""
    servers = _servers(result)
    best = {name: row for name, rows in servers.items() if (row := _best(rows))}
    if not best:
        return "No number of streams passed"
    if len(servers) == 1:
        ((name, row),) = best.items()
        bound = "" if row["case"]["streams"] < result["method"]["max_streams"] else " or more"
        found = f"{name}: {tables.counted(row['case']['streams'], 'real-time stream')}{bound}"
        figures = [
            f"{_NAMES[each]} p95 {row['figures'][each]['p95']:.0f} ms" for each in _NAMES if each in row["figures"]
        ]
        return ", ".join([found, *figures])
    if not result["method"]["searched"]:
        return f"Latencies of {len(servers)} servers by number of streams"
    first, *others = sorted(best.items(), key=lambda each: -each[1]["case"]["streams"])
    text = f"{first[0]} serves {tables.counted(first[1]['case']['streams'], 'real-time stream')}"
    if not others:
        return text
    name, row = others[0]
    ratio = first[1]["case"]["streams"] / row["case"]["streams"]
    return f"{text}, {ratio:.1f} times as many as {name}"


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the latencies by number of streams, and, after searches, that of the capacity of servers."""
    servers, method, found = _servers(result), result["method"], dict[str, Chart]()
    lines = [(name, rows, "p95") for name, rows in servers.items()]  # label, rows and percentile
    if len(servers) == 1:
        lines = [(percent, result["rows"], percent) for percent in ("p99", "p95", "p50")]
    panels = []
    for figure, heading in _NAMES.items():
        curves = list[Curve]()
        for series, (label, rows, percent) in enumerate(lines):
            curves += probe_curves(label, _points(rows, figure, percent), series)
        if curves:
            panels.append(CurvePanel(heading, curves))
    if panels:
        low = min(y for panel in panels for curve in panel.curves for _, y in curve.points)
        measure = "Time" if len(servers) == 1 else "95th percentile of the time"
        subtitle = (
            f"{measure} from the end of a word until it is received, and from the end of speech to the final. Filled "
            f"marks passed, crosses failed: more than {method['limit_ms']:g} ms above the unloaded run, or errors."
        )
        x_label = "concurrent real-time streams"
        found["latency"] = CurveChart(_finding(result), subtitle, panels, x_label, " ms", log_y=low > 0)
    best = {name: row for name, rows in servers.items() if (row := _best(rows))}
    if len(servers) > 1 and best and method["searched"]:  # given numbers of streams are not capacities
        found["servers"] = _bars(result, best)
    return found


def _points(rows: Sequence[Row], figure: str, percent: str) -> list[tuple[float, float, bool]]:
    """Return number of streams, percentile of a figure, and whether it passed, of each run that has the figure."""
    return [
        (row["case"]["streams"], row["figures"][figure][percent], row["values"]["passed"])
        for row in rows
        if figure in row["figures"]
    ]


def _bars(result: Record, best: Mapping[str, Row]) -> BarChart:
    rows = sorted(best, key=lambda name: -best[name]["case"]["streams"])
    counts = [best[name]["case"]["streams"] for name in rows]
    panels = [BarPanel("streams", "concurrent", [Bar([count], str(count)) for count in counts])]
    for figure, scale, unit, form in (
        (_PARTIAL, 1, "milliseconds", "{:.0f} ms"),
        (_FINAL, 1000, "seconds", "{:.2f} s"),
    ):
        bars: list[Bar | None] = []
        for name in rows:
            if found := best[name]["figures"].get(figure):
                median, high = found["p50"] / scale, found["p95"] / scale
                bars.append(Bar([median], form.format(median), (median, high)))
            else:
                bars.append(None)
        panels.append(BarPanel(_NAMES[figure], unit, bars))
    subtitle = (
        f"Real-time streams held for {result['method']['seconds']:g} s, and latencies with that many streams: median; "
        "whiskers: up to the 95th percentile."
    )
    ours = [name for name in rows if name.startswith("nemostream")]
    return BarChart(_finding(result), subtitle, rows, panels, ours or None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("load", __doc__)
    parser.add_argument("target", nargs="?", metavar="TARGET", help="server, such as nemostream+ws://127.0.0.1:8000")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="RESULT", help="results to compare (no TARGET)")
    parser.add_argument("--label", help="name of the server in tables and plots (default: the target)")
    parser.add_argument("--manifest", type=Path, help="NeMo manifest of the recordings (default: the packaged clip)")
    parser.add_argument("--recordings", type=int, default=8, help="number of recordings of the manifest to send")
    parser.add_argument("--bundle", type=Path, help="model that aligns the words (default: the packaged model)")
    parser.add_argument("--streams", type=int, nargs="+", help="numbers of streams (default: search the largest)")
    parser.add_argument("--first-streams", type=int, default=8, help="first number of streams of the search")
    parser.add_argument("--max-streams", type=int, default=1024, help="largest number of streams of the search")
    parser.add_argument("--seconds", type=float, default=MIN_HOLD, help="duration of the hold, or of each of --streams")
    parser.add_argument("--probe-seconds", type=float, default=15.0, help="duration of a probe of the search")
    parser.add_argument("--limit-ms", type=float, default=500.0, help="p95 may exceed the unloaded run's by this much")
    parser.add_argument("--packet-ms", type=int, default=40, help="audio per message, in ms")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds of quiet noise after a recording")
    parser.add_argument("--delay-ms", type=int, help="delay of the aligning model's times (default: 220 or 0)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the load generator")
    parser.add_argument("--pid", type=int, nargs="+", default=[], help="processes of the server on this machine")
    parser.add_argument("--price", type=float, help="price of the server's machine per hour, in any currency")
    parser.add_argument("--normalizer", default="english", choices=NORMALIZERS, help="text normaliser of the WER")
    options = parser.parse_args(arguments)
    if (options.target is None) == (options.compare is None):
        parser.error("give either a TARGET or --compare RESULT ...")
    command.run(lambda: _measure(options), options)


def _measure(options: argparse.Namespace) -> Record:
    if options.compare:
        return compare([records.read(path) for path in options.compare])
    bundle = command.open_bundle(options.bundle)
    utterances = read_manifest(options.manifest) if options.manifest else packaged(bundle.manifest)
    return measure_load(
        options.target,
        utterances[: options.recordings],
        bundle,
        label=options.label,
        streams=options.streams,
        first_streams=options.first_streams,
        max_streams=options.max_streams,
        seconds=options.seconds,
        probe_seconds=options.probe_seconds,
        limit_ms=options.limit_ms,
        packet_ms=options.packet_ms,
        pause=options.pause,
        delay_ms=options.delay_ms,
        processes=options.processes,
        pids=options.pid,
        price=options.price,
        normalise=options.normalizer,
        progress=records.report_progress,
    )


if __name__ == "__main__":
    main()
