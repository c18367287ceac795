"""Validate an engine by comparing a backend that uses it with fp32 on real speech.

Both backends process the same clips: one stream through the encoder alone, another through the whole step. A backend
passes if the cosine similarity of every encoder frame is high enough and the emitted tokens are equal. The check is
needed because compilers have produced wrong results for this model without an error (TensorRT issue 4822), and fp16
overflows (NeMo issue 14531).

An engine has other kernels for other batch sizes. Therefore the encoder also processes batches in which every row has
its own audio, and in a prompted model other prompts than its neighbours: each row is compared with fp32, with the
engine's result for the row alone, and with its result beside other rows.
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

MIN_STEPS = 12
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "fp8": 0.99, "int8": 0.99}
# Tokens are compared only on clips that the model understands: the geometric mean probability of fp32's tokens is at
# least this. On others (a small model on a novel, random weights), any rounding changes the choice among near-equal
# tokens.
MIN_CONFIDENCE = 0.75


# Steps of each row of a batch. In the first, all caches are empty, and most of the audio may be the lead of silence.
_ROW_STEPS = 4
# Streams of a batch with different audio. It is a prime number: rows with the same audio are not a power of two apart,
# so a row that reads the caches of another is detected.
_MAX_STREAMS = 67
# Largest relative difference of an encoder frame to the same row of a batch of the same size with other neighbours.
# Both are computed by the same kernels, so it is 0, except that a kernel may add in a random order.
MAX_NEIGHBOUR_DIFFERENCE = 0.005


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
    batches: Sequence[int] = (),
) -> dict[str, Any]:
    """Compare `candidate` with `reference` (fp32) on `clips` [N] at the model's sample rate.

    `progress` is called with the share that is done (0 to 1). `batches` are sizes of batches, more than 1, to compare
    in addition to single streams. Uses slots 0 and 1 of both backends, and as many of the candidate as the largest
    batch has rows.

    Returns the number of steps, the smallest cosine similarity of two encoder frames (as input to the joint network),
    the number of tokens compared, and the seconds of audio. With `batches`, also the number of rows of the largest, and
    the largest relative difference of an encoder frame to the same row alone (`batch_difference`, 0 if results do not
    depend on the batch) and to the same row of the batch with other neighbours (`neighbour_difference`).

    Raises `EngineValidationError` if a cosine is below `MIN_COSINE`, a value is not finite, the tokens of a clip that
    the model understands differ, a row differs from the row alone by more than `MIN_COSINE` or depends on its
    neighbours, or the clips have fewer than `MIN_STEPS` steps. In batches, the error to fp32 (1 - cosine) may be twice
    that of `MIN_COSINE`, or twice that of the same streams alone.
    """
    comparison = _Comparison(manifest, chunk, precision, candidate, reference, clips, progress, batches)
    figures = comparison.compare_clips()
    if figures["steps"] < MIN_STEPS:
        raise EngineValidationError(
            f"the clips have {figures['steps']} steps of {chunk.ms} ms; validation needs at least {MIN_STEPS}."
        )
    return figures | (comparison.compare_batches() if batches else {})


class _Comparison:
    """The two parts of `validate_engine`, with its arguments."""

    def __init__(
        self,
        manifest: Manifest,
        chunk: ChunkConfig,
        precision: str,
        candidate: EncoderBackend,
        reference: EncoderBackend,
        clips: Sequence[Floats],
        progress: Callable[[float], None],
        batches: Sequence[int],
    ) -> None:
        self._manifest, self._chunk, self._precision = manifest, chunk, precision
        self._candidate, self._reference, self._clips = candidate, reference, clips
        self._batches = sorted(batches)
        self._min_cosine = MIN_COSINE[precision]
        self._progress, self._done = progress, 0
        self._streams = min(max(batches, default=0), _MAX_STREAMS)
        # Rows times steps, of both parts.
        self._total = sum(-(-manifest.encoder_frames(len(clip)) // chunk.frames) for clip in clips)
        self._total += 2 * _ROW_STEPS * (self._streams + sum(batches))

    def compare_clips(self) -> dict[str, Any]:
        chunk, backends = self._chunk, (self._candidate, self._reference)
        steps, compared, worst = 0, 0, 1.0
        for clip in self._clips:
            tokens: tuple[list[int], list[int]] = ([], [])
            scores: list[float] = []
            for backend in backends:
                backend.reset(np.array([0, 1]))
            for step in padded_chunks(self._manifest, chunk, clip):
                steps += 1
                batch = Batch(chunk, np.array([0]), step.audio[None], np.array([step.length]))
                (got, counts), (wanted, _) = (backend.encode(batch) for backend in backends)
                got, wanted = got[0, : counts[0]], wanted[0, : counts[0]]
                worst = min(worst, self._check_cosine(got, wanted, "fp32", f"step {steps}", self._min_cosine))
                decoded = Batch(chunk, np.array([1]), batch.audio, batch.lengths)
                emissions, expected = (backend.submit(decoded).result() for backend in backends)
                if emissions.failed[0]:
                    raise self._failure(f"decoding produces values that are not finite in step {steps}")
                tokens[0].extend(emissions.tokens[0].tolist())
                tokens[1].extend(expected.tokens[0].tolist())
                scores.extend(expected.scores[0].tolist())
                self._advance(1)
            if scores and np.mean(scores) >= np.log(MIN_CONFIDENCE):
                if tokens[0] != tokens[1]:
                    raise self._failure(f"it emits tokens {tokens[0]}, fp32 emits {tokens[1]}")
                compared += len(tokens[0])
        seconds = round(sum(map(len, self._clips)) / self._manifest.features.sample_rate, 2)
        return {"steps": steps, "cosine": worst, "tokens": compared, "seconds": seconds}

    def compare_batches(self) -> dict[str, Any]:
        audio, lengths = _streams(self._manifest, self._chunk, self._clips, self._streams)
        ids = sorted(set(self._manifest.languages.prompts.values()))
        prompts = np.resize(ids, self._streams) if ids else None

        def encode(backend: EncoderBackend, streams: NDArray[Any]) -> tuple[Floats, NDArray[np.int64]]:
            """Return the encoder frames [K, B, T, J] of a batch of new streams, and their numbers [K, B]."""
            slots, rows = np.arange(len(streams)), None if prompts is None else prompts[streams]
            backend.reset(slots)
            results = []
            for step in range(_ROW_STEPS):
                encoded, counts = backend.encode(
                    Batch(self._chunk, slots, audio[streams, step], lengths[streams, step], rows)
                )
                results.append((encoded.copy(), counts))
            self._advance(_ROW_STEPS * len(streams))
            return np.stack([frames for frames, _ in results]), np.stack([counts for _, counts in results])

        def encode_alone(backend: EncoderBackend) -> tuple[Floats, NDArray[np.int64]]:
            alone = [encode(backend, np.array([stream])) for stream in range(self._streams)]
            return np.concatenate([part[0] for part in alone], axis=1), np.concatenate(
                [part[1] for part in alone], axis=1
            )

        wanted, counts = encode_alone(self._reference)
        single, _ = encode_alone(self._candidate)
        worst = min(
            self._cosine(single[step, stream, :count], wanted[step, stream, :count], f"step {step + 1} of one stream")
            for (step, stream), count in np.ndenumerate(counts)
        )
        # The streams begin in the middle of speech, where low precision is less accurate than in the clips.
        min_cosine = 1 - 2 * (1 - min(self._min_cosine, worst))
        batch_difference = neighbour_difference = 0.0
        for rows in self._batches:
            streams = np.arange(rows) % self._streams
            got, _ = encode(self._candidate, streams)
            for step, row in np.ndindex(_ROW_STEPS, rows):
                stream = streams[row]
                frames = slice(0, counts[step, stream])
                where = f"step {step + 1}, row {row} of a batch of {rows}"
                row_frames, alone = got[step, row, frames], single[step, stream, frames]
                self._check_cosine(row_frames, wanted[step, stream, frames], "fp32", where, min_cosine)
                self._check_cosine(row_frames, alone, "the row alone", where, self._min_cosine)
                batch_difference = max(batch_difference, _difference(row_frames, alone))
            kept = np.arange(rows) % 3 == 0
            others = np.where(kept, streams, (streams + self._streams // 2) % self._streams)
            again, _ = encode(self._candidate, others)
            for step, row in np.ndindex(_ROW_STEPS, rows):
                if not kept[row]:
                    continue
                frames = slice(0, counts[step, streams[row]])
                difference = _difference(again[step, row, frames], got[step, row, frames])
                if not difference <= MAX_NEIGHBOUR_DIFFERENCE:
                    raise self._failure(
                        f"the encoder output in row {row} of a batch of {rows} changes by {100 * difference:.2g} % if "
                        f"the other rows have other audio; at most {100 * MAX_NEIGHBOUR_DIFFERENCE} % is allowed"
                    )
                neighbour_difference = max(neighbour_difference, difference)
        return {
            "rows": max(self._batches),
            "batch_difference": batch_difference,
            "neighbour_difference": neighbour_difference,
        }

    def _check_cosine(self, got: Floats, wanted: Floats, name: str, where: str, min_cosine: float) -> float:
        """Return the smallest cosine similarity of encoder frames [T, J]. Raises if it is too small."""
        cosine = self._cosine(got, wanted, where)
        if not cosine >= min_cosine:
            raise self._failure(
                f"the encoder output has a cosine similarity of {cosine:.5f} with {name} in {where}, "
                f"at least {min_cosine:.4g} is required"
            )
        return cosine

    def _cosine(self, got: Floats, wanted: Floats, where: str) -> float:
        """Return the smallest cosine similarity of encoder frames [T, J]. Raises if a value is not finite."""
        if not np.isfinite(got).all():
            raise self._failure(f"the encoder output is not finite in {where}")
        return float(_cosines(got, wanted).min(initial=1.0))

    def _advance(self, steps: int) -> None:
        self._done += steps
        self._progress(self._done / self._total)

    def _failure(self, what: str) -> EngineValidationError:
        advice = "build another precision" if self._precision == "fp32" else "build another precision, or use fp32"
        return EngineValidationError(
            f"the {self._precision} engine for {self._chunk.ms} ms failed validation: {what}; {advice}."
        )


def _streams(
    manifest: Manifest, chunk: ChunkConfig, clips: Sequence[Floats], number: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Return the audio [R, K, S] and lengths [R, K] of `number` streams that begin at different places of the clips.

    Every third ends in the middle of the last step.
    """
    speech = np.concatenate(clips)
    samples = _ROW_STEPS * chunk.samples
    starts = np.arange(number)[:, None] * (len(speech) // number)
    audio = speech[(starts + np.arange(samples) - manifest.lead) % len(speech)]
    audio[:, : manifest.lead] = 0
    audio[2::3, samples - chunk.samples // 2 :] = 0
    lengths = np.full((number, _ROW_STEPS), chunk.samples)
    lengths[2::3, -1] -= chunk.samples // 2
    return audio.reshape(number, _ROW_STEPS, chunk.samples), lengths


def _cosines(got: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine similarity of each frame [T, J]."""
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    return np.asarray((got * wanted).sum(axis=1) / np.maximum(norms, 1e-30))


def _difference(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest relative difference of two frames [T, J]."""
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    norms = np.maximum(np.linalg.norm(wanted, axis=1), 1e-30)
    return float((np.linalg.norm(got - wanted, axis=1) / norms).max(initial=0.0))
