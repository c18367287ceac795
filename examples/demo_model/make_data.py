"""Make the demo model's data: spoken digits from synthetic voices, and human ones if they are at hand.

    python make_data.py --out WORK [--speech DIR]

Needs `flite`, `espeak-ng` and `festival` (voices kal, ked and slt_arctic_hts) on the PATH; `--speech` is a folder with
`digits/SPEAKER.jsonl` manifests (the Free Spoken Digit Dataset, one FLAC a speaker). Everything ends up in three files:

    words.npz    single digits, trimmed: training strings are built from them on the fly, with known times
    strings.npz  digit strings spoken in one breath by a synthesiser, for training
    heldout.npz  the same, for testing: texts that no training string has (`is_held_out`)

each with `audio` (int16, 16 kHz, end to end), `start`, `length`, `text`, `voice`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 16000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_SPEAKER = "yweweler"  # the human speaker no training step hears
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
VARIANTS = ("m1", "m3", "m5", "m7", "f1", "f2", "f3", "f4", "")
FLITE = ("slt", "rms", "awb", "kal16", "kal")
FESTIVAL = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")


def is_held_out(text: str) -> bool:
    """One string of eight, by its own text, is for testing whatever voice speaks it."""
    return hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def flite(voice: str, stretch: float, text: str, path: Path) -> None:
    _run(["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o", str(path)])


def espeak(voice: str, speed: int, pitch: int, text: str, path: Path) -> None:
    _run(["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), text])


def festival(voice: str, texts: list[str], paths: list[Path]) -> None:
    """Festival takes a second to start: one process says a whole list."""
    lines = [f"(voice_{voice})"]
    lines += [
        f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{path}" \'riff)'
        for text, path in zip(texts, paths, strict=True)
    ]
    script = paths[0].with_suffix(".scm")
    script.write_text("\n".join(lines))
    _run(["festival", "-b", str(script)])


def random_string(rng: random.Random, held_out: bool) -> str:
    while True:
        text = " ".join(rng.choices(DIGITS, k=rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 10))))
        if " " in text and is_held_out(text) == held_out:
            return text


def speak_words(folder: Path, rng: random.Random) -> list[tuple[str, str, Path]]:
    jobs, made = [], []
    for word in DIGITS:
        for voice in FLITE:
            for stretch in (0.8, 1.0, 1.25, 1.5):
                path = folder / f"w{len(made)}.wav"
                made.append((word, f"flite-{voice}", path))
                jobs.append((flite, voice, stretch, word + rng.choice((".", ",", "?")), path))
        for accent in ACCENTS:
            for variant in VARIANTS:
                for speed in rng.sample((110, 130, 150, 170, 190), 2):
                    path = folder / f"w{len(made)}.wav"
                    made.append((word, f"espeak-{accent}+{variant}", path))
                    voice = f"{accent}+{variant}" if variant else accent
                    jobs.append((espeak, voice, speed, rng.randint(20, 80), word, path))
    _in_parallel(jobs)
    return made


def speak_strings(folder: Path, rng: random.Random, count: int, held_out: bool) -> list[tuple[str, str, Path]]:
    """A third each from flite and festival, the rest from espeak: equal shares would make espeak's accents rare."""
    jobs, made = [], []
    queues: dict[str, list[tuple[str, Path]]] = {voice: [] for voice in FESTIVAL}
    for number in range(count):
        text, path = random_string(rng, held_out), folder / f"s{number}.wav"
        # A comma now and then makes the pause of someone reading a number in groups.
        spoken = "".join(word + rng.choice((" ", " ", " ", ", ")) for word in text.split()).strip(" ,")
        kind = rng.random()
        if kind < 0.4:
            voice = rng.choice(FLITE)
            jobs.append((flite, voice, round(rng.uniform(0.85, 1.5), 2), spoken, path))
        elif kind < 0.8:
            accent, variant = rng.choice(ACCENTS), rng.choice(VARIANTS)
            voice = f"{accent}+{variant}" if variant else accent
            jobs.append((espeak, voice, rng.randint(100, 190), rng.randint(20, 80), spoken, path))
        else:
            voice = rng.choice(FESTIVAL)
            queues[voice].append((spoken, path))
        made.append((text, voice, path))
    for voice, queue in queues.items():
        for start in range(0, len(queue), 40):
            part = queue[start : start + 40]
            jobs.append((festival, voice, [text for text, _ in part], [path for _, path in part]))
    _in_parallel(jobs)
    return made


def human_words(speech: Path) -> list[tuple[str, str, np.ndarray]]:
    words = []
    for manifest in sorted((speech / "digits").glob("*.jsonl")):
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        audio, rate = soundfile.read(speech / rows[0]["audio_filepath"], dtype="float32")
        for row in rows:
            begin = round(row["offset"] * rate)
            clip = audio[begin : begin + round(row["duration"] * rate)]
            words.append((row["text"], f"human-{row['speaker']}", soxr.resample(clip, rate, RATE)))
    return words


def trim(audio: np.ndarray) -> np.ndarray:
    """Cut silence off both ends, 30 dB under the loudest 10 ms."""
    frames = audio[: len(audio) // 160 * 160].reshape(-1, 160)
    power = (frames**2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 1e-3)
    return audio[max(loud[0] * 160 - 160, 0) : loud[-1] * 160 + 480]


def save(path: Path, rows: list[tuple[str, str, np.ndarray]]) -> None:
    audio = [np.clip(clip * 32767, -32768, 32767).astype(np.int16) for _, _, clip in rows]
    length = np.array([len(clip) for clip in audio])
    np.savez(
        path,
        audio=np.concatenate(audio),
        start=np.cumsum(length) - length,
        length=length,
        text=np.array([text for text, _, _ in rows]),
        voice=np.array([voice for _, voice, _ in rows]),
    )
    print(f"{path}: {len(rows)} clips, {length.sum() / RATE / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--strings", type=int, default=4000)
    options = parser.parse_args()
    missing = [tool for tool in ("flite", "espeak-ng", "festival") if not shutil.which(tool)]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found; on Debian: apt-get install flite espeak-ng festival "
                 "festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts")  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = [(word, voice, trim(_read(path))) for word, voice, path in speak_words(folder, rng)]
        if options.speech:
            words += [(word, voice, trim(clip)) for word, voice, clip in human_words(options.speech)]
        save(options.out / "words.npz", words)
        for name, count, held_out in (("strings", options.strings, False), ("heldout", 300, True)):
            part = folder / name
            part.mkdir()
            strings = [(t, voice, _read(path)) for t, voice, path in speak_strings(part, rng, count, held_out)]
            save(options.out / f"{name}.npz", strings)


def _read(path: Path) -> np.ndarray:
    audio, rate = soundfile.read(path, dtype="float32")
    return audio if rate == RATE else soxr.resample(audio, rate, RATE)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _in_parallel(jobs: list[tuple]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: job[0](*job[1:]), jobs))


if __name__ == "__main__":
    main()
