"""A backend whose tokens are a checksum of the audio it received.

The tokens of frame i encode a checksum of every sample that the slot received up to and including that frame, and for a
prompted model of the prompt id of each frame. If one sample is lost, doubled, moved or in another slot, or if a slot is
not reset, all later tokens differ. A stream that is saved and loaded continues with its checksum. The backend also
checks the conditions that `backends.base` guarantees to a backend, and fails the batch if one is violated.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemostream.bundle import Manifest
from nemostream.runtime.backends.base import Batch, Emissions, check_copy, check_state
from nemostream.runtime.decoding.boosting import NO_PHRASES, Boosting

DIGITS = 3


def spell(checksum: int, vocabulary: int) -> list[int]:
    """Return the tokens of a checksum: its digits in base `vocabulary`, lowest first."""
    return [checksum // vocabulary**k % vocabulary for k in range(DIGITS)]


def encoder_frames(samples: int) -> int:
    """Count the windows of three convolutions (kernel 3, stride 2, two zeros before, one after)."""
    frames = samples // 160
    for _ in range(3 if frames else 0):
        frames = sum(1 for start in range(0, 2 + frames + 1, 2) if start + 3 <= 2 + frames + 1)
    return frames


def expected(audio_N: np.ndarray, vocabulary: int, prompts: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Return the tokens and frames of a whole recording at 16 kHz, computed from the definition.

    `prompts` are those of its encoder frames, for a prompted model.
    """
    frames = encoder_frames(len(audio_N))
    padded = np.zeros(frames * 1280, np.float32)
    part = audio_N[: max(frames * 1280 - 1081, 0)]
    padded[1081 : 1081 + len(part)] = part
    checksum, tokens = 0, []
    for frame, row in enumerate(padded.reshape(-1, 1280)):
        checksum = zlib.crc32(row.tobytes(), checksum)
        if prompts is not None:
            checksum = zlib.crc32(bytes([prompts[frame]]), checksum)
        tokens += spell(checksum, vocabulary)
    return tokens, [i for i in range(frames) for _ in range(DIGITS)]


@dataclass
class FakeStep:
    backend: FakeBackend
    batch: Batch
    emissions: Emissions

    def result(self) -> Emissions:
        try:
            self.backend.on_result(self.batch)
        finally:
            for slot in self.batch.slots.tolist():
                self.backend.in_flight[slot] -= 1
        return self.emissions


def do_nothing(batch: Batch) -> None: ...


