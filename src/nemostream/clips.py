"""The recordings that the package contains."""

from __future__ import annotations

from importlib import resources

import numpy as np
from numpy.typing import NDArray

CLIP_TEXT = "After the tone, say your busy message and then press the pound key."  # transcript of "clip"


def read_clip(name: str, sample_rate: int) -> NDArray[np.float32]:
    """Return a recording [N] of the package at `sample_rate` Hz.

    "speech" is 18 s of English; "clip" is one sentence that the demo model recognises.
    """
    import soundfile
    import soxr

    with resources.as_file(resources.files("nemostream") / f"{name}.flac") as path:
        audio, rate = soundfile.read(path, dtype="float32")
    return audio if rate == sample_rate else soxr.resample(audio, rate, sample_rate)
