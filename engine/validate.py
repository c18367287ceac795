"""Validate an engine by comparing a backend that uses it with fp32 on real speech.

Both backends process the same clips: one stream through the encoder alone, another through the whole step. A backend
passes if the cosine similarity of every encoder frame is high enough and the emitted tokens are equal. The check is
needed because compilers have produced wrong results for this model without an error (TensorRT issue 4822), and fp16
overflows (NeMo issue 14531).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import EngineValidationError
from nemostream.runtime.backends.base import Backend, Batch

Floats = NDArray[np.float32]

MIN_STEPS = 12
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "fp8": 0.99, "int8": 0.99}
# Tokens are compared only on clips that the model understands: the geometric mean probability of fp32's tokens is at
# least this. On others (a small model on a novel, random weights), any rounding changes the choice among near-equal
# tokens.
MIN_CONFIDENCE = 0.75


class EncoderBackend(Backend, Protocol):
    """A backend that can run its encoder alone."""

    def encode(self, batch: Batch) -> tuple[Floats, NDArray[np.int64]]:
        """Run the step without decoding and return `encoded_joint` [B, T, J] and the number of frames per row."""
        ...


def validate_engine(
    manifest: Manifest,
    chunk: ChunkConfig,
    precision: str,
    candidate: EncoderBackend,
    reference: EncoderBackend,
    clips: Sequence[Floats],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Compare `candidate` with `reference` (fp32) on `clips` [N] at the model's sample rate.

    `progress` is called with the share that is done (0 to 1). Uses slots 0 and 1 of both backends.

    Returns the number of steps, the smallest cosine similarity of two encoder frames (as input to the joint network),
    the number of tokens compared, and the seconds of audio. Raises `EngineValidationError` if a cosine is below
    `MIN_COSINE`, a value is not finite, the tokens of a clip that the model understands differ, or the clips have fewer
    than `MIN_STEPS` steps.
    """
    backends = (candidate, reference)
    min_cosine = MIN_COSINE[precision]
    steps, compared, worst, done = 0, 0, 1.0, 0
    total = sum(map(len, clips))

    def failure(what: str) -> EngineValidationError:
        advice = "build another precision" if precision == "fp32" else "build another precision, or use fp32"
        return EngineValidationError(f"the {precision} engine for {chunk.ms} ms failed validation: {what}; {advice}.")

    for clip in clips:
        tokens: tuple[list[int], list[int]] = ([], [])
        scores: list[float] = []
        for backend in backends:
            backend.reset(np.array([0, 1]))
        for batch in _batches(manifest, chunk, clip):
            (got, counts), (wanted, _) = (backend.encode(batch) for backend in backends)
            got, wanted = got[0, : counts[0]], wanted[0, : counts[0]]
            if not np.isfinite(got).all():
                raise failure(f"the encoder output is not finite in step {steps + 1}")
            cosine = float(_cosines(got, wanted).min(initial=1.0))
            if not cosine >= min_cosine:
                raise failure(
                    f"the encoder output has a cosine similarity of {cosine:.5f} with fp32 in step {steps + 1}, "
                    f"at least {min_cosine} is required"
                )
            decoded = Batch(chunk, np.array([1]), batch.audio, batch.lengths)
            emissions, expected = (backend.submit(decoded).result() for backend in backends)
            if emissions.failed[0]:
                raise failure(f"decoding produces values that are not finite in step {steps + 1}")
            tokens[0].extend(emissions.tokens[0].tolist())
            tokens[1].extend(expected.tokens[0].tolist())
            scores.extend(expected.scores[0].tolist())
            worst, steps, done = min(worst, cosine), steps + 1, done + int(batch.lengths[0])
            progress(min(done / total, 1.0))
        if scores and np.mean(scores) >= np.log(MIN_CONFIDENCE):
            if tokens[0] != tokens[1]:
                raise failure(f"it emits tokens {tokens[0]}, fp32 emits {tokens[1]}")
            compared += len(tokens[0])
    if steps < MIN_STEPS:
        raise EngineValidationError(
            f"the clips have {steps} steps of {chunk.ms} ms; validation needs at least {MIN_STEPS}."
        )
    seconds = round(total / manifest.features.sample_rate, 2)
    return {"steps": steps, "cosine": worst, "tokens": compared, "seconds": seconds}


def _batches(manifest: Manifest, chunk: ChunkConfig, clip: Floats) -> list[Batch]:
    """Return the steps of one stream for a whole recording, including its end."""
    audio = np.concatenate([np.zeros(manifest.lead, np.float32), clip])
    steps = -(-manifest.encoder_frames(len(clip)) // chunk.frames)
    padded = np.zeros(max(steps * chunk.samples, len(audio)), np.float32)
    padded[: len(audio)] = audio
    starts = range(0, steps * chunk.samples, chunk.samples)
    return [
        Batch(
            chunk,
            np.array([0]),
            padded[None, start : start + chunk.samples],
            np.array([min(chunk.samples, max(len(audio) - start, 0))]),
        )
        for start in starts
    ]


def _cosines(got: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine similarity of each frame [T, J]."""
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    return np.asarray((got * wanted).sum(axis=1) / np.maximum(norms, 1e-30))
