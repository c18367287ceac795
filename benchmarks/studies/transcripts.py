"""Accuracy of word times and confidences, and effect of decoder resets on long streams.

    python -m nemostream.benchmarks.studies.transcripts --out benchmarks/results

*Times.* Flite (on the PATH) synthesises the texts of the held-out recordings and prints the end time of each phone,
from which word times follow. The benchmark measures the delay of the start and end times of transcribed words at each
chunk size.

*Confidence.* The held-out recordings are transcribed clean and with white noise (`NOISE_DRAWS` draws at each ratio of
`DECIBELS`). Words are correct if a minimum edit distance alignment matches them with the reference. The expected
calibration error uses `BINS` bins of equal width (Guo et al. 2017). The area under the ROC curve is the probability
that a correct word has a higher confidence than a wrong one.

*Decoder.* The recordings are transcribed in one stream, with pauses of `PAUSES` seconds between them and utterances
that end after `SILENCE_MS` of silence: word error rate if the decoder state is kept, if it is reset at the end of each
utterance, and if each recording has its own stream.

Words are compared without case and punctuation.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

import nemostream
from nemostream.benchmarks.accuracy import plain
from nemostream.benchmarks.command import make_parser
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import add_noise
from nemostream.benchmarks.harness.plots import Chart, Curve, CurveChart, CurvePanel
from nemostream.benchmarks.harness.records import Progress, Record, Row, no_progress
from nemostream.benchmarks.report import write_report
from nemostream.errors import AudioError
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.scripts import unbreakable_spans
from nemostream.runtime.text.words import group_words

VOICES = ("slt", "rms", "awb", "kal16")
DECIBELS, NOISE_DRAWS = (20, 15, 10, 5), 4
MEASURES = (
    Confidence(),
    Confidence(norm="lin"),
    Confidence("renyi"),
    Confidence("renyi", "lin"),
    Confidence("max_prob"),
    Confidence("max_prob", alpha=1.0),
)
BINS = 10
PAUSES, SILENCE_MS = (1.2, 2.0, 4.0, 8.0), 800  # pauses in seconds
_RATE = 16000  # Hz

Floats = NDArray[np.float32]


def measure_transcripts(model: Model, manifest: Path, progress: Progress = no_progress) -> Record:
    """Run all three measurements and return the result; `manifest` is a NeMo manifest (`audio_filepath`, `text`)."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    clips = [_read_audio(manifest.parent / row["audio_filepath"]) for row in rows]
    texts = [row["text"] for row in rows]
    found = list[Row]()
    if shutil.which("flite"):
        found += _measure_times(model, texts, progress)
    else:
        progress("flite is not installed: word times are skipped")
    found += _measure_confidence(model, clips, texts, progress)
    found += _measure_decoder_resets(model, clips, texts, progress)
    return records.record(
        "transcripts",
        found,
        model=records.model_of(model.manifest),
        method={
            "voices": VOICES,
            "decibels": DECIBELS,
            "noise_draws": NOISE_DRAWS,
            "bins": BINS,
            "pauses": PAUSES,
            "silence_ms": SILENCE_MS,
            "chunk_ms": model.chunk_ms,
            "manifest": manifest.name,
        },
    )


# -- times -------------------------------------------------------------------------------------------------------------


