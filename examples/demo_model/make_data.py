"""Make the demo model's data: digits and digit strings by synthetic voices, and human digits if they are at hand.

    python make_data.py --work WORK [--speech DIR]

Needs `flite`, `espeak-ng` and `festival` with the voices kal, ked and slt_arctic_hts. `--speech` is a folder with
`digits/SPEAKER.jsonl` manifests, one FLAC a speaker (the Free Spoken Digit Dataset). Writes three files:

    words.npz    single digits without silence: training strings are built of them on the fly, with known times
    strings.npz  digit strings spoken in one go by a synthesiser, for training
    heldout.npz  the same for testing, of texts that no training string has (see `is_held_out`)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
import synth
from clips import DIGITS, RATE, Clip, save_clips
from synth import Utterance


def is_held_out(text: str) -> bool:
    """One text of eight is for testing, whatever voice says it. Single digits cannot be: there are only ten."""
    return " " in text and hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def random_text(rng: random.Random, held_out: bool) -> str:
    while True:
        text = " ".join(rng.choices(DIGITS, k=rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 10))))
        if is_held_out(text) == held_out:
            return text


def with_pauses(text: str, rng: random.Random) -> str:
    """Commas where someone reading a number would pause: after each group, now and then, or nowhere."""
    words, style = text.split(), rng.random()
    if style < 0.4:
        return " ".join(words)
    if style < 0.7:
        group = rng.choice((3, 4))
        return ", ".join(" ".join(words[i : i + group]) for i in range(0, len(words), group))
    return "".join(word + rng.choice((" ", " ", ", ")) for word in words).strip(" ,")


def single_words(folder: Path, rng: random.Random) -> list[Utterance]:
    plan: list[tuple[str, float]] = []
    for stretch in (0.8, 0.95, 1.1, 1.3, 1.5):
        plan += [(f"flite-{voice}", stretch) for voice in synth.FLITE]
        plan += [(f"festival-{voice}", stretch) for voice in synth.FESTIVAL]
    for accent in synth.ACCENTS:
        plan += [(synth.espeak_voice(accent, variant), 0.0) for variant in synth.VARIANTS]
    made = []
    for word in DIGITS:
        for voice, stretch in plan:
            path = folder / f"{len(made)}.wav"
            pace = stretch or round(rng.uniform(0.75, 1.4), 2)
            made.append(Utterance(word, word + rng.choice((".", ",", "?")), voice, pace, rng.randint(15, 85), path))
    return made


def strings(folder: Path, rng: random.Random, count: int, held_out: bool) -> list[Utterance]:
    made = []
    for number in range(count):
        text = random_text(rng, held_out)
        pace = rng.choice((0.85, 1.0, 1.1, 1.25, 1.45))
        path = folder / f"{number}.wav"
        made.append(Utterance(text, with_pauses(text, rng), synth.random_voice(rng), pace, rng.randint(15, 85), path))
    return made


def spoken(utterances: list[Utterance]) -> list[Clip]:
    synth.speak(utterances)
    clips = []
    for one in utterances:
        audio, rate = soundfile.read(one.path, dtype="float32")
        one.path.unlink()
        if rate != RATE:
            audio = soxr.resample(audio, rate, RATE)
        clips.append(Clip(audio, one.text, one.voice, [round(end * RATE) for end in one.ends]))
    return clips


def human_words(speech: Path) -> list[Clip]:
    clips = []
    for manifest in sorted((speech / "digits").glob("*.jsonl")):
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        audio, rate = soundfile.read(speech / rows[0]["audio_filepath"], dtype="float32")
        for row in rows:
            begin = round(row["offset"] * rate)
            part = audio[begin : begin + round(row["duration"] * rate)]
            clips.append(Clip(soxr.resample(part, rate, RATE), row["text"], f"human-{row['speaker']}", []))
    return clips


def trim(clip: Clip) -> Clip:
    """Cut the silence off both ends: what is more than 35 dB below the loudest 10 ms."""
    frames = clip.audio[: len(clip.audio) // 160 * 160].reshape(-1, 160)
    power = (frames**2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10**-3.5)
    return Clip(clip.audio[max(loud[0] - 1, 0) * 160 : (loud[-1] + 2) * 160], clip.text, clip.voice, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder to write to")
    parser.add_argument("--speech", type=Path, help="folder with digits/SPEAKER.jsonl; without it, no human speech")
    parser.add_argument("--strings", type=int, default=4000)
    parser.add_argument("--heldout", type=int, default=300)
    options = parser.parse_args()
    if complaint := synth.missing_tools():
        sys.exit(complaint)
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = [trim(clip) for clip in spoken(single_words(folder, random.Random(1)))]
        if options.speech:
            words += [trim(clip) for clip in human_words(options.speech)]
        save_clips(options.work / "words.npz", words)
        for name, seed, count in (("heldout", 3, options.heldout), ("strings", 2, options.strings)):
            utterances = strings(folder, random.Random(seed), count, held_out=name == "heldout")
            save_clips(options.work / f"{name}.npz", spoken(utterances))


if __name__ == "__main__":
    main()
