"""The recordings that come with the package, as every room reads them."""

from __future__ import annotations

from importlib import resources

import numpy as np
from numpy.typing import NDArray

CLIP_TEXT = "After the tone, say your busy message and then press the pound key."  # what the voice of "clip" says


def read_clip(name: str, sample_rate: int) -> NDArray[np.float32]:
    """A packaged recording [N] at `sample_rate`: "speech" is 18 s of English, "clip" a voice that the demo model
    understands."""
    import soundfile
    import soxr

    with resources.as_file(resources.files("nemostream") / f"{name}.flac") as path:
        audio, rate = soundfile.read(path, dtype="float32")
    return audio if rate == sample_rate else soxr.resample(audio, rate, sample_rate)
