"""Word error rates during training: the validation set, decoded by NeMo with the attention mask of streaming."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

RATE = 16000


@dataclass
class Scored:
    """A recording with its reference text."""

    audio: np.ndarray  # float32
    text: str
    kind: str
    voice: str = ""
    ends: list[float] | None = None  # of each word, in seconds


def read_shard(folder: Path, name: str) -> list[Scored]:
    """Read all clips of a shard."""
    samples = np.memmap(folder / f"{name}.i16", np.int16, "r")
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [
        Scored(
            samples[row["start"] : row["start"] + row["length"]].astype(np.float32) / 32768,
            row["text"],
            row["kind"],
            row["voice"],
            row.get("ends"),
        )
        for row in rows
    ]


def dev_clips(folder: Path) -> list[Scored]:
    """Return the validation set, from a test shard that the final figures do not use."""
    return read_shard(folder, "test-002")[:140]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.sub(r"[^a-z' ]", " ", text.lower().replace("-", " ")).split()


def errors(wanted: list[str], got: list[str]) -> int:
    """Return the edit distance of two word sequences (Levenshtein)."""
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(got, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


@torch.inference_mode()
def transcribe(model, clips: list[np.ndarray], context: list[int]) -> list[str]:
    """Transcribe clips with NeMo, in batches of similar length, with the attention context of a chunk size."""
    model.eval()
    model.encoder.set_default_att_context_size(context)
    device = next(model.parameters()).device
    order = sorted(range(len(clips)), key=lambda n: len(clips[n]))
    texts = [""] * len(clips)
    for first in range(0, len(order), 24):
        part = order[first : first + 24]
        length = torch.tensor([len(clips[n]) + RATE // 2 for n in part])
        audio = torch.zeros(len(part), int(length.max()))
        for row, n in enumerate(part):
            audio[row, : len(clips[n])] = torch.from_numpy(clips[n])
        mel, mel_length = model.preprocessor(input_signal=audio.to(device), length=length.to(device))
        encoded, frames = model.encoder(audio_signal=mel, length=mel_length)
        for n, hypothesis in zip(part, model.decoding.rnnt_decoder_predictions_tensor(encoded, frames), strict=True):
            texts[n] = hypothesis.text
    return texts


def word_errors(model, clips: list[Scored], context: list[int]) -> dict[str, float]:
    """Return the word error rate of each kind of sentence, and of all."""
    got = transcribe(model, [clip.audio for clip in clips], context)
    wrong: dict[str, int] = {}
    total: dict[str, int] = {}
    for clip, text in zip(clips, got, strict=True):
        count = errors(words(clip.text), words(text))
        for kind in ("all", clip.kind):
            wrong[kind] = wrong.get(kind, 0) + count
            total[kind] = total.get(kind, 0) + len(words(clip.text))
    return {kind: wrong[kind] / max(total[kind], 1) for kind in sorted(total)}
