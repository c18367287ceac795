"""Transcribed speech to count words on: NeMo manifests, data sets of the Hugging Face hub, the packaged clip."""

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

# By name: configuration and split of hf-audio/esb-datasets-test-only-sorted, which the leaderboard is computed on, and
# the published model's WER in percent at 1120, 560, 160 and 80 ms.
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
CARD_CHUNKS = (1120, 560, 160, 80)
_HUB = "hf-audio/esb-datasets-test-only-sorted"
_TEXTS = ("text", "sentence", "normalized_text", "transcript", "transcription")  # in the leaderboard's order
_NOT_SCORED = "ignore_time_segment_in_scoring"  # the leaderboard leaves out what TED-LIUM's transcribers did


@dataclass(frozen=True)
class Utterance:
    """A recording and what is said in it: a path or a file's bytes, from `offset` on for `duration` seconds (to its
    end), or samples at the model's rate."""

    audio: Path | bytes | NDArray[np.float32]
    text: str
    offset: float = 0.0
    duration: float | None = None

    def samples(self, rate: int) -> NDArray[np.float32]:
        """[N], one channel, at `rate`. Raises `AudioError` for what cannot be read."""
        import soundfile
        import soxr

        if isinstance(self.audio, np.ndarray):
            return self.audio
        try:
            with soundfile.SoundFile(io.BytesIO(self.audio) if isinstance(self.audio, bytes) else self.audio) as file:
                file.seek(min(round(self.offset * file.samplerate), file.frames))
                frames = -1 if self.duration is None else round(self.duration * file.samplerate)
                found, its_rate = file.read(frames, dtype="float32", always_2d=True), file.samplerate
        except (OSError, RuntimeError) as error:
            what = self.audio if isinstance(self.audio, Path) else f"the recording of {self.text[:40]!r}"
            raise AudioError(f"{what} cannot be read: {error}") from error
        return soxr.resample(found.mean(axis=1), its_rate, rate)

    def source(self, rate: int) -> Any:
        """For `Model.transcribe`: the file itself, if it is a whole one."""
        whole = isinstance(self.audio, Path) and not self.offset and self.duration is None
        return self.audio if whole else self.samples(rate)


def read_manifest(path: Path) -> list[Utterance]:
    """A NeMo manifest; relative paths are meant from its folder or, if there is none, from the one above.

    Raises `OptionError` naming the line that is none.
    """
    found = []
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
            # Without an offset a duration is that of the file, rounded perhaps.
            duration = float(row["duration"]) if row.get("offset") is not None and row.get("duration") else None
            audio = path.parent / row["audio_filepath"]
            if not audio.exists() and (above := path.parent.parent / row["audio_filepath"]).exists():
                audio = above
            found.append(Utterance(audio, str(row["text"]), offset, duration))
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{path}, line {number}, is not a manifest's: it needs audio_filepath and text."
            ) from error
    if not found:
        raise OptionError(f"{path} names no recording.")
    return found


def packaged(manifest: Manifest) -> list[Utterance]:
    """The voice that comes with the package."""
    return [Utterance(read_clip("clip", manifest.features.sample_rate), CLIP_TEXT)]


class Hub:
    """A data set of the hub, one of `LEADERBOARD` or `name:config:split`, read anew each time it is gone through.

    A whole set is downloaded once and kept by the `datasets` package; of a `limit` only what it takes is fetched.
    Raises `OptionError` for a name it does not know, `BackendError` if the set or the package cannot be had.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        if find_spec("datasets") is None:
            raise BackendError("data sets of the hub need the datasets package: pip install datasets")
        if name in LEADERBOARD:
            self._path, (self._config, self._split) = _HUB, LEADERBOARD[name][0]
        elif name.count(":") == 2:
            self._path, self._config, self._split = name.split(":")
        else:
            known = ", ".join(LEADERBOARD)
            raise OptionError(
                f"there is no set {name!r}: choose of {known}, or give name:config:split, or --manifest FILE."
            )
        self._name, self._limit = name, limit

    def __iter__(self) -> Iterator[Utterance]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self._path, self._config or None, split=self._split, streaming=self._limit is not None
            )
            # Decoded here: their own decoding wants PyTorch and FFmpeg.
            rows = rows.cast_column("audio", datasets.Audio(decode=False))
            for row in rows if self._limit is None else rows.take(self._limit):
                audio, text = row["audio"], next((row[name] for name in _TEXTS if row.get(name)), "")
                said = "" if text.strip().lower() == _NOT_SCORED else text
                yield Utterance(audio["bytes"] or Path(audio["path"]), said)
        except (OSError, ValueError, KeyError) as error:
            raise BackendError(f"{self._name} cannot be had from the hub: {error}") from error