def synthesise(voice: str, text: str) -> tuple[Floats, list[tuple[str, float]]]:
    """Return audio [N] at 16 kHz from flite, and its phones with their end times in seconds; "pau" is a pause."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        audio, rate = soundfile.read(file.name, dtype="float32")
    phones = [(name, float(end)) for name, _, end in (phone.partition(":") for phone in output.split())]
    return audio if rate == _RATE else soxr.resample(audio, rate, _RATE), phones


def word_times(words: Sequence[str], phones: Sequence[tuple[str, float]], sizes: dict[str, int]) -> list[Any]:
    """Return start and end of each word in seconds; `sizes` is the number of phones of each word.

    Returns an empty list if the number of phones does not match.
    """
    starts = [0.0, *(end for _, end in phones)]
    spans = [(start, end) for start, (name, end) in zip(starts, phones, strict=False) if name != "pau"]
    if len(spans) != sum(sizes[word] for word in words):
        return []
    times, index = [], 0
    for word in words:
        part = spans[index : index + sizes[word]]
        times.append((part[0][0], part[-1][1]))
        index += sizes[word]
    return times


def _measure_times(model: Model, texts: Sequence[str], progress: Progress) -> list[Row]:
    recordings = []
    for voice in VOICES:
        progress(f"synthesising with voice {voice}")
        vocabulary = {word for text in texts for word in text.split()}
        sizes = {word: sum(name != "pau" for name, _ in synthesise(voice, word)[1]) for word in vocabulary}
        for text in texts:
            audio, phones = synthesise(voice, text)
            if times := word_times(text.split(), phones, sizes):  # empty if a word has other phones in a sentence
                reference = [plain(word) for word in text.split()]
                recordings.append((np.concatenate([audio, np.zeros(_RATE, np.float32)]), reference, times))
    rows = []
    for chunk in model.manifest.chunks:
        progress(f"word times at {chunk.ms} ms")
        start_delays, end_delays = [], []
        for audio, reference, times in recordings:
            words = model.transcribe(audio, chunk_ms=chunk.ms).words
            for expected, found in records.matches(reference, [plain(word.text) for word in words]):
                word, (start, end) = words[found], times[expected]
                start_delays.append(1000 * (word.start - start))
                end_delays.append(1000 * (word.end - end))
        values = {"words": len(start_delays), "reference_words": sum(len(reference) for _, reference, _ in recordings)}
        case = {"measurement": "times", "chunk_ms": chunk.ms}
        rows.append(records.row(case, {"start": start_delays, "end": end_delays}, values))
    return rows


# -- confidence --------------------------------------------------------------------------------------------------------


def _measure_confidence(model: Model, clips: Sequence[Floats], texts: Sequence[str], progress: Progress) -> list[Row]:
    noisy: list[tuple[Floats, str]] = list(zip(clips, texts, strict=True))
    for ratio, seed in itertools.product(DECIBELS, range(NOISE_DRAWS)):
        noisy += [(add_noise(clip, ratio, seed), text) for clip, text in zip(clips, texts, strict=True)]
    progress(f"confidence of {len(noisy)} recordings")
    results, vocabulary = [], model.manifest.decoder.vocabulary + 1
    invertible = Confidence("renyi", "lin")  # from this measure, `_sum_p_alpha` recovers the input of all measures
    for (_, text), result in zip(
        noisy, model.transcribe_many((audio for audio, _ in noisy), confidence=invertible), strict=True
    ):
        assert isinstance(result, nemostream.Result), result
        words = [plain(word.text) for word in result.words]
        results.append((result, _hits([plain(text[slice(*span)]) for span in unbreakable_spans(text)], words)))
    rows = []
    for measure in MEASURES:
        confidence, pairs = measure.token_measure(vocabulary), []
        for result, hits in results:
            tokens = [
                replace(
                    token,
                    confidence=confidence(token.score, _sum_p_alpha(token.confidence, invertible.alpha, vocabulary)),
                )
                for token in result.tokens
            ]
            grouped = group_words(tokens, measure.aggregation)
            pairs += [(word.confidence, hit) for word, hit in zip(grouped, hits, strict=True)]
        case = {"measurement": "confidence", "measure": measure.measure, "norm": measure.norm, "alpha": measure.alpha}
        rows.append(records.row(case, {}, calibration(pairs)))
    return rows


def calibration(pairs: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Return calibration figures of words; pairs are (confidence, whether the word is correct).

    Each bin is [count, mean confidence, share of correct words]; `ece` is the expected calibration error, `auroc` the
    area under the ROC curve.
    """
    confidences, correct = np.array([value for value, _ in pairs]), np.array([hit for _, hit in pairs])
    index = np.clip((confidences * BINS).astype(int), 0, BINS - 1)
    bins = [
        [int(part.sum()), float(confidences[part].mean()), float(correct[part].mean())] if part.any() else [0, 0.0, 0.0]
        for part in (index == number for number in range(BINS))
    ]
    error = sum(count * abs(confidence - share) for count, confidence, share in bins) / len(pairs)
    ordered = np.sort(confidences)
    # Equal confidences have the mean of their ranks.
    rank = (np.searchsorted(ordered, confidences, "left") + np.searchsorted(ordered, confidences, "right") + 1) / 2
    hits, misses = int(correct.sum()), int((~correct).sum())
    area = (rank[correct].sum() - hits * (hits + 1) / 2) / (hits * misses) if hits and misses else float("nan")
    return {"words": len(pairs), "correct": hits, "bins": bins, "ece": float(error), "auroc": float(area)}


