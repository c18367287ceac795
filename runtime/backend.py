"""The seam: what a backend must do, so that the scheduler and the recogniser never learn which one they hold.

A backend owns the state of every live stream (audio tail, mel history, K/V ring, convolution caches, predictor state,
position), addressed by slot, an integer in [0, capacity). It is called by one thread only. A chunk size is a property
of a batch, not of a slot: the state is the same for all of them, so a stream may change its chunk size between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import OptionError
from nemostream.spec import Chunk


@dataclass(frozen=True)
class Batch:
    """One step of B streams of the same chunk size. Filled by the scheduler, consumed by the backend.

    A row whose stream has ended carries fewer than `chunk.samples` samples: `lengths` counts the leading samples of
    its row that belong to the stream (the lead silence counts as belonging), the rest must be zero.
    """

    chunk: Chunk
    slots: NDArray[np.int64]  # [B], no slot twice
    audio: NDArray[np.float32]  # [B, chunk.samples], in [-1, 1]
    lengths: NDArray[np.int64]  # [B], 0 <= length <= chunk.samples


@dataclass(frozen=True)
class Emissions:
    """What a step said. Filled by the backend, read by the scheduler; row b belongs to `Batch.slots[b]`."""

    tokens: tuple[NDArray[np.int32], ...]  # per row: ids emitted, in order, never blank
    frames: tuple[NDArray[np.int64], ...]  # per row: encoder frame of the stream each was emitted at
    scores: tuple[NDArray[np.float32], ...]  # per row: natural logarithm of each token's probability
    failed: NDArray[np.bool_]  # [B] the row's numbers are not finite: its stream cannot go on


class Pending(Protocol):
    """A step under way."""

    def result(self) -> Emissions:
        """Wait for the step. Raises `BackendError` if it could not be run at all."""
        ...


class Backend(Protocol):
    """Up to two steps may be under way at once, with the same slot in both: the second reads what the first left."""

    capacity: int  # slots
    max_batch: int  # most rows in one batch
    asynchronous: bool  # whether `submit` returns before the step is over; if not, overlapping steps would only delay

    def reset(self, slots: NDArray[np.int64]) -> None:
        """Make the slots' state that of a stream that has heard nothing."""
        ...

    def submit(self, batch: Batch) -> Pending:
        """Start one step: features, encoder, greedy decoding; the slots' state moves on by `chunk.frames` frames."""
        ...

    def close(self) -> None: ...


def at_least_one(**options: int | None) -> None:
    """Raise `OptionError` naming the first option below 1; None is one that was left out."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1.")
