"""Backend interface used by the scheduler and the model, independent of the implementation.

A backend owns the state of all live streams (audio tail, mel cache, K/V ring, convolution caches, prediction network
state, position, phrases), indexed by slot, an integer in [0, capacity). It is called by one thread only. The chunk size
is a property of a batch, not of a slot: the state has the same format for all chunk sizes, so a stream may change its
chunk size between steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemostream.bundle import ChunkConfig, LanguageConfig
from nemostream.errors import OptionError

if TYPE_CHECKING:
    from nemostream.runtime.decoding.boosting import Boosting


DEFAULT_MAX_BATCH = 64  # rows in a batch


@dataclass(frozen=True)
class Batch:
    """Input of one step: B streams with the same chunk size. Its arrays are valid until `submit` returns.

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
    """Output of one step. Row b belongs to `Batch.slots[b]`.

    Most rows of a step have no tokens, so the tokens of all rows are in one array, row after row: N in all. `tokens`,
    `frames`, `scores` and `sum_p_alpha` have an array per row.
    """

    counts: NDArray[np.int64]  # [B], tokens of each row
    all_tokens: NDArray[np.int32]  # [N], emitted token ids in order, without blanks
    all_frames: NDArray[np.int64]  # [N], encoder frame of the stream at which each token was emitted
    all_scores: NDArray[np.float32]  # [N], log probability (natural logarithm) of each token
    all_sum_p_alpha: NDArray[np.float32]  # [N], sum of p ** greedy.ALPHA over the vocabulary, for each token
    failed: NDArray[np.bool_]  # [B], whether the row's values are not finite: its stream cannot continue

    @classmethod
    def of_rows(
        cls,
        tokens: Iterable[Sequence[int] | NDArray[Any]],
        frames: Iterable[Sequence[int] | NDArray[Any]],
        scores: Iterable[Sequence[float] | NDArray[Any]],
        sum_p_alpha: Iterable[Sequence[float] | NDArray[Any]],
        failed: ArrayLike,
    ) -> Emissions:
        """Return the output of rows with one sequence each: the first element of `tokens` has the tokens of row 0."""
        tokens, flat = list(tokens), itertools.chain.from_iterable
        return cls(
            np.array([len(row) for row in tokens], np.int64),
            np.array([*flat(tokens)], np.int32),
            np.array([*flat(frames)], np.int64),
            np.array([*flat(scores)], np.float32),
            np.array([*flat(sum_p_alpha)], np.float32),
            np.asarray(failed, np.bool_),
        )

    @cached_property
    def tokens(self) -> list[NDArray[np.int32]]:
        """The tokens of each row."""
        return self._by_row(self.all_tokens)

    @cached_property
    def frames(self) -> list[NDArray[np.int64]]:
        """The frames of each row."""
        return self._by_row(self.all_frames)

    @cached_property
    def scores(self) -> list[NDArray[np.float32]]:
        """The scores of each row."""
        return self._by_row(self.all_scores)

    @cached_property
    def sum_p_alpha(self) -> list[NDArray[np.float32]]:
        """`all_sum_p_alpha` of each row."""
        return self._by_row(self.all_sum_p_alpha)

    def _by_row(self, column: NDArray[Any]) -> list[NDArray[Any]]:
        return np.split(column, np.cumsum(self.counts)[:-1])


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

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy the state and phrases of each source slot [N] into the target slot [N] at the same index.

        Nothing is shared afterwards: both slots continue from the same state, independently. A source may be in a
        pending step: the copy has the state that the step leaves. Targets may have any state, which is lost.

        Raises `OptionError` if a slot does not exist, a target occurs twice or a target is a source; no slot is then
        changed.
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


def check_copy(sources: NDArray[np.int64], targets: NDArray[np.int64], capacity: int) -> None:
    """Raise `OptionError` unless `Backend.copy` accepts these slots in a backend of `capacity` slots."""
    if sources.ndim != 1 or sources.shape != targets.shape:
        raise OptionError(
            f"the source slots have shape {sources.shape} and the target slots {targets.shape}; "
            "give as many targets as sources, in arrays of one dimension."
        )
    for name, slots in (("source", sources), ("target", targets)):
        if len(invalid := slots[(slots < 0) | (slots >= capacity)]):
            raise OptionError(f"a {name} slot is {invalid[0]}; this backend has the slots 0 to {capacity - 1}.")
    distinct, counts = np.unique(targets, return_counts=True)
    if len(repeated := distinct[counts > 1]):
        raise OptionError(f"slot {repeated[0]} is a target more than once; a target can have one source only.")
    if len(both := np.intersect1d(sources, targets)):
        raise OptionError(f"slot {both[0]} is both a source and a target; copy it in a call of its own.")


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
