"""Accuracy and latency of partials and finals of live streams, with one and with two chunk sizes.

    nemostream bench finals --manifest examples/demo_model/heldout/heldout.jsonl --normalizer basic
    nemostream bench finals --manifest heldout.jsonl --mode 80 1120 80+1120 --noise

A mode is a chunk size (`80`), or those of partials and of finals (`80+1120`, the option `final_chunk_ms`). Each
recording has its own stream, to which packets of 20 ms are pushed, each when the previous one has been processed. It is
preceded by 0, 280, 560 and 840 ms of quiet noise in turn, so that speech ends at different positions in a chunk, and
followed by 2.5 s of it, in which the default rule (800 ms of silence) ends the utterance. Speech ends with the last 20
ms of a recording that are at most 30 dB below its loudest 20 ms. With `--noise`, a second set has the same recordings
with white noise at 20, 15, 10 and 5 dB in turn, before, during and after the speech.

* *WER of finals*: of the finals of a stream, joined. *WER of partials*: of the text that is visible when half a second
  has passed since the end of speech, which is before most utterances end: finals, and the newest partial after them.
  The plot shows it from the end of speech to two seconds later. Only the audio determines when a text is visible here;
  the time of the steps is not included. Intervals are 95 % bootstrap intervals over the recordings. A difference is
  that from the mode of the same partials without an accurate lane, over the same recordings.
* *Revised*: words of partials that a later partial or the final changes or removes, relative to the words of finals
  (unstable partial word ratio, Shangguan et al. 2020). The last word of a partial may grow without being revised.
* *Final by silence*: time from the end of speech to the final. It has two parts: the audio up to the packet that
  completes the final, which does not depend on the machine, and the time from pushing this packet to the final, for one
  stream on an idle model. *Final by request*: time from `end_utterance()`, called at the end of the recording, to the
  final. Both on the first set only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks import command
from nemostream.benchmarks.accuracy import NORMALIZERS, normalizer, require_word_errors, word_errors
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import CorpusUtterance, add_noise, packaged, read_manifest
from nemostream.benchmarks.harness.load import PACKET
from nemostream.benchmarks.harness.plots import Bar, BarChart, BarPanel, Chart, Curve, CurveChart, CurvePanel
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress, rate_interval
from nemostream.benchmarks.harness.timed import timed_backend
from nemostream.bundle import Bundle
from nemostream.errors import OptionError
from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.events import Event

Floats = NDArray[np.float32]

MODES = ("80", "160", "560", "1120", "80+560", "80+1120", "160+1120")
LEADS = (0.0, 0.28, 0.56, 0.84)  # seconds before a recording
PAUSE = 2.5  # seconds after a recording: utterances end in it at every chunk size
DECIBELS = (20, 15, 10, 5)  # signal-to-noise ratios of the set with noise
DELAYS = tuple(range(0, 2001, 100))  # ms after the end of speech, at which the visible text is compared
PARTIAL_MS = 500  # that of the WER of partials
_LEVEL = 1e-3  # standard deviation of the quiet noise
_SPEECH_DB = 30  # speech is at most so much quieter than the loudest part of its recording
_BLOCK = 0.02  # seconds
_CONCURRENT = 16  # streams whose times are not measured


@dataclass(frozen=True)
class Mode:
    """The chunk sizes of partials and finals in milliseconds; `final_chunk_ms` is None if they are the same."""

    chunk_ms: int
    final_chunk_ms: int | None = None

    @classmethod
    def of(cls, text: str) -> Mode:
        """Return the mode of "80" or "80+1120". Raises `OptionError` if it is neither."""
        sizes = text.split("+")
        if len(sizes) > 2 or not all(size.isdecimal() for size in sizes):
            raise OptionError(f"mode is {text!r}; it must be a chunk size, or two, such as 80 or 80+1120.")
        return cls(*map(int, sizes))

    def __str__(self) -> str:
        return "+".join(str(ms) for ms in (self.chunk_ms, self.final_chunk_ms) if ms is not None)


@dataclass(frozen=True)
class Take:
    """One recording as it is pushed: samples [N] and where its speech and the recording end, in samples."""

    samples: Floats
    speech_end: int
    recording_end: int
    text: str


@dataclass
class Transcript:
    """What a stream displayed. Times are seconds of audio pushed."""

    finals: list[str] = field(default_factory=list)
    revised: int = 0  # words
    visible: list[tuple[float, str]] = field(default_factory=list)  # the whole text after each change
    final_audio: float = 0.0  # when the last final was complete
    final_seconds: float = 0.0  # from pushing the packet that completed it
    requested_seconds: float = 0.0  # from `end_utterance`

    def at(self, seconds: float) -> str:
        """Return the text that is visible when `seconds` of audio were pushed."""
        return next((text for since, text in reversed(self.visible) if since <= seconds), "")


def measure_finals(
    bundle: Bundle,
    utterances: Sequence[CorpusUtterance],
    modes: Sequence[str] = MODES,
    *,
    noise: bool = False,
    normalise: str = "english",
    leads: Sequence[float] = LEADS,
    precision: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Measure all modes and return the result; `leads` are seconds of quiet noise before a recording.

    Raises `OptionError` for invalid options, `AudioError` if a recording cannot be read, and `BackendError` if a
    package, device or engine is missing.
    """
    require_word_errors()
    normalise_text, rate = normalizer(normalise), bundle.manifest.features.sample_rate
    parsed = [Mode.of(mode) for mode in modes]
    sizes = sorted({ms for mode in parsed for ms in (mode.chunk_ms, mode.final_chunk_ms) if ms is not None})
    chunks = [bundle.manifest.chunk(ms) for ms in sizes]
    clips = [(utterance.samples(rate), utterance.text) for utterance in utterances]
    sets = {name: _takes(clips, leads, rate, name == "noise") for name in ("clean", *(["noise"] if noise else []))}
    others, rows = OtherWork(), list[Row]()
    slots = 4 * _CONCURRENT  # two lanes, and branches
    with (
        timed_backend(
            bundle, chunks, precision, slots, device=device, threads=threads, engines=engines, max_batch=_CONCURRENT
        ) as backend,
        Model(bundle, backend, chunks[0].ms) as model,
    ):
        for name, takes in sets.items():
            for mode in parsed:
                progress(f"{name}, {mode} ms")
                timed = name == "clean"
                transcripts = transcribe(model, takes, mode, timed=timed, requests=len(clips))
                case = {"set": name, "mode": str(mode), "precision": precision}
                rows.append(_row(case, takes, transcripts, normalise_text, len(clips), rate, timed))
    return records.record(
        "finals",
        rows,
        model=records.model_of(bundle.manifest),
        method={
            "normalizer": normalise,
            "recordings": len(clips),
            "leads": list(leads),
            "pause": PAUSE,
            "decibels": list(DECIBELS) if noise else [],
            "delays_ms": list(DELAYS),
            "silence_ms": Endpoint().silence_ms,
            "device": device,
            "threads": threads or records.cores(),
            "other_work_cores": round(others.cores(), 3),
        },
    )


