"""Training batches: clips joined, stretched and augmented, with the frame of each label and the sound of each frame.

A block of batches depends only on the data, the seed and the number of the block. A resumed run therefore continues
identically, and any number of worker processes can create blocks.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import soxr
import torch
from model import FRAME
from scipy import fft

RATE = 16000
POOL = 120  # examples per block, sorted by length into batches
BATCH_SECONDS = 40.0
MAX_SECONDS = 13.0
# Sampling weights of the voices. Natural ones have more weight than their share of the data; below ENOUGH clips the
# weight of a voice is reduced, so that its clips are not repeated too often.
WEIGHTS = {"flite": 0.2, "espeak": 0.17, "festival": 0.13, "piper": 0.22, "kokoro": 0.28}
ENOUGH = 1500
# Sampling weights of the kinds of sentences; kinds with large vocabularies have more weight.
KINDS = {"digits": 0.11, "numbers": 0.08, "dates": 0.09, "prompt": 0.18, "command": 0.21}
KINDS |= {"everyday": 0.21, "text": 0.12}


@dataclass
class Clip:
    """A recording of a shard, with its labels."""

    shard: int
    start: int
    length: int
    voice: str
    kind: str
    text: str
    tokens: list[int]
    times: np.ndarray  # earliest emission of each token, in seconds; empty if unknown
    phones: np.ndarray  # ids of the sounds
    until: np.ndarray  # end of each sound, in seconds
    phone_set: int


@dataclass
class Batch:
    """Augmented audio and its labels."""

    audio: torch.Tensor  # [B, samples]
    length: torch.Tensor  # [B]
    tokens: list[list[int]]
    frames: list[list[int]]  # encoder frame of each token; [-1, ...] if unknown
    sounds: torch.Tensor  # [B, T, 2] id of the sound in each half frame, -100 if unknown
    sets: torch.Tensor  # [B] index of the set of sounds


class Sounds:
    """Ids of the synthesisers' sound symbols; 0 is silence. Each set of symbols has its own ids."""

    SETS = ("us", "ipa", "piper", "kokoro")
    SET_SIZE = 63  # ids per set
    SIZE = 1 + len(SETS) * SET_SIZE

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], int] = {}

    def number(self, phone_set: str, symbol: str) -> int:
        if not symbol:
            return 0
        # A hash, so that the id does not depend on the order of the clips. Collisions do little harm.
        key = (phone_set, symbol)
        if key not in self.numbers:
            base = 1 + self.SETS.index(phone_set) * self.SET_SIZE
            index = sum(ord(c) * (i * 31 + 1) for i, c in enumerate(symbol)) % self.SET_SIZE
            self.numbers[key] = base + index
        return self.numbers[key]


class Clips:
    """All shards with the given prefixes in a folder; `refresh` adds new ones."""

    def __init__(self, folder: Path, tokenizer: Path, prefixes: tuple[str, ...]) -> None:
        self.folder, self.prefixes = folder, prefixes
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        self.sounds = Sounds()
        self.clips: list[Clip] = []
        self.audio: list[np.ndarray] = []
        self.seen: set[Path] = set()
        self.by_voice: dict[str, list[int]] = {}
        self.by_kind: dict[tuple[str, str], list[int]] = {}  # by kind of voice and kind of sentence
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(p for prefix in self.prefixes for p in self.folder.glob(f"{prefix}-*.jsonl")):
            if path not in self.seen:
                self.seen.add(path)
                self.audio.append(np.memmap(path.with_suffix(".i16"), np.int16, "r"))
                for line in path.read_text().splitlines():
                    clip = self._clip(json.loads(line), len(self.audio) - 1)
                    voice = clip.voice.split("-")[0]
                    self.by_voice.setdefault(voice, []).append(len(self.clips))
                    self.by_kind.setdefault((voice, clip.kind), []).append(len(self.clips))
                    self.clips.append(clip)

    def samples(self, clip: Clip) -> np.ndarray:
        return self.audio[clip.shard][clip.start : clip.start + clip.length].astype(np.float32) / 32768

    def _clip(self, row: dict, shard: int) -> Clip:
        tokens, times = self.tokens(row["text"], row.get("starts"), row.get("ends"))
        symbols, until = [], []
        for symbol, end in zip(row.get("phones", ()), row.get("until", ()), strict=True):
            if symbol in ("ː", "ˑ") and until:
                until[-1] = end  # a length mark belongs to the previous sound
            elif symbol not in ("ˈ", "ˌ"):  # the time of a stress mark belongs to the next sound
                symbols.append(self.sounds.number(row["set"], symbol))
                until.append(end)
        return Clip(
            shard,
            row["start"],
            row["length"],
            row["voice"],
            row["kind"],
            row["text"],
            tokens,
            times,
            np.array(symbols, np.uint8),
            np.array(until, np.float32),
            Sounds.SETS.index(row["set"]) if "set" in row else 0,
        )

    def tokens(self, text: str, starts: list[float] | None, ends: list[float] | None) -> tuple[list[int], np.ndarray]:
        """Return token ids and their times: the time of a word is divided among its pieces by their letters."""
        pieces = self.pieces.encode(text, out_type=str)
        tokens = self.pieces.encode(text)
        if ends is None or starts is None:
            return tokens, np.zeros(0, np.float32)
        words: list[list[int]] = []
        for number, piece in enumerate(pieces):
            if piece.startswith("▁") or not words:
                words.append([])
            words[-1].append(number)
        times = np.zeros(len(tokens), np.float32)
        if len(words) != len(ends):
            return tokens, times[:0]
        for inside, begin, end in zip(words, starts, ends, strict=True):
            letters = np.cumsum([sum(c.isalnum() for c in pieces[n]) for n in inside])
            times[inside] = begin + (end - begin) * letters / max(letters[-1], 1)
        return tokens, times


