"""Effect of phrase boosting: phrases found in noise, false positives, and word error rate.

    python -m nemostream.benchmarks.studies.boosting --manifest names.jsonl --phrases names.txt --out benchmarks/results

Input is a NeMo manifest (`audio_filepath`, `text`) and a file with one phrase per line, some of which occur in the
recordings. Without this file, the text of each recording with `MIN_WORDS` words or more is a phrase, and other phrases
are made up from the same words, like telephone numbers in an address book. White noise is added at several
signal-to-noise ratios, `NOISE_DRAWS` times each. Two lists of `LIST_SIZE` phrases are boosted:

* spoken: all phrases that occur in a recording, and others that do not;
* unspoken: only phrases that do not occur in any recording.

Found: recordings whose transcript contains the longest phrase that they contain, word for word. False positives:
phrases of the list in a transcript that the recording does not contain. Word error rate: over all recordings. All
without case and punctuation. Weight 0 means no boosting; the same phrases are searched in these transcripts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from nemostream.benchmarks import command
from nemostream.benchmarks.accuracy import plain
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import add_noise
from nemostream.benchmarks.harness.records import Progress, Record, Row, no_progress
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import AudioError, OptionError
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.text.tokenizer import Tokenizer

LIST_SIZE = 300
MIN_WORDS = 3
NOISE_DRAWS = 8
_SLOTS = 64
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Phrases:
    """Phrases and where they occur. Keys are normalised (`plain`)."""

    spelling: dict[str, str]  # as given, by normalised phrase
    longest_in: dict[str, str]  # longest phrase that occurs in a text, by text
    spoken: list[str]  # phrases that occur in a text
    lists: dict[str, list[str]]  # boosted lists by name

    @classmethod
    def of(cls, texts: Sequence[str], spellings: Sequence[str]) -> Phrases:
        """Classify phrases by whether they occur in `texts` (normalised)."""
        spelling = {plain(phrase): phrase for phrase in spellings}
        spoken = [phrase for phrase in spelling if any(_contains(text, phrase) for text in texts)]
        unspoken = [phrase for phrase in spelling if phrase not in set(spoken)]
        by_length = sorted(spoken, key=len)  # later, longer phrases replace shorter ones
        longest_in = {text: phrase for text in texts for phrase in by_length if _contains(text, phrase)}
        mixed = (spoken + unspoken[:LIST_SIZE])[:LIST_SIZE]
        return cls(spelling, longest_in, spoken, {"spoken": mixed, "unspoken": unspoken[-LIST_SIZE:]})


def measure_boosting(
    bundle: Bundle,
    manifest: Path,
    weights: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    decibels: Sequence[float | None] = (None, 10, 5, 0),
    ms: int = 560,
    progress: Progress = no_progress,
    phrase_file: Path | None = None,
) -> Record:
    """Measure boosting and return the result; `decibels` are signal-to-noise ratios, None is without noise.

    Raises `OptionError` if there are too few phrases, and `AudioError` for recordings at another sample rate.
    """
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    clips = [_read_audio(manifest.parent / entry["audio_filepath"], bundle) for entry in entries]
    texts = [plain(entry["text"]) for entry in entries]
    phrases = Phrases.of(texts, _read_phrases([entry["text"] for entry in entries], phrase_file))
    tokenizer = Tokenizer.of_bundle(bundle)
    chunk, rows = bundle.manifest.chunk(ms), list[Row]()

    def transcribe(noisy: Sequence[Floats], boosting: Boosting | None) -> list[str]:
        return [plain(tokenizer.decode(tokens)) for tokens in decode(bundle, chunk, noisy, boosting)]

    for ratio in decibels:
        draws = 1 if ratio is None else NOISE_DRAWS
        noisy = [clip if ratio is None else add_noise(clip, ratio, seed) for seed in range(draws) for clip in clips]
        references = texts * draws
        progress(f"noise {_noise_name(ratio)}, not boosted")
        unboosted = transcribe(noisy, None)
        for name, listed in phrases.lists.items():
            for weight in (0.0, *weights):
                got = unboosted
                if weight:
                    progress(f"noise {_noise_name(ratio)}, list {name}, weight {weight}")
                    spelled = dict.fromkeys((phrases.spelling[phrase] for phrase in listed), weight)
                    got = transcribe(noisy, Boosting.from_phrases(spelled, tokenizer))
                case = {"list": name, "weight": weight, "decibels": ratio}
                rows.append(records.row(case, {}, count_phrases(references, got, listed, phrases.longest_in)))
    return records.record(
        "boosting",
        rows,
        model={"name": bundle.manifest.name, "layers": bundle.manifest.encoder.layers},
        method={
            "chunk_ms": ms,
            "list_size": LIST_SIZE,
            "spoken_phrases": len(phrases.spoken),
            "noise_draws": NOISE_DRAWS,
            "manifest": manifest.name,
            "phrases": phrase_file.name if phrase_file else None,
        },
    )


def count_phrases(
    references: Sequence[str], texts: Sequence[str], phrases: Sequence[str], longest_in: dict[str, str]
) -> dict[str, float]:
    """Count phrases that are found and false positives in transcripts; all texts are normalised."""
    import jiwer

    pairs = list(zip(references, texts, strict=True))
    expected = [(longest_in[reference], text) for reference, text in pairs if reference in longest_in]
    return {
        "recordings": len(texts),
        "spoken": len(expected),
        "found": sum(_contains(text, phrase) for phrase, text in expected),
        "false_positives": sum(
            _contains(text, phrase) and not _contains(reference, phrase)
            for reference, text in pairs
            for phrase in phrases
        ),
        "wer": jiwer.wer(list(references), list(texts)),
    }


def decode(bundle: Bundle, chunk: ChunkConfig, clips: Sequence[Floats], boosting: Boosting | None) -> list[list[int]]:
    """Return the token ids of whole recordings, transcribed `_SLOTS` at a time."""
    backend = OrtBackend(bundle, capacity=_SLOTS)
    tokens: list[list[int]] = []
    for first in range(0, len(clips), _SLOTS):
        tokens += _decode_batch(backend, chunk, clips[first : first + _SLOTS], boosting)
    return tokens


def _decode_batch(
    backend: OrtBackend, chunk: ChunkConfig, clips: Sequence[Floats], boosting: Boosting | None
) -> list[list[int]]:
    manifest, slots = backend.manifest, np.arange(len(clips))
    backend.reset(slots)
    for slot in slots.tolist():
        backend.set_phrases(slot, boosting)
    steps = -(-max(manifest.encoder_frames(len(clip)) for clip in clips) // chunk.frames)
    audio = np.zeros((len(clips), steps * chunk.samples), np.float32)
    for row, clip in zip(audio, clips, strict=True):
        row[manifest.lead : manifest.lead + len(clip)] = clip[: len(row) - manifest.lead]
    lengths = np.array([manifest.lead + len(clip) for clip in clips])
    tokens: list[list[int]] = [[] for _ in clips]
    for start in range(0, steps * chunk.samples, chunk.samples):
        samples = np.clip(lengths - start, 0, chunk.samples)
        emissions = backend.submit(Batch(chunk, slots, audio[:, start : start + chunk.samples], samples)).result()
        for row_tokens, new in zip(tokens, emissions.tokens, strict=True):
            row_tokens += new.tolist()
    return tokens


def _read_audio(path: Path, bundle: Bundle) -> Floats:
    audio, rate = soundfile.read(path, dtype="float32")
    expected = bundle.manifest.features.sample_rate
    if rate != expected:
        raise AudioError(f"{path} has a sample rate of {rate} Hz; the model needs {expected} Hz.")
    return audio


def _read_phrases(texts: Sequence[str], path: Path | None) -> list[str]:
    """Return the phrases of a file, or the texts and made-up phrases. Raises `OptionError` if there are too few."""
    if path is None:
        return sorted({text for text in texts if len(text.split()) >= MIN_WORDS}) + _make_up(texts, 2 * LIST_SIZE)
    lines = path.read_text(encoding="utf-8").splitlines()
    phrases = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(phrases) < 2 * LIST_SIZE:
        raise OptionError(f"{path} has {len(phrases)} phrases; at least {2 * LIST_SIZE} are needed.")
    return phrases


def _make_up(texts: Sequence[str], count: int) -> list[str]:
    """Return phrases with words and lengths of the texts that do not occur in any text.

    Raises `OptionError` if the texts have too few words.
    """
    rng, words = np.random.default_rng(0), sorted({word for text in texts for word in text.split()})
    lengths = [len(text.split()) for text in texts if len(text.split()) >= MIN_WORDS]
    phrases: dict[str, None] = {}
    for _ in range(100 * count if lengths else 0):
        phrase = " ".join(rng.choice(words, rng.choice(lengths)))
        if not any(_contains(text, phrase) for text in texts):
            phrases[phrase] = None
        if len(phrases) == count:
            return list(phrases)
    raise OptionError(f"the recordings have too few words to make up {count} phrases of {MIN_WORDS} or more words.")


def _contains(text: str, phrase: str) -> bool:
    """Return whether the words of `phrase` occur consecutively in `text`."""
    return f" {phrase} " in f" {text} "


def _noise_name(decibels: float | None) -> str:
    return "none" if decibels is None else f"{decibels:g} dB"


def table(result: Record) -> str:
    """Return the result as Markdown."""
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in result["rows"]:
        case, values = row["case"], row["values"]
        noise = f"{_noise_name(case['decibels'])} ({values['spoken']})"
        cell = f"{values['found']}, {values['false_positives']}, {100 * values['wer']:.1f} %"
        cells.setdefault((noise, case["list"]), {})[case["weight"]] = cell
    weights = sorted({row["case"]["weight"] for row in result["rows"]})
    head = (
        "noise (phrases spoken)",
        "list",
        *(f"weight {weight:g}" if weight else "not boosted" for weight in weights),
    )
    lines = [(*key, *(found.get(weight, "") for weight in weights)) for key, found in cells.items()]
    method = result["method"]
    return (
        f"Model *{result['model']['name']}*, {method['chunk_ms']} ms. Cells: phrases found, false positives, word "
        f"error rate. Each list has {method['list_size']} phrases, of which {method['spoken_phrases']} (list *spoken*) "
        f"or none (list *unspoken*) occur in the recordings. {method['noise_draws']} draws of the noise.\n\n"
        f"{tables.markdown(head, lines)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.studies.boosting", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--bundle", type=Path, help="bundle to run (default: the packaged model)")
    parser.add_argument("--manifest", type=Path, required=True, help="NeMo manifest of the recordings")
    parser.add_argument("--phrases", type=Path, help="file with one phrase per line (default: texts of the recordings)")
    parser.add_argument("--weight", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="boosting weights")
    parser.add_argument("--chunk-ms", type=int, default=560, help="chunk size in ms")
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder for the result")
    parser.add_argument("--name", default="boosting", help="name of the output files, without suffix")
    options = parser.parse_args(arguments)
    result = measure_boosting(
        command.open_bundle(options.bundle),
        options.manifest,
        options.weight,
        ms=options.chunk_ms,
        progress=records.report_progress,
        phrase_file=options.phrases,
    )
    command.write_study(result, table(result), options)


if __name__ == "__main__":
    main()
