"""Create the audio data: synthetic speech with the times of all words and sounds, and the human recordings.

    python make_data.py --sentences sentences.jsonl --out WORK --piper VOICE --kokoro VOICES [--speech SPEECH]

Writes shards of two files: `NAME.i16` (concatenated 16 kHz mono samples) and `NAME.jsonl` (one row per clip: start,
length, text, kind, voice, and word times and sounds if known). The rows file is written last, so a shard is complete or
absent, and a rerun continues where it stopped. The shards `test-*` are for testing: held-out sentences, the digits of
the held-out human speaker, and the held-out prompts.
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
from voices import RATE, Espeak, Festival, Flite, SynthesisError, Utterance

TEST_SPEAKER = "yweweler"  # human speaker who is not in the training data
SHARES = {"flite": 0.27, "espeak": 0.25, "festival": 0.18, "piper": 0.3}
PER_SHARD = 400
KOKORO_SHARDS, PER_KOKORO_SHARD = 60, 100  # slowest voice: 3 times real time on a core


class Shard:
    """Writer of a shard."""

    def __init__(self, folder: Path, name: str) -> None:
        self.rows_path, self.audio_path = folder / f"{name}.jsonl", folder / f"{name}.i16"
        self.rows: list[str] = []
        self.pieces: list[np.ndarray] = []
        self.length = 0  # samples

    def add(self, audio: np.ndarray, row: dict, utterance: Utterance | None = None) -> None:
        """Append a clip, normalised to a peak of 0.9."""
        peak = float(np.abs(audio).max()) if len(audio) else 0.0
        samples = np.round(audio * (0.9 / max(peak, 0.05)) * 32767).astype(np.int16)
        row = row | {"start": self.length, "length": len(samples)}
        if utterance:
            row |= {
                "starts": [round(t, 3) for t in utterance.starts],
                "ends": [round(t, 3) for t in utterance.ends],
                "set": utterance.phone_set,
                "phones": [symbol for symbol, _ in utterance.phones],
                "until": [round(float(t), 3) for _, t in utterance.phones],
            }
        self.rows.append(json.dumps(row, ensure_ascii=False))
        self.pieces.append(samples)
        self.length += len(samples)

    def write(self) -> float:
        """Write the files; return the duration in minutes."""
        np.concatenate(self.pieces).tofile(self.audio_path)
        partial = self.rows_path.with_suffix(".partial")
        partial.write_text("\n".join(self.rows) + "\n")
        partial.rename(self.rows_path)
        return self.length / RATE / 60


def synthesize_shard(folder: Path, name: str, rows: list[dict], seed: int, piper: Path | None) -> str:
    """Synthesise one shard, each sentence by one voice; skip sentences without reliable word times."""
    rng = random.Random(seed)
    shares = {tool: share for tool, share in SHARES.items() if piper or tool != "piper"}
    espeak = Espeak()
    synthesizers = {"flite": Flite().synthesize, "espeak": espeak.synthesize}
    if piper:
        synthesizers["piper"] = Piper(piper, espeak).synthesize
    tools = rng.choices(list(shares), list(shares.values()), k=len(rows))
    slow = [row for row, tool in zip(rows, tools, strict=True) if tool == "festival"]
    festival = iter(Festival().synthesize_all([row["text"] for row in slow], rng))
    shard, skipped = Shard(folder, name), 0
    for row, tool in zip(rows, tools, strict=True):
        try:
            utterance = next(festival) if tool == "festival" else synthesizers[tool](row["text"], rng)
        except SynthesisError:
            utterance = None
        if utterance is None:
            skipped += 1
            continue
        shard.add(utterance.audio, {"text": row["text"], "kind": row["kind"], "voice": utterance.voice}, utterance)
    return f"{name}: {shard.write():.1f} minutes, {skipped} sentences skipped"


def synthesize_kokoro_shard(folder: Path, name: str, rows: list[dict], seed: int, kokoro: Path) -> str:
    """Synthesise one shard with Kokoro."""
    rng, synthesize, shard = random.Random(seed), Kokoro(kokoro, Espeak()).synthesize, Shard(folder, name)
    for row in rows:
        try:
            utterance = synthesize(row["text"], rng)
        except SynthesisError:
            continue
        shard.add(utterance.audio, {"text": row["text"], "kind": row["kind"], "voice": utterance.voice}, utterance)
    return f"{name}: {shard.write():.1f} minutes"


def write_human_shards(folder: Path, speech: Path) -> None:
    """Write the shards of human digits and prompts."""
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
    """Remove silence at both ends: less than 30 dB below the loudest 10 ms is speech."""
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
    parser.add_argument("--tag", help="ignored; identifies the process in a list")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.speech and not (options.out / "test-prompts.jsonl").is_file():
        write_human_shards(options.out, options.speech)
    rows = [json.loads(line) for line in options.sentences.read_text().splitlines()]
    held_out = [row for row in rows if row["held_out"]]
    training = [row for row in rows if not row["held_out"]]
    jobs = [
        (synthesize_shard, f"test-{n:03}", part, 10_000 + n, options.piper)
        for n, part in _parts(held_out[:1200], PER_SHARD)
    ]
    fast = [(synthesize_shard, f"train-{n:03}", part, n, options.piper) for n, part in _parts(training, PER_SHARD)]
    if options.kokoro:
        selected = held_out[1200 : 1200 + 2 * PER_KOKORO_SHARD]
        jobs += [
            (synthesize_kokoro_shard, f"test-kokoro-{n:03}", part, 30_000 + n, options.kokoro)
            for n, part in _parts(selected, PER_KOKORO_SHARD)
        ]
        selected = training[::-1][: KOKORO_SHARDS * PER_KOKORO_SHARD]
        slow = [
            (synthesize_kokoro_shard, f"train-kokoro-{n:03}", part, 20_000 + n, options.kokoro)
            for n, part in _parts(selected, PER_KOKORO_SHARD)
        ]
        while slow:  # interleaved, so that training can start with all voices
            jobs += [*fast[:2], slow.pop(0)]
            fast = fast[2:]
    jobs = [
        (function, options.out, *job)
        for function, *job in jobs + fast
        if not (options.out / f"{job[0]}.jsonl").is_file()
    ]
    # One process per shard: flite and espeak-ng have global state, and a crash in C code loses only one shard.
    with get_context("fork").Pool(options.processes, maxtasksperchild=1) as pool:
        for line in pool.imap(_run_job, jobs, chunksize=1):
            print(line, flush=True)


def _parts(rows: list[dict], size: int) -> list[tuple[int, list[dict]]]:
    return [(number, rows[first : first + size]) for number, first in enumerate(range(0, len(rows), size))]


def _run_job(job: tuple) -> str:
    function, *arguments = job
    return function(*arguments)


if __name__ == "__main__":
    main()
