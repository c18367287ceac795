"""Schedule the streams: one thread owns the backend and runs the chunks of all streams in batches.

Each step takes the stream that has been ready longest and every other ready stream with the same chunk size, oldest
first, so no chunk size can starve another. A stream with more audio queued goes to the end of the queue.

With overlap, step k is submitted before the results of step k-1 are awaited, so the host's work is hidden behind the
device's. A stream may be in both steps: its next step needs its state, which the backend keeps, not its results. A
stream waits for its results only if they may change that state (a decoder reset at the end of an utterance or in a
repetition loop). Without overlap, each step's results are processed at once. That is the reference implementation, and
faster where `submit` itself does the work.

This module does not depend on the kind of backend, on text, sample rates or asyncio.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import BackendError, CapacityError, NemostreamError, StreamError
from nemostream.runtime.backends.base import Backend, Batch, Emissions
from nemostream.runtime.streaming.chunker import Chunker, Floats, WorkItem
from nemostream.runtime.streaming.state import BackendCall, InFlightStep, StepOutput, StreamState
from nemostream.runtime.text.endpointing import UtteranceEnd

T = TypeVar("T")


class Scheduler:
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
        self._manifest = manifest
        self._backend: Backend  # opened by `_run`
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # the scheduler's thread waits on it for work
        self._slot_released = threading.Condition(self._lock)  # `open(block=True)` waits on it for a slot
        self._free: list[int] = []  # a heap: the lowest slot first, so that used slots are contiguous
        self._streams: dict[int, StreamState] = {}  # open streams by slot
        self._ready: dict[StreamState, None] = {}  # streams with a chunk to run, in the order they became ready
        self._slot_resets: set[int] = set()  # slots to reset before the next step
        self._decoder_resets: set[int] = set()  # slots whose decoder to reset before the next step
        self._calls: deque[BackendCall] = deque()
        self._closed: NemostreamError | None = None  # why no stream can be opened any more
        # Called on the scheduler's thread after each step, with its chunk, number of streams and duration in seconds.
        self.on_step: Callable[[ChunkConfig, int, float], None] | None = None
        self.on_failure: Callable[[Exception], None] | None = None  # called with each error raised by the backend
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
        self._free = list(range(self._backend.capacity))

    # -- called by the streams' threads; `wait`, `call`, `close` and `open(block=True)` block, the others do not ------

    def check_process(self) -> None:
        """Raise `BackendError` in a forked child, which has no copy of the threads and maybe a held lock."""
        if os.getpid() != self._process:
            raise BackendError(
                f"the model was loaded in process {self._process} and cannot be used in a forked child process; "
                "load the model in the child process."
            )

    def open(
        self, chunker: Chunker, listener: Callable[[], None] | None = None, block: bool = False, **fields: Any
    ) -> StreamState:
        """Open a stream in a free slot; with `block`, wait for one.

        `listener` is called after every change, on the thread that made it, and must not block. `fields` are further
        fields of the `StreamState`. Raises `CapacityError` if no slot is free and `StreamError` after `close`.
        """
        self.check_process()
        with self._lock:
            while block and not (self._free or self._closed):
                self._slot_released.wait()
            if self._closed:
                raise _copy_of(self._closed)
            if not self._free:
                raise CapacityError(
                    f"all {self._backend.capacity} slots are taken; finish or close a stream, or load the model with "
                    "more slots: nemostream.load(capacity=...)."
                )
            slot = heapq.heappop(self._free)
            stream = StreamState(chunker, slot, threading.Condition(self._lock), listener, **fields)
            self._streams[slot] = stream
            self._slot_resets.add(slot)
            self._work.notify()
            return stream

    def accept(self, stream: StreamState, samples_N: Floats) -> None:
        """Append audio (mono, at the model's rate). Raises the stream's error if it failed."""
        self.check_process()
        with self._lock:
            _raise_error(stream)
            stream.chunker.accept(samples_N)
            self._schedule(stream)

    def skip_silence(self, stream: StreamState, samples: int) -> None:
        """Append digital silence, which is not run (`Chunker.skip_silence`). Raises the stream's error if it failed."""
        with self._lock:
            _raise_error(stream)
            stream.chunker.skip_silence(samples)
            self._schedule(stream)

    def finish(self, stream: StreamState) -> None:
        """End a stream's audio. Its slot is released after the last step. Raises the stream's error if it failed."""
        self.check_process()
        with self._lock:
            _raise_error(stream)
            stream.chunker.finish()
            self._schedule(stream)
            self._release_if_finished(stream)

    def end_utterance(self, stream: StreamState) -> None:
        """End the utterance: process all accepted audio, then start anew in the same slot."""
        self.check_process()
        with self._lock:
            _raise_error(stream)
            stream.chunker.end_utterance()
            self._schedule(stream)

    def settled(self, stream: StreamState, backlog: int = 0) -> bool:
        """Return whether all but `backlog` items of a stream are done. Raises the stream's error if it failed."""
        self.check_process()
        with self._lock:
            return self._settled(stream, backlog)

    def wait(self, stream: StreamState, backlog: int = 0) -> None:
        """Block until `settled`."""
        self.check_process()
        with self._lock:
            while not self._settled(stream, backlog):
                stream.progress.wait()

    def set_chunk(self, stream: StreamState, chunk: ChunkConfig) -> None:
        """Change a stream's chunk size from its next chunk on. The state at the backend is the same for all sizes."""
        self.check_process()
        with self._lock:
            stream.chunker.set_chunk(chunk)

    def set_prompt(self, stream: StreamState, prompt: int) -> None:
        """Change a stream's language from its next chunk on. The state at the backend is the same for all languages."""
        self.check_process()
        with self._lock:
            stream.chunker.prompt = prompt

    def collect(self, stream: StreamState) -> list[StepOutput]:
        """Return a stream's outputs since the last call, in order."""
        self.check_process()
        with self._lock:
            outputs = list(stream.outputs)
            stream.outputs.clear()
            return outputs

    def call(self, function: Callable[[Backend], T]) -> T:
        """Call a function with the backend on the scheduler's thread, between two steps. Blocks; raises its errors."""
        self.check_process()
        call = BackendCall(function)
        with self._lock:
            if self._closed:
                raise _copy_of(self._closed)
            self._calls.append(call)
            self._work.notify()
        call.done.wait()
        if call.error:
            raise call.error
        return call.result

    def cancel(self, stream: StreamState) -> None:
        """Drop a stream in any state. Its slot is released as soon as no step uses it. Does nothing if it is done."""
        if os.getpid() != self._process:  # the stream belongs to the parent process
            return
        with self._lock:
            if stream.slot is None or stream.error:
                return
            self._fail_stream(stream, StreamError("the stream was closed; open a new one for more audio."))
        self._notify([stream])

    def close(self) -> None:
        """Fail all unfinished streams, wait for the step in flight and close the backend.

        Does nothing if already closed, or in a forked child.
        """
        if os.getpid() != self._process:
            return
        self._shut_down(StreamError("the model was closed; load it again."))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- called with the lock held -------------------------------------------------------------------------------------

    def _settled(self, stream: StreamState, backlog: int) -> bool:
        _raise_error(stream)
        return stream.chunker.queued + stream.in_flight <= backlog

    def _schedule(self, stream: StreamState) -> None:
        """Process the stream's items up to the next chunk to run, and mark the stream ready to run it.

        Stops where the next item must wait for the step in flight.
        """
        chunker = stream.chunker
        if chunker.queued and stream.in_flight and stream.must_wait:  # may have been ready before the last result
            self._ready.pop(stream, None)
        while chunker.queued and not (stream.in_flight and stream.must_wait):
            if chunker.head.kind == "run":
                if stream not in self._ready:
                    self._ready[stream] = None
                    self._work.notify()
                return
            self._record_output(stream, chunker.take(), [], [])

    def _record_output(self, stream: StreamState, item: WorkItem, tokens: list[int], positions: list[int]) -> None:
        """Record the output of an item that is done. Its tokens are already in the hypothesis."""
        hypothesis = stream.hypothesis
        ends: list[UtteranceEnd] = []
        count = len(hypothesis.tokens)
        if item.kind == "end_of_utterance":
            ends = [UtteranceEnd(count, item.end_sample, "forced")]
            if stream.endpointer:
                stream.endpointer.reset()
        elif endpointer := stream.endpointer:
            ends = endpointer.step(tokens, positions, item.end_sample)
            if endpointer.reset_due:
                self._reset_decoder_of(stream)
        if (guard := stream.guard) and item.kind == "run":
            if item.reset_slot:
                guard.restart(count - len(tokens))
            if guard.step(hypothesis.tokens, hypothesis.sample_positions, item.end_sample):
                self._reset_decoder_of(stream)
        stream.outputs.append(StepOutput(item, count, ends))

    def _reset_decoder_of(self, stream: StreamState) -> None:
        if stream.slot is not None:
            self._decoder_resets.add(stream.slot)

    def _release_if_finished(self, stream: StreamState) -> None:
        if stream.finished and not stream.in_flight and stream.slot is not None:
            del self._streams[stream.slot]
            heapq.heappush(self._free, stream.slot)
            stream.slot = None
            self._slot_released.notify()

    def _fail_stream(self, stream: StreamState, error: NemostreamError) -> None:
        if stream.error is None:
            stream.error = error
        self._ready.pop(stream, None)
        self._release_if_finished(stream)
        stream.progress.notify_all()

    def _next_batch(self) -> tuple[list[StreamState], list[WorkItem]]:
        """Return the streams of the next step, sorted by slot, and the chunk of each. All chunks have the same size."""
        chunk = next(iter(self._ready)).chunker.head.chunk
        same_size = (stream for stream in self._ready if stream.chunker.head.chunk == chunk)
        # By slot, because a backend can use contiguous slots in place.
        streams = sorted(itertools.islice(same_size, self._backend.max_batch), key=lambda stream: stream.slot or 0)
        items = [stream.chunker.take() for stream in streams]
        for stream, item in zip(streams, items, strict=True):
            if item.reset_slot and stream.slot is not None:
                self._slot_resets.add(stream.slot)
                stream.saved_slot = None  # it belongs to audio before the reset
            stream.in_flight += 1
            del self._ready[stream]
            self._schedule(stream)
        return streams, items

    # -- called on the scheduler's thread ------------------------------------------------------------------------------

    def _run(self, backend: Backend | Callable[[], Backend]) -> None:
        try:
            self._backend = backend() if callable(backend) else backend
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
            self._backend.close()

    def _loop(self) -> None:
        running: InFlightStep | None = None
        while True:
            with self._lock:
                while not (self._ready or self._slot_resets or self._calls or running or self._closed):
                    self._work.wait()
                if self._closed:
                    break
                batch = self._next_batch() if self._ready else None
                slot_resets, self._slot_resets = sorted(self._slot_resets), set()
                decoder_resets, self._decoder_resets = sorted(self._decoder_resets - set(slot_resets)), set()
                calls = list(self._calls)
                self._calls.clear()
            for slots, reset in ((slot_resets, self._reset_slots), (decoder_resets, self._reset_decoders)):
                if slots:
                    try:
                        reset(slots)
                    except Exception as error:
                        self._fail_step(list(self._owners(slots).values()), error, submitted=0)
            for call in calls:
                call.run(self._backend)
            step = self._submit(*batch) if batch else None
            if running:
                self._complete(running)
            running = step
            if running and not self._overlap:
                self._complete(running)
                running = None
        if running:
            self._complete(running)

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
                self._fail_step([stream], error, submitted=0)

    def _reset_decoders(self, slots: list[int]) -> None:
        self._backend.reset_decoder(np.array(slots, np.int64))

    def _owners(self, slots: list[int]) -> dict[int, StreamState]:
        """Return the streams that a reset of the slots was for, without those opened since, whose reset is pending."""
        with self._lock:
            return {
                slot: self._streams[slot] for slot in slots if slot in self._streams and slot not in self._slot_resets
            }

    def _submit(self, streams: list[StreamState], items: list[WorkItem]) -> InFlightStep | None:
        started = time.perf_counter()
        try:
            batch = Batch(
                items[0].chunk,
                np.array([stream.slot for stream in streams], np.int64),
                np.stack([item.audio for item in items]),
                np.array([item.length for item in items], np.int64),
                np.array([item.prompt for item in items], np.int64) if self._manifest.languages.count else None,
            )
            return InFlightStep(streams, items, self._backend.submit(batch), started)
        except Exception as error:
            self._fail_step(streams, error, submitted=1)
            return None

    def _complete(self, step: InFlightStep) -> None:
        """Wait for a step's results and pass them to its streams."""
        try:
            emissions = step.pending.result()
            _check_rows(emissions, len(step.streams))
        except Exception as error:
            self._fail_step(step.streams, error, submitted=1)
            return
        frame = self._manifest.samples_per_frame
        rows = zip(
            step.streams,
            step.items,
            emissions.tokens,
            emissions.frames,
            emissions.scores,
            emissions.sum_p_alpha,
            emissions.failed,
            strict=True,
        )
        with self._lock:
            for stream, item, tokens_n, frames_n, scores_n, sum_p_alpha_n, failed in rows:
                stream.in_flight -= 1
                if failed:
                    self._fail_stream(
                        stream, StreamError("the model's output for this stream is not finite; open a new one.")
                    )
                elif not stream.error:
                    tokens, positions = tokens_n.tolist(), (frames_n * frame + item.origin_sample).tolist()
                    stream.hypothesis.extend(tokens, positions, scores_n.tolist(), sum_p_alpha_n.tolist())
                    self._record_output(stream, item, tokens, positions)
                    self._schedule(stream)
                self._release_if_finished(stream)
                stream.progress.notify_all()
        if self.on_step:
            self.on_step(step.items[0].chunk, len(step.streams), time.perf_counter() - step.started)
        self._notify(step.streams)

    def _fail_step(self, streams: list[StreamState], error: Exception, submitted: int) -> None:
        """Fail the streams of a backend call that raised; `submitted` is 1 if the call was a step, else 0."""
        with self._lock:
            for stream in streams:
                stream.in_flight -= submitted
                self._fail_stream(stream, _as_nemostream_error(error, "the model failed"))
        if self.on_failure:
            self.on_failure(error)
        self._notify(streams)

    # -- called on any thread, without the lock ------------------------------------------------------------------------

    def _shut_down(self, error: NemostreamError) -> None:
        """Fail all open streams and pending calls with `error`, and end the scheduler's thread."""
        with self._lock:
            self._closed = self._closed or error
            streams = list(self._streams.values())
            for stream in streams:
                self._fail_stream(stream, error)
            calls = list(self._calls)
            self._calls.clear()
            self._work.notify()
            self._slot_released.notify_all()
        for call in calls:
            call.fail(_copy_of(error))
        self._notify(streams)

    def _notify(self, streams: Iterable[StreamState]) -> None:
        for stream in streams:
            try:
                if stream.listener:
                    stream.listener()
            except Exception:  # for example a closed event loop: the outputs will never be collected
                stream.listener = None
                self.cancel(stream)


def _raise_error(stream: StreamState) -> None:
    if stream.error:
        raise _copy_of(stream.error)


def _check_rows(emissions: Emissions, rows: int) -> None:
    fields = (emissions.tokens, emissions.frames, emissions.scores, emissions.sum_p_alpha, emissions.failed)
    found = tuple(map(len, fields))
    if found != (rows,) * len(fields):
        raise BackendError(
            f"the backend returned {found} rows of tokens, frames, scores, sum_p_alpha, failed for a batch of {rows}."
        )


def _as_nemostream_error(error: BaseException, problem: str) -> NemostreamError:
    if isinstance(error, NemostreamError):
        return error
    wrapped = BackendError(f"{problem}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _copy_of(error: NemostreamError) -> NemostreamError:
    """Return a copy: an exception raised twice, or by two threads, would mix their tracebacks."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
