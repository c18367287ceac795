"""How right are a transcript's times and confidences, and what becomes of a stream whose decoder forgets?

    python -m nemostream.benchmarks.studies.transcripts --out benchmarks/results

*Times.* Flite (on the PATH) speaks the held-out recordings' texts and tells when each phone ends, so when each word
does. How much later is a word said to begin and to end, at each chunk size?

*Confidence.* The held-out recordings, clean and with white noise (`NOISES` drawings at each ratio of `DECIBELS`): of
the words that got a confidence of so much, how many are right? The expected calibration error is over `BINS` bins of
equal width (Guo et al. 2017); words are right where the alignment of least edits says that they are hits. The area
under the ROC curve is the chance that a right word has more confidence than a wrong one.

*Decoder.* The same recordings one after the other in one stream, with pauses of `PAUSES` seconds between them, and
utterances that end after `SILENCE_MS`: words wrong if the decoder is kept, if it is reset at the end of each utterance,
and if every recording is a stream of its own.

Words are compared without case and punctuation.
"""

from __future__ import annotations

import difflib
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
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import Record
from nemostream.errors import AudioError
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.words import group_words

VOICES = ("slt", "rms", "awb", "kal16")
DECIBELS, NOISES = (20, 15, 10, 5), 4
MEASURES = (
    Confidence(),
    Confidence(norm="lin"),
    Confidence("renyi"),
    Confidence("renyi", "lin"),
    Confidence("max_prob"),
    Confidence("max_prob", alpha=1.0),
)
BINS = 10
PAUSES, SILENCE_MS = (1.2, 2.0, 4.0, 8.0), 800
_RATE = 16000

Floats = NDArray[np.float32]


def measure_transcripts(model: Model, manifest: Path, say: records.Say = lambda message: None) -> Record:
    """The result; `manifest` is NeMo's (`audio_filepath`, `text`)."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    clips = [_audio(manifest.parent / row["audio_filepath"]) for row in rows]
    texts = [row["text"] for row in rows]
    found = []
    if shutil.which("flite"):
        found += _times(model, texts, say)
    else:
        say("flite is not installed: no times")
    found += _confidences(model, clips, texts, say)
    found += _decoders(model, clips, texts, say)
    return records.record(
        "transcripts",
        found,
        model={
            "name": model.manifest.name,
            "layers": model.manifest.encoder.layers,
            "d_model": model.manifest.encoder.d_model,
        },
        method={
            "voices": VOICES,
            "decibels": DECIBELS,
            "noises": NOISES,
            "bins": BINS,
            "pauses": PAUSES,
            "silence_ms": SILENCE_MS,
            "chunk_ms": model.chunk_ms,
            "manifest": manifest.name,
        },
    )


# -- times -------------------------------------------------------------------------------------------------------------


def speak(voice: str, text: str) -> tuple[Floats, list[tuple[str, float]]]:
    """What flite says, at 16 kHz, and each phone with its end in seconds; pauses are the phone "pau"."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        audio, rate = soundfile.read(file.name, dtype="float32")
    phones = [(name, float(end)) for name, _, end in (phone.partition(":") for phone in told.split())]
    return audio if rate == _RATE else soxr.resample(audio, rate, _RATE), phones


def word_times(words: Sequence[str], phones: Sequence[tuple[str, float]], sizes: dict[str, int]) -> list[Any]:
    """Begin and end of each word in seconds; `sizes` are its phones. Empty if the phones do not add up."""
    begins = [0.0, *(end for _, end in phones)]
    heard = [(begin, end) for begin, (name, end) in zip(begins, phones, strict=False) if name != "pau"]
    if len(heard) != sum(sizes[word] for word in words):
        return []
    found, at = [], 0
    for word in words:
        part = heard[at : at + sizes[word]]
        found.append((part[0][0], part[-1][1]))
        at += sizes[word]
    return found


def _times(model: Model, texts: Sequence[str], say: records.Say) -> list[records.Row]:
    spoken = []
    for voice in VOICES:
        say(f"flite speaks: {voice}")
        alone = {word for text in texts for word in text.split()}
        sizes = {word: sum(name != "pau" for name, _ in speak(voice, word)[1]) for word in alone}
        for text in texts:
            audio, phones = speak(voice, text)
            if times := word_times(text.split(), phones, sizes):  # none if a word sounds otherwise in its sentence
                said = [plain(word) for word in text.split()]
                spoken.append((np.concatenate([audio, np.zeros(_RATE, np.float32)]), said, times))
    rows = []
    for chunk in model.manifest.chunks:
        say(f"times at {chunk.ms} ms")
        begin, end = [], []
        for audio, said, times in spoken:
            got = model.transcribe(audio, chunk_ms=chunk.ms).words
            same = difflib.SequenceMatcher(None, said, [plain(word.text) for word in got], autojunk=False)
            for block in same.get_matching_blocks():
                for i in range(block.size):
                    told, true = got[block.b + i], times[block.a + i]
                    begin.append(1000 * (told.start - true[0]))
                    end.append(1000 * (told.end - true[1]))
        values = {"words": len(begin), "spoken": sum(len(said) for _, said, _ in spoken)}
        rows.append(records.row({"what": "times", "chunk_ms": chunk.ms}, {"begin": begin, "end": end}, values))
    return rows