def _sum_p_alpha(confidence: float, alpha: float, vocabulary: int) -> float:
    """Return the sum of p ** alpha from a confidence with Renyi entropy and linear normalisation."""
    return float(vocabulary ** ((1 - confidence) * (1 - alpha)))


def _hits(reference: Sequence[str], words: Sequence[str]) -> list[bool]:
    """Return for each word whether a minimum edit distance alignment matches it with an equal reference word."""
    costs = np.zeros((len(reference) + 1, len(words) + 1), np.int64)
    costs[:, 0], costs[0] = np.arange(len(reference) + 1), np.arange(len(words) + 1)
    for i, a in enumerate(reference, 1):
        for j, b in enumerate(words, 1):
            costs[i, j] = min(costs[i - 1, j] + 1, costs[i, j - 1] + 1, costs[i - 1, j - 1] + (a != b))
    hits, i, j = [False] * len(words), len(reference), len(words)
    while i and j:
        if costs[i, j] == costs[i - 1, j - 1] + (reference[i - 1] != words[j - 1]):
            i, j = i - 1, j - 1
            hits[j] = reference[i] == words[j]
        elif costs[i, j] == costs[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return hits


# -- decoder -----------------------------------------------------------------------------------------------------------


def _measure_decoder_resets(
    model: Model, clips: Sequence[Floats], texts: Sequence[str], progress: Progress
) -> list[Row]:
    import jiwer

    rng = np.random.default_rng(0)
    pauses = [rng.standard_normal(round(_RATE * seconds)).astype(np.float32) * 1e-3 for seconds in PAUSES]
    order = rng.permutation(len(clips)).tolist()
    pairs = zip(order, itertools.cycle(pauses), strict=False)
    audio = np.concatenate([part for number, pause in pairs for part in (clips[number], pause)])
    reference, rows = plain(" ".join(texts[number] for number in order)), []
    for chunk in model.manifest.chunks:
        progress(f"decoder resets at {chunk.ms} ms")
        for decoder in ("keep", "reset"):
            rule = Endpoint(silence_ms=SILENCE_MS, decoder="reset" if decoder == "reset" else "keep")
            finals = [e.text for e in model.listen(audio, chunk_ms=chunk.ms, endpoint=rule) if e.kind == "final"]
            wer = jiwer.wer(reference, plain(" ".join(finals)))
            values = {"wer": wer, "utterances": len(finals), "recordings": len(clips)}
            rows.append(records.row({"measurement": "decoder", "chunk_ms": chunk.ms, "decoder": decoder}, {}, values))
        separate = " ".join(model.transcribe(clips[number], chunk_ms=chunk.ms).text for number in order)
        wer = jiwer.wer(reference, plain(separate))
        values = {"wer": wer, "utterances": len(clips), "recordings": len(clips)}
        case = {"measurement": "decoder", "chunk_ms": chunk.ms, "decoder": "separate streams"}
        rows.append(records.row(case, {}, values))
    return rows


def _read_audio(path: Path) -> Floats:
    audio, rate = soundfile.read(path, dtype="float32")
    if rate != _RATE:
        raise AudioError(f"{path} has a sample rate of {rate} Hz; this benchmark needs {_RATE} Hz.")
    return audio


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    rows: dict[str, list[Row]] = {}
    for row in result["rows"]:
        rows.setdefault(row["case"]["measurement"], []).append(row)
    parts = [_show_times(rows["times"])] if "times" in rows else []
    parts += [_show_confidence(rows["confidence"]), _show_decoder(rows["decoder"])]
    return "\n\n".join(parts) + "\n"


def _show_times(rows: Sequence[Row]) -> str:
    lines = [
        [
            f"{row['case']['chunk_ms']} ms",
            *(_span(row["ms"][name]) for name in ("start", "end")),
            f"{row['values']['words']} of {row['values']['reference_words']}",
        ]
        for row in rows
    ]
    head = ["chunk", "start delay, ms", "end delay, ms", "matched words"]
    return f"Delay of word times, median [5th–95th percentile]:\n\n{tables.markdown(head, lines)}"


def _show_confidence(rows: Sequence[Row]) -> str:
    lines = [
        [_measure_name(row["case"]), f"{row['values']['ece']:.3f}", f"{row['values']['auroc']:.3f}"] for row in rows
    ]
    words, correct = rows[0]["values"]["words"], rows[0]["values"]["correct"]
    head = ["measure", "expected calibration error", "area under ROC curve"]
    return f"Confidence, {words} words, {100 * correct / words:.1f} % correct:\n\n{tables.markdown(head, lines)}"


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the share of correct words by confidence, with a panel for each measure."""
    rows = [row for row in result["rows"] if row["case"]["measurement"] == "confidence"]
    panels = []
    for row in rows:
        bins = [each for each in row["values"]["bins"] if each[0]]
        points = [(confidence, share) for _, confidence, share in bins]
        intervals = [wilson_interval(count, share) for count, _, share in bins]
        curves = [Curve("", [(0, 0), (1, 1)], style="fit"), Curve("", points, intervals)]
        note = f"calibration error {row['values']['ece']:.3f}"
        panels.append(CurvePanel(_measure_name(row["case"]), curves, note))
    best = min(rows, key=lambda row: row["values"]["ece"])
    name, error = _measure_name(best["case"]), best["values"]["ece"]
    subtitle = (
        f"Share of correct words (vertical) by word confidence, {rows[0]['values']['words']} words. Whiskers: 95 % "
        "Wilson interval; dotted: perfect calibration. The calibration error is the mean distance from it."
    )
    title = f"The measure “{name}” is calibrated best: expected calibration error {error:.3f}"
    ticks = {0.0: "0", 0.5: "0.5", 1.0: "1"}
    return {"reliability": CurveChart(title, subtitle, panels, "word confidence", "", ticks, y_max=1.0)}


def wilson_interval(count: int, share: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` words (Wilson 1927)."""
    z = 1.96
    centre, width = share + z**2 / (2 * count), z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return float((centre - width) / (1 + z**2 / count)), float((centre + width) / (1 + z**2 / count))


def _show_decoder(rows: Sequence[Row]) -> str:
    sizes = list(dict.fromkeys(row["case"]["chunk_ms"] for row in rows))
    cells = {(row["case"]["decoder"], row["case"]["chunk_ms"]): row["values"] for row in rows}
    names = {"keep": "one stream, kept", "reset": "one stream, reset", "separate streams": "separate streams"}
    lines = [
        [label, *(f"{100 * cells[name, size]['wer']:.1f} % ({cells[name, size]['utterances']})" for size in sizes)]
        for name, label in names.items()
    ]
    head = ["decoder state", *(f"{size} ms" for size in sizes)]
    title = f"Decoder, {rows[0]['values']['recordings']} recordings, word error rate (utterances)"
    return f"{title}:\n\n{tables.markdown(head, lines)}"


def _span(samples: Sequence[float]) -> str:
    low, middle, high = (records.percentile(samples, percent) for percent in (5, 50, 95))
    return f"{middle:.0f} [{low:.0f}–{high:.0f}]"


def _measure_name(case: dict[str, Any]) -> str:
    if case["measure"] == "max_prob":
        return "probability" if case["alpha"] == 1 else f"max_prob, alpha {case['alpha']}"
    return f"{case['measure']}, {case['norm']}" + (" (default)" if (case["measure"], case["norm"]) == _DEFAULT else "")


_DEFAULT = (Confidence().measure, Confidence().norm)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("transcripts", __doc__)
    parser.add_argument("--bundle", type=Path, help="bundle to run (default: the packaged model)")
    parser.add_argument("--manifest", type=Path, required=True, help="NeMo manifest of held-out recordings")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    options = parser.parse_args(arguments)
    with nemostream.load(options.bundle, capacity=20, threads=options.threads) as model:
        result = measure_transcripts(model, options.manifest, records.report_progress)
    records.write(result, options.out / f"{options.name}.json")
    print(write_report([result], options.out / f"{options.name}.md")[0], end="")


if __name__ == "__main__":
    main()
