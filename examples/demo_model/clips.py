"""Audio clips with their text, kept by the thousand in one .npz file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 16000
FRAME = 1280  # samples in an encoder frame (80 ms)


@dataclass
class Clip:
    audio: np.ndarray  # float32, 16 kHz, within [-1, 1]
    text: str
    voice: str
    ends: list[int]  # sample at which each word ends; empty when unknown


def save_clips(path: Path, clips: list[Clip]) -> None:
    audio = [np.clip(np.rint(clip.audio * 32767), -32768, 32767).astype(np.int16) for clip in clips]
    rows = [{"text": c.text, "voice": c.voice, "ends": c.ends, "length": len(c.audio)} for c in clips]
    np.savez(path, audio=np.concatenate(audio), rows=np.array(json.dumps(rows)))
    timed = sum(bool(clip.ends) for clip in clips)
    print(f"{path}: {len(clips)} clips, {timed} with times, {hours(clips) * 60:.1f} minutes", flush=True)


def load_clips(path: Path) -> list[Clip]:
    with np.load(path) as data:
        audio, rows = data["audio"], json.loads(str(data["rows"]))
    clips, start = [], 0
    for row in rows:
        part = audio[start : start + row["length"]].astype(np.float32) / 32767
        clips.append(Clip(part, row["text"], row["voice"], row["ends"]))
        start += row["length"]
    return clips


def hours(clips: list[Clip]) -> float:
    return sum(len(clip.audio) for clip in clips) / RATE / 3600