class FakeBackend:
    asynchronous = False

    def __init__(self, manifest: Manifest, capacity: int = 4, max_batch: int = 4) -> None:
        self.manifest, self.capacity, self.max_batch = manifest, capacity, max_batch
        self.position: dict[int, int] = {}
        self.checksum: dict[int, int] = {}
        self.phrases: dict[int, Boosting | None] = {}
        self.decoder_resets: list[tuple[int, int]] = []  # slot, and its position in frames
        self.in_flight = dict.fromkeys(range(capacity), 0)
        self.batches: list[tuple[int, list[int]]] = []  # chunk size in ms, slots
        self.prompts: list[list[int]] = []  # of the rows of each batch
        self.max_in_flight = 0
        self.closed = False
        self.on_reset: Callable[[list[int]], None] = lambda slots: None
        self.on_phrases: Callable[[int, Boosting | None], None] = lambda slot, phrases: None
        self.on_submit: Callable[[Batch], None] = do_nothing
        self.on_result: Callable[[Batch], None] = do_nothing
        self.fails: Callable[[int, int], bool] = lambda slot, position: False
        self.thread: int | None = None

    def reset(self, slots: np.ndarray) -> None:
        self._on_one_thread()
        self.on_reset(slots.tolist())
        for slot in slots.tolist():
            assert self.in_flight[slot] == 0, f"slot {slot} was reset while a step used it"
            self.position[slot] = self.checksum[slot] = 0
            self.phrases[slot] = None

    def reset_decoder(self, slots: np.ndarray) -> None:
        self._on_one_thread()
        self.decoder_resets += [(slot, self.position[slot]) for slot in slots.tolist()]

    def set_phrases(self, slot: int, phrases: Boosting | None) -> None:
        self._on_one_thread()
        self.on_phrases(slot, phrases)
        self.phrases[slot] = phrases

    def save(self, slot: int) -> dict[str, np.ndarray]:
        self._on_one_thread()
        phrases = self.phrases[slot]
        return {
            "position": np.array(self.position[slot]),
            "checksum": np.array(self.checksum[slot]),
            "phrases": NO_PHRASES if phrases is None else phrases.digest,
        }

    def load(self, slot: int, state: Mapping[str, Any]) -> None:
        check_state(state, self.save(slot))
        self.position[slot], self.checksum[slot] = int(state["position"]), int(state["checksum"])

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._on_one_thread()
        check_copy(sources, targets, self.capacity)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            assert self.in_flight[target] == 0, f"slot {target} was overwritten while a step used it"
            for state in (self.position, self.checksum, self.phrases):
                state[target] = state[source]

    def submit(self, batch: Batch) -> FakeStep:
        self._on_one_thread()
        slots = batch.slots.tolist()
        self.batches.append((batch.chunk.ms, slots))
        self._check(batch)
        self.prompts.append(batch.prompt_ids(self.manifest.languages).tolist())
        self.on_submit(batch)
        vocabulary = self.manifest.decoder.vocabulary
        tokens, frames, failed = [], [], []
        rows = zip(slots, batch.audio, batch.lengths.tolist(), self.prompts[-1], strict=True)
        for slot, audio, length, prompt in rows:
            self.in_flight[slot] += 1
            start = self.position[slot]
            total = encoder_frames(start * 1280 - 1081 + length)
            row: list[int] = []
            for segment in audio.reshape(-1, 1280)[: total - start]:
                self.checksum[slot] = zlib.crc32(segment.tobytes(), self.checksum[slot])
                if self.manifest.languages.count:
                    self.checksum[slot] = zlib.crc32(bytes([prompt]), self.checksum[slot])
                row += spell(self.checksum[slot], vocabulary)
            tokens.append(np.array(row, np.int32))
            frames.append(start + np.arange(len(row), dtype=np.int64) // DIGITS)
            failed.append(self.fails(slot, start))
            self.position[slot] = start + batch.chunk.frames
        self.max_in_flight = max(self.max_in_flight, sum(self.in_flight.values()))
        scores = [-np.arange(len(row), dtype=np.float32) for row in tokens]
        sum_p_alpha = [1 + np.arange(len(row), dtype=np.float32) for row in tokens]
        return FakeStep(self, batch, Emissions.of_rows(tokens, frames, scores, sum_p_alpha, failed))

    def close(self) -> None:
        self._on_one_thread()
        self.closed = True

    def _on_one_thread(self) -> None:
        self.thread = self.thread or threading.get_ident()
        assert self.thread == threading.get_ident(), "the backend was called by two threads"
        assert not self.closed, "the backend was called after close"

    def _check(self, batch: Batch) -> None:
        slots, rows = batch.slots.tolist(), len(batch.slots)
        assert slots == sorted(set(slots)) and 0 < rows <= self.max_batch
        assert (batch.slots.dtype, batch.lengths.dtype, batch.audio.dtype) == (np.int64, np.int64, np.float32)
        assert batch.audio.shape == (rows, batch.chunk.samples) and batch.lengths.shape == (rows,)
        if self.manifest.languages.count:
            assert batch.prompts is not None and batch.prompts.shape == (rows,) and batch.prompts.dtype == np.int64
        else:
            assert batch.prompts is None
        for audio, length in zip(batch.audio, batch.lengths.tolist(), strict=True):
            assert 0 <= length <= batch.chunk.samples and not audio[length:].any()
