"""A stream's place at the backend, and what the scheduler's threads hand each other. All of it is the scheduler's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from nemostream.errors import NemostreamError
from nemostream.runtime.backends.base import Backend, Pending
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.streaming.chunker import Chunker, WorkItem
from nemostream.runtime.text.endpointing import Endpointer, RepetitionGuard, UtteranceEnd

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class StepOutput:
    """A piece of a stream that is done."""

    item: WorkItem
    count: int  # tokens in the hypothesis after it
    ends: Sequence[UtteranceEnd] = ()  # of utterances, with it


@dataclass(eq=False)
class StreamState:
    """A stream and its place at the backend. Everything here is guarded by the scheduler's lock."""

    chunker: Chunker
    slot: int | None  # None once given back
    progress: threading.Condition  # notified whenever `settled` may have changed
    listener: Callable[[], None] | None  # called at the same moments, for those who cannot wait on a condition
    endpointer: Endpointer | None = None
    guard: RepetitionGuard | None = None
    phrases: Boosting | None = None
    saved: State | None = None  # for the slot, in place of that of a stream that heard nothing
    in_flight: int = 0  # steps submitted whose results are not in; the slot is not given back before it is 0
    heard: deque[StepOutput] = field(default_factory=deque)  # not yet collected
    error: NemostreamError | None = None  # why the stream cannot go on

    @property
    def over(self) -> bool:
        return self.error is not None or (self.chunker.ended and not self.chunker.queued)

    @property
    def alone(self) -> bool:
        """Whether what is next must wait for the step under way: its result may change the slot, or come before it."""
        head = self.chunker.head
        if head.kind != "run" or head.fresh or (self.guard is not None and self.guard.loop_suspected):
            return True
        return self.endpointer is not None and self.endpointer.resets_decoder


@dataclass(frozen=True)
class InFlightStep:
    states: list[StreamState]
    items: list[WorkItem]
    pending: Pending
    started: float


class BackendCall:
    """Something to be done on the scheduler's thread, that another one waits for."""

    def __init__(self, act: Callable[[Backend], Any]) -> None:
        self._act = act
        self.done = threading.Event()
        self.answer: Any = None
        self.error: BaseException | None = None

    def run(self, backend: Backend) -> None:
        try:
            self.answer = self._act(backend)
        except Exception as error:
            self.error = error
        self.done.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.done.set()
