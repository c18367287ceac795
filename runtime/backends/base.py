"""Backend interface used by the scheduler and the model, independent of the implementation.

A backend owns the state of all live streams (audio tail, mel cache, K/V ring, convolution caches, prediction network
state, position, phrases), indexed by slot, an integer in [0, capacity). It is called by one thread only. The chunk size
is a property of a batch, not of a slot: the state has the same format for all chunk sizes, so a stream may change its
chunk size between steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, LanguageConfig
from nemostream.errors import OptionError

if TYPE_CHECKING:
    from nemostream.runtime.decoding.boosting import Boosting


DEFAULT_MAX_BATCH = 64  # rows in a batch


@dataclass(frozen=True)
class Batch:
    """Input of one step: B streams with the same chunk size.

    If a stream has ended, `lengths` is the number of leading samples of its row that belong to it (its lead silence
    included); the remaining samples must be zero.
    """

    chunk: ChunkConfig
    slots: NDArray[np.int64]  # [B], distinct
    audio: NDArray[np.float32]  # [B, chunk.samples], in [-1, 1]
    lengths: NDArray[np.int64]  # [B], 0 <= length <= chunk.samples
    # [B] prompt id of each row (`LanguageConfig.prompts`), for prompted models; None: the default language
    prompts: NDArray[np.int64] | None = None

    def prompt_ids(self, languages: LanguageConfig) -> NDArray[np.int64]:
        """Return the prompt id of each row [B]; zeros for a model of one language.

        Raises `OptionError` for an id that the model does not have: a device would read beyond its table.
        """
        if self.prompts is None or not languages.count:
            return np.full(len(self.slots), languages.prompt(None))
        if len(invalid := self.prompts[(self.prompts < 0) | (self.prompts >= languages.count)]):
            raise OptionError(f"a prompt id is {invalid[0]}; this model has the ids 0 to {languages.count - 1}.")
        return self.prompts


@dataclass(frozen=True)
class Emissions:
    """Output of one step. Row b belongs to `Batch.slots[b]`; all arrays of a row have one element per token."""

    tokens: tuple[NDArray[np.int32], ...]  # per row: emitted token ids in order, without blanks
    frames: tuple[NDArray[np.int64], ...]  # per row: encoder frame of the stream at which each token was emitted
    scores: tuple[NDArray[np.float32], ...]  # per row: log probability (natural logarithm) of each token
    sum_p_alpha: tuple[NDArray[np.float32], ...]  # per row: sum of p ** greedy.ALPHA over the vocabulary, per token
    failed: NDArray[np.bool_]  # [B], whether the row's values are not finite: its stream cannot continue


class Pending(Protocol):
    """A submitted step."""

    def result(self) -> Emissions:
        """Wait for the step and return its output. Raises `BackendError` if the step could not be run."""
        ...


class Backend(Protocol):
    """Runs steps and owns the state of all slots.

    Up to two steps may be pending at once, also with the same slot in both: the second uses the state the first leaves.
    The other methods are ordered too: they affect steps submitted after the call, and none submitted before.
    """

    capacity: int  # number of slots
    max_batch: int  # maximum number of rows in a batch
    # Whether `submit` returns before the step is complete; if not, overlapping steps only adds delay.
    asynchronous: bool

    def reset(self, slots: NDArray[np.int64]) -> None:
        """Reset slots to the initial state of a stream, without phrases."""
        ...

    def reset_decoder(self, slots: NDArray[np.int64]) -> None:
        """Reset the decoder state of slots: prediction network state and current node of the phrase automaton.

        Encoder caches, position and phrases are kept.
        """
        ...

    def set_phrases(self, slot: int, phrases: Boosting | None) -> None:
        """Set a slot's phrases from the next step on, starting at the root of their automaton; None removes them.

        Raises `CapacityError` if the backend has no room for them; the slot then keeps its previous phrases.
        """
        ...

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        """Copy the state of a slot, by name. `load` restores it bit for bit in any slot.

        A state can be loaded into backends of the same kind with the same type of caches. It contains the current node
        of the phrase automaton but not the phrases themselves: call `set_phrases` before `load`.
        """
        ...

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a state returned by `save`.

        Raises `OptionError` for a state of another model or kind of backend, or if the slot's phrases are not those of
        the state; the slot is then unchanged.
        """
        ...

    def submit(self, batch: Batch) -> Pending:
        """Start one step (features, encoder, greedy decoding), which advances the slots by `chunk.frames` frames."""
        ...

    def close(self) -> None:
        """Release all resources."""
        ...


def at_least_one(**options: int | None) -> None:
    """Raise `OptionError` for the first option that is not an integer of at least 1. None means not given."""
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise OptionError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1.")


def check_state(state: Mapping[str, NDArray[Any]], like: Mapping[str, NDArray[Any]]) -> None:
    """Raise `OptionError` unless a saved state has the same arrays and phrases as `like`, the state of the slot."""
    found = {name: (array.dtype.str, array.shape) for name, array in state.items()}
    expected = {name: (array.dtype.str, array.shape) for name, array in like.items()}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise OptionError(
            "the saved state is from another model, or from another kind of backend or cache: "
            f"{', '.join(wrong)} {'does' if len(wrong) == 1 else 'do'} not fit."
        )
    if not np.array_equal(state["phrases"], like["phrases"]):
        raise OptionError("the saved state has other phrases; set the phrases it was saved with before loading it.")