class Mixer:
    """Data set of blocks of batches."""

    def __init__(self, folder: Path, tokenizer: Path, seed: int, with_prompts_from: int) -> None:
        self.clips = Clips(folder, tokenizer, ("train", "human"))
        self.seed, self.with_prompts_from = seed, with_prompts_from
        self.noises = self._noises(np.random.default_rng(seed))

    def __getitem__(self, block: int) -> list[Batch]:
        self.clips.refresh()
        rng = np.random.default_rng([self.seed, block])
        examples = sorted((self._example(rng, block) for _ in range(POOL)), key=lambda e: len(e[0]))
        batches: list[list] = [[]]
        for example in examples:
            if batches[-1] and len(example[0]) * (len(batches[-1]) + 1) > BATCH_SECONDS * RATE:
                batches.append([])
            batches[-1].append(example)
        rng.shuffle(batches)
        return [self._batch(batch) for batch in batches]

    def _example(self, rng: np.random.Generator, block: int) -> tuple:
        kind = rng.random()
        if kind < 0.03:
            parts = []
        elif kind < 0.13 and "human" in self.clips.by_voice:
            parts = self._human_digits(rng)
        elif kind < 0.22 and block >= self.with_prompts_from:
            prompts = self.clips.by_kind["human", "prompt"]
            parts = [self.clips.clips[int(rng.choice(prompts))]]
        else:
            parts = [self._synthetic(rng)]
            if rng.random() < 0.25:
                second = self._synthetic(rng)
                short = parts[0].length + second.length < 0.8 * MAX_SECONDS * RATE
                if short and second.phone_set == parts[0].phone_set:
                    parts.append(second)
        digits = len(parts) > 1 and parts[0].voice.startswith("human")
        silence = rng.uniform(0.0, 0.8) if parts else rng.uniform(1.0, 6.0)
        pieces, at = [np.zeros(int(silence * RATE), np.float32)], int(silence * RATE) / RATE
        tokens, times, sounds, until = [], [], [0], [at]
        # There are few human speakers, so their speed (and pitch) is changed more often.
        probability = 0.85 if parts and parts[0].voice.startswith("human") else 0.5
        factor = float(rng.uniform(0.88, 1.14)) if rng.random() < probability else 1.0
        known = True
        for part in parts:
            audio = self.clips.samples(part) * float(rng.uniform(0.5, 1.0))
            if factor != 1.0:
                audio = soxr.resample(audio, RATE, RATE / factor, quality="LQ")
            tokens += part.tokens
            times += [at + float(t) / factor for t in part.times]
            known = known and len(part.times) == len(part.tokens)
            sounds += [int(s) for s in part.phones]
            until += [at + float(t) / factor for t in part.until]
            at += len(audio) / RATE
            pieces.append(audio)
            gap = rng.uniform(0.0, 0.4) if digits else rng.uniform(0.2, 1.0)
            pieces.append(np.zeros(int(gap * RATE), np.float32))
            at += int(gap * RATE) / RATE
            sounds.append(0 if len(part.phones) else -1)
            until.append(at)
        audio = self._augment(np.concatenate(pieces)[: int(MAX_SECONDS * RATE)], rng)
        frames = [int(t / FRAME) + 1 for t in times] if known else [-1] * len(tokens)
        # Middles of the half frames, one frame later: encoder frame f depends on the audio before FRAME * f.
        grid = (np.arange(int(at / FRAME * 2) + 2) * 2 - 3) * FRAME / 4
        index = np.searchsorted(np.array(until), grid)
        numbers = np.array([*sounds, 0])[np.minimum(index, len(sounds))]
        if parts and not len(parts[0].phones):
            numbers = np.full(len(grid), -100)
        return audio, tokens, frames, numbers, parts[0].phone_set if parts else 0

    def _synthetic(self, rng: np.random.Generator) -> Clip:
        kinds = [kind for kind in WEIGHTS if kind in self.clips.by_voice]
        shares = np.array([WEIGHTS[kind] * min(1.0, len(self.clips.by_voice[kind]) / ENOUGH) for kind in kinds])
        voice = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        while True:
            pool = self.clips.by_kind.get((voice, str(rng.choice(list(KINDS), p=list(KINDS.values())))))
            if not pool:
                continue
            clip = self.clips.clips[pool[int(rng.integers(len(pool)))]]
            if len(clip.times) and clip.length < 0.8 * MAX_SECONDS * RATE:
                return clip

    def _human_digits(self, rng: np.random.Generator) -> list[Clip]:
        pool = self.clips.by_kind["human", "digits"]
        first = self.clips.clips[int(rng.choice(pool))]
        parts = [first]
        while len(parts) < int(rng.choice((1, 2, 3, 4, 5, 6, 8))):
            clip = self.clips.clips[int(rng.choice(pool))]
            if clip.voice == first.voice:
                parts.append(clip)
        return parts

    def _noises(self, rng: np.random.Generator) -> np.ndarray:
        """Return 30 s each of noise with power 1, 1/f, 1/f^2 and between, with standard deviation 1."""
        count = 30 * RATE
        frequency = np.maximum(np.arange(count // 2 + 1) * RATE / count, 20.0)
        noises = []
        for slope in (0.0, 0.5, 1.0, 1.5, 2.0):
            shape = (frequency ** (-slope / 2)).astype(np.float32)
            noise = fft.irfft(fft.rfft(rng.standard_normal(count, dtype=np.float32)) * shape, count)
            noises.append(noise / noise.std())
        return np.array(noises, np.float32)

    def _augment(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Apply a random room, microphone, telephone band, noise and level; filters are multiplied as one spectrum."""
        level = float(np.sqrt(np.mean(audio**2)))
        if level == 0:  # no speech: noise of any level
            noise = self.noises[rng.integers(len(self.noises))][: len(audio)]
            gain = 10 ** (rng.uniform(-70, -12) / 20)
            return np.clip(np.roll(noise, int(rng.integers(len(noise)))) * gain, -1, 1).astype(np.float32)
        count = fft.next_fast_len(len(audio) + RATE // 4, real=True)
        frequency = np.linspace(0, RATE / 2, count // 2 + 1, dtype=np.float32)
        noise = self.noises[rng.integers(len(self.noises))]
        offset = int(rng.integers(len(noise) - len(audio)))
        degraded = rng.random() < 0.6  # the others stay clean: a small model learns little from noisy speech only
        ratio = rng.uniform(10, 40) if degraded and rng.random() < 0.75 else rng.uniform(40, 70)
        noise = noise[offset : offset + len(audio)] * (max(level, 3e-3) * 10 ** (-ratio / 20))
        if degraded:
            spectrum = fft.rfft(audio, count)
            if rng.random() < 0.3:
                room = np.zeros(int(rng.uniform(0.05, 0.3) * RATE), np.float32)
                decay = np.exp(-np.arange(len(room), dtype=np.float32) * (5.0 / len(room)))
                room[:] = rng.standard_normal(len(room), dtype=np.float32) * decay * rng.uniform(0.01, 0.06)
                room[0] = 1.0
                spectrum *= fft.rfft(room, count)
            response = np.ones_like(frequency)
            if rng.random() < 0.5:  # frequency response of a microphone: a few decibels
                points = np.log2([60, 200, 500, 1000, 2000, 4000, 8100])
                decibels = np.interp(np.log2(frequency + 60), points, rng.uniform(-6, 6, 7))
                response *= (10 ** (decibels / 20)).astype(np.float32)
            kind = rng.random()
            if kind < 0.35:  # telephone
                low, high = rng.uniform(80, 320), rng.uniform(3100, 3950)
                response *= 1 / (1 + (low / (frequency + 1)) ** 6) / (1 + (frequency / high) ** 24)
            elif kind < 0.5:
                response *= 1 / (1 + (frequency / rng.uniform(3800, 7500)) ** 12)
            if rng.random() < 0.5:  # noise before the telephone
                spectrum += fft.rfft(noise, count)
                noise = noise * 0.02
            audio = fft.irfft(spectrum * response, count)[: len(audio)]
        audio = audio + noise
        if rng.random() < 0.1:  # eight bits of mu-law
            small = np.sign(audio) * np.log1p(255 * np.minimum(np.abs(audio), 1)) / np.log(256)
            small = np.round(small * 127) / 127
            audio = np.sign(small) * (256 ** np.abs(small) - 1) / 255
        return np.clip(audio * 10 ** (rng.uniform(-24, 3) / 20), -1, 1).astype(np.float32)

    def _batch(self, examples: list[tuple]) -> Batch:
        length = torch.tensor([len(e[0]) for e in examples])
        audio = torch.zeros(len(examples), int(length.max()))
        steps = max(len(e[3]) for e in examples) // 2 + 1
        sounds = torch.full((len(examples), steps, 2), -100, dtype=torch.long)
        for row, (samples, _, _, numbers, _) in enumerate(examples):
            audio[row, : len(samples)] = torch.from_numpy(samples)
            half = torch.from_numpy(numbers[: len(numbers) // 2 * 2].astype(np.int64)).view(-1, 2)
            sounds[row, : len(half)] = torch.where(half < 0, -100, half)
        return Batch(
            audio,
            length,
            [e[1] for e in examples],
            [e[2] for e in examples],
            sounds,
            torch.tensor([e[4] for e in examples]),
        )


def seed_everything(seed: int) -> None:
    """Seed all generators; NeMo draws the attention context of a batch from `random`."""
    random.seed(seed)
    torch.manual_seed(seed)
