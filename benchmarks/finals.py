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
from collections.abc import Callable, Mapping, Sequence
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
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress
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


def interval(errors: NDArray[Any], words: NDArray[Any]) -> tuple[float, float, float]:
    """Return a rate and its 95 % bootstrap interval; `errors` and `words` [N] are those of N recordings.

    Differences of errors give a difference of rates.
    """
    chosen = np.random.default_rng(0).integers(0, len(errors), (2000, len(errors)))
    low, high = np.quantile(errors[chosen].sum(axis=1) / words[chosen].sum(axis=1), [0.025, 0.975])
    return float(errors.sum() / words.sum()), float(low), float(high)


def _rate(row: Row, key: str, reference: NDArray[Any] | None = None) -> str:
    """Return the rate in percent, or its difference from that of the errors `reference`, with its interval."""
    errors, words = np.array(row["values"][key]).T
    rate, low, high = interval(errors if reference is None else errors - reference, words)
    if reference is None:
        return f"{100 * rate:.1f} % [{100 * low:.1f}–{100 * high:.1f}]"
    return f"{100 * rate:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Return the tables of a result as Markdown and draw its plots; `plot(name)` returns axes."""
    method, text = result["method"], []
    sets: dict[str, list[Row]] = {}
    for row in result["rows"]:
        sets.setdefault(row["case"]["set"], []).append(row)
    for name, rows in sets.items():
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
    _draw_finals(sets, plot("finals"))
    _draw_visible(next(iter(sets.values())), method["delays_ms"], plot("visible"))
    return "\n".join(text) + "\n"


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


def _draw_finals(sets: Mapping[str, Sequence[Row]], axes: Any) -> None:
    """Draw the WER of finals by the median time to the final, which is measured on the first set only."""
    first = next(iter(sets.values()))
    seconds = {row["case"]["mode"]: row["figures"]["final"]["p50"] / 1000 for row in first}
    for name, rows in sets.items():
        points = [(row["case"]["mode"], seconds[row["case"]["mode"]], 100 * row["values"]["wer"]) for row in rows]
        single = sorted((x, y) for mode, x, y in points if "+" not in mode)
        if single:
            axes.plot(*zip(*single, strict=True), ":", color="0.5", zorder=1)
        for index, (mode, x, y) in enumerate(points):
            marker, size = ("D", 8) if "+" in mode else ("o", 7)
            label = f"{mode.replace('+', ' + ')} ms" if rows is first else None
            axes.plot([x], [y], marker, color=f"C{index}", markersize=size, label=label)
        _, x, y = max(points, key=lambda point: point[1])
        axes.annotate(name, (x, y), xytext=(0, 10), textcoords="offset points", ha="center")
    axes.set(
        xlabel="end of speech to final, s (median)",
        ylabel="WER of finals, %",
        title="Finals with one and with two chunk sizes",
    )
    axes.margins(x=0.08, y=0.2)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="chunks")  # beside the axes


def _draw_visible(rows: Sequence[Row], delays_ms: Sequence[int], axes: Any) -> None:
    for row in rows:
        style = "-" if "+" in row["case"]["mode"] else ":"
        rates = [100 * rate for rate in row["values"]["visible_wer"]]
        axes.plot([ms / 1000 for ms in delays_ms], rates, style, label=_mode_name(row))
    axes.set(
        xlabel="time since the end of speech, s",
        ylabel="WER of the visible text, %",
        title="Text that is visible after the end of speech",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="chunks")


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