# -- confidence --------------------------------------------------------------------------------------------------------


def _confidences(model: Model, clips: Sequence[Floats], texts: Sequence[str], say: records.Say) -> list[records.Row]:
    noisy: list[tuple[Floats, str]] = list(zip(clips, texts, strict=True))
    for ratio, seed in itertools.product(DECIBELS, range(NOISES)):
        noisy += [(_with_noise(clip, ratio, seed), text) for clip, text in zip(clips, texts, strict=True)]
    say(f"confidence of {len(noisy)} recordings")
    heard, vocabulary = [], model.manifest.decoder.vocabulary + 1
    with_power = Confidence("renyi", "lin")  # from which the sum that every entropy is made of can be had again
    for (_, text), result in zip(
        noisy, model.transcribe_many((audio for audio, _ in noisy), confidence=with_power), strict=True
    ):
        assert isinstance(result, nemostream.Result), result
        got = [plain(word.text) for word in result.words]
        heard.append((result, _hits([plain(word) for word in text.split()], got)))
    rows = []
    for measure in MEASURES:
        sure, found = measure.token_measure(vocabulary), []
        for result, hits in heard:
            tokens = [
                replace(token, confidence=sure(token.score, _power(token.confidence, with_power.alpha, vocabulary)))
                for token in result.tokens
            ]
            words = group_words(tokens, measure.aggregation)
            found += [(word.confidence, hit) for word, hit in zip(words, hits, strict=True)]
        case = {"what": "confidence", "measure": measure.measure, "norm": measure.norm, "alpha": measure.alpha}
        rows.append(records.row(case, {}, calibration(found)))
    return rows


