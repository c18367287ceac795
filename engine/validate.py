"""Is a backend as good as fp32? Run beside it on real speech, before anybody relies on it.

Both hear the same clips, the encoder step by step and, as another stream, the whole way to tokens. A backend passes if
every encoder frame points where the fp32 one does and what is said is the same. Compilers have been silently wrong
about this very model (TensorRT issue 4822), and halves overflow (NeMo issue 14531): nothing is believed unrun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import EngineValidationError
from nemostream.runtime.backends.base import Backend, Batch
from nemostream.step_loop import padded_chunks

Floats = NDArray[np.float32]

LEAST_STEPS = 12
LEAST_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "fp8": 0.99, "int8": 0.99}
# Tokens are compared on clips that the model understands: fp32's own are this likely, on geometric average. Elsewhere
# (a small model that hears a novel, random weights) it guesses among near equals, and any rounding guesses anew.
UNDERSTOOD = 0.75


class Encoding(Backend, Protocol):
    """A backend whose encoder can be looked at."""

    def encode(self, batch: Batch) -> tuple[Floats, NDArray[np.int64]]:
        """The step without decoding: `encoded_joint` [B, T, J] and frames per row."""
        ...


def validate_engine(
    manifest: Manifest,
    chunk: ChunkConfig,
    precision: str,
    candidate: Encoding,
    reference: Encoding,
    clips: Sequence[Floats],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Figures of `candidate` beside `reference` (fp32) on `clips` [N] at the model's rate; `progress` hears the share.

    Returns steps run, the least cosine between two encoder frames as the joint gets them, the tokens that were compared
    and are equal, seconds of audio. Raises `EngineValidationError` if a cosine is below `LEAST_COSINE`, a number is not finite, or
    the tokens of a clip that the model understands differ. Uses slots 0 and 1 of both.
    """
    both = (candidate, reference)
    steps, compared, least, done = 0, 0, 1.0, 0
    total = sum(map(len, clips))

    def refuse(what: str) -> EngineValidationError:
        advice = "build another precision" if precision == "fp32" else "build another precision, or use fp32"
        return EngineValidationError(
            f"the {precision} engine for {chunk.ms} ms is refused: on real speech {what}; {advice}."
        )

    for clip in clips:
        tokens: tuple[list[int], list[int]] = ([], [])
        scores: list[float] = []
        for backend in both:
            backend.reset(np.array([0, 1]))
        for step in padded_chunks(manifest, chunk, clip):
            batch = Batch(chunk, np.array([0]), step.audio[None], np.array([step.length]))
            (got, counts), (wanted, _) = (backend.encode(batch) for backend in both)
            got, wanted = got[0, : counts[0]], wanted[0, : counts[0]]
            if not np.isfinite(got).all():
                raise refuse(f"its encoder gives numbers that are not finite, in step {steps + 1}")
            cosine = float(_cosines(got, wanted).min(initial=1.0))
            if not cosine >= LEAST_COSINE[precision]:
                needed = LEAST_COSINE[precision]
                raise refuse(f"its encoder is off, cosine {cosine:.5f} in step {steps + 1}, where {needed} is needed")
            decoded = Batch(chunk, np.array([1]), batch.audio, batch.lengths)
            mine, theirs = (backend.submit(decoded).result() for backend in both)
            if mine.failed[0]:
                raise refuse(f"its decoding meets numbers that are not finite, in step {steps + 1}")
            tokens[0].extend(mine.tokens[0].tolist())
            tokens[1].extend(theirs.tokens[0].tolist())
            scores.extend(theirs.scores[0].tolist())
            least, steps, done = min(least, cosine), steps + 1, done + int(batch.lengths[0])
            progress(min(done / total, 1.0))
        if scores and np.mean(scores) >= np.log(UNDERSTOOD):
            if tokens[0] != tokens[1]:
                raise refuse(f"it says {tokens[0]} where fp32 says {tokens[1]}")
            compared += len(tokens[0])
    if steps < LEAST_STEPS:
        raise EngineValidationError(
            f"the clips give {steps} steps of {chunk.ms} ms; {LEAST_STEPS} are needed to judge an engine."
        )
    seconds = round(total / manifest.features.sample_rate, 2)
    return {"steps": steps, "cosine": least, "tokens": compared, "seconds": seconds}


def _cosines(got: Floats, wanted: Floats) -> NDArray[np.float64]:
    """Of each frame [T, J]."""
    mine, theirs = got.astype(np.float64), wanted.astype(np.float64)
    length = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    return np.asarray((mine * theirs).sum(axis=1) / np.maximum(length, 1e-30))
