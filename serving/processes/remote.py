"""The scheduler of a transport process: streams whose steps run in the engine process.

`RemoteScheduler` has the interface of `Scheduler`, so sessions, events and protocols are the same in both. A stream's
audio is received, filtered and cut into chunks here; complete work items go to the engine (`link`), and the tokens and
ends of utterances come back, once per step for all streams. Decisions that depend on the decoder's state, such as ends
of utterances, are made in the engine.

The items of one turn of the event loop are sent together. Received results are passed to their streams at once.
"""

from __future__ import annotations

import asyncio
import heapq
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Manifest
from nemostream.errors import BackendError, CapacityError, NemostreamError, StreamError
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.compiled import Queue, RemoteFields, compiled
from nemostream.runtime.streaming.items import WorkItem, new_output
from nemostream.runtime.streaming.scheduler import BRANCH_ITEM, MODEL_CLOSED, STREAM_CLOSED, StreamScheduler
from nemostream.runtime.streaming.snapshot import SavedArrays
from nemostream.runtime.streaming.state import Hypothesis, Listener, StreamState, copy_of
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.serving.errors import Draining
from nemostream.serving.processes.link import (
    BRANCH,
    CANCEL,
    CLOSED,
    ERROR,
    ITEM,
    ITEM_KINDS,
    ITEMS,
    LAST,
    OPEN,
    RESET_DECODER,
    RESULTS,
    RUN,
    RUN_INT16,
    SAVE,
    SAVED,
    STREAM,
    FrameReader,
    FrameWriter,
    Region,
    Results,
    SharedAudio,
    dump_fields,
    frame,
    load_error,
    load_parts,
)

_READ_BYTES = 1 << 18
_INT16 = np.dtype(np.int16)
_NO_REGION = "too many streams are being closed; try again in a few seconds."
_ENGINE_ENDED = "the engine process ended unexpectedly and is started again; open a new stream."


@dataclass(eq=False, slots=True, kw_only=True)
class RemoteStream(StreamState):
    """A stream of a transport. `slot` is its number in the link, `in_flight` the number of items at the engine."""

    link: _EngineLink
    region: Region
    opened: bool = True  # whether the number was sent to the engine; that of a branch follows its source's items
    sent: Queue[WorkItem] = field(default_factory=Queue)  # items at the engine, and branches between them
    last_sent: bool = False  # whether `LAST` was sent
    saves: deque[Future[dict[str, SavedArrays]]] = field(default_factory=deque)  # requested with `SAVE`

    def fail_saves(self, error: NemostreamError) -> None:
        while self.saves:
            self.saves.popleft().set_exception(copy_of(error))


class _EngineLink:
    """The transport's end of a link, and the streams that use it."""

    def __init__(self, link: socket.socket, audio: NDArray[np.int16]) -> None:
        self.socket, self.audio = link, audio
        self.reader, self.writer = FrameReader(), FrameWriter(link)
        self.streams: dict[int, RemoteStream] = {}  # by number
        self.free = list(range(len(audio)))  # a heap: the lowest number first, so that used pages are few
        self.items = bytearray()  # `ITEM` records that follow `frames`
        self.frames = bytearray()  # not sent yet

    @property
    def is_blocked(self) -> bool:
        """Whether the socket is full."""
        return not self.writer.is_done

    def add(self, chunker: Chunker | None, listener: Listener | None, **fields: Any) -> RemoteStream:
        """Return a new stream. There must be a free number."""
        number = heapq.heappop(self.free)
        stream = RemoteStream(chunker, number, listener, link=self, region=Region(self.audio[number]), **fields)
        self.streams[number] = stream
        return stream

    def release(self, number: int) -> RemoteStream:
        """Remove a stream and return it."""
        stream = self.streams.pop(number)
        stream.slot = None
        stream.fail_saves(StreamError(STREAM_CLOSED))
        heapq.heappush(self.free, number)
        return stream

    def put(self, kind: int, payload: bytes | bytearray) -> None:
        """Queue a frame."""
        if self.items:
            self.frames += frame(ITEMS, self.items)
            self.items.clear()
        self.frames += frame(kind, payload)

    def take(self) -> bytearray:
        """Return what is to be sent."""
        if self.items:
            self.frames += frame(ITEMS, self.items)
            self.items.clear()
        frames, self.frames = self.frames, bytearray()
        return frames


