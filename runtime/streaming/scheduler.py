"""Schedule the streams: one thread owns the backend and runs the chunks of all streams in batches.

Each step takes the stream that has been ready longest and every other ready stream with the same chunk size, oldest
first, so no chunk size can starve another. A stream with more audio queued goes to the end of the queue.

With overlap, step k is submitted before the results of step k-1 are awaited, so the host's work is hidden behind the
device's. A stream may be in both steps: its next step needs its state, which the backend keeps, not its results. A
stream waits for its results only if they may change that state (a decoder reset at the end of an utterance or in a
repetition loop). Without overlap, each step's results are processed at once. That is the reference implementation, and
faster where `submit` itself does the work.

Thousands of streams can be open, so nothing here is done per stream and step that can be done once per step: a step
takes the lock twice, converts the results of all rows at once, and calls each listener once. A row without tokens whose
stream has nothing to decide (`StreamState.quiet_until`) costs one entry in its stream's outputs. Chunks of other
processes are rows of arrays (`enqueue_rows`): such a row costs nothing in Python if it has no tokens.

This module does not depend on the kind of backend, on text, sample rates or asyncio.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import BackendError, CapacityError, NemostreamError, StreamError
from nemostream.runtime.backends.base import Backend, Batch, Emissions
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.compiled import SchedulerFields, compiled
from nemostream.runtime.streaming.items import Floats, StepOutput, WorkItem, new_item, new_output
from nemostream.runtime.streaming.rows import ROW, RowQueue, Rows
from nemostream.runtime.streaming.snapshot import SavedArrays
from nemostream.runtime.streaming.state import (
    BackendCall,
    InFlightStep,
    Listener,
    RowFeed,
    StepTimes,
    StreamState,
    StreamTrace,
    copy_of,
)
from nemostream.runtime.text.endpointing import NEVER, UtteranceEnd

T = TypeVar("T")

STREAMS_PER_RESERVED_SLOT = 16  # that may branch: a branch runs only a few steps

BRANCH_ITEM = WorkItem("branch", cast(Any, None), 0)  # where a branch begins in the items of its source

_slot_of = attrgetter("slot")
_NO_AUDIO: Floats = np.empty(0, np.float32)
_NO_ROWS: Rows = np.empty(0, ROW)

STREAM_CLOSED = "the stream was closed; open a new one for more audio."
MODEL_CLOSED = "the model was closed; load it again."

_forks = 0  # between the import of this module and this process; takes less time to read than the process id


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_count_fork)


class _Copy(NamedTuple):
    """A copy of a slot to make."""

    source: int
    target: int
    branch: StreamState  # in the target


class StreamScheduler(ABC):
    """What schedulers of streams have in common: `Scheduler`, and that of a process whose engine is another process.

    The chunker of a stream is used on the thread that calls `accept`, `skip_silence`, `finish` and `end_utterance`, one
    thread at a time. `wait`, `close` and `open(block=True)` block; the other methods do not.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._process, self._forks = os.getpid(), _forks
        self._lock = threading.Lock()
        self._closed: NemostreamError | None = None  # why no stream can be opened any more
        self.records_times = False  # whether `last_step` is set and streams are traced
        self.last_step = StepTimes(0.0, 0.0, 0)
        # Called on the scheduler's thread after each step, with its chunk, number of streams and duration in seconds.
        self.on_step: Callable[[ChunkConfig, int, float], None] | None = None
        self.on_failure: Callable[[Exception], None] | None = None  # called with each error raised by the backend
        # Called with the error of an accurate lane because of which a final has tokens of the fast lane (`lanes.py`)
        self.on_fallback: Callable[[NemostreamError], None] | None = None

    @abstractmethod
    def open(
        self, chunker: Chunker | None, listener: Listener | None = None, block: bool = False, **fields: Any
    ) -> StreamState:
        """Open a stream in a free slot; with `block`, wait for one.

        Without a chunker, its items come from `enqueue`. `fields` are further fields of the `StreamState`. For every 16
        streams with `may_branch`, or fewer, a slot is reserved for their branches. Raises `CapacityError` if no slot is
        free and `StreamError` after `close`.
        """

    @abstractmethod
    def enqueue(self, stream: StreamState, items: Sequence[WorkItem], last: bool = False) -> None:
        """Append work items to a stream; with `last` no more follow. Raises the stream's error if it failed."""

    @abstractmethod
    def branch(self, stream: StreamState, chunker: Chunker | None, may_branch: bool = False) -> StreamState:
        """Open a stream that continues from the state of another one after the items that were enqueued so far.

        It has the same tokens, phrases and repetition guard, and no endpointer. It fails if the other stream fails
        before. If no slot is free, neither of them runs further items until one is; with `may_branch` (see `open`),
        `CapacityError` is raised instead. Raises the other stream's error if it failed.
        """

    @abstractmethod
    def save(self, stream: StreamState) -> Future[dict[str, SavedArrays]]:
        """Return the parts of a snapshot that belong to the scheduler: "slot", "guard", "endpoint" (what there is).

        The stream must have settled; what is enqueued after the call is not part of the result. Raises the stream's
        error if it failed; the result has the errors of the backend.
        """

    @abstractmethod
    def cancel(self, stream: StreamState) -> None:
        """Drop a stream in any state. Its slot is released as soon as no step uses it. Does nothing if it is done."""

    @property
    def waiting(self) -> int:
        """Number of streams with a chunk that is ready and not in a step yet; 0 if steps run in another process."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Fail all unfinished streams and release the backend. Does nothing if already closed, or in a forked child."""

    def check_process(self) -> None:
        """Raise `BackendError` in a forked child, which has no copy of the threads and maybe a held lock."""
        if _forks != self._forks:
            raise BackendError(
                f"the model was loaded in process {self._process} and cannot be used in a forked child process; "
                "load the model in the child process."
            )

    def accept(self, stream: StreamState, samples_N: NDArray[Any]) -> None:
        """Append audio (`Chunker.accept`). Raises the stream's error if it failed."""
        if _forks != self._forks:
            self.check_process()
        if stream.error is not None:
            stream.raise_error()
        chunker = stream.chunker
        assert chunker is not None
        chunker.accept(samples_N)
        if items := chunker.take():
            self.enqueue(stream, items)

    def skip_silence(self, stream: StreamState, samples: int) -> None:
        """Append digital silence, which is not run (`Chunker.skip_silence`). Raises the stream's error if it failed."""
        stream.raise_error()
        chunker = _chunker_of(stream)
        chunker.skip_silence(samples)
        self.enqueue(stream, chunker.take())

    def finish(self, stream: StreamState) -> None:
        """End a stream's audio. Its slot is released after the last step. Raises the stream's error if it failed."""
        self.check_process()
        stream.raise_error()
        chunker = _chunker_of(stream)
        chunker.finish()
        self.enqueue(stream, chunker.take(), last=True)

    def end_utterance(self, stream: StreamState) -> None:
        """End the utterance: process all accepted audio, then start anew in the same slot."""
        self.check_process()
        stream.raise_error()
        chunker = _chunker_of(stream)
        chunker.end_utterance()
        self.enqueue(stream, chunker.take())

    def settled(self, stream: StreamState, backlog: int = 0) -> bool:
        """Return whether all but `backlog` items of a stream are done. Raises the stream's error if it failed."""
        if _forks != self._forks:
            self.check_process()
        with self._lock:
            return self._settled(stream, backlog)

    def wait(self, stream: StreamState, backlog: int = 0) -> None:
        """Block until `settled`."""
        self.check_process()
        with self._lock:
            while not self._settled(stream, backlog):
                if stream.progress is None:
                    self._watch(stream)
                assert stream.progress is not None
                stream.progress.wait()

    def trace(self, stream: StreamState) -> StreamTrace:
        """Record when the chunks of a stream are run. Called before the first of its items is enqueued."""
        stream.trace, self.records_times = StreamTrace(), True
        return stream.trace

    def set_chunk(self, stream: StreamState, chunk: ChunkConfig) -> None:
        """Change a stream's chunk size from its next chunk on. The state at the backend is the same for all sizes."""
        self.check_process()
        _chunker_of(stream).set_chunk(chunk)

    def set_prompt(self, stream: StreamState, prompt: int) -> None:
        """Change a stream's language from its next chunk on. The state at the backend is the same for all languages."""
        self.check_process()
        _chunker_of(stream).prompt = prompt

    def collect(self, stream: StreamState) -> list[StepOutput]:
        """Return a stream's outputs since the last call, in order."""
        if _forks != self._forks:
            self.check_process()
        outputs = stream.outputs  # no lock: other threads only append to it
        if len(outputs) == 1:  # most often
            return [outputs.popleft()]
        return [outputs.popleft() for _ in range(len(outputs))]

    def _settled(self, stream: StreamState, backlog: int) -> bool:
        if stream.error is not None:
            stream.raise_error()
        return stream.source is None and len(stream.items) + stream.in_flight <= backlog

    def _watch(self, stream: StreamState) -> None:
        """Notify of every change of a stream from now on."""
        stream.progress = threading.Condition(self._lock)

    def _notify(self, streams: Sequence[StreamState]) -> None:
        """Call each listener once, with its streams."""
        changed: dict[Listener, list[StreamState]] = {}
        for stream in streams:
            if (listener := stream.listener) is not None:
                if listener in changed:
                    changed[listener].append(stream)
                else:
                    changed[listener] = [stream]
        for listener, its_streams in changed.items():
            try:
                listener(its_streams)
            except Exception:  # for example a closed event loop: the outputs will never be collected
                for stream in its_streams:
                    stream.listener = None
                    self.cancel(stream)


