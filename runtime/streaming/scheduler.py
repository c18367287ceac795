"""Who runs when: one thread owns the backend and runs the streams of all others in batches.

Each turn takes the stream that has been ready longest and every other ready one of its chunk size, oldest first: no
chunk size can starve another. A stream with more audio waiting queues again behind all that are ready by then.

With overlap, step k is submitted before the results of step k-1 are waited for, so the host's work is hidden behind the
device's; a stream may be in both, as its next step needs its state, which the backend keeps, not its results. Only
where a result may change the state (a decoder that is reset at an utterance's end or in a repetition loop) does the
stream wait for it. Without overlap (the plain twin, and better where `submit` itself does the work) each step's results
are handled at once.

What the module does not know: which backend, text, sample rates, asyncio.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import BackendError, CapacityError, NemostreamError, StreamError
from nemostream.runtime.backends.base import Backend, Batch, Emissions
from nemostream.runtime.streaming.chunker import Chunker, Floats, WorkItem
from nemostream.runtime.streaming.state import BackendCall, InFlightStep, StepOutput, StreamState
from nemostream.runtime.text.endpointing import UtteranceEnd

T = TypeVar("T")


class Scheduler:
    """Serves streams from any thread. `close` it; it closes the backend, on the thread that used it."""

    def __init__(self, manifest: Manifest, backend: Backend, overlap: bool = True) -> None:
        self._manifest, self._backend, self._overlap = manifest, backend, overlap
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # what the scheduler's thread waits on
        self._room = threading.Condition(self._lock)  # what those wait on who want a slot
        self._free = list(range(backend.capacity))  # a heap: the lowest first, so that slots in use are neighbours
        self._states: dict[int, StreamState] = {}  # by slot
        self._ready: dict[StreamState, None] = {}  # in the order they became ready
        self._resets: set[int] = set()  # slots of new streams
        self._forgets: set[int] = set()  # slots whose decoder is to start anew
        self._calls: deque[BackendCall] = deque()
        self._closed: NemostreamError | None = None  # why no stream can be opened any more
        # Told of every step, on the scheduler's thread: its chunk, how many streams it had, seconds it took.
        self.on_step: Callable[[ChunkConfig, int, float], None] | None = None
        self.on_failure: Callable[[Exception], None] | None = None  # of every call that the backend failed in
        self._thread = threading.Thread(target=self._run, name="nemostream-scheduler", daemon=True)
        self._thread.start()

    # -- for the streams' threads; none of these but `wait` and `close` blocks -----------------------------------------

    def check_process(self) -> None:
        """Raise `BackendError` in a forked child: threads are not copied, and a lock may have been held."""
        if os.getpid() != self._process:
            raise BackendError(
                f"the model was loaded in process {self._process} and does not work in this one, a fork of it; "
                "load the model in the child process."
            )

    def open(
        self, stream: Chunker, listener: Callable[[], None] | None = None, block: bool = False, **about: Any
    ) -> StreamState:
        """A new stream; `about` is what a `StreamState` can have from the start. Blocks for a slot if `block`.

        `listener` is called after every change, on whichever thread made it; it must not block. Raises `CapacityError`
        if every slot is taken and `StreamError` after `close`.
        """
        self.check_process()
        with self._lock:
            while block and not (self._free or self._closed):
                self._room.wait()
            if self._closed:
                raise _again(self._closed)
            if not self._free:
                raise CapacityError(
                    f"all {self._backend.capacity} slots are taken; finish or close a stream, or load the model with "
                    "more of them: nemostream.load(capacity=...)."
                )
            slot = heapq.heappop(self._free)
            state = StreamState(stream, slot, threading.Condition(self._lock), listener, **about)
            self._states[slot] = state
            self._resets.add(slot)
            self._work.notify()
            return state

    def accept(self, state: StreamState, samples_N: Floats) -> None:
        """Append audio to a stream (mono, at the model's rate). Raises what the stream died of."""
        self.check_process()
        with self._lock:
            if state.error:
                raise _again(state.error)
            state.chunker.accept(samples_N)
            self._queue(state)

    def pass_over(self, state: StreamState, samples: int) -> None:
        """Append digital silence that is not run (`Chunker.pass_over`). Raises what the stream died of."""
        with self._lock:
            if state.error:
                raise _again(state.error)
            state.chunker.pass_over(samples)
            self._queue(state)

    def finish(self, state: StreamState) -> None:
        """No more audio comes. The slot is given back by itself when the last frame is out."""
        self.check_process()
        with self._lock:
            if state.error:
                raise _again(state.error)
            state.chunker.finish()
            self._queue(state)
            self._give_back(state)

    def end_utterance(self, state: StreamState) -> None:
        """End the utterance: what was accepted is decoded, what follows is a stream of its own in the same slot."""
        self.check_process()
        with self._lock:
            if state.error:
                raise _again(state.error)
            state.chunker.end_utterance()
            self._queue(state)

    def settled(self, state: StreamState, backlog: int = 0) -> bool:
        """Whether all but `backlog` pieces of a stream are done. Raises what the stream died of."""
        self.check_process()
        with self._lock:
            return self._settled(state, backlog)

    def wait(self, state: StreamState, backlog: int = 0) -> None:
        """Block until `settled`."""
        self.check_process()
        with self._lock:
            while not self._settled(state, backlog):
                state.progress.wait()

    def set_chunk(self, state: StreamState, chunk: ChunkConfig) -> None:
        """Run a stream in chunks of another size from its next one on; the state at the backend serves every size."""
        self.check_process()
        with self._lock:
            state.chunker.set_chunk(chunk)

    def collect(self, state: StreamState) -> list[StepOutput]:
        """What was done of a stream since the last call, in order."""
        self.check_process()
        with self._lock:
            heard = list(state.heard)
            state.heard.clear()
            return heard

    def call(self, act: Callable[[Backend], T]) -> T:
        """Have the scheduler's thread do something with the backend, between two steps; blocks. Raises what it does."""
        self.check_process()
        call = BackendCall(act)
        with self._lock:
            if self._closed:
                raise _again(self._closed)
            self._calls.append(call)
            self._work.notify()
        call.done.wait()
        if call.error:
            raise call.error
        return call.answer

    def cancel(self, state: StreamState) -> None:
        """Drop a stream whatever its state; its slot is given back as soon as no step uses it."""
        if os.getpid() != self._process:  # nothing here is this process's to give back
            return
        with self._lock:
            if state.slot is None or state.error:
                return
            self._kill(state, StreamError("the stream was closed; open a new one for more audio."))
        self._tell([state])

    def close(self) -> None:
        """Fail every stream that is not done, let the step under way end, close the backend. Does nothing if done,
        and nothing in a forked child."""
        if os.getpid() != self._process:
            return
        self._shut(StreamError("the model was closed; load it again."))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- under the lock ------------------------------------------------------------------------------------------------

    def _settled(self, state: StreamState, backlog: int) -> bool:
        if state.error:
            raise _again(state.error)
        return state.chunker.queued + state.in_flight <= backlog

    def _queue(self, state: StreamState) -> None:
        """See to what is next of a stream, as far as it can be done now."""
        stream = state.chunker
        if stream.queued and state.in_flight and state.alone:  # it may have been ready before the last result was known
            self._ready.pop(state, None)
        while stream.queued and not (state.in_flight and state.alone):
            if stream.head.kind == "run":
                if state not in self._ready:
                    self._ready[state] = None
                    self._work.notify()
                return
            self._hear(state, stream.take(), [], [])

    def _hear(self, state: StreamState, item: WorkItem, tokens: list[int], sample_positions: list[int]) -> None:
        """A piece is done, and its tokens are in the hypothesis."""
        count, ends = len(state.chunker.hypothesis.tokens), cast(Sequence[UtteranceEnd], ())
        if item.kind == "end_of_utterance":
            ends = [UtteranceEnd(count, item.end_sample, "forced")]
        if pointer := state.endpointer:
            if item.kind == "end_of_utterance":
                pointer.reset()
            else:
                ends = pointer.step(tokens, sample_positions, item.end_sample)
                if ends and pointer.resets_decoder and pointer.between_utterances and state.slot is not None:
                    self._forgets.add(state.slot)
        if (guard := state.guard) and item.kind == "run":
            said = state.chunker.hypothesis
            if item.fresh:
                guard.restart(count - len(tokens))
            if guard.step(said.tokens, said.sample_positions, item.end_sample) and state.slot is not None:
                self._forgets.add(state.slot)
        state.heard.append(StepOutput(item, count, ends))

    def _give_back(self, state: StreamState) -> None:
        if state.over and not state.in_flight and state.slot is not None:
            del self._states[state.slot]
            heapq.heappush(self._free, state.slot)
            state.slot = None
            self._room.notify()

    def _kill(self, state: StreamState, error: NemostreamError) -> None:
        if state.error is None:
            state.error = error
        self._ready.pop(state, None)
        self._give_back(state)
        state.progress.notify_all()

    def _pick(self) -> tuple[list[StreamState], list[WorkItem]]:
        """The seats of the next step, by slot, and the chunk of each, all of one size."""
        chunk = next(iter(self._ready)).chunker.head.chunk
        alike = (state for state in self._ready if state.chunker.head.chunk == chunk)
        # By slot, because a backend can use neighbouring slots where they lie.
        states = sorted(itertools.islice(alike, self._backend.max_batch), key=lambda state: state.slot or 0)
        items = [state.chunker.take() for state in states]
        for state, item in zip(states, items, strict=True):
            if item.fresh and state.slot is not None:
                self._resets.add(state.slot)
                state.saved = None  # the slot's first reset may still be to come; what was saved is of earlier audio
            state.in_flight += 1
            del self._ready[state]
            self._queue(state)
        return states, items

    # -- the scheduler's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # a fault of ours: whoever waits must hear of it
            self._shut(_failure(error, "the scheduler failed"))
            raise
        finally:
            self._backend.close()

    def _loop(self) -> None:
        running: InFlightStep | None = None
        while True:
            with self._lock:
                while not (self._ready or self._resets or self._calls or running or self._closed):
                    self._work.wait()
                if self._closed:
                    break
                picked = self._pick() if self._ready else None
                resets, self._resets = sorted(self._resets), set()
                forgets, self._forgets = sorted(self._forgets - set(resets)), set()
                calls = list(self._calls)
                self._calls.clear()
            for slots, work in ((resets, self._reset), (forgets, self._forget)):
                if slots:
                    self._change(slots, work)
            for call in calls:
                call.run(self._backend)
            step = self._submit(*picked) if picked else None
            if running:
                self._land(running)
            running = step
            if running and not self._overlap:
                self._land(running)
                running = None
        if running:
            self._land(running)

    def _change(self, slots: list[int], work: Callable[[list[int]], None]) -> None:
        try:
            work(slots)
        except Exception as error:
            self._fail(list(self._owners(slots).values()), error, steps=0)

    def _reset(self, slots: list[int]) -> None:
        self._backend.reset(np.array(slots, np.int64))
        for slot, state in self._owners(slots).items():
            try:
                if state.phrases:
                    self._backend.set_phrases(slot, state.phrases)
                if state.saved is not None:
                    self._backend.load(slot, state.saved)
                    state.saved = None
            except Exception as error:
                self._fail([state], error, steps=0)

    def _owners(self, slots: list[int]) -> dict[int, StreamState]:
        """Whom a change of the slots was for, not who got one meanwhile, whose own reset is still to come."""
        with self._lock:
            return {slot: self._states[slot] for slot in slots if slot in self._states and slot not in self._resets}

    def _forget(self, slots: list[int]) -> None:
        self._backend.reset_decoder(np.array(slots, np.int64))

    def _submit(self, states: list[StreamState], items: list[WorkItem]) -> InFlightStep | None:
        started = time.perf_counter()
        try:
            batch = Batch(
                items[0].chunk,
                np.array([state.slot for state in states], np.int64),
                np.stack([item.audio for item in items]),
                np.array([item.length for item in items], np.int64),
            )
            return InFlightStep(states, items, self._backend.submit(batch), started)
        except Exception as error:
            self._fail(states, error, steps=1)
            return None

    def _land(self, step: InFlightStep) -> None:
        try:
            emissions = step.pending.result()
            _check(emissions, len(step.states))
        except Exception as error:
            self._fail(step.states, error, steps=1)
            return
        frame = self._manifest.samples_per_frame
        rows = zip(
            step.states,
            step.items,
            emissions.tokens,
            emissions.frames,
            emissions.scores,
            emissions.sum_p_alpha,
            emissions.failed,
            strict=True,
        )
        with self._lock:
            for state, item, tokens, frames, scores, sum_p_alpha, failed in rows:
                state.in_flight -= 1
                if failed:
                    self._kill(
                        state, StreamError("the model's numbers for this stream are not finite; open a new one.")
                    )
                elif not state.error:
                    said, sample_positions = tokens.tolist(), (frames * frame + item.origin_sample).tolist()
                    state.chunker.hypothesis.extend(said, sample_positions, scores.tolist(), sum_p_alpha.tolist())
                    self._hear(state, item, said, sample_positions)
                    self._queue(state)
                self._give_back(state)
                state.progress.notify_all()
        if self.on_step:
            self.on_step(step.items[0].chunk, len(step.states), time.perf_counter() - step.started)
        self._tell(step.states)

    def _fail(self, states: list[StreamState], error: Exception, steps: int) -> None:
        """End the streams of a call that raised; `steps` is how many steps of each it was."""
        with self._lock:
            for state in states:
                state.in_flight -= steps
                self._kill(state, _failure(error, "the model failed"))
        if self.on_failure:
            self.on_failure(error)
        self._tell(states)

    def _shut(self, error: NemostreamError) -> None:
        with self._lock:
            self._closed = self._closed or error
            states = list(self._states.values())  # a stream that is done has no seat any more
            for state in states:
                self._kill(state, error)
            calls = list(self._calls)
            self._calls.clear()
            self._work.notify()
            self._room.notify_all()
        for call in calls:
            call.fail(_again(error))
        self._tell(states)

    def _tell(self, states: Iterable[StreamState]) -> None:
        for state in states:
            try:
                if state.listener:
                    state.listener()
            except Exception:  # its owner is gone (an event loop that was closed): nobody will ever collect
                state.listener = None
                self.cancel(state)


def _check(emissions: Emissions, rows: int) -> None:
    fields = (emissions.tokens, emissions.frames, emissions.scores, emissions.sum_p_alpha, emissions.failed)
    found = tuple(map(len, fields))
    if found != (rows,) * len(fields):
        raise BackendError(
            f"the backend answered {found} rows of tokens, frames, scores, powers, failed to a batch of {rows}."
        )


def _failure(error: BaseException, what: str) -> NemostreamError:
    if isinstance(error, NemostreamError):
        return error
    failure = BackendError(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _again(error: NemostreamError) -> NemostreamError:
    """A fresh copy: an exception raised twice, or by two threads, would mix their tracebacks."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
