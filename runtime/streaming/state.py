"""The scheduler's data: a stream's state, and what the scheduler and the streams' threads exchange.

A scheduler handles tens of thousands of these objects per second, so they have slots, and those that exist per step are
named tuples.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig
from nemostream.errors import NemostreamError
from nemostream.runtime.backends.base import Backend, Pending
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.compiled import HypothesisFields, Queue, StreamFields
from nemostream.runtime.streaming.items import StepOutput, WorkItem
from nemostream.runtime.streaming.rows import Rows
from nemostream.runtime.streaming.snapshot import SavedArrays, saved_array, saved_counts
from nemostream.runtime.text.endpointing import Endpointer, RepetitionGuard


@dataclass(slots=True)
class Hypothesis(HypothesisFields):
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

    def copy(self) -> Hypothesis:
        return Hypothesis([*self.tokens], [*self.sample_positions], [*self.scores], [*self.sum_p_alpha])

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


class StepTimes(NamedTuple):
    """When a step was run. Times are `time.perf_counter()`, in seconds; on Linux, all processes have the same clock."""

    started: float  # it was submitted
    ended: float  # its results were available
    streams: int


class StreamTrace:
    """The chunks of a stream that were run, until `chunks` is emptied. Thread-safe."""

    def __init__(self) -> None:
        # Of each chunk, its `end_sample`, when its audio was complete (`time.perf_counter()`), and its step
        self.chunks: deque[tuple[int, float, StepTimes]] = deque()
        self._ready: deque[float] = deque()  # of chunks that were not run yet

    def enqueued(self, items: Sequence[WorkItem]) -> None:
        """Record that items are ready."""
        now = time.perf_counter()
        for item in items:
            if item.kind == "run":
                self._ready.append(now)

    def ran(self, item: WorkItem, step: StepTimes) -> None:
        """Record that the next chunk was run. Called before its result can be collected."""
        self.chunks.append((item.end_sample, self._ready.popleft() if self._ready else step.started, step))


# Called with the streams that have changed: once after each step, on the scheduler's thread; after other changes, on
# the thread that made them. It must not block.
Listener = Callable[[list["StreamState"]], None]


@dataclass(eq=False, slots=True)
class StreamState(StreamFields):
    """One stream: its audio, its slot at the backend and its tokens. Guarded by the scheduler's lock.

    The chunker belongs to the thread that feeds the stream. It is None if another process cuts the audio.
    """

    chunker: Chunker | None
    slot: int | None  # None once released
    listener: Listener | None = None
    consumer: Any = None  # of the listener: what the stream is to it
    hypothesis: Hypothesis = field(default_factory=Hypothesis)
    endpointer: Endpointer | None = None
    guard: RepetitionGuard | None = None
    phrases: Boosting | None = None
    saved_slot: SavedArrays | None = None  # loaded into the slot after its first reset
    items: Queue[WorkItem] = field(default_factory=Queue)  # not in a step yet
    ended: bool = False  # no items follow
    branches: deque[StreamState] | None = None  # of the items of the kind "branch" that are not done, in order
    source: StreamState | None = None  # of a branch, until it has the state of this stream
    copied: int = 0  # tokens that a branch has from its source
    may_branch: bool = False  # slots are reserved for its branches
    in_flight: int = 0  # submitted items without results; the slot is not released before this is 0
    # Sample before which a step without tokens changes nothing, and the number of tokens (`Scheduler._record_output`)
    quiet_until: int = 0
    quiet_count: int = 0
    outputs: Queue[StepOutput] = field(default_factory=Queue)  # not yet collected
    error: NemostreamError | None = None  # why the stream failed
    progress: threading.Condition | None = None  # notified of every change; created when a thread first waits
    trace: StreamTrace | None = None  # `StreamScheduler.trace`

    def raise_error(self) -> None:
        """Raise the stream's error if it failed."""
        if self.error is not None:
            raise copy_of(self.error)

    @property
    def finished(self) -> bool:
        """Whether no further work item will be run."""
        return self.error is not None or (self.ended and not self.items and self.source is None)

    @property
    def must_wait(self) -> bool:
        """Whether the next item must wait for the step in flight: its result may change the slot or must come first."""
        head = self.items[0]
        if head.kind != "run" or head.reset_slot or (self.guard is not None and self.guard.loop_suspected):
            return True
        return self.endpointer is not None and self.endpointer.resets_decoder


class InFlightStep(NamedTuple):
    """A submitted step: `items[b]` of `streams[b]`, then `rows`. Row b of the batch is row `order[b]` of these."""

    chunk: ChunkConfig
    slots: NDArray[np.int64]  # in the order of items and rows
    streams: list[StreamState]
    items: list[WorkItem]
    rows: Rows
    order: NDArray[np.int64] | None  # None: the same order
    pending: Pending
    started: float  # `time.perf_counter()` at submission


class RowFeed(Protocol):
    """Feeds a scheduler with rows. All methods are called on the scheduler's thread."""

    def receive(self) -> None:
        """Enqueue what has arrived. Called before each step is assembled, without the scheduler's lock."""
        ...

    def before_wait(self) -> None:
        """Call `Scheduler.wake` when something arrives from now on, or has arrived since the last `receive`."""
        ...

    def audio(self, rows: Rows, samples: int) -> NDArray[np.float32]:
        """Return the audio of rows [len(rows), samples], which the caller may keep."""
        ...

    def deliver(self, rows: Rows, streams: Sequence[StreamState]) -> None:
        """Accept the results of a step: `rows` without tokens or ends, and streams whose outputs have others."""
        ...

    def stopped(self) -> None:
        """No further step is run."""
        ...


class BackendCall:
    """A function to call on the scheduler's thread, and its result."""

    def __init__(self, function: Callable[[Backend], Any]) -> None:
        self._function = function
        self.future: Future[Any] = Future()

    def run(self, backend: Backend) -> None:
        try:
            self.future.set_result(self._function(backend))
        except Exception as error:
            self.future.set_exception(error)


def copy_of(error: NemostreamError) -> NemostreamError:
    """Return a copy: an exception raised twice, or by two threads, would mix their tracebacks."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
