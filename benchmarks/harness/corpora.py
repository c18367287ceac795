"""Transcribed speech for word error rates: NeMo manifests, data sets of the Hugging Face hub, the packaged clip."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Manifest
from nemostream.clips import CLIP_TEXT, read_clip
from nemostream.errors import AudioError, BackendError, OptionError

# By name: configuration and split in hf-audio/esb-datasets-test-only-sorted, the data of the Open ASR leaderboard, and
# the WER of the published model in percent at the chunk sizes `CARD_CHUNKS`.
# Source: model card of nvidia/nemotron-speech-streaming-en-0.6b, March 2026.
LEADERBOARD = {
    "ami": (("ami", "test"), (11.73, 11.88, 14.71, 18.29)),
    "earnings22": (("earnings22", "test"), (12.52, 12.82, 13.01, 13.16)),
    "gigaspeech": (("gigaspeech", "test"), (9.66, 9.78, 10.34, 11.17)),
    "librispeech-clean": (("librispeech", "test.clean"), (2.32, 2.46, 2.56, 2.80)),
    "librispeech-other": (("librispeech", "test.other"), (4.84, 5.07, 5.57, 6.01)),
    "spgispeech": (("spgispeech", "test"), (2.97, 3.03, 3.25, 3.43)),
    "tedlium": (("tedlium", "test"), (3.50, 3.54, 3.77, 4.10)),
    "voxpopuli": (("voxpopuli", "test"), (7.91, 8.00, 8.18, 8.46)),
}
CARD_CHUNKS = (1120, 560, 160, 80)  # ms
_HUB = "hf-audio/esb-datasets-test-only-sorted"
_TEXT_COLUMNS = ("text", "sentence", "normalized_text", "transcript", "transcription")  # same order as the leaderboard
_NOT_SCORED = "ignore_time_segment_in_scoring"  # marker in TED-LIUM; the leaderboard skips such segments


@dataclass(frozen=True)
class CorpusUtterance:
    """A recording and its transcript.

    `audio` is a path or the bytes of a file, of which `duration` seconds (None: to the end) from `offset` seconds are
    used, or samples [N] at the sample rate of the model.
    """

    audio: Path | bytes | NDArray[np.float32]
    text: str
    offset: float = 0.0
    duration: float | None = None

    def samples(self, rate: int) -> NDArray[np.float32]:
        """Return the samples [N], one channel, at `rate` Hz. Raises `AudioError` if the file cannot be read."""
        import soundfile
        import soxr

        if isinstance(self.audio, np.ndarray):
            return self.audio
        try:
            with soundfile.SoundFile(io.BytesIO(self.audio) if isinstance(self.audio, bytes) else self.audio) as file:
                file.seek(min(round(self.offset * file.samplerate), file.frames))
                frames = -1 if self.duration is None else round(self.duration * file.samplerate)
                samples, file_rate = file.read(frames, dtype="float32", always_2d=True), file.samplerate
        except (OSError, RuntimeError) as error:
            name = self.audio if isinstance(self.audio, Path) else f"the recording of {self.text[:40]!r}"
            raise AudioError(f"{name} cannot be read: {error}") from error
        return soxr.resample(samples.mean(axis=1), file_rate, rate)

    def source(self, rate: int) -> Any:
        """Return an input for `Model.transcribe`: the path if the utterance is a whole file, else samples."""
        whole = isinstance(self.audio, Path) and not self.offset and self.duration is None
        return self.audio if whole else self.samples(rate)


def read_manifest(path: Path) -> list[CorpusUtterance]:
    """Read a NeMo manifest (`audio_filepath`, `text`, optional `offset` and `duration` in seconds; JSON Lines).

    Relative paths are resolved from the folder of the manifest or, if there is no such file, from its parent folder.
    Raises `OptionError` with the line number if a line is invalid.
    """
    utterances = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            offset = float(row.get("offset") or 0.0)
            # Without an offset the duration is that of the whole file and may be rounded.
            duration = float(row["duration"]) if row.get("offset") is not None and row.get("duration") else None
            audio = path.parent / row["audio_filepath"]
            if not audio.exists() and (other := path.parent.parent / row["audio_filepath"]).exists():
                audio = other
            utterances.append(CorpusUtterance(audio, str(row["text"]), offset, duration))
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{path}, line {number}: not a manifest entry; expected a JSON object with audio_filepath and text."
            ) from error
    if not utterances:
        raise OptionError(f"{path} contains no recordings.")
    return utterances


def add_noise(
    clip: NDArray[np.float32], decibels: float, seed: int, before: int = 0, after: int = 0
) -> NDArray[np.float32]:
    """Add white noise at a signal-to-noise ratio of `decibels`; the same seed and length give the same noise.

    `before` and `after` are samples of noise alone at the start and the end; the ratio is that of the clip.
    """
    rng = np.random.default_rng([seed, len(clip)])
    noise = rng.standard_normal(len(clip) + before + after).astype(np.float32)
    noise = np.roll(noise, before)  # that of the clip does not depend on the rest
    noise *= np.float32(np.sqrt((clip**2).mean() / 10 ** (decibels / 10)))
    noise[before : before + len(clip)] += clip
    return noise


def packaged(manifest: Manifest) -> list[CorpusUtterance]:
    """Return the packaged recording."""
    return [CorpusUtterance(read_clip("clip", manifest.features.sample_rate), CLIP_TEXT)]


class Hub:
    """A data set of the Hugging Face hub: a name in `LEADERBOARD` or `name:config:split`. Can be iterated repeatedly.

    The `datasets` package downloads a whole set once and caches it; with `limit`, the first utterances are streamed.
    Raises `OptionError` for an unknown name, and `BackendError` if the package is missing or the set not available.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        if find_spec("datasets") is None:
            raise BackendError("data sets of the Hugging Face hub need the datasets package: pip install datasets")
        if name in LEADERBOARD:
            self._path, (self._config, self._split) = _HUB, LEADERBOARD[name][0]
        elif name.count(":") == 2:
            self._path, self._config, self._split = name.split(":")
        else:
            known = ", ".join(LEADERBOARD)
            raise OptionError(
                f"unknown data set {name!r}: choose one of {known}, give name:config:split, or use --manifest FILE."
            )
        self._name, self._limit = name, limit

    def __iter__(self) -> Iterator[CorpusUtterance]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self._path, self._config or None, split=self._split, streaming=self._limit is not None
            )
            # Decoded in `CorpusUtterance`: the decoder of `datasets` needs PyTorch and FFmpeg.
            rows = rows.cast_column("audio", datasets.Audio(decode=False))
            for row in rows if self._limit is None else rows.take(self._limit):
                audio, text = row["audio"], next((row[name] for name in _TEXT_COLUMNS if row.get(name)), "")
                scored = "" if text.strip().lower() == _NOT_SCORED else text
                yield CorpusUtterance(audio["bytes"] or Path(audio["path"]), scored)
        except (OSError, ValueError, KeyError) as error:
            raise BackendError(f"{self._name} cannot be loaded from the hub: {error}") from error