def _takes(clips: Sequence[tuple[Floats, str]], leads: Sequence[float], rate: int, noise: bool) -> list[Take]:
    """Return all recordings after each lead. With `noise`, each is at another signal-to-noise ratio after each lead."""
    return [
        make_take(clip, text, lead, rate, DECIBELS[(number + index) % len(DECIBELS)] if noise else None, index)
        for index, lead in enumerate(leads)
        for number, (clip, text) in enumerate(clips)
    ]


def speech_end(clip: Floats, rate: int) -> int:
    """Return the sample at which speech ends: the end of the last block that is loud enough. 0 if there is none."""
    size = round(_BLOCK * rate)
    blocks = [float((clip[begin : begin + size] ** 2).mean()) for begin in range(0, len(clip), size)]
    limit = max(blocks, default=0.0) / 10 ** (_SPEECH_DB / 10)
    loud = [number for number, power in enumerate(blocks) if power and power >= limit]
    return min((loud[-1] + 1) * size, len(clip)) if loud else 0


def make_take(clip: Floats, text: str, lead: float, rate: int, decibels: float | None = None, seed: int = 0) -> Take:
    """Return a recording between `lead` seconds and `PAUSE` seconds of quiet noise, or of noise at `decibels`."""
    before, after = round(lead * rate), round(PAUSE * rate)
    if decibels is None:
        rng = np.random.default_rng([seed, len(clip)])
        quiet = (_LEVEL * rng.standard_normal(before + after)).astype(np.float32)
        samples = np.concatenate([quiet[:before], clip, quiet[before:]])
    else:
        samples = add_noise(clip, decibels, seed, before, after)
    return Take(samples, before + speech_end(clip, rate), before + len(clip), text)


