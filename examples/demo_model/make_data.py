"""Speak the sentences: synthetic voices with the time of every word and sound, and the human recordings.

    python make_data.py --sentences sentences.jsonl --out WORK --piper VOICE --kokoro VOICES [--speech SPEECH]

Writes shards, each `NAME.i16` (16 kHz mono samples end to end) and `NAME.jsonl` (one row a clip: start, length, text,
kind, voice, and where known word times and sounds). A shard's rows file comes last, so a shard is whole or absent, and
a rerun goes on where it stopped. `test-*` are for testing: held-out sentences, the left-out human speaker's digits and
the left-out prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import soxr
from kokoro import Kokoro
from piper import Piper
from texts import is_test_prompt, prompt_text
from voices import RATE, Espeak, Festival, Flite, Spoken, Unspeakable

TEST_SPEAKER = "yweweler"  # the human speaker no training step hears
SHARES = {"flite": 0.27, "espeak": 0.25, "festival": 0.18, "piper": 0.3}
PER_SHARD = 400
KOKORO_SHARDS, PER_KOKORO_SHARD = 60, 100  # the slowest voice by far: 3 times real time on a core


class Shard:
    def __init__(self, folder: Path, name: str) -> None:
        self.rows_path, self.audio_path = folder / f"{name}.jsonl", folder / f"{name}.i16"
        self.rows: list[str] = []
        self.pieces: list[np.ndarray] = []
        self.at = 0

    def add(self, audio: np.ndarray, row: dict, spoken: Spoken | None = None) -> None:
        peak = float(np.abs(audio).max()) if len(audio) else 0.0
        samples = np.round(audio * (0.9 / max(peak, 0.05)) * 32767).astype(np.int16)
        row = row | {"start": self.at, "length": len(samples)}
        if spoken:
            row |= {
                "starts": [round(t, 3) for t in spoken.starts],
                "ends": [round(t, 3) for t in spoken.ends],
                "set": spoken.phone_set,
                "phones": [symbol for symbol, _ in spoken.phones],
                "until": [round(float(t), 3) for _, t in spoken.phones],
            }
        self.rows.append(json.dumps(row, ensure_ascii=False))
        self.pieces.append(samples)
        self.at += len(samples)

    def write(self) -> float:
        np.concatenate(self.pieces).tofile(self.audio_path)
        partial = self.rows_path.with_suffix(".partial")
        partial.write_text("\n".join(self.rows) + "\n")
        partial.rename(self.rows_path)
        return self.at / RATE / 60


def speak(folder: Path, name: str, rows: list[dict], seed: int, piper: Path | None) -> str:
    """One shard. Each sentence gets one voice; what a voice cannot time is left out."""
    rng = random.Random(seed)
    shares = {tool: share for tool, share in SHARES.items() if piper or tool != "piper"}
    espeak = Espeak()
    says = {"flite": Flite().say, "espeak": espeak.say}
    if piper:
        says["piper"] = Piper(piper, espeak).say
    tools = rng.choices(list(shares), list(shares.values()), k=len(rows))
    slow = [row for row, tool in zip(rows, tools, strict=True) if tool == "festival"]
    festival = iter(Festival().say_all([row["text"] for row in slow], rng))
    shard, lost = Shard(folder, name), 0
    for row, tool in zip(rows, tools, strict=True):
        try:
            spoken = next(festival) if tool == "festival" else says[tool](row["text"], rng)
        except Unspeakable:
            spoken = None
        if spoken is None:
            lost += 1
            continue
        shard.add(spoken.audio, {"text": row["text"], "kind": row["kind"], "voice": spoken.voice}, spoken)
    return f"{name}: {shard.write():.1f} minutes, {lost} sentences left out"


def speak_slowly(folder: Path, name: str, rows: list[dict], seed: int, kokoro: Path) -> str:
    """A shard by Kokoro's voices."""
    rng, say, shard = random.Random(seed), Kokoro(kokoro, Espeak()).say, Shard(folder, name)
    for row in rows:
        try:
            spoken = say(row["text"], rng)
        except Unspeakable:
            continue
        shard.add(spoken.audio, {"text": row["text"], "kind": row["kind"], "voice": spoken.voice}, spoken)
    return f"{name}: {shard.write():.1f} minutes"


