"""The arithmetic of the validation of engines: bounds, figures and inputs, with backends of known outputs.

`tests/test_engines.py` validates real backends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig, LanguageConfig, Manifest
from nemostream.engine.validate import validate_engine
from nemostream.errors import EngineValidationError
from nemostream.runtime.backends.base import Batch

Change = Callable[[int, NDArray[Any], Batch], None]


class KnownBackend:
    """A backend whose frames are a function of the samples of a row, and its tokens those of a list, one a step."""

    def __init__(self, manifest: Manifest, tokens: list[list[int]], probability: float = 0.9) -> None:
        self._joint, self._tokens, self._score = manifest.decoder.joint, tokens, np.log(probability)
        self.change: Change = lambda call, encoded, batch: None
        self.failed_step = -1
        self.resets: list[list[int]] = []
        self.encoded: list[Batch] = []
        self.decoded: list[Batch] = []

    def reset(self, slots: NDArray[Any]) -> None:
        self.resets.append(slots.tolist())

    def encode(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        frames = batch.chunk.frames
        seeds = np.abs(batch.audio).sum(axis=1).astype(np.float64) + 1
        grid = np.arange(1, frames * self._joint + 1).reshape(frames, self._joint)
        encoded = np.sin(seeds[:, None, None] * grid).astype(np.float32)
        encoded[..., :2] = [3, 4]  # in every frame
        self.change(len(self.encoded), encoded, batch)
        self.encoded.append(batch)
        return encoded, np.full(len(encoded), frames)

    def submit(self, batch: Batch) -> Any:
        step = len(self.decoded)
        self.decoded.append(batch)
        tokens = self._tokens[step % len(self._tokens)]
        emissions = SimpleNamespace(
            tokens=[np.array(tokens)],
            scores=[np.full(len(tokens), self._score)],
            failed=np.array([step == self.failed_step]),
        )
        return SimpleNamespace(result=lambda: emissions)


@pytest.fixture
def manifest(demo_bundle: Bundle) -> Manifest:
    return demo_bundle.manifest


def steps_of(manifest: Manifest, chunk: ChunkConfig, steps: int) -> NDArray[np.float32]:
    """Return noise [N] of this number of steps; the last one is a part."""
    audio = np.random.default_rng(steps).uniform(-0.1, 0.1, steps * chunk.samples - chunk.samples // 2)
    assert -(-manifest.encoder_frames(len(audio)) // chunk.frames) == steps
    return audio.astype(np.float32)


def rotate(frame: NDArray[Any], cosine: float) -> None:
    """Replace a frame by one with this cosine similarity to it."""
    other = np.zeros(len(frame))
    other[:2] = [-4, 3]  # orthogonal to every frame
    other *= np.linalg.norm(frame) / 5
    frame[:] = cosine * frame + np.sqrt(1 - cosine**2) * other


@pytest.mark.parametrize(
    ("precision", "bound"), [("fp32", 0.9999), ("fp16", 0.999), ("bf16", 0.999), ("fp8", 0.99), ("int8", 0.99)]
)
def test_the_smallest_cosine_of_any_frame_decides(precision: str, bound: float, manifest: Manifest) -> None:
    """One frame of one step is rotated, to just above and just below the bound of the precision."""
    chunk = manifest.chunk(560)
    clips = [steps_of(manifest, chunk, 7), steps_of(manifest, chunk, 6)]
    for cosine, passes in ((bound + 1e-5, True), (bound - 1e-5, False)):
        candidate, reference = (KnownBackend(manifest, [[1, 2], []]) for _ in range(2))

        def change(call: int, encoded: NDArray[Any], batch: Batch, cosine: float = cosine) -> None:
            if call == 9:
                rotate(encoded[0, 5], cosine)
            rotate(encoded[0, 1], 1 - (1 - bound) / 3)

        candidate.change = change
        arguments: Any = (manifest, chunk, precision, candidate, reference, clips)
        if passes:
            figures = validate_engine(*arguments)
            assert figures.keys() == {"steps", "cosine", "tokens", "seconds"}
            assert figures["cosine"] == pytest.approx(cosine, abs=2e-6) and figures["steps"] == 13
        else:
            with pytest.raises(EngineValidationError, match=rf"with fp32 in step 10, at least {bound:.4g} is required"):
                validate_engine(*arguments)


def test_figures_and_calls(manifest: Manifest) -> None:
    """Slots 0 and 1 of both backends are reset before each clip; both get the chunks of `padded_chunks`."""
    chunk, shares = manifest.chunk(560), list[float]()
    clips = [steps_of(manifest, chunk, 7), steps_of(manifest, chunk, 6)]
    candidate, reference = (KnownBackend(manifest, [[1, 2, 3], [], [4]]) for _ in range(2))
    figures = validate_engine(manifest, chunk, "fp16", candidate, reference, clips, shares.append)
    seconds = round(sum(map(len, clips)) / 16000, 2)
    tokens = 4 * 4 + 3  # of 13 steps: four times three steps, and one
    assert figures == {"steps": 13, "cosine": pytest.approx(1), "tokens": tokens, "seconds": seconds}
    assert shares == pytest.approx([(step + 1) / 13 for step in range(13)])
    for backend in (candidate, reference):
        assert backend.resets == [[0, 1]] * 2
        for batches, slot in ((backend.encoded, 0), (backend.decoded, 1)):
            assert [batch.slots.tolist() for batch in batches] == [[slot]] * 13
            assert all(batch.chunk == chunk for batch in batches)
            audio = np.concatenate([batch.audio[0] for batch in batches[:7]])
            np.testing.assert_array_equal(audio[manifest.lead : manifest.lead + len(clips[0])], clips[0])
            assert not audio[: manifest.lead].any() and not audio[manifest.lead + len(clips[0]) :].any()
            lengths = [int(batch.lengths[0]) for batch in batches]
            assert lengths[:6] == [chunk.samples] * 6 and sum(lengths[:7]) == manifest.lead + len(clips[0])
            assert sum(lengths[7:]) == manifest.lead + len(clips[1])


@pytest.mark.parametrize(("steps", "passes"), [(11, False), (12, True)])
def test_the_number_of_steps(steps: int, passes: bool, manifest: Manifest) -> None:
    chunk = manifest.chunk(560)
    backends = [KnownBackend(manifest, [[]]) for _ in range(2)]
    clips = [steps_of(manifest, chunk, 5), steps_of(manifest, chunk, steps - 5)]
    arguments: Any = (manifest, chunk, "fp16", *backends, clips)
    if passes:
        assert validate_engine(*arguments)["steps"] == steps
    else:
        with pytest.raises(EngineValidationError, match=f"have {steps} steps of 560 ms; validation needs at least 12"):
            validate_engine(*arguments)


@pytest.mark.parametrize(("probability", "compared"), [(0.74, False), (0.76, True)])
def test_tokens_are_compared_if_fp32_is_confident(probability: float, compared: bool, manifest: Manifest) -> None:
    """The mean log-probability of fp32's tokens decides, not that of the engine's."""
    chunk, clip = manifest.chunk(560), steps_of(manifest, manifest.chunk(560), 12)
    candidate = KnownBackend(manifest, [[1, 2], [4]], 1.5 - probability)
    reference = KnownBackend(manifest, [[1, 2], [3]], probability)
    arguments: Any = (manifest, chunk, "int8", candidate, reference, [clip])
    if compared:
        with pytest.raises(EngineValidationError, match=r"emits tokens \[1, 2, 4, .* fp32 emits \[1, 2, 3, "):
            validate_engine(*arguments)
        candidate._tokens = reference._tokens
        candidate.decoded.clear()
        reference.decoded.clear()
        assert validate_engine(*arguments)["tokens"] == 18
    else:
        assert validate_engine(*arguments)["tokens"] == 0


def test_values_that_are_not_finite(manifest: Manifest) -> None:
    chunk, clip = manifest.chunk(560), steps_of(manifest, manifest.chunk(560), 12)
    for value in (np.nan, np.inf):
        candidate, reference = (KnownBackend(manifest, [[1]]) for _ in range(2))

        def change(call: int, encoded: NDArray[Any], batch: Batch, value: float = value) -> None:
            if call == 11:
                encoded[0, 6, 9] = value

        candidate.change = change
        with pytest.raises(EngineValidationError, match="output is not finite in step 12; build another precision, or"):
            validate_engine(manifest, chunk, "bf16", candidate, reference, [clip])
    candidate, reference = (KnownBackend(manifest, [[1]]) for _ in range(2))
    candidate.failed_step = 7
    with pytest.raises(EngineValidationError, match=r"not finite in step 8; build another precision\.$"):
        validate_engine(manifest, chunk, "fp32", candidate, reference, [clip])


BATCHES = [2, 7]


def test_inputs_of_batches(manifest: Manifest) -> None:
    """Every row has its own audio; every third ends in the middle of its last step; then two of three rows change."""
    chunk, shares = manifest.chunk(560), list[float]()
    clips = [steps_of(manifest, chunk, 30), steps_of(manifest, chunk, 31)]
    candidate, reference = (KnownBackend(manifest, [[]]) for _ in range(2))
    figures = validate_engine(manifest, chunk, "fp16", candidate, reference, clips, shares.append, BATCHES)
    assert (figures["rows"], figures["batch_difference"], figures["neighbour_difference"]) == (7, 0, 0)
    assert shares == sorted(shares) and shares[-1] == 1
    # Seven streams alone, on both; then two batches of each size on the candidate.
    assert reference.resets[2:] == [[0]] * 7
    assert candidate.resets[2:] == [*[[0]] * 7, *[[0, 1]] * 2, *[list(range(7))] * 2]
    assert len(reference.encoded) == 61 + 7 * 4 and len(candidate.encoded) == 61 + 7 * 4 + 2 * 2 * 4
    assert all(batch.prompts is None for batch in (*reference.encoded, *candidate.encoded)), "of one language"
    alone = candidate.encoded[61 : 61 + 28]
    streams = [np.concatenate([batch.audio[0] for batch in alone[4 * row : 4 * row + 4]]) for row in range(7)]
    lengths = [[int(batch.lengths[0]) for batch in alone[4 * row : 4 * row + 4]] for row in range(7)]
    full, part = [chunk.samples] * 4, [*[chunk.samples] * 3, chunk.samples - chunk.samples // 2]
    assert lengths == [full, full, part, full, full, part, full]
    speech = np.concatenate(clips)
    for row, (stream, length) in enumerate(zip(streams, lengths, strict=True)):
        start = row * (len(speech) // 7)
        assert not stream[: manifest.lead].any() and not stream[sum(length) :].any()
        got = stream[manifest.lead : sum(length)]
        np.testing.assert_array_equal(got, speech[start : start + len(got)])
    for first, rows in ((61 + 28, 2), (61 + 28 + 8, 7)):
        batches = candidate.encoded[first : first + 8]
        for row in range(rows):
            together = np.concatenate([batch.audio[row] for batch in batches[:4]])
            np.testing.assert_array_equal(together, streams[row])
            assert [int(batch.lengths[row]) for batch in batches[:4]] == lengths[row]
            again = np.concatenate([batch.audio[row] for batch in batches[4:]])
            kept = row % 3 == 0
            np.testing.assert_array_equal(again, streams[row if kept else (row + 3) % 7])


def test_equal_rows_of_large_batches(manifest: Manifest) -> None:
    """67 streams: rows with the same audio are not a power of two apart, as the caches of other rows may be."""
    chunk = manifest.chunk(560)
    candidate, reference = (KnownBackend(manifest, [[]]) for _ in range(2))
    validate_engine(manifest, chunk, "fp16", candidate, reference, [steps_of(manifest, chunk, 30)], batches=[128])
    audio = candidate.encoded[-7].audio  # the second step; the first begins with silence, the last 4 have other rows
    assert len(audio) == 128 and np.array_equal(audio[0], audio[67])
    for power in range(7):
        equal = (audio[2**power :] == audio[: -(2**power)]).all(axis=1)
        assert not equal.any(), f"rows {2**power} apart"


def test_prompts_of_batches(manifest: Manifest) -> None:
    """Adjacent rows have different prompts, and all prompts occur."""
    languages = LanguageConfig("de", {"en": 0, "de": 4, "fr": 2}, 5)
    prompted = dataclasses.replace(manifest, languages=languages)
    chunk = manifest.chunk(560)
    candidate, reference = (KnownBackend(manifest, [[]]) for _ in range(2))
    validate_engine(prompted, chunk, "fp16", candidate, reference, [steps_of(manifest, chunk, 30)], batches=[5])
    batch = candidate.encoded[30 + 5 * 4]
    assert batch.prompts is not None and batch.prompts.tolist() == [0, 2, 4, 0, 2]
    alone = [candidate.encoded[30 + 4 * row].prompts for row in range(5)]
    assert [prompts.tolist() for prompts in alone if prompts is not None] == [[0], [2], [4], [0], [2]]


@pytest.mark.parametrize(
    ("alone", "together", "message"),
    [
        (1 - 0.9e-3, 1 - 0.9e-3, None),
        (1 - 1.9e-3, 1 - 1.9e-3, None),  # twice the error that clips may have
        (1 - 2.1e-3, 1 - 2.1e-3, None),  # and twice that of the streams alone
        (
            1 - 2.1e-3,
            1 - 4.5e-3,
            r"cosine similarity of 0\.9955\d with fp32 in step 3, row 4 of a batch of 5, .* 0.9958",
        ),
        (
            1 - 1e-9,
            1 - 1.9e-3,
            r"cosine similarity of 0\.9981\d with the row alone in step 3, row 4 of a batch of 5, .*0.999",
        ),
    ],
)
def test_bounds_of_batches(alone: float, together: float, message: str | None, manifest: Manifest) -> None:
    chunk = manifest.chunk(560)
    candidate, reference = (KnownBackend(manifest, [[]]) for _ in range(2))

    def change(call: int, encoded: NDArray[Any], batch: Batch) -> None:
        if call == 30 + 4 * 4 + 2:  # the third step of stream 4, alone
            rotate(encoded[0, 3], alone)
        elif call >= 30 + 5 * 4 and (call - 30) % 4 == 2:
            rotate(encoded[4, 3], together)

    candidate.change = change
    arguments: Any = (manifest, chunk, "fp16", candidate, reference, [steps_of(manifest, chunk, 30)])
    if message:
        with pytest.raises(EngineValidationError, match=message):
            validate_engine(*arguments, batches=[5])
    else:
        figures = validate_engine(*arguments, batches=[5])
        assert figures["cosine"] == pytest.approx(1, abs=1e-6) and figures["batch_difference"] < 1e-3


@pytest.mark.parametrize(("size", "passes"), [(0.0049, True), (0.0051, False)])
def test_the_difference_to_other_neighbours_is_relative(size: float, passes: bool, manifest: Manifest) -> None:
    """Row 3 keeps its audio in the second batch, and changes by this size of its norm, which is small."""
    chunk = manifest.chunk(560)
    candidate, reference = (KnownBackend(manifest, [[]]) for _ in range(2))

    def change(call: int, encoded: NDArray[Any], batch: Batch) -> None:
        encoded *= np.float32(1e-3)
        if call == 30 + 5 * 4 + 4 + 1:  # the second step of the batch with other neighbours
            frame = encoded[3, 6]
            frame[0] += size * np.linalg.norm(frame)

    candidate.change = change
    arguments: Any = (manifest, chunk, "int8", candidate, reference, [steps_of(manifest, chunk, 30)])
    if passes:
        figures = validate_engine(*arguments, batches=[5])
        assert figures["neighbour_difference"] == pytest.approx(size, rel=1e-3) and figures["batch_difference"] == 0
    else:
        with pytest.raises(
            EngineValidationError, match=r"in row 3 of a batch of 5 changes by 0\.51 % .* at most 0.5 %"
        ):
            validate_engine(*arguments, batches=[5])
