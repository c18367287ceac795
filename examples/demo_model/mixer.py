"""Training audio made on the fly: strings of single words or whole strings, then a room, a telephone, noise, a level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread

import numpy as np
from clips import DIGITS, RATE, Clip, load_clips
from make_data import is_held_out
from scipy.signal import butter, fftconvolve, sosfilt

TEST_SPEAKER = "human-yweweler"  # no training step hears this one
HUMAN_SHARE = 0.45  # of the built strings; there are only four human voices
COUNTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)
SHARES = np.array((0.05, 0.17, 0.13, 0.15, 0.15, 0.13, 0.08, 0.06, 0.05, 0.03))


@dataclass
class Example:
    audio: np.ndarray  # float32, 16 kHz
    digits: list[int]
    starts: list[int]  # first sample of each word
    ends: list[int]  # sample after each word; both empty where nobody knows


class Mixer:
    def __init__(self, work: Path, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        words = [clip for clip in load_clips(work / "words.npz") if clip.voice != TEST_SPEAKER]
        self.strings = load_clips(work / "strings.npz")
        self.timed = [clip for clip in self.strings if clip.ends]
        self.hours = sum(len(clip.audio) for clip in words + self.strings) / RATE / 3600
        # voices[human or not][voice][digit] is a list of clips
        self.voices: tuple[dict[str, list[list[Clip]]], ...] = ({}, {})
        for clip in words:
            by_digit = self.voices[clip.voice.startswith("human-")].setdefault(clip.voice, [[] for _ in DIGITS])
            by_digit[DIGITS.index(clip.text)].append(clip)
        self.names = [sorted(kind) for kind in self.voices]
        # 128 espeak voices would drown the eight others: they share half of the draws.
        espeak = np.array([name.startswith("espeak") for name in self.names[0]])
        self.weights = np.where(espeak, 0.5 / espeak.sum(), 0.5 / (~espeak).sum())

    def batches(self, size: int, first: int, steps: int, warm: int, joined: int) -> Iterator[list[Example]]:
        """Batches `first` to `steps` - 1, made one ahead in a thread. They get harder over the first `warm`;
        whole strings without times come in from `joined` on."""
        queue: Queue[list[Example] | None] = Queue(maxsize=3)

        def fill() -> None:
            for step in range(first, steps):
                self.rng = np.random.default_rng((11, step))  # the same batch whether or not training was resumed
                hard = min(1.0, 0.15 + step / warm)
                queue.put([self.example(hard, step >= joined) for _ in range(size)])
            queue.put(None)

        Thread(target=fill, daemon=True).start()
        while (batch := queue.get()) is not None:
            yield batch

    def example(self, hard: float, untimed: bool) -> Example:
        if self.rng.random() < (0.45 if untimed else 0.25):
            return self.whole(self.strings if untimed else self.timed, hard)
        return self.built(hard)

    def built(self, hard: float) -> Example:
        """Words of one voice, as a rule, joined with gaps or nearly without."""
        rng = self.rng
        shares = np.where(np.array(COUNTS) <= 2 + 8 * hard, SHARES, 0.0)
        count = int(rng.choice(COUNTS, p=shares / shares.sum()))
        digits = rng.integers(10, size=count).tolist()
        while is_held_out(" ".join(DIGITS[d] for d in digits)):
            digits = rng.integers(10, size=count).tolist()
        kind = int(bool(self.names[1]) and rng.random() < HUMAN_SHARE)
        voice = str(rng.choice(self.names[kind], p=None if kind else self.weights))
        tight = rng.random() < 0.4
        speed = rng.uniform(0.88, 1.14)
        pieces = [self._silence(0.0, 0.7) if rng.random() < 0.8 else self._silence(0.0, 0.03)]
        length, starts, ends = len(pieces[0]), [], []
        for digit in digits:
            choice = self.voices[kind][voice][digit]
            word = self._level(_faded(choice[int(rng.integers(len(choice)))].audio))
            word = _speed(word, speed * rng.uniform(0.96, 1.04))
            gap = self._silence(0.0, 0.06) if tight else self._silence(0.03, rng.choice((0.2, 0.5, 1.0)))
            starts.append(length)
            ends.append(length + len(word))
            pieces += [word, gap]
            length += len(word) + len(gap)
        pieces.append(self._silence(0.15, 0.6) if count else self._silence(0.3, 3.0))
        return Example(self._augment(np.concatenate(pieces), hard), digits, starts, ends)

    def whole(self, clips: list[Clip], hard: float) -> Example:
        rng = self.rng
        clip = clips[int(rng.integers(len(clips)))]
        while len(clip.audio) > (4 + 8 * hard) * RATE:
            clip = clips[int(rng.integers(len(clips)))]
        speed = rng.uniform(0.88, 1.14)
        before = self._silence(0.0, 0.6) if rng.random() < 0.8 else self._silence(0.0, 0.0)
        audio = [before, _speed(self._level(clip.audio), speed), self._silence(0.1, 0.5)]
        ends = [len(before) + round(end / speed) for end in clip.ends]
        # A word's own start is not known; what the starts are for only needs its second half.
        starts = [max(end - round(0.4 * RATE), previous) for end, previous in zip(ends, [0, *ends], strict=False)]
        digits = [DIGITS.index(word) for word in clip.text.split()]
        return Example(self._augment(np.concatenate(audio), hard), digits, starts, ends)

    def _silence(self, low: float, high: float) -> np.ndarray:
        return np.zeros(int(self.rng.uniform(low, high) * RATE), np.float32)

    def _level(self, audio: np.ndarray) -> np.ndarray:
        return audio / max(float(np.abs(audio).max()), 1e-3) * np.float32(self.rng.uniform(0.3, 0.6))

    def _augment(self, audio: np.ndarray, hard: float) -> np.ndarray:
        rng = self.rng
        if rng.random() < 0.2 * hard:  # a small room
            length = int(rng.uniform(0.05, 0.2) * RATE)
            room = rng.standard_normal(length) * np.exp(-6.0 * np.arange(length) / length) * rng.uniform(0.02, 0.08)
            room[0] = 1.0
            audio = fftconvolve(audio, room)[: len(audio)]
        if rng.random() < 0.25 * hard:  # a telephone
            band = (rng.uniform(150, 350), rng.uniform(3000, 3800))
            audio = sosfilt(butter(3, band, "band", fs=RATE, output="sos"), audio)
        elif rng.random() < 0.3 * hard:  # a dull microphone
            audio = sosfilt(butter(2, rng.uniform(3000, 7500), "low", fs=RATE, output="sos"), audio)
        level = float(np.sqrt(np.mean(audio**2)))
        if rng.random() < 0.8:
            noise = rng.standard_normal(len(audio))
            if rng.random() < 0.6:
                noise = sosfilt(butter(1, rng.uniform(200, 2000), "low", fs=RATE, output="sos"), noise)
            noise /= float(np.sqrt(np.mean(noise**2))) + 1e-9
            signal_to_noise = rng.uniform(25 - 18 * hard, 50)
            loudness = 10 ** rng.uniform(-4.5, -1.3) if level < 1e-4 else level * 10 ** (-signal_to_noise / 20)
            audio = audio + noise * loudness
        return (audio * 10 ** (rng.uniform(-18 * hard, 4) / 20)).astype(np.float32)


def _faded(audio: np.ndarray, samples: int = 80) -> np.ndarray:
    ramp = np.linspace(0.0, 1.0, samples, dtype=np.float32)
    audio = audio.copy()
    audio[:samples] *= ramp[: len(audio)]
    audio[-samples:] *= ramp[::-1][: len(audio)]
    return audio


def _speed(audio: np.ndarray, rate: float) -> np.ndarray:
    """Faster and higher by `rate`. Linear interpolation is good enough to train on."""
    times = np.arange(0, len(audio) - 1, rate)
    return np.interp(times, np.arange(len(audio)), audio).astype(np.float32)