class Scheduler(SchedulerFields, StreamScheduler):
    """Runs streams for any number of threads.

    `backend` is a backend, or a function that opens one. The function is called on the scheduler's thread, because some
    libraries keep data per thread: ONNX Runtime captures its CUDA graphs again on every thread that runs a session. The
    constructor returns when the backend is open and raises its errors. `overlap` is by default whether the backend is
    asynchronous.

    `close` the scheduler when done; that also closes the backend, on the thread that used it.
    """

    def __init__(
        self, manifest: Manifest, backend: Backend | Callable[[], Backend], overlap: bool | None = None
    ) -> None:
        super().__init__(manifest)
        self._backend: Backend  # opened by `_run`
        self._work = threading.Condition(self._lock)  # the scheduler's thread waits on it for work
        self._idle = False  # whether the scheduler's thread waits
        self._slot_released = threading.Condition(self._lock)  # `open(block=True)` waits on it for a slot
        self._free: list[int] = []  # a heap: the lowest slot first, so that used slots are contiguous
        self._streams: dict[int, StreamState] = {}  # open streams by slot
        # Streams with a chunk to run in the order they became ready, and the number of arrivals in `_rows` before that
        self._ready: dict[StreamState, int] = {}
        self._slot_resets: set[int] = set()  # slots to reset before the next step
        self._decoder_resets: set[int] = set()  # slots whose decoder to reset before the next step
        self._copies: list[_Copy] = []  # to be made before these resets and the next step, in order
        self._branches: deque[StreamState] = deque()  # wait for a slot
        self._branching = 0  # open streams that may branch
        self._changed: list[StreamState] = []  # by changes of other streams; their listeners are called next
        self._calls: deque[BackendCall] = deque()
        self._feed: RowFeed | None = None
        self._woken = False  # `wake` was called since the last wait
        self._audio: dict[int, Floats] = {}  # input of a step by chunk size (ms): [max_batch, samples]
        self._opened = threading.Event()  # the backend is open, or `_open_error` is set
        self._open_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(backend,), name="nemostream-scheduler", daemon=True)
        self._thread.start()
        try:
            self._opened.wait()
        except BaseException:  # for example Ctrl-C while the backend is opened
            self.close()
            raise
        error, self._open_error = self._open_error, None
        if error:
            try:
                raise error
            finally:
                del error  # its traceback has this frame: a cycle would keep the backend's memory
        # If `submit` runs the whole step, overlap would delay each result by one step and hide no work.
        self._overlap = self._backend.asynchronous if overlap is None else overlap

    # -- called by the streams' threads --------------------------------------------------------------------------------

    def open(
        self, chunker: Chunker | None, listener: Listener | None = None, block: bool = False, **fields: Any
    ) -> StreamState:
        self.check_process()
        with self._lock:
            stream = StreamState(chunker, None, listener, **fields)
            while block and not (self._has_slot(stream.may_branch) or self._closed):
                self._slot_released.wait()
            if self._closed:
                raise copy_of(self._closed)
            self._check_capacity(stream.may_branch)
            self._branching += stream.may_branch
            self._slot_resets.add(self._take_slot(stream))
            self._update_plain(stream)
            self._wake()
            return stream

    @compiled(SchedulerFields)
    def accept(self, stream: StreamState, samples_N: NDArray[Any]) -> None:
        super().accept(stream, samples_N)

    @compiled(SchedulerFields)
    def collect(self, stream: StreamState) -> list[StepOutput]:
        return super().collect(stream)

    def branch(self, stream: StreamState, chunker: Chunker | None, may_branch: bool = False) -> StreamState:
        self.check_process()
        with self._lock:
            stream.raise_error()
            branch = StreamState(chunker, None, stream.listener, stream.consumer, phrases=stream.phrases, source=stream)
            if may_branch:
                self._check_capacity(True)
                self._branching += 1
                branch.may_branch = True
            if self._free:
                self._take_slot(branch)
            else:
                self._branches.append(branch)
            if stream.branches is None:
                stream.branches = deque()
            stream.branches.append(branch)
            stream.items.append(BRANCH_ITEM)
            self._schedule(stream)
            self._update_plain(stream)
            return branch

    def enqueue(self, stream: StreamState, items: Sequence[WorkItem], last: bool = False) -> None:
        with self._lock:
            if stream.error is not None:
                stream.raise_error()
            if stream.trace is not None:
                stream.trace.enqueued(items)
            stream.items += items
            self._schedule(stream)
            if last:
                stream.ended = True
                self._release_if_finished(stream)
            if stream.chunker is None:
                self._update_plain(stream)

    def enqueue_rows(self, rows: Rows) -> NDArray[np.bool_]:
        """Append chunks [N] to streams without a chunker; return which were accepted.

        The others belong to streams that have failed, or whose items must wait for others: `enqueue` them. The slots
        must be those of open streams. Called by the feed in `receive`.
        """
        with self._lock:
            accepted = self._plain[rows["slot"]]
            if accepted.all():
                self._rows.append(rows)
            elif accepted.any():
                self._rows.append(rows[accepted])
        return accepted

    def set_feed(self, feed: RowFeed) -> None:
        """Run the rows of a feed from now on. Called before the first stream without a chunker is opened."""
        self._feed = feed
        self.wake()

    def wake(self) -> None:
        """Let the feed receive soon. Raises `StreamError` after `close`."""
        with self._lock:
            if self._closed:
                raise copy_of(self._closed)
            self._woken = True
            self._wake()

    def call(self, function: Callable[[Backend], T]) -> T:
        """Call a function with the backend on the scheduler's thread, between two steps. Blocks; raises its errors."""
        return self._call(function).result()

    def save(self, stream: StreamState) -> Future[dict[str, SavedArrays]]:
        stream.raise_error()

        def save(backend: Backend) -> dict[str, SavedArrays]:
            if stream.slot is None:
                raise StreamError(STREAM_CLOSED)
            parts = {"guard": stream.guard, "endpoint": stream.endpointer}
            return {"slot": backend.save(stream.slot)} | {name: part.save() for name, part in parts.items() if part}

        return self._call(save)

    def _call(self, function: Callable[[Backend], T]) -> Future[T]:
        self.check_process()
        call = BackendCall(function)
        with self._lock:
            if self._closed:
                raise copy_of(self._closed)
            self._calls.append(call)
            self._wake()
        return call.future

    def cancel(self, stream: StreamState) -> None:
        if _forks != self._forks:  # the stream belongs to the parent process
            return
        with self._lock:
            if (stream.slot is None and stream.source is None) or stream.error:
                return
            self._fail_stream(stream, StreamError(STREAM_CLOSED))
        self._notify([stream])

    @property
    def waiting(self) -> int:
        with self._lock:
            return len(self._ready) + self._rows.streams

    def close(self) -> None:
        """Fail all unfinished streams, wait for the step in flight and close the backend.

        Does nothing if already closed, or in a forked child.
        """
        if _forks != self._forks:
            return
        self._shut_down(StreamError(MODEL_CLOSED))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- called with the lock held -------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Wake the scheduler's thread if it waits."""
        if self._idle:
            self._notify_idle()

    def _notify_idle(self) -> None:
        self._work.notify()

    def _has_slot(self, may_branch: bool) -> bool:
        """Return whether a slot is free that is not reserved for branches."""
        return len(self._free) > -(-(self._branching + may_branch) // STREAMS_PER_RESERVED_SLOT)

    def _check_capacity(self, may_branch: bool) -> None:
        if not self._has_slot(may_branch):
            taken = self._backend.capacity - len(self._free)
            state = f"{taken} of {self._backend.capacity} slots are taken and the others are reserved for finals"
            raise CapacityError(
                f"{state if self._free else f'all {taken} slots are taken'}; finish or close a stream, or load the "
                "model with more slots: nemostream.load(capacity=...)."
            )

    def _take_slot(self, stream: StreamState) -> int:
        slot = stream.slot = heapq.heappop(self._free)
        self._streams[slot] = stream
        self._slot_resets.discard(slot)  # of a stream before
        self._decoder_resets.discard(slot)
        return slot

    @compiled(SchedulerFields)
    def _schedule(self, stream: StreamState) -> None:
        """Process the stream's items up to the next chunk to run, and mark the stream ready to run it.

        Stops where the next item must wait for the step in flight, or for a slot for a branch.
        """
        self._process_items(stream)

    def _process_items(self, stream: StreamState) -> None:
        """`_schedule`, of which the C function only covers a chunk that can run at once."""
        if stream.source is not None:
            return
        items, slot = stream.items, stream.slot
        while items:
            if stream.in_flight and stream.must_wait:
                break
            if stream.chunker is None and slot is not None and self._rows.precede(slot, stream.must_wait):
                break
            if items[0].kind == "run":
                if stream not in self._ready:
                    self._ready[stream] = self._rows.arrivals
                    self._wake()
                return
            if items[0].kind == "branch":
                if not self._begin_branch(stream):
                    break
                items.popleft()
                continue
            if items[0].kind == "reset_decoder":
                items.popleft()
                self._reset_decoder_of(stream)
                continue
            self._record_output(stream, items.popleft(), [], [])
        self._ready.pop(stream, None)  # it may have been ready before the last result

    def _begin_branch(self, stream: StreamState) -> bool:
        """Give the stream's next branch the stream's state. Return False if the branch has no slot yet."""
        assert stream.branches and stream.slot is not None
        branch = stream.branches[0]
        if branch.error is None:
            if branch.slot is None:
                return False
            branch.source, branch.hypothesis, branch.guard = None, stream.hypothesis.copy(), copy.copy(stream.guard)
            branch.copied = len(branch.hypothesis.tokens)
            if stream.slot in self._slot_resets:  # nothing has been run
                self._slot_resets.add(branch.slot)
                branch.saved_slot = stream.saved_slot
            else:
                self._copies.append(_Copy(stream.slot, branch.slot, branch))
                if stream.slot in self._decoder_resets:
                    self._decoder_resets.add(branch.slot)
                self._wake()
            self._schedule(branch)
            self._update_plain(branch)
            self._release_if_finished(branch)
            self._note_change(branch)
        stream.branches.popleft()
        return True

    def _place_branches(self) -> None:
        """Give free slots to the branches that wait for one."""
        while self._branches and self._free:
            branch = self._branches.popleft()
            if branch.error is None and (stream := branch.source) is not None:
                self._take_slot(branch)
                self._continue(stream)

    def _continue(self, stream: StreamState) -> None:
        """Process the items of a stream that waited for a branch."""
        self._note_change(stream)
        self._schedule(stream)
        self._update_plain(stream)
        self._release_if_finished(stream)

    def _note_change(self, stream: StreamState) -> None:
        """Notify of a change of a stream that is not in the current step or call: soon, on the scheduler's thread."""
        self._changed.append(stream)
        if stream.progress is not None:
            stream.progress.notify_all()
        self._wake()

    def _record_output(self, stream: StreamState, item: WorkItem, tokens: list[int], positions: list[int]) -> None:
        """Record the output of an item that is done. Its tokens are already in the hypothesis."""
        hypothesis, endpointer, guard = stream.hypothesis, stream.endpointer, stream.guard
        ends: Sequence[UtteranceEnd] = ()
        count = len(hypothesis.tokens)
        if item.kind == "end_of_utterance":
            ends = [UtteranceEnd(count, item.end_sample, "forced")]
            if endpointer is not None:
                endpointer.reset()
        elif endpointer is not None:
            ends = endpointer.step(tokens, positions, item.end_sample) or ()
            if endpointer.resets_decoder and endpointer.reset_due:
                self._reset_decoder_of(stream)
        # Without tokens, the end of an utterance depends on the time only, and a loop cannot be found that was not
        # suspected before.
        quiet_until = NEVER if endpointer is None else endpointer.next_end
        if guard is not None and item.kind == "run":
            if item.reset_slot:
                guard.restart(count - len(tokens))
            if guard.step(hypothesis.tokens, hypothesis.sample_positions, item.end_sample):
                self._reset_decoder_of(stream)
        if guard is not None and guard.loop_suspected:
            quiet_until = 0
        stream.outputs.append(new_output((item, count, ends)))
        stream.quiet_until, stream.quiet_count = quiet_until, count

    def _reset_decoder_of(self, stream: StreamState) -> None:
        if stream.slot is not None:
            self._decoder_resets.add(stream.slot)

    def _settled(self, stream: StreamState, backlog: int) -> bool:
        return super()._settled(stream, backlog - self._rows_of(stream))

    def _rows_of(self, stream: StreamState) -> int:
        """Return the number of rows of a stream that have no result."""
        return self._rows.pending(stream.slot) if stream.chunker is None and stream.slot is not None else 0

    def _watch(self, stream: StreamState) -> None:
        super()._watch(stream)
        self._update_plain(stream)

    def _update_plain(self, stream: StreamState) -> None:
        """Set what rows of the stream depend on. Called after each change of a stream without a chunker."""
        slot, guard = stream.slot, stream.guard
        if stream.chunker is not None or slot is None:
            return
        self._quiet_until[slot] = stream.quiet_until
        suspected = guard is not None and guard.loop_suspected
        if suspected and self._rows.count_of[slot]:  # they must wait for the step in flight
            rows = self._rows.remove(slot)
            stream.items.extendleft([self._item_of(rows[row : row + 1]) for row in reversed(range(len(rows)))])
            self._schedule(stream)
        resets = stream.endpointer is not None and stream.endpointer.resets_decoder
        self._plain[slot] = not (
            suspected
            or resets
            or stream.items
            or stream.ended
            or stream.source is not None
            or stream.error is not None
            or stream.progress
        )

    def _item_of(self, row: Rows) -> WorkItem:
        """Return the item of one row [1]."""
        assert self._feed is not None
        chunk = self._manifest.chunks[row["size"][0]]
        end, origin, length, prompt = (
            int(row[name][0]) for name in ("end_sample", "origin_sample", "length", "prompt")
        )
        return WorkItem("run", chunk, end, origin, self._feed.audio(row, chunk.samples)[0], length, prompt=prompt)

    def _release_if_finished(self, stream: StreamState) -> None:
        slot = stream.slot
        if slot is not None and stream.finished and not stream.in_flight and not self._rows_of(stream):
            del self._streams[slot]
            heapq.heappush(self._free, slot)
            stream.slot = None
            self._plain[slot] = False
            self._branching -= stream.may_branch
            if self._branches:
                self._place_branches()
            self._slot_released.notify_all()  # they may wait for different numbers of slots

    def _fail_stream(self, stream: StreamState, error: NemostreamError) -> None:
        if stream.error is None:
            stream.error = error
        stream.items.clear()
        if stream.chunker is None and stream.slot is not None:
            self._rows.remove(stream.slot)
            self._plain[stream.slot] = False
        self._ready.pop(stream, None)
        branches, source = stream.branches or (), stream.source
        stream.branches = stream.source = None
        for branch in branches:
            self._fail_stream(branch, copy_of(error))
            self._note_change(branch)
        self._release_if_finished(stream)
        if source is not None and source.error is None:  # it may wait for this branch
            self._continue(source)
        if stream.progress is not None:
            stream.progress.notify_all()

    def _next_batch(self) -> tuple[list[StreamState], list[WorkItem], Rows]:
        """Return the streams of the next step and the chunk of each, and rows. All chunks have the same size.

        Streams and rows are sorted by slot, because a backend can use contiguous slots in place.
        """
        ready, queue, rows = self._ready, self._rows, _NO_ROWS
        if not queue:
            return *self._take_items(next(iter(ready)).items[0].chunk, self._backend.max_batch), rows
        oldest, count = queue.oldest, self._backend.max_batch
        head = next(iter(ready), None)
        streams: list[StreamState] = []
        items: list[WorkItem] = []
        if head is not None and ready[head] <= oldest["arrival"]:  # it has waited longer than all rows
            chunk = head.items[0].chunk
            streams, items = self._take_items(chunk, count)
            rows = self._take_rows(self._manifest.chunks.index(chunk), count - len(items))
        else:
            rows = self._take_rows(oldest["size"], count)
            if ready:
                streams, items = self._take_items(self._manifest.chunks[oldest["size"]], count - len(rows))
        slots = rows["slot"]
        for slot in slots[~self._plain[slots]].tolist():  # items after the row may be ready now, for the next step
            if (stream := self._streams[slot]).items:
                self._schedule(stream)
        return streams, items, rows

    def _take_items(self, chunk: ChunkConfig, count: int) -> tuple[list[StreamState], list[WorkItem]]:
        streams, items = self._take(chunk, count)
        if self._feed is not None:
            for stream in streams:
                self._update_plain(stream)
        return streams, items

    @compiled(SchedulerFields)
    def _take(self, chunk: ChunkConfig, count: int) -> tuple[list[StreamState], list[WorkItem]]:
        """Take the next item of up to `count` ready streams, if it is a chunk of this size."""
        ready = self._ready
        same_size = (stream for stream in ready if stream.items[0].chunk is chunk)
        streams = list(itertools.islice(same_size, count))
        streams.sort(key=_slot_of)
        items = []
        for stream in streams:
            stream.in_flight += 1
            del ready[stream]
            queue = stream.items
            items.append(item := queue.popleft())
            if item.reset_slot:
                self._reset_before(stream)
            if queue:
                self._schedule(stream)
        return streams, items

    def _reset_before(self, stream: StreamState) -> None:
        """Reset a stream's slot before the next step."""
        if stream.slot is not None:
            self._slot_resets.add(stream.slot)
            stream.saved_slot = None  # it belongs to audio before the reset

    def _take_rows(self, size: int, count: int) -> Rows:
        rows = self._rows.take(size, count)
        return rows[np.argsort(rows["slot"])]

    # -- called on the scheduler's thread ------------------------------------------------------------------------------

    def _run(self, backend: Backend | Callable[[], Backend]) -> None:
        try:
            self._backend = backend() if callable(backend) else backend
            self._allocate(self._backend.capacity)
        except BaseException as error:
            self._open_error = error
            return
        finally:
            self._opened.set()
        try:
            self._loop()
        except BaseException as error:  # an error in the scheduler itself: waiting threads must receive it
            self._shut_down(_as_nemostream_error(error, "the scheduler failed"))
            raise
        finally:
            if self._feed is not None:
                self._feed.stopped()
            self._backend.close()

    def _allocate(self, capacity: int) -> None:
        self._free = list(range(capacity))
        # Rows of `enqueue_rows`, and for them by slot: whether one may be enqueued, and is run and landed without its
        # `StreamState`, and its stream's `quiet_until`
        self._rows = RowQueue(capacity)
        self._plain = np.zeros(capacity, np.bool_)
        self._quiet_until = np.zeros(capacity, np.int64)

    def _loop(self) -> None:
        running: InFlightStep | None = None
        is_open = True
        while is_open:
            is_open, running = self._turn(running)

    def _turn(self, running: InFlightStep | None) -> tuple[bool, InFlightStep | None]:
        """Run a step, if there is one. Return whether the scheduler is open, and the step in flight.

        A function of its own: while the scheduler waits, it must not refer to the streams of its last step.
        """
        if self._changed:
            self._notify([])
        if self._feed is not None:
            self._feed.receive()
        with self._lock:
            if not self._wait_for_work(running):
                return True, running
            closed = self._closed is not None
            batch = None if closed or not (self._ready or self._rows) else self._next_batch()
            copies, self._copies = self._copies, []
            slot_resets, self._slot_resets = sorted(self._slot_resets), set()
            decoder_resets, self._decoder_resets = sorted(self._decoder_resets - set(slot_resets)), set()
            calls = list(self._calls)
            self._calls.clear()
        if closed:
            if running:
                self._complete(running)
            return False, None
        if copies:
            self._copy_slots(copies)
        for slots, reset in ((slot_resets, self._reset_slots), (decoder_resets, self._reset_decoders)):
            if slots:
                try:
                    reset(slots)
                except Exception as error:
                    self._fail_reset(list(self._owners(slots).values()), error)
        for call in calls:
            call.run(self._backend)
        step = self._submit(*batch) if batch else None
        if running:
            self._complete(running)
        if step and not self._overlap:
            self._complete(step)
            step = None
        return True, step

    def _wait_for_work(self, running: InFlightStep | None) -> bool:
        """Wait until there is something to do. Return False if listeners must be called or the feed must receive."""
        while not (
            self._ready or self._rows or self._slot_resets or self._copies or self._calls or running or self._closed
        ):
            if self._woken or self._changed:
                self._woken = False
                return False
            if self._feed is not None:
                self._feed.before_wait()
            self._idle = True
            self._work.wait()
            self._idle = False
        return True

    def _copy_slots(self, copies: list[_Copy]) -> None:
        for source, target, branch in copies:
            try:
                self._backend.copy(np.array([source], np.int64), np.array([target], np.int64))
            except Exception as error:
                self._fail_reset([branch], error)

    def _reset_slots(self, slots: list[int]) -> None:
        self._backend.reset(np.array(slots, np.int64))
        for slot, stream in self._owners(slots).items():
            try:
                if stream.phrases:
                    self._backend.set_phrases(slot, stream.phrases)
                if stream.saved_slot is not None:
                    self._backend.load(slot, stream.saved_slot)
                    stream.saved_slot = None
            except Exception as error:
                self._fail_reset([stream], error)

    def _reset_decoders(self, slots: list[int]) -> None:
        self._backend.reset_decoder(np.array(slots, np.int64))

    def _owners(self, slots: list[int]) -> dict[int, StreamState]:
        """Return the streams that a reset of the slots was for, without those opened since, whose reset is pending."""
        with self._lock:
            return {
                slot: self._streams[slot] for slot in slots if slot in self._streams and slot not in self._slot_resets
            }

    def _submit(self, streams: list[StreamState], items: list[WorkItem], rows: Rows) -> InFlightStep | None:
        started = time.perf_counter()
        slots, lengths, prompts = (np.empty(len(items), np.int64) for _ in range(3))
        order = None
        try:
            chunk = items[0].chunk if items else self._manifest.chunks[rows["size"][0]]
            audio = None
            if items:
                audio = self._audio_of(chunk)[: len(items)]
                self._gather(streams, items, audio, slots, lengths, prompts)
            if len(rows):
                assert self._feed is not None
                audio_of_rows = self._feed.audio(rows, chunk.samples)
                audio = audio_of_rows if audio is None else np.concatenate([audio, audio_of_rows])
                slots = np.concatenate([slots, rows["slot"]])
                lengths = np.concatenate([lengths, rows["length"]])
                prompts = np.concatenate([prompts, rows["prompt"]])
                order = np.argsort(slots) if items else None
            assert audio is not None, "a step has items or rows"
            order_or_all = slice(None) if order is None else order
            batch = Batch(
                chunk,
                slots[order_or_all],
                audio[order_or_all],
                lengths[order_or_all],
                prompts[order_or_all] if self._manifest.languages.count else None,
            )
            return InFlightStep(chunk, slots, streams, items, rows, order, self._backend.submit(batch), started)
        except Exception as error:
            self._fail_step(streams, rows, error)
            return None

    def _audio_of(self, chunk: ChunkConfig) -> Floats:
        """Return the memory for the audio of a step [max_batch, chunk.samples]."""
        audio = self._audio.get(chunk.ms)
        if audio is None:
            audio = self._audio[chunk.ms] = np.empty((self._backend.max_batch, chunk.samples), np.float32)
        return audio

    @compiled(SchedulerFields)
    def _gather(
        self,
        streams: list[StreamState],
        items: list[WorkItem],
        audio: Floats,
        slots: NDArray[np.int64],
        lengths: NDArray[np.int64],
        prompts: NDArray[np.int64],
    ) -> None:
        """Write the inputs of a step of items into arrays: `audio` [B, N] and the others [B]."""
        self._concatenate(items, audio)
        for row, (stream, item) in enumerate(zip(streams, items, strict=True)):
            assert stream.slot is not None, "it has an item in flight"
            slots[row], lengths[row], prompts[row] = stream.slot, item.length, item.prompt
            if item.block is not None and stream.chunker is not None:
                stream.chunker.recycle(item.block)

    def _concatenate(self, items: list[WorkItem], audio: Floats) -> None:
        """Write the audio of items, of which the C function only covers arrays of a chunker."""
        np.concatenate([item.audio for item in items], out=audio.reshape(-1))
        scales = [item.scale for item in items]
        if scales.count(scales[0]) < len(items):
            audio *= np.array(scales, np.float32)[:, None]
        elif scales[0] != 1:
            audio *= np.float32(scales[0])

    def _complete(self, step: InFlightStep) -> None:
        """Wait for a step's results and pass them to its streams."""
        try:
            emissions = step.pending.result()
            _check_rows(emissions, len(step.slots))
        except Exception as error:
            self._fail_step(step.streams, step.rows, error)
            return
        if self.records_times:
            self._record_times(step)
        landing = _Landing(emissions, step.order, self._manifest.samples_per_frame)
        with self._lock:
            if step.items:
                self._land_items(step, landing)
            changed, quiet = self._land_rows(step, landing) if len(step.rows) else ([], step.rows)
        if self.on_step:
            self.on_step(step.chunk, len(step.slots), time.perf_counter() - step.started)
        if len(step.rows):
            assert self._feed is not None
            self._feed.deliver(quiet, changed)
        self._notify(step.streams)  # and of branches of all streams of the step, after the results of these

    def _record_times(self, step: InFlightStep) -> None:
        self.last_step = StepTimes(step.started, time.perf_counter(), len(step.slots))
        for stream, item in zip(step.streams, step.items, strict=True):
            if stream.trace is not None:
                stream.trace.ran(item, self.last_step)

    def _land_items(self, step: InFlightStep, landing: _Landing) -> None:
        """Record the results of the items of a step. Called with the lock held."""
        self._land_all(step.streams, step.items, landing, landing.counts, landing.failed)
        if self._feed is not None:
            for stream in step.streams:
                self._update_plain(stream)

    @compiled(SchedulerFields)
    def _land_all(
        self,
        streams: list[StreamState],
        items: list[WorkItem],
        landing: _Landing,
        counts: list[int],
        failed: list[bool],
    ) -> None:
        for row, (stream, item, count, row_failed) in enumerate(zip(streams, items, counts, failed, strict=False)):
            stream.in_flight -= 1
            changes = row_failed or stream.error is not None or count
            if changes or item.end_sample >= stream.quiet_until or item.reset_slot:
                self._land_item(stream, item, landing, row)
            else:
                stream.outputs.append(new_output((item, stream.quiet_count, ())))
            if stream.items:
                self._schedule(stream)
            if stream.ended:
                self._release_if_finished(stream)
            if stream.progress is not None:
                stream.progress.notify_all()

    def _land_item(self, stream: StreamState, item: WorkItem, landing: _Landing, row: int) -> None:
        """Record the result of an item that has tokens, or may cause more than an output."""
        if landing.failed[row] or stream.error is not None:  # an earlier error is kept
            self._fail_stream(stream, _not_finite())
        else:
            self._land(stream, item, landing, row)

    def _land_rows(self, step: InFlightStep, landing: _Landing) -> tuple[list[StreamState], Rows]:
        """Record the results of the rows of a step. Called with the lock held.

        Return the streams for which that took more than nothing, and the rows of the others.
        """
        rows, first, changed = step.rows, len(step.items), []
        slots, counts, failed = rows["slot"], landing.counts_B[first:], landing.failed_B[first:]
        quiet = self._plain[slots] & (counts == 0) & ~failed & (rows["end_sample"] < self._quiet_until[slots])
        self._rows.landed(slots[quiet])
        chunk, not_quiet = step.chunk, np.flatnonzero(~quiet)
        for row, (slot, _, end, origin, length, prompt, *_) in zip(
            not_quiet.tolist(), rows[not_quiet].tolist(), strict=True
        ):
            self._rows.landed(slot)  # not earlier: the rows before may concern other streams, which then continue
            stream = self._streams[slot]
            changed.append(stream)
            if landing.failed[first + row] or stream.error is not None:
                self._fail_stream(stream, _not_finite())
            else:
                item = new_item(("run", chunk, end, origin, _NO_AUDIO, length, False, prompt, 1.0, None))
                self._land(stream, item, landing, first + row)
            if stream.items:
                self._schedule(stream)
            if stream.ended:
                self._release_if_finished(stream)
            if stream.progress is not None:
                stream.progress.notify_all()
            self._update_plain(stream)
        return changed, rows[quiet]

    def _land(self, stream: StreamState, item: WorkItem, landing: _Landing, row: int) -> None:
        """Record the tokens of a row and what follows from them, or from their absence."""
        if landing.counts[row]:
            tokens, frames, scores, sum_p_alpha = landing.tokens_of(row)
            frame, origin = landing.samples_per_frame, item.origin_sample
            positions = [position * frame + origin for position in frames]
            stream.hypothesis.extend(tokens, positions, scores, sum_p_alpha)
            self._record_output(stream, item, tokens, positions)
        else:
            self._record_output(stream, item, [], [])

    def _fail_step(self, streams: list[StreamState], rows: Rows, error: Exception) -> None:
        """Fail the streams of a step that raised."""
        with self._lock:
            failed = list(streams)
            for stream in streams:
                stream.in_flight -= 1
                self._fail(stream, error)
            for slot in rows["slot"].tolist():
                failed.append(stream := self._streams[slot])
                self._rows.landed(slot)
                self._fail(stream, error)
        self._report_failure(failed, error)

    def _fail_reset(self, streams: list[StreamState], error: Exception) -> None:
        """Fail the streams of a reset that raised."""
        with self._lock:
            for stream in streams:
                self._fail(stream, error)
        self._report_failure(streams, error)

    def _fail(self, stream: StreamState, error: Exception) -> None:
        self._fail_stream(stream, _as_nemostream_error(error, "the model failed"))

    def _report_failure(self, streams: list[StreamState], error: Exception) -> None:
        if self.on_failure:
            self.on_failure(error)
        self._notify(streams)

    # -- called on any thread, without the lock ------------------------------------------------------------------------

    def _notify(self, streams: Sequence[StreamState]) -> None:
        """Call each listener once, with its streams, and with those that changed because of them."""
        if self._changed:
            with self._lock:
                changed, self._changed = self._changed, []
            streams = list(dict.fromkeys([*streams, *changed]))
        super()._notify(streams)

    def _shut_down(self, error: NemostreamError) -> None:
        """Fail all open streams and pending calls with `error`, and end the scheduler's thread."""
        with self._lock:
            self._closed = self._closed or error
            streams = [*self._branches, *self._streams.values()]  # in this order: no branch takes the slot of another
            for stream in streams:
                self._fail_stream(stream, error)
            calls = list(self._calls)
            self._calls.clear()
            self._wake()
            self._slot_released.notify_all()
        for call in calls:
            call.future.set_exception(copy_of(error))
        self._notify(streams)


def _chunker_of(stream: StreamState) -> Chunker:
    assert stream.chunker is not None, "the items of this stream come from `enqueue`"
    return stream.chunker


class _Landing:
    """The results of a step: row b is item b, or row b - len(items). `order` is that of `InFlightStep`."""

    def __init__(self, emissions: Emissions, order: NDArray[np.int64] | None, samples_per_frame: int) -> None:
        counts, failed = emissions.counts, emissions.failed
        begins = np.cumsum(counts) - counts
        if order is not None:
            place = np.argsort(order)
            counts, failed, begins = counts[place], failed[place], begins[place]
        self.samples_per_frame = samples_per_frame
        self.counts_B, self.failed_B = counts, failed
        self.counts, self.failed, self._begins = counts.tolist(), failed.tolist(), begins.tolist()
        self._tokens, self._frames = emissions.all_tokens.tolist(), emissions.all_frames.tolist()
        self._scores, self._sum_p_alpha = emissions.all_scores.tolist(), emissions.all_sum_p_alpha.tolist()

    def tokens_of(self, row: int) -> tuple[list[int], list[int], list[float], list[float]]:
        """Return the tokens, frames, scores and `sum_p_alpha` of a row."""
        begin = self._begins[row]
        of_row = slice(begin, begin + self.counts[row])
        return self._tokens[of_row], self._frames[of_row], self._scores[of_row], self._sum_p_alpha[of_row]


def _not_finite() -> StreamError:
    return StreamError("the model's output for this stream is not finite; open a new one.")


def _check_rows(emissions: Emissions, rows: int) -> None:
    columns = (emissions.all_tokens, emissions.all_frames, emissions.all_scores, emissions.all_sum_p_alpha)
    found = len(emissions.counts), len(emissions.failed)
    if found != (rows, rows):
        raise BackendError(f"the backend returned {found} rows of counts, failed for a batch of {rows}.")
    total = int(emissions.counts.sum())
    if (sizes := tuple(len(column) for column in columns)) != (total,) * 4:
        raise BackendError(
            f"the backend returned {sizes} tokens, frames, scores, sum_p_alpha; its counts add to {total}."
        )


def _as_nemostream_error(error: BaseException, problem: str) -> NemostreamError:
    if isinstance(error, NemostreamError):
        return error
    wrapped = BackendError(f"{problem}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
