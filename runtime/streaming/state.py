"""The scheduler's data: a stream's state, and what the scheduler and the streams' threads exchange."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import NemostreamError
from nemostream.runtime.backends.base import Backend, Pending
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.streaming.chunker import Chunker, WorkItem
from nemostream.runtime.streaming.snapshot import SavedArrays, saved_array, saved_counts
from nemostream.runtime.text.endpointing import Endpointer, RepetitionGuard, UtteranceEnd


@dataclass
class Hypothesis:
    """The tokens that the decoder emitted for a stream.

    The lists are only appended to, so another thread may read a prefix without the lock.
    """

    tokens: list[int] = field(default_factory=list)
    sample_positions: list[int] = field(default_factory=list)  # of each token: first sample of its encoder frame
    scores: list[float] = field(default_factory=list)  # of each token: log-probability
    sum_p_alpha: list[float] = field(default_factory=list)  # of each token: `Emissions.sum_p_alpha`

    def extend(
        self, tokens: list[int], sample_positions: list[int], scores: list[float], sum_p_alpha: list[float]
    ) -> None:
        self.tokens += tokens
        self.sample_positions += sample_positions
        self.scores += scores
        self.sum_p_alpha += sum_p_alpha

    def save(self) -> dict[str, NDArray[Any]]:
        return {
            "tokens": np.array(self.tokens, np.int32),
            "sample_positions": np.array(self.sample_positions, np.int64),
            "scores": np.array(self.scores, np.float32),
            "sum_p_alpha": np.array(self.sum_p_alpha, np.float32),
        }

    def load(self, state: SavedArrays) -> None:
        """Append a saved hypothesis. Raises `ValueError` if `state` does not come from `save`."""
        dtypes = {"tokens": np.int32, "sample_positions": np.int64, "scores": np.float32, "sum_p_alpha": np.float32}
        count = len(saved_array(state, "tokens", np.int32, None))
        arrays = {name: saved_array(state, name, dtype, count) for name, dtype in dtypes.items()}
        saved_counts(state, "sample_positions")
        if not all(np.isfinite(arrays[name]).all() for name in ("scores", "sum_p_alpha")):
            raise ValueError("a score is not finite")
        self.extend(*(array.tolist() for array in arrays.values()))


@dataclass(frozen=True)
class StepOutput:
    """The result of one work item."""

    item: WorkItem
    count: int  # tokens in the stream's hypothesis after the item
    ends: Sequence[UtteranceEnd] = ()  # ends of utterances found with it


@dataclass(eq=False)
class StreamState:
    """One stream: its audio, its slot at the backend and its tokens. Guarded by the scheduler's lock."""

    chunker: Chunker
    slot: int | None  # None once released
    progress: threading.Condition  # notified when the result of `Scheduler.settled` may have changed
    listener: Callable[[], None] | None  # called at the same moments; for callers that cannot wait on a condition
    hypothesis: Hypothesis = field(default_factory=Hypothesis)
    endpointer: Endpointer | None = None
    guard: RepetitionGuard | None = None
    phrases: Boosting | None = None
    saved_slot: SavedArrays | None = None  # loaded into the slot after its first reset
    in_flight: int = 0  # submitted steps without results; the slot is not released before this is 0
    outputs: deque[StepOutput] = field(default_factory=deque)  # not yet collected
    error: NemostreamError | None = None  # why the stream failed

    @property
    def finished(self) -> bool:
        """Whether no further work item will be run."""
        return self.error is not None or (self.chunker.ended and not self.chunker.queued)

    @property
    def must_wait(self) -> bool:
        """Whether the next item must wait for the step in flight: its result may change the slot or must come first."""
        head = self.chunker.head
        if head.kind != "run" or head.reset_slot or (self.guard is not None and self.guard.loop_suspected):
            return True
        return self.endpointer is not None and self.endpointer.resets_decoder


@dataclass(frozen=True)
class InFlightStep:
    """A submitted step: row b is `items[b]` of `streams[b]`."""

    streams: list[StreamState]
    items: list[WorkItem]
    pending: Pending
    started: float  # `time.perf_counter()` at submission


class BackendCall:
    """A function to call on the scheduler's thread, and its result, for which another thread waits."""

    def __init__(self, function: Callable[[Backend], Any]) -> None:
        self._function = function
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self, backend: Backend) -> None:
        try:
            self.result = self._function(backend)
        except Exception as error:
            self.error = error
        self.done.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.done.set()
