"""The seam: what a backend must do, so that the scheduler and the recogniser never learn which one they hold.

A backend owns the state of every live stream (audio tail, mel history, K/V ring, convolution caches, predictor state,
position, phrases), addressed by slot, an integer in [0, capacity). It is called by one thread only. A chunk size is a
property of a batch, not of a slot: the state is the same for all of them, so a stream may change its chunk size between
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig
from nemostream.errors import OptionError

if TYPE_CHECKING:
    from nemostream.runtime.decoding.boosting import Boosting


@dataclass(frozen=True)
class Batch:
    """One step of B streams of the same chunk size. Filled by the scheduler, consumed by the backend.

    A row whose stream has ended carries fewer than `chunk.samples` samples: `lengths` counts the leading samples of
    its row that belong to the stream (the lead silence counts as belonging), the rest must be zero.
    """

    chunk: ChunkConfig
    slots: NDArray[np.int64]  # [B], no slot twice
    audio: NDArray[np.float32]  # [B, chunk.samples], in [-1, 1]
    lengths: NDArray[np.int64]  # [B], 0 <= length <= chunk.samples


@dataclass(frozen=True)
class Emissions:
    """What a step said. Filled by the backend, read by the scheduler; row b belongs to `Batch.slots[b]`."""

    tokens: tuple[NDArray[np.int32], ...]  # per row: ids emitted, in order, never blank
    frames: tuple[NDArray[np.int64], ...]  # per row: encoder frame of the stream each was emitted at
    scores: tuple[NDArray[np.float32], ...]  # per row: natural logarithm of each token's probability
    sum_p_alpha: tuple[
        NDArray[np.float32], ...
    ]  # per row: of each token, the sum of p ** greedy.ALPHA over the vocabulary
    failed: NDArray[np.bool_]  # [B] the row's numbers are not finite: its stream cannot go on


class Pending(Protocol):
    """A step under way."""

    def result(self) -> Emissions:
        """Wait for the step. Raises `BackendError` if it could not be run at all."""
        ...


class Backend(Protocol):
    """Up to two steps may be under way at once, with the same slot in both: the second reads what the first left.

    The other calls too are in order: steps submitted before one of them know nothing of it, those after it do.
    """

    capacity: int  # slots
    max_batch: int  # most rows in one batch
    asynchronous: bool  # whether `submit` returns before the step is over; if not, overlapping steps would only delay

    def reset(self, slots: NDArray[np.int64]) -> None:
        """Make the slots' state that of a stream that has heard nothing, without phrases."""
        ...

    def reset_decoder(self, slots: NDArray[np.int64]) -> None:
        """Decode on as if nothing had been said yet: prediction and phrases' automata start anew.

        What was heard stays: the encoder's caches, the position, and which phrases the slots have.
        """
        ...

    def set_phrases(self, slot: int, phrases: Boosting | None) -> None:
        """Listen for phrases from the next step on, beginning at their automaton's root; None: for none any more.

        Raises `CapacityError` if the backend has no room for them; the slot then keeps those it had.
        """
        ...

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        """Copy everything the slot is, by name: `load` makes any slot the same to the bit.

        It fits backends of the same kind whose caches are of the same type. Phrases are not in it, only where in their
        automaton the stream stands: `set_phrases` comes before `load`.
        """
        ...

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Make the slot what `save` saw.

        Raises `OptionError` for a state of another model or kind of backend, or if the slot's phrases are not those of
        the saved one; the slot is then as it was.
        """
        ...

    def submit(self, batch: Batch) -> Pending:
        """Start one step: features, encoder, greedy decoding; the slots' state moves on by `chunk.frames` frames."""
        ...

    def close(self) -> None: ...


def at_least_one(**options: int | None) -> None:
    """Raise `OptionError` naming the first option that is no whole number of at least 1; None is one left out."""
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise OptionError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1.")


def check_state(state: Mapping[str, NDArray[Any]], like: Mapping[str, NDArray[Any]]) -> None:
    """Raise `OptionError` unless a saved state has the arrays, and the phrases, that `save` gives of the slot now."""
    found = {name: (array.dtype.str, array.shape) for name, array in state.items()}
    wanted = {name: (array.dtype.str, array.shape) for name, array in like.items()}
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        raise OptionError(
            f"the saved state is of another model, or of another kind of backend or cache: {', '.join(wrong)} "
            f"{'does' if len(wrong) == 1 else 'do'} not fit."
        )
    if not np.array_equal(state["phrases"], like["phrases"]):
        raise OptionError("the saved state was listening for other phrases; give the stream those it had.")
