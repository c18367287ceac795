"""What boosting is good for, and what it costs: phrases found under noise, and phrases found that nobody said.

    python -m nemostream.benchmarks.studies.boosting --manifest names.jsonl --phrases names.txt --out benchmarks/results

A NeMo manifest (`audio_filepath`, `text`), and a file of phrases, one a line, some of which are said. Without the file
every recording's whole text is a phrase, if it has `LEAST` words or more, and others are made up of the same words: a
telephone number in somebody's address book. White noise is added at several ratios (`NOISES` drawings of it). There are
two lists of `LIST` phrases:

* spoken: those that are said in some recording, and others that nobody says;
* others: phrases that nobody says.

Found: recordings in whose text the longest phrase that is said there stands, word for word. False: phrases of the list
that stand in a text and were not said there. Words wrong: the word error rate over all recordings. All of it without
case and punctuation. Weight 0 is without boosting: what is found is looked for all the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

import nemostream
from nemostream.benchmarks.accuracy import plain
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import Record
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import AudioError, OptionError
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.text.tokenizer import Tokenizer

LIST = 300
LEAST = 3
NOISES = 8
_SLOTS = 64
Floats = NDArray[np.float32]


def measure_boosting(
    bundle: Bundle,
    manifest: Path,
    weights: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    decibels: Sequence[float | None] = (None, 10, 5, 0),
    ms: int = 560,
    say: records.Say = lambda message: None,
    listed: Path | None = None,
) -> Record:
    """The result; `decibels` are ratios of speech to noise, None without noise; `listed` is the file of phrases."""
    import jiwer

    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    clips = [_audio(manifest.parent / row["audio_filepath"], bundle) for row in rows]
    texts = [plain(row["text"]) for row in rows]
    spellings = _phrases([row["text"] for row in rows], listed)
    plainly = {plain(phrase): phrase for phrase in spellings}
    said = {phrase: any(_stands_in(phrase, text) for text in texts) for phrase in plainly}
    spoken = [phrase for phrase in plainly if said[phrase]]
    unsaid = [phrase for phrase in plainly if not said[phrase]]
    # The longest that is said in a recording is its own.
    owned = {text: phrase for text in texts for phrase in sorted(spoken, key=len) if _stands_in(phrase, text)}
    mixed, others = (spoken + unsaid[:LIST])[:LIST], unsaid[-LIST:]
    tokenizer = Tokenizer(bundle.path / bundle.manifest.tokenizer.file, bundle.manifest.decoder.vocabulary)
    found = []
    for ratio in decibels:
        drawings = 1 if ratio is None else NOISES
        noisy = [_with_noise(clip, ratio, seed) for seed in range(drawings) for clip in clips]
        wanted, unboosted = texts * drawings, None
        for name, phrases in (("spoken", mixed), ("others", others)):
            for weight in (0.0, *weights):
                say(f"{_noise(ratio)}, {name}, weight {weight}")
                spelled = dict.fromkeys((plainly[phrase] for phrase in phrases), weight)
                boosting = Boosting.from_phrases(spelled, tokenizer) if weight else None
                if boosting or unboosted is None:
                    tokens = decode(bundle, bundle.manifest.chunk(ms), noisy, boosting)
                    got = [plain(tokenizer.decode(row)) for row in tokens]
                    unboosted = unboosted or got
                got = got if boosting else unboosted
                own = [(owned[want], text) for want, text in zip(wanted, got, strict=True) if want in owned]
                values = {
                    "recordings": len(got),
                    "phrases_said": len(own),
                    "found": sum(_stands_in(want, text) for want, text in own),
                    "false": sum(
                        _stands_in(phrase, text) and not _stands_in(phrase, want)
                        for want, text in zip(wanted, got, strict=True)
                        for phrase in phrases
                    ),
                    "wer": jiwer.wer(wanted, got),
                }
                found.append(records.row({"list": name, "weight": weight, "decibels": ratio}, {}, values))
    return records.record(
        "boosting",
        found,
        model={"name": bundle.manifest.name, "layers": bundle.manifest.encoder.layers},
        method={
            "chunk_ms": ms,
            "list": LIST,
            "spoken": len(spoken),
            "noises": NOISES,
            "manifest": manifest.name,
            "phrases": listed.name if listed else None,
        },
    )


def decode(bundle: Bundle, chunk: ChunkConfig, clips: Sequence[Floats], boosting: Boosting | None) -> list[list[int]]:
    """Tokens of whole recordings, `_SLOTS` streams at a time."""
    manifest, backend = bundle.manifest, OrtBackend(bundle, capacity=_SLOTS)
    said: list[list[int]] = [[] for _ in clips]
    for first in range(0, len(clips), _SLOTS):
        part = clips[first : first + _SLOTS]
        slots = np.arange(len(part))
        backend.reset(slots)
        for slot in slots.tolist():
            backend.set_phrases(slot, boosting)
        steps = -(-max(manifest.encoder_frames(len(clip)) for clip in part) // chunk.frames)
        audio, lengths = np.zeros((len(part), steps * chunk.samples), np.float32), []
        for row, clip in zip(audio, part, strict=True):
            row[manifest.lead : manifest.lead + len(clip)] = clip[: len(row) - manifest.lead]
            lengths.append(manifest.lead + len(clip))
        for step in range(steps):
            start = step * chunk.samples
            left = np.clip(np.array(lengths) - start, 0, chunk.samples)
            got = backend.submit(Batch(chunk, slots, audio[:, start : start + chunk.samples], left)).result()
            for slot, tokens in enumerate(got.tokens):
                said[first + slot] += tokens.tolist()
    return said


def _audio(path: Path, bundle: Bundle) -> Floats:
    audio, rate = soundfile.read(path, dtype="float32")
    if rate != bundle.manifest.features.sample_rate:
        raise AudioError(f"{path} has {rate} samples a second, the model wants {bundle.manifest.features.sample_rate}.")
    return audio


def _with_noise(clip: Floats, decibels: float | None, seed: int) -> Floats:
    if decibels is None:
        return clip
    noise = np.random.default_rng([seed, len(clip)]).standard_normal(len(clip)).astype(np.float32)
    return clip + noise * np.float32(np.sqrt((clip**2).mean() / 10 ** (decibels / 10)))


def _phrases(texts: Sequence[str], listed: Path | None) -> list[str]:
    """Those that are said and as many others as two lists need. Raises `OptionError` if there are too few."""
    if listed is None:
        return sorted({text for text in texts if len(text.split()) >= LEAST}) + _made_up(texts, 2 * LIST)
    lines = listed.read_text(encoding="utf-8").splitlines()
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2 * LIST:
        raise OptionError(f"{listed} has {len(found)} phrases; this benchmark wants {2 * LIST} or more.")
    return found


def _made_up(texts: Sequence[str], count: int) -> list[str]:
    """Phrases of the texts' words and lengths that stand in none of them. Raises `OptionError` if there are too few."""
    rng, words = np.random.default_rng(0), sorted({word for text in texts for word in text.split()})
    lengths = [len(text.split()) for text in texts if len(text.split()) >= LEAST]
    found: dict[str, None] = {}
    for _ in range(100 * count if lengths else 0):
        phrase = " ".join(rng.choice(words, rng.choice(lengths)))
        if not any(_stands_in(phrase, text) for text in texts):
            found[phrase] = None
        if len(found) == count:
            return list(found)
    raise OptionError(f"the recordings have too few words to make up {count} phrases of {LEAST} or more.")