class RemoteScheduler(RemoteFields, StreamScheduler):
    """Runs streams at the engine process that is attached. Its callbacks run in the event loop `loop`.

    `on_engine_ended` is called when the engine process has ended. There is no backend and no thread here: `on_step` and
    `on_failure` are never called, because the engine process records its steps.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        loop: asyncio.AbstractEventLoop,
        on_engine_ended: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(manifest)
        self._tokenizer, self._event_loop, self._on_engine_ended = tokenizer, loop, on_engine_ended
        self._chunks = {chunk.ms: index for index, chunk in enumerate(manifest.chunks)}
        self._link: _EngineLink | None = None
        self._flushing = False  # whether a call of `_flush` is scheduled

    # -- in the event loop ---------------------------------------------------------------------------------------------

    def attach(self, link: socket.socket, audio_file: int) -> None:
        """Use another engine process from now on. The streams of the previous one fail."""
        if self._link is not None:
            self._end_link(self._link)
        new = _EngineLink(link, SharedAudio(audio_file, self._manifest).regions)
        with self._lock:
            self._link = new
        self._event_loop.add_reader(link, self._receive, new)

    def _receive(self, link: _EngineLink) -> None:
        try:
            data = link.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self._end_link(link)
        changed: dict[RemoteStream, None] = {}
        with self._lock:
            for kind, payload in link.reader(data):
                if kind == RESULTS:
                    self._pass_results(link.streams, Results.unpack(payload), changed)
                elif kind == ERROR:
                    stream = link.streams.get(STREAM.unpack_from(payload)[0])
                    if stream is not None and stream.error is None:
                        self._fail(stream, load_error(bytes(payload[STREAM.size :])), changed)
                elif kind == SAVED:
                    stream = link.streams.get(STREAM.unpack_from(payload)[0])
                    if stream is not None and stream.saves:
                        saved = stream.saves.popleft()
                        if len(payload) > STREAM.size:
                            saved.set_result(load_parts(payload[STREAM.size :]))
                        else:
                            saved.set_exception(BackendError("the engine could not save the stream."))
                elif kind == CLOSED:
                    for (number,) in STREAM.iter_unpack(payload):
                        changed[link.release(number)] = None
            for stream in changed:
                if stream.progress is not None:
                    stream.progress.notify_all()
        self._notify(list(changed))

    @compiled(RemoteFields)
    def _pass_results(
        self, streams: dict[int, RemoteStream], results: Results, changed: dict[RemoteStream, None]
    ) -> None:
        """Pass the results of a step to its streams. Called with the lock held."""
        tokens, positions = results.tokens.tolist(), results.positions.tolist()
        scores, sum_p_alpha = results.scores.tolist(), results.sum_p_alpha.tolist()
        at = end_at = 0
        for number, count, ends in zip(results.streams, results.counts, results.ends, strict=True):
            stream = streams[number]
            sent = stream.sent
            while (item := sent.popleft()).kind == "branch":  # of a stream that has failed
                pass
            stream.in_flight -= 1
            if item.kind == "run":
                stream.region.release(len(_words_of(item)))
                if stream.trace is not None:
                    stream.trace.ran(item, results.step)
            if stream.error is None:
                hypothesis = stream.hypothesis
                if count:
                    row = slice(at, at + count)
                    hypothesis.extend(tokens[row], positions[row], scores[row], sum_p_alpha[row])
                found = results.utterance_ends(end_at, ends) if ends else ()
                stream.outputs.append(new_output((item, len(hypothesis.tokens), found)))
                if sent:
                    self._begin_branches(stream, changed)
                if stream.items or stream.ended:
                    self._send_items(stream, changed)
                changed[stream] = None
            at += count
            end_at += ends

    def _begin_branches(self, stream: RemoteStream, changed: dict[RemoteStream, None]) -> None:
        """Give branches the tokens of their stream if all its items before them are done. Called with the lock held."""
        sent = stream.sent
        while sent and sent[0].kind == "branch":
            sent.popleft()
            assert stream.branches
            branch = cast(RemoteStream, stream.branches.popleft())
            if branch.error is None:
                branch.source, branch.hypothesis = None, stream.hypothesis.copy()
                branch.copied = len(branch.hypothesis.tokens)
                changed[branch] = None

    def _end_link(self, link: _EngineLink) -> None:
        """Close the link to an engine process that has ended, and fail its streams."""
        self._close_link(link)
        with self._lock:
            if self._link is link:
                self._link = None
            streams = list(link.streams.values())
            for stream in streams:
                if not _is_done(stream):
                    self._fail(stream, BackendError(_ENGINE_ENDED), {})
                stream.slot = None
            link.streams.clear()
        self._notify(streams)
        self._on_engine_ended()

    def _flush(self) -> None:
        with self._lock:
            self._flushing = False
            link = self._link
            if link is None:
                return
            was_blocked = link.is_blocked
            try:
                link.writer.send(link.take())
            except OSError:  # the engine ended; `_receive` reads end-of-file
                return
        if link.is_blocked and not was_blocked:
            self._event_loop.add_writer(link.socket, self._flush)
        elif was_blocked and not link.is_blocked:
            self._event_loop.remove_writer(link.socket)

    # -- called by the streams' threads --------------------------------------------------------------------------------

    @compiled(RemoteFields)
    def accept(self, stream: StreamState, samples_N: NDArray[Any]) -> None:
        super().accept(stream, samples_N)

    def open(
        self, chunker: Chunker | None, listener: Listener | None = None, block: bool = False, **fields: Any
    ) -> RemoteStream:
        """Open a stream. The engine assigns a slot as soon as one is free.

        The limits of the server (`Board`) ensure that every stream gets one. A stream with `may_branch` does not wait
        for those that are being closed: it fails with `CapacityError` if no slot is free. Raises `Draining` while there
        is no engine, `CapacityError` if no region of the link is free, `StreamError` after `close`.
        """
        hypothesis: Hypothesis = fields.get("hypothesis") or Hypothesis()
        with self._lock:
            if self._closed is not None:
                raise copy_of(self._closed)
            link = self._link
            if link is None:
                raise Draining("the engine is being started; try again in a few seconds.")
            if not link.free:
                raise CapacityError(_NO_REGION)
            payload = dump_fields(fields, self._manifest, self._tokenizer)
            stream = link.add(chunker, listener, hypothesis=hypothesis)
            link.put(OPEN, STREAM.pack(stream.slot) + payload)
            self._schedule_flush()
        return stream

    def branch(self, stream: StreamState, chunker: Chunker | None, may_branch: bool = False) -> RemoteStream:
        """Open a stream that continues from the state of another one after the items that were enqueued so far.

        As `Scheduler.branch`, except that with `may_branch` the branch fails with `CapacityError` later if no slot is
        free. Raises `CapacityError` if no region of the link is free, and the other stream's error if it failed.
        """
        assert isinstance(stream, RemoteStream)
        with self._lock:
            if stream.error is not None:
                stream.raise_error()
            link = stream.link
            if not link.free:
                raise CapacityError(_NO_REGION)
            branch = link.add(
                chunker, stream.listener, consumer=stream.consumer, source=stream, may_branch=may_branch, opened=False
            )
            if stream.branches is None:
                stream.branches = deque()
            stream.branches.append(branch)
            stream.items.append(BRANCH_ITEM)
            self._send_items(stream, {})
        return branch

    def enqueue(self, stream: StreamState, items: Sequence[WorkItem], last: bool = False) -> None:
        """Append work items to a stream; with `last` no more follow. Raises the stream's error if it failed."""
        with self._lock:
            if stream.error is not None:
                stream.raise_error()
            if stream.trace is not None:
                stream.trace.enqueued(items)
            stream.items += items
            if last:
                stream.ended = True
            self._send_items(cast(RemoteStream, stream), {})

    def save(self, stream: StreamState) -> Future[dict[str, SavedArrays]]:
        """Return the parts of a snapshot that belong to the engine. Raises the stream's error if it failed."""
        assert isinstance(stream, RemoteStream)
        future: Future[dict[str, SavedArrays]] = Future()
        with self._lock:
            stream.raise_error()
            if stream.slot is None:
                raise StreamError(STREAM_CLOSED)
            stream.saves.append(future)
            stream.link.items += ITEM.pack(SAVE, 0, 0, stream.slot, 0, 0, 0, 0, 0)
            self._schedule_flush()
        return future

    def cancel(self, stream: StreamState) -> None:
        """Drop a stream in any state. Does nothing if it is done."""
        assert isinstance(stream, RemoteStream)
        with self._lock:
            if stream.slot is None or stream.error is not None or _is_done(stream):
                return
            changed: dict[RemoteStream, None] = {}
            self._cancel(stream, StreamError(STREAM_CLOSED), changed)
        self._notify(list(changed))

    def close(self) -> None:
        """Fail all unfinished streams and close the link to the engine. Does nothing if already closed."""
        error = StreamError(MODEL_CLOSED)
        with self._lock:
            self._closed = self._closed or error
            link, self._link = self._link, None
            streams = list(link.streams.values()) if link else []
            for stream in streams:
                self._fail(stream, error, {})
        if link is not None:
            self._event_loop.call_soon_threadsafe(self._close_link, link)
        self._notify(streams)

    def _close_link(self, link: _EngineLink) -> None:
        self._event_loop.remove_reader(link.socket)
        self._event_loop.remove_writer(link.socket)
        link.socket.close()

    # -- called with the lock held -------------------------------------------------------------------------------------

    @compiled(RemoteFields)
    def _send_items(self, stream: RemoteStream, changed: dict[RemoteStream, None]) -> None:
        """Send a stream's items, as far as there is space for their audio. Adds branches that begin to `changed`."""
        self._send_others(stream, changed)

    def _send_others(self, stream: RemoteStream, changed: dict[RemoteStream, None]) -> None:
        """`_send_items`, of which the C function only covers chunks of int16 audio."""
        link, number = stream.link, stream.slot
        if number is None or not stream.opened:
            return
        while stream.items:
            item, offset = stream.items[0], 0
            if item.kind == "branch":
                stream.items.popleft()
                self._open_branch(stream, changed)
                continue
            kind = ITEM_KINDS[item.kind]
            if kind == RUN:
                if item.audio.dtype is _INT16:
                    kind = RUN_INT16
                place = stream.region.write(_words_of(item))
                if place is None:
                    return
                offset = place
                if item.block is not None and stream.chunker is not None:
                    stream.chunker.recycle(item.block)
            stream.items.popleft()
            if kind != RESET_DECODER:  # it has no output
                stream.sent.append(item)
                stream.in_flight += 1
            link.items += ITEM.pack(
                kind,
                item.reset_slot,
                self._chunks[item.chunk.ms],
                number,
                item.prompt,
                offset,
                item.length,
                item.end_sample,
                item.origin_sample,
            )
            if not self._flushing:
                self._schedule_flush()
        if stream.ended and not stream.last_sent:
            stream.last_sent = True
            link.items += ITEM.pack(LAST, 0, 0, number, 0, 0, 0, 0, 0)
            self._schedule_flush()

    def _open_branch(self, stream: RemoteStream, changed: dict[RemoteStream, None]) -> None:
        """Open the next branch of a stream at the engine."""
        assert stream.branches is not None and stream.slot is not None
        branch = cast(RemoteStream, stream.branches[sum(item.kind == "branch" for item in stream.sent)])
        if branch.error is None:
            assert branch.slot is not None
            stream.link.items += ITEM.pack(BRANCH, branch.may_branch, 0, stream.slot, 0, branch.slot, 0, 0, 0)
            branch.opened = True
            self._schedule_flush()
        stream.sent.append(BRANCH_ITEM)
        self._begin_branches(stream, changed)
        if branch.error is None:
            self._send_items(branch, changed)

    def _schedule_flush(self) -> None:
        """Send what is queued at the end of this turn of the event loop."""
        if self._flushing:
            return
        self._flushing = True
        try:
            in_loop = asyncio.get_running_loop() is self._event_loop
        except RuntimeError:
            in_loop = False
        if in_loop:
            self._event_loop.call_soon(self._flush)
        else:
            self._event_loop.call_soon_threadsafe(self._flush)

    def _cancel(self, stream: RemoteStream, error: NemostreamError, changed: dict[RemoteStream, None]) -> None:
        """Fail a stream and remove it from the engine."""
        self._fail(stream, error, changed)
        if stream.opened:
            stream.link.items += ITEM.pack(CANCEL, 0, 0, stream.slot, 0, 0, 0, 0, 0)
            self._schedule_flush()
        elif stream.slot is not None:
            stream.link.release(stream.slot)

    def _fail(self, stream: RemoteStream, error: NemostreamError, changed: dict[RemoteStream, None]) -> None:
        """Fail a stream and its branches that have not begun. Adds all to `changed`."""
        if stream.error is None:
            stream.error = error
        stream.fail_saves(error)
        changed[stream] = None
        branches, stream.branches, stream.source = stream.branches or (), None, None
        stream.items.clear()
        for branch in branches:
            if branch.error is None:
                self._cancel(cast(RemoteStream, branch), copy_of(error), changed)
        if stream.progress is not None:
            stream.progress.notify_all()


def _words_of(item: WorkItem) -> NDArray[np.int16]:
    """Return the audio of a chunk as it is in a region."""
    return cast(NDArray[np.int16], item.audio if item.audio.dtype is _INT16 else item.audio.view(_INT16))


def _is_done(stream: StreamState) -> bool:
    """Return whether a stream has all its results; its slot may not be released yet."""
    return stream.ended and not stream.items and not stream.in_flight and stream.source is None