def human(folder: Path, speech: Path) -> None:
    shards = {name: Shard(folder, name) for name in ("human-digits", "human-prompts", "test-digits", "test-prompts")}
    for manifest in sorted((speech / "digits").glob("*.jsonl")):
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        audio, rate = soundfile.read(speech / rows[0]["audio_filepath"], dtype="float32")
        for row in rows:
            begin = round(row["offset"] * rate)
            clip = trim(soxr.resample(audio[begin : begin + round(row["duration"] * rate)], rate, RATE))
            shard = shards["test-digits" if row["speaker"] == TEST_SPEAKER else "human-digits"]
            times = {"starts": [0.0], "ends": [round(len(clip) / RATE, 3)]}
            shard.add(clip, {"text": row["text"], "kind": "digits", "voice": f"human-{row['speaker']}"} | times)
    for line in (speech / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        if text := prompt_text(row["text"]):
            audio, rate = soundfile.read(speech / row["audio_filepath"], dtype="float32")
            shard = shards["test-prompts" if is_test_prompt(row["audio_filepath"]) else "human-prompts"]
            shard.add(soxr.resample(audio, rate, RATE), {"text": text, "kind": "prompt", "voice": "human-prompts"})
    for name, shard in shards.items():
        print(f"{name}: {len(shard.rows)} clips, {shard.write():.1f} minutes", flush=True)


def trim(audio: np.ndarray) -> np.ndarray:
    """Cut silence off both ends, 30 dB under the loudest 10 ms."""
    frames = audio[: len(audio) // 160 * 160].reshape(-1, 160)
    power = (frames**2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 1e-3)
    return audio[max(loud[0] * 160 - 160, 0) : loud[-1] * 160 + 480]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--piper", type=Path, help="folder of en_US-joe-medium.onnx and its .json")
    parser.add_argument("--kokoro", type=Path, help="folder of kokoro.onnx, vocab.json and voices/*.bin")
    parser.add_argument("--speech", type=Path, help="folder of digits/*.jsonl and prompts.jsonl")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--tag", help="ignored: a word to find the process by")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.speech and not (options.out / "test-prompts.jsonl").is_file():
        human(options.out, options.speech)
    rows = [json.loads(line) for line in options.sentences.read_text().splitlines()]
    held_out = [row for row in rows if row["held_out"]]
    training = [row for row in rows if not row["held_out"]]
    jobs = [(speak, f"test-{n:03}", part, 10_000 + n, options.piper) for n, part in _parts(held_out[:1200], PER_SHARD)]
    many = [(speak, f"train-{n:03}", part, n, options.piper) for n, part in _parts(training, PER_SHARD)]
    if options.kokoro:
        few = held_out[1200 : 1200 + 2 * PER_KOKORO_SHARD]
        jobs += [
            (speak_slowly, f"test-kokoro-{n:03}", part, 30_000 + n, options.kokoro)
            for n, part in _parts(few, PER_KOKORO_SHARD)
        ]
        few = training[::-1][: KOKORO_SHARDS * PER_KOKORO_SHARD]
        slow = [
            (speak_slowly, f"train-kokoro-{n:03}", part, 20_000 + n, options.kokoro)
            for n, part in _parts(few, PER_KOKORO_SHARD)
        ]
        while slow:  # in turns, so that training can begin with some of everything
            jobs += [*many[:2], slow.pop(0)]
            many = many[2:]
    jobs = [(say, options.out, *job) for say, *job in jobs + many if not (options.out / f"{job[0]}.jsonl").is_file()]
    # A process a shard: flite and espeak-ng keep state, and a crash in C code should cost one shard.
    with get_context("fork").Pool(options.processes, maxtasksperchild=1) as pool:
        for line in pool.imap(_speak, jobs, chunksize=1):
            print(line, flush=True)


def _parts(rows: list[dict], size: int) -> list[tuple[int, list[dict]]]:
    return [(number, rows[first : first + size]) for number, first in enumerate(range(0, len(rows), size))]


def _speak(job: tuple) -> str:
    say, *rest = job
    return say(*rest)


if __name__ == "__main__":
    main()