def transcribe(
    model: Model,
    takes: Sequence[Take],
    mode: Mode,
    *,
    timed: bool,
    requests: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Transcript]:
    """Return the transcripts of all recordings.

    With `timed`, one stream is open at a time, and times are measured: those of finals by request for the first
    `requests` recordings.
    """
    if not timed:
        with ThreadPoolExecutor(_CONCURRENT) as pool:
            return list(pool.map(lambda take: run_stream(model, take, mode, clock), takes))
    run_stream(model, takes[0], mode, clock)  # warm up
    transcripts = [run_stream(model, take, mode, clock) for take in takes]
    for take, transcript in zip(takes[:requests], transcripts, strict=False):
        transcript.requested_seconds = time_request(model, take, mode, clock)
    return transcripts


def run_stream(model: Model, take: Take, mode: Mode, clock: Callable[[], float] = time.perf_counter) -> Transcript:
    """Push a recording packet by packet and return what was displayed."""
    rate = model.manifest.features.sample_rate
    size, transcript = round(PACKET * rate), Transcript()
    options: Any = {"chunk_ms": mode.chunk_ms, "final_chunk_ms": mode.final_chunk_ms, "endpoint": Endpoint()}
    partial = ""
    with model.stream(sample_rate=rate, **options) as stream:
        for begin in range(0, len(take.samples) + 1, size):
            packet = take.samples[begin : begin + size]
            start = clock()
            events = stream.push_events(packet) if len(packet) == size else _finish(stream, packet)
            seconds = clock() - start
            for event in events:
                if event.kind not in ("partial", "final"):
                    continue
                transcript.revised += revised_words(partial, event.text)
                if event.kind == "final":
                    transcript.finals.append(event.text)
                    transcript.final_audio, transcript.final_seconds = (begin + len(packet)) / rate, seconds
                    partial = ""
                else:
                    partial = event.text
            if events:
                transcript.visible.append(
                    ((begin + len(packet)) / rate, " ".join(filter(None, [*transcript.finals, partial])))
                )
    return transcript


def _finish(stream: Any, packet: Floats) -> list[Event]:
    return [*stream.push_events(packet), *stream.finish_events()]