def _stands_in(phrase: str, text: str) -> bool:
    return f" {phrase} " in f" {text} "


def _noise(decibels: float | None) -> str:
    return "none" if decibels is None else f"{decibels:g} dB"


def table(result: Record) -> str:
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in result["rows"]:
        case, values = row["case"], row["values"]
        noise = f"{_noise(case['decibels'])} ({values['phrases_said']} said)"
        cache_dtype = f"{values['found']}, {values['false']}, {100 * values['wer']:.1f} %"
        cells.setdefault((noise, case["list"]), {})[case["weight"]] = cache_dtype
    weights = sorted({row["case"]["weight"] for row in result["rows"]})
    head = ("noise", "list", *("not boosted" if not weight else f"weight {weight:g}" for weight in weights))
    lines = [(*key, *(found.get(weight, "") for weight in weights)) for key, found in cells.items()]
    method = result["method"]
    return (
        f"Model *{result['model']['name']}*, {method['chunk_ms']} ms; phrases found, false ones, words wrong. A list "
        f"has {method['list']} phrases, of which {method['spoken']} are said in some recording (*spoken*) or none "
        f"(*others*); {method['noises']} drawings of the noise.\n\n{tables.markdown(head, lines)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.studies.boosting", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--bundle", type=Path, help="what to run (default: the packaged model)")
    parser.add_argument("--manifest", type=Path, required=True, help="recordings and what is said in them")
    parser.add_argument("--phrases", type=Path, help="a phrase a line (default: the recordings' texts and more)")
    parser.add_argument("--weight", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--chunk-ms", type=int, default=560)
    parser.add_argument("--out", type=Path, default=records.FOLDER)
    parser.add_argument("--name", default="boosting")
    options = parser.parse_args(arguments)
    result = measure_boosting(
        Bundle.open(options.bundle or nemostream.demo_bundle()),
        options.manifest,
        options.weight,
        ms=options.chunk_ms,
        say=records.say,
        listed=options.phrases,
    )
    records.write(result, options.out / f"{options.name}.json")
    (options.out / f"{options.name}.md").write_text(table(result), encoding="utf-8")
    print(table(result), end="")


if __name__ == "__main__":
    main()