def calibration(found: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Of confidences and whether each was right: bins as (count, mean confidence, share right), errors, ranking."""
    values, right = np.array([value for value, _ in found]), np.array([hit for _, hit in found])
    which = np.clip((values * BINS).astype(int), 0, BINS - 1)
    bins = [
        [int(part.sum()), float(values[part].mean()), float(right[part].mean())] if part.any() else [0, 0.0, 0.0]
        for part in (which == number for number in range(BINS))
    ]
    error = sum(count * abs(sure - hit) for count, sure, hit in bins) / len(found)
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1  # ties by chance of order, as rare as any
    hits, misses = int(right.sum()), int((~right).sum())
    area = (order[right].sum() - hits * (hits + 1) / 2) / (hits * misses) if hits and misses else float("nan")
    return {"words": len(found), "right": hits, "bins": bins, "ece": float(error), "area": float(area)}


def _power(confidence: float, alpha: float, vocabulary: int) -> float:
    """The sum of p ** alpha that a token's Renyi entropy, mapped linearly, was made of."""
    return float(vocabulary ** ((1 - confidence) * (1 - alpha)))


def _hits(wanted: Sequence[str], got: Sequence[str]) -> list[bool]:
    """Of each word said, whether an alignment of least edits pairs it with itself."""
    costs = np.zeros((len(wanted) + 1, len(got) + 1), np.int64)
    costs[:, 0], costs[0] = np.arange(len(wanted) + 1), np.arange(len(got) + 1)
    for i, a in enumerate(wanted, 1):
        for j, b in enumerate(got, 1):
            costs[i, j] = min(costs[i - 1, j] + 1, costs[i, j - 1] + 1, costs[i - 1, j - 1] + (a != b))
    hits, i, j = [False] * len(got), len(wanted), len(got)
    while i and j:
        if costs[i, j] == costs[i - 1, j - 1] + (wanted[i - 1] != got[j - 1]):
            i, j = i - 1, j - 1
            hits[j] = wanted[i] == got[j]
        elif costs[i, j] == costs[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return hits


# -- decoder -----------------------------------------------------------------------------------------------------------


def _decoders(model: Model, clips: Sequence[Floats], texts: Sequence[str], say: records.Say) -> list[records.Row]:
    import jiwer

    rng = np.random.default_rng(0)
    pauses = [rng.standard_normal(round(_RATE * seconds)).astype(np.float32) * 1e-3 for seconds in PAUSES]
    order = rng.permutation(len(clips)).tolist()
    turns = zip(order, itertools.cycle(pauses), strict=False)
    audio = np.concatenate([part for number, pause in turns for part in (clips[number], pause)])
    wanted, rows = plain(" ".join(texts[number] for number in order)), []
    for chunk in model.manifest.chunks:
        say(f"decoders at {chunk.ms} ms")
        for decoder in ("keep", "reset"):
            rule = Endpoint(silence_ms=SILENCE_MS, decoder="reset" if decoder == "reset" else "keep")
            finals = [e.text for e in model.listen(audio, chunk_ms=chunk.ms, endpoint=rule) if e.kind == "final"]
            said = plain(" ".join(finals))
            values = {"wer": jiwer.wer(wanted, said), "utterances": len(finals), "recordings": len(clips)}
            rows.append(records.row({"what": "decoder", "chunk_ms": chunk.ms, "decoder": decoder}, {}, values))
        alone = " ".join(model.transcribe(clips[number], chunk_ms=chunk.ms).text for number in order)
        values = {"wer": jiwer.wer(wanted, plain(alone)), "utterances": len(clips), "recordings": len(clips)}
        rows.append(records.row({"what": "decoder", "chunk_ms": chunk.ms, "decoder": "alone"}, {}, values))
    return rows


def _audio(path: Path) -> Floats:
    audio, rate = soundfile.read(path, dtype="float32")
    if rate != _RATE:
        raise AudioError(f"{path} has {rate} samples a second; this benchmark wants {_RATE}.")
    return audio


def _with_noise(clip: Floats, decibels: float, seed: int) -> Floats:
    noise = np.random.default_rng([seed, len(clip)]).standard_normal(len(clip)).astype(np.float32)
    return clip + noise * np.float32(np.sqrt((clip**2).mean() / 10 ** (decibels / 10)))


# -- showing -----------------------------------------------------------------------------------------------------------


def show(result: Record, plot: Any) -> str:
    parts, rows = [], result["rows"]
    times = [row for row in rows if row["case"]["what"] == "times"]
    if times:
        lines = [
            [
                f"{row['case']['chunk_ms']} ms",
                *(_span(row["ms"][name]) for name in ("begin", "end")),
                f"{row['values']['words']} of {row['values']['spoken']}",
            ]
            for row in times
        ]
        head = ["chunk", "begins late, ms", "ends late, ms", "words"]
        parts.append(f"Times, median [5th–95th percentile]:\n\n{tables.markdown(head, lines)}")
    sure = [row for row in rows if row["case"]["what"] == "confidence"]
    axes = plot("reliability")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    lines = []
    for row in sure:
        bins = [each for each in row["values"]["bins"] if each[0]]
        axes.plot([each[1] for each in bins], [each[2] for each in bins], marker="o", label=_named(row["case"]))
        values = row["values"]
        lines.append([_named(row["case"]), f"{values['ece']:.3f}", f"{values['area']:.3f}"])
    axes.set_xlabel("confidence of a word")
    axes.set_ylabel("share of such words that are right")
    axes.legend()
    share = f"{sure[0]['values']['words']} words, {100 * sure[0]['values']['right'] / sure[0]['values']['words']:.1f} %"
    head = ["measure", "expected calibration error", "area under ROC"]
    parts.append(f"Confidence, {share} of them right:\n\n{tables.markdown(head, lines)}")
    decoders = [row for row in rows if row["case"]["what"] == "decoder"]
    sizes = list(dict.fromkeys(row["case"]["chunk_ms"] for row in decoders))
    cells = {(row["case"]["decoder"], row["case"]["chunk_ms"]): row["values"] for row in decoders}
    lines = [
        [what, *(f"{100 * cells[name, size]['wer']:.1f} % ({cells[name, size]['utterances']})" for size in sizes)]
        for name, what in (("keep", "one stream, kept"), ("reset", "one stream, reset"), ("alone", "a stream each"))
    ]
    head = ["words wrong (utterances)", *(f"{size} ms" for size in sizes)]
    parts.append(f"Decoder, {decoders[0]['values']['recordings']} recordings:\n\n{tables.markdown(head, lines)}")
    return "\n\n".join(parts) + "\n"


def _span(samples: Sequence[float]) -> str:
    low, middle, high = (records.percentile(samples, percent) for percent in (5, 50, 95))
    return f"{middle:.0f} [{low:.0f}–{high:.0f}]"


def _named(case: dict[str, Any]) -> str:
    if case["measure"] == "max_prob":
        return "probability" if case["alpha"] == 1 else f"max_prob, alpha {case['alpha']}"
    return f"{case['measure']}, {case['norm']}" + (" (default)" if (case["measure"], case["norm"]) == _DEFAULT else "")


_DEFAULT = (Confidence().measure, Confidence().norm)


def main(arguments: Sequence[str] | None = None) -> None:
    from nemostream.benchmarks.report import write_report

    parser = records.parser("transcripts", __doc__)
    parser.add_argument("--bundle", type=Path, help="what to run (default: the packaged model)")
    parser.add_argument("--manifest", type=Path, required=True, help="held-out recordings and what is said in them")
    parser.add_argument("--threads", type=int, help="default: every core")
    options = parser.parse_args(arguments)
    with nemostream.load(options.bundle, capacity=20, threads=options.threads) as model:
        result = measure_transcripts(model, options.manifest, records.say)
    records.write(result, options.out / f"{options.name}.json")
    print(write_report([result], options.out / f"{options.name}.md"), end="")


if __name__ == "__main__":
    main()