def time_request(model: Model, take: Take, mode: Mode, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds from `end_utterance`, called at the end of the recording, to the final."""
    rate = model.manifest.features.sample_rate
    size = round(PACKET * rate)
    with model.stream(sample_rate=rate, chunk_ms=mode.chunk_ms, final_chunk_ms=mode.final_chunk_ms) as stream:
        for begin in range(0, take.recording_end, size):
            stream.push_events(take.samples[begin : min(begin + size, take.recording_end)])
        start = clock()
        stream.end_utterance()
        return clock() - start


def revised_words(before: str, after: str) -> int:
    """Return the number of words of `before` that `after` changes or removes; its last word may grow."""
    old, new = before.split(), after.split()
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    grown = same == len(old) - 1 and same < len(new) and new[same].startswith(old[same])
    return len(old) - same - grown


def _row(
    case: dict[str, Any],
    takes: Sequence[Take],
    transcripts: Sequence[Transcript],
    normalise: Callable[[str], str],
    recordings: int,
    rate: int,
    timed: bool,
) -> Row:
    """Return a row; its errors are those of each recording, over all takes of it."""
    references = [take.text for take in takes]

    def errors(texts: Sequence[str]) -> NDArray[Any]:
        found = [word_errors([a], [b], normalise) for a, b in zip(references, texts, strict=True)]
        counts = np.array([[each["errors"], each["words"]] for each in found])
        return counts.reshape(-1, recordings, 2).sum(axis=0)

    finals = [" ".join(each.finals) for each in transcripts]
    by_utterance = errors(finals)
    at_delays = [
        errors([each.at(take.speech_end / rate + ms / 1000) for take, each in zip(takes, transcripts, strict=True)])
        for ms in DELAYS
    ]
    words = int(by_utterance[:, 1].sum())
    values = {
        "wer": float(by_utterance[:, 0].sum() / words),
        "errors": int(by_utterance[:, 0].sum()),
        "words": words,
        "by_utterance": by_utterance.tolist(),
        "partial_by_utterance": at_delays[DELAYS.index(PARTIAL_MS)].tolist(),
        "visible_wer": [round(float(each[:, 0].sum() / words), 4) for each in at_delays],
        "revised": sum(each.revised for each in transcripts) / sum(len(text.split()) for text in finals),
        "utterances": sum(len(each.finals) for each in transcripts),
        "streams": len(takes),
    }
    times: dict[str, list[float]] = {}
    if timed:
        pairs = [(take, each) for take, each in zip(takes, transcripts, strict=True) if each.finals]
        audio = [1000 * (each.final_audio - take.speech_end / rate) for take, each in pairs]
        compute = [1000 * each.final_seconds for _, each in pairs]
        times["final"] = [a + b for a, b in zip(audio, compute, strict=True)]
        times["requested"] = [1000 * each.requested_seconds for each in transcripts[:recordings]]
        values["audio_ms"], values["compute_ms"] = (_summary(part) for part in (audio, compute))
    return records.row(case, {name: [round(x, 1) for x in samples] for name, samples in times.items()}, values)


def _summary(samples: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": round(records.percentile(samples, percent), 2) for percent in (50, 95, 99)}


# -- report ------------------------------------------------------------------------------------------------------------


def _rate(row: Row, key: str, reference: NDArray[Any] | None = None) -> str:
    """Return the rate in percent, or its difference from that of the errors `reference`, with its interval."""
    counts = np.array(row["values"][key])
    if reference is None:
        return "{:.1f} % [{:.1f}–{:.1f}]".format(*(100 * each for each in rate_interval(counts)))
    counts[:, 0] -= reference
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * each for each in rate_interval(counts)))


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    method, text = result["method"], []
    for name, rows in _sets(result).items():
        text += [f"{_set_title(name, result)}:", "", _accuracy_table(rows), ""]
    timed = [row for row in result["rows"] if row["figures"]]
    text += [
        f"Milliseconds to the final from the end of speech, by the rule of {method['silence_ms']} ms of silence. *Of "
        "it compute*: time of the model; the rest is audio. *By request*: from `end_utterance()`.",
        "",
        _latency_table(timed),
        "",
        f"{method['device']}, {method['threads']} threads. {tables.other_load([method['other_work_cores']])}",
    ]
    return "\n".join(text) + "\n"


def _sets(result: Record) -> dict[str, list[Row]]:
    sets: dict[str, list[Row]] = {}
    for row in result["rows"]:
        sets.setdefault(row["case"]["set"], []).append(row)
    return sets


def _set_title(name: str, result: Record) -> str:
    method, rows = result["method"], [row for row in result["rows"] if row["case"]["set"] == name]
    values = rows[0]["values"]
    ratios = ", ".join(map(str, method["decibels"]))
    noise = f", white noise at {ratios} dB" if name == "noise" else ""
    size = f"{method['recordings']} recordings, {values['streams']} streams, {values['words']} words"
    return f"Set *{name}*{noise}: {size}"


def _accuracy_table(rows: Sequence[Row]) -> str:
    finals = {row["case"]["mode"]: np.array(row["values"]["by_utterance"])[:, 0] for row in rows}
    lines = []
    for row in rows:
        fast, two, _ = row["case"]["mode"].partition("+")
        line = [_mode_name(row), _rate(row, "partial_by_utterance"), _rate(row, "by_utterance")]
        line.append(_rate(row, "by_utterance", finals[fast]) if two and fast in finals else "")
        lines.append([*line, tables.percent(row["values"]["revised"], 1)])
    head = ["chunks", "WER of partials [95 %]", "WER of finals [95 %]", "difference, points [95 %]", "revised"]
    return tables.markdown(head, lines)


def _latency_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        figures, compute = row["figures"], row["values"]["compute_ms"]
        line = [_mode_name(row), *(f"{figures['final'][name]:.0f}" for name in ("p50", "p95", "p99"))]
        line += [tables.digits(compute[name]) for name in ("p50", "p99")]
        lines.append([*line, *(tables.digits(figures["requested"][name]) for name in ("p50", "p95"))])
    head = ["chunks", "final, p50", "p95", "p99", "of it compute, p50", "p99", "by request, p50", "p95"]
    return tables.markdown(head, lines)


def _mode_name(row: Row) -> str:
    return row["case"]["mode"].replace("+", " + ") + " ms"


def charts(result: Record) -> dict[str, Chart]:
    """Return the plots of word error rates and times of finals, and of the text that is visible after speech."""
    sets, delays = _sets(result), [ms / 1000 for ms in result["method"]["delays_ms"]]
    first = next(iter(sets.values()))  # the only one with times
    rows = [_mode_name(row) for row in first]
    two = [name for name in rows if "+" in name]
    panels = []
    for name, each in sets.items():
        rates = [[100 * rate for rate in rate_interval(row["values"]["by_utterance"])] for row in each]
        bars = [Bar([rate], f"{rate:.1f} %", (low, high)) for rate, low, high in rates]
        panels.append(BarPanel(f"finals, {name}", "WER, %", bars))
    times = [[records.percentile(row["ms"]["final"], percent) / 1000 for percent in (50, 5, 95)] for row in first]
    bars = [Bar([median], f"{median:.2f} s", (low, high)) for median, low, high in times]
    panels.append(BarPanel("end of speech to final", "seconds", bars))
    subtitle = (
        f"Chunk size of partials and finals; bold: two sizes. WER: whiskers are 95 % bootstrap intervals over "
        f"{result['method']['recordings']} recordings. Time: median; whiskers: 5th to 95th percentile."
    )
    curves: dict[str, list[Curve]] = {"one chunk size": [], "two chunk sizes": []}
    for row in first:
        group = curves["two chunk sizes" if "+" in row["case"]["mode"] else "one chunk size"]
        points = [(delay, 100 * rate) for delay, rate in zip(delays, row["values"]["visible_wer"], strict=True)]
        group.append(Curve(_mode_name(row), points, style="plain", series=len(group)))
    visible = CurveChart(
        _visible_finding(first),
        "Word error rate of the text that is visible by the time since the end of speech. The final replaces the "
        "partial after the rule of silence.",
        [CurvePanel(heading, group) for heading, group in curves.items() if group],
        "seconds since the end of speech",
        " %",
    )
    return {"finals": BarChart(_finding(first), subtitle, rows, panels, two), "visible": visible}


def _pairs(rows: Sequence[Row]) -> tuple[Row, Row]:
    """Return the row of two chunk sizes with the largest second size, and the row of that size alone if measured."""
    by_mode = {row["case"]["mode"]: row for row in rows}
    two = max((row for mode, row in by_mode.items() if "+" in mode), key=lambda row: _final_size(row), default=rows[0])
    return two, by_mode.get(two["case"]["mode"].rpartition("+")[2], rows[0])


def _final_size(row: Row) -> int:
    return int(row["case"]["mode"].rpartition("+")[2])


def _finding(rows: Sequence[Row]) -> str:
    two, one = _pairs(rows)
    earlier = one["figures"]["final"]["p50"] - two["figures"]["final"]["p50"]
    rates = [tables.percent(row["values"]["wer"], 1) for row in (two, one)]
    return (
        f"Finals of {_mode_name(two)} chunks come {earlier / 1000:.2f} s earlier than those of {_mode_name(one)}, with "
        f"WER {rates[0]} and {rates[1]}"
    )


def _visible_finding(rows: Sequence[Row]) -> str:
    two, one = _pairs(rows)
    rates = [tables.percent(row["values"]["visible_wer"][0], 0) for row in (two, one)]
    return (
        f"When speech ends, the visible text has a WER of {rates[0]} with {_mode_name(two)} chunks, and of {rates[1]} "
        f"with {_mode_name(one)}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("finals", __doc__)
    command.add_engine_options(parser)
    parser.add_argument("--precision", default="fp32", help="precision of the engine")
    parser.add_argument("--manifest", type=Path, help="NeMo manifest (default: the packaged clip)")
    parser.add_argument("--mode", nargs="+", default=list(MODES), help="chunk sizes in ms: one, or PARTIALS+FINALS")
    parser.add_argument("--noise", action="store_true", help="also measure with white noise")
    parser.add_argument("--normalizer", default="english", choices=NORMALIZERS, help="text normaliser")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = command.open_bundle(options.bundle)
        return measure_finals(
            bundle,
            read_manifest(options.manifest) if options.manifest else packaged(bundle.manifest),
            options.mode,
            noise=options.noise,
            normalise=options.normalizer,
            precision=options.precision,
            **command.engine_arguments(options),
        )

    command.run(measure, options)


if __name__ == "__main__":
    main()
