"""The engine process: the model, and the streams of all transports. Started by the supervisor.

The scheduler's thread receives the transports' items before each step, and after each step sends every transport the
outputs of its streams, in one message. Items and outputs are processed as arrays, except the few that have more than a
chunk to run or nothing to report. A transport whose link ends has crashed or stopped: its streams are cancelled and
their slots are free for others.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from nemostream.errors import CapacityError, NemostreamError, StreamError
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.items import INT16_SCALE, Floats, WorkItem
from nemostream.runtime.streaming.rows import ROW, Rows
from nemostream.runtime.streaming.scheduler import Scheduler
from nemostream.runtime.streaming.snapshot import SavedArrays
from nemostream.runtime.streaming.state import StreamState
from nemostream.serving.logs import log_to_stderr
from nemostream.serving.memory import freeze_heap
from nemostream.serving.metrics import Metrics, share_metrics
from nemostream.serving.processes.board import Board
from nemostream.serving.processes.control import Control, connect
from nemostream.serving.processes.link import (
    BRANCH,
    CANCEL,
    CLOSED,
    ERROR,
    ITEM_DTYPE,
    ITEM_NAMES,
    ITEMS,
    LAST,
    RESULTS,
    RUN,
    RUN_INT16,
    SAVE,
    SAVED,
    STREAM,
    FrameReader,
    FrameWriter,
    Results,
    SharedAudio,
    dump_error,
    dump_parts,
    frame,
    load_fields,
)
from nemostream.serving.service import SWITCH_SECONDS, StepRecorder, load_model, log_ready

log = logging.getLogger("nemostream.serving")

_READ_BYTES = 1 << 18
Words = NDArray[np.int16]


class _Stream:
    """A stream of a transport. It waits without a state while all slots are taken, and so do branches of it."""

    __slots__ = (
        "audio",
        "cancelled",
        "ended",
        "failed",
        "fields",
        "items",
        "link",
        "may_branch",
        "number",
        "state",
        "tokens",
    )

    def __init__(self, link: TransportLink, number: int, audio: Words, fields: dict[str, Any]) -> None:
        self.link, self.number, self.audio, self.fields = link, number, audio, fields
        self.may_branch: bool = fields.get("may_branch", False)
        self.state: StreamState | None = None
        self.items: list[WorkItem | _Stream] = []  # received before it had a state; a `_Stream` is a branch of it
        self.ended = False  # no items follow
        self.cancelled = False
        self.failed = False  # its error was sent
        self.tokens = 0  # tokens that were sent


class TransportLink:
    """The engine's end of a link. An instance is the listener of all streams of its transport (`Listener`)."""

    def __init__(self, host: EngineHost, number: int, link: socket.socket, audio_file: int) -> None:
        self.socket, self.number = link, number
        self.streams: dict[int, _Stream] = {}  # by number
        self.is_blocked = False  # whether the socket was full
        self.is_armed = False  # whether the host is woken when data arrives
        self._host, self._scheduler = host, host.scheduler
        self._chunks = host.model.manifest.chunks
        self._audio = SharedAudio(audio_file, host.model.manifest).regions
        self._windows: dict[tuple[bool, int], NDArray[Any]] = {}  # all parts of the memory of so many samples
        # By number of a stream: its slot, once it has one, otherwise -1
        self._slots = np.full(len(self._audio), -1, np.int64)
        self._reader, self._writer = FrameReader(), FrameWriter(link)
        self._lock = threading.Lock()  # outputs are collected and sent in order, by one thread at a time
        self._ended = False

    def audio(self, begins: NDArray[np.int64], is_int16: bool, samples: int) -> Floats:
        """Return the audio that begins at each of these words of the memory [len(begins), samples]."""
        windows = self._windows.get((is_int16, samples))
        if windows is None:
            words = self._audio.reshape(-1)
            windows = sliding_window_view(words if is_int16 else words.view(np.float32), samples)
            self._windows[is_int16, samples] = windows
        if is_int16:
            audio: Floats = windows[begins].astype(np.float32)
            audio *= np.float32(INT16_SCALE)
            return audio
        return cast(Floats, windows[begins // 2])

    # -- in `RowFeed.receive` ------------------------------------------------------------------------------------------

    def receive(self) -> bool:
        """Process what the transport has sent, and send the rest of earlier results. Return whether it continues."""
        if self.is_blocked:
            self._send(b"")
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            return False
        items = []
        for kind, payload in self._reader(data):
            if kind == ITEMS:
                items.append(payload)
                continue
            self._process_items(items)
            items = []
            self._open(STREAM.unpack_from(payload)[0], payload[STREAM.size :])
        self._process_items(items)
        return True

    def open_waiting(self, stream: _Stream) -> bool:
        """Open a stream at the scheduler. Return False if no slot is free."""
        if stream.cancelled:
            return True
        try:
            state = self._scheduler.open(None, self, consumer=stream, **stream.fields)
        except CapacityError as error:
            if not stream.may_branch:
                return False
            self._close(stream, error)
            return True
        except NemostreamError as error:  # the scheduler has failed: no stream can be opened any more
            self._host.fail(error)
            return True
        assert state.slot is not None
        stream.fields, stream.tokens = {}, len(state.hypothesis.tokens)
        self._begin(stream, state)
        return True

    def _open(self, number: int, data: memoryview) -> None:
        manifest, tokenizer = self._host.model.manifest, self._host.model.context.tokenizer
        stream = self.streams[number] = _Stream(
            self, number, self._audio[number], load_fields(data, manifest, tokenizer)
        )
        self._host.open(stream)

    def _begin(self, stream: _Stream, state: StreamState) -> None:
        """Set the state of a stream and pass its items to the scheduler."""
        stream.state = state
        items, stream.items = stream.items, []
        for item in items:
            if isinstance(item, _Stream):
                self._branch(stream, item)
            else:
                self._enqueue(stream, [item])
        if stream.ended:
            self._enqueue(stream, [], last=True)

    def _branch(self, stream: _Stream, branch: _Stream) -> None:
        """Open a branch of a stream."""
        if branch.cancelled:
            return
        if stream.state is None:  # it has failed
            return self._close(branch, None)
        try:
            state = self._scheduler.branch(stream.state, None, **branch.fields)
        except NemostreamError as error:  # the stream has failed, or no slot is free
            self._close(branch, error)
        else:
            state.consumer = branch
            self._begin(branch, state)

    def _process_items(self, payloads: list[memoryview]) -> None:
        """Pass items to the scheduler: as rows, except those of streams that have others among them."""
        if not payloads:
            return
        items = np.frombuffer(b"".join(payloads), ITEM_DTYPE)
        numbers = items["stream"]
        slots = self._slots[numbers]
        as_row = (items["kind"] <= RUN_INT16) & (items["reset_slot"] == 0) & (slots >= 0)
        if not as_row.all():
            as_row &= ~np.isin(numbers, numbers[~as_row])
        found = np.flatnonzero(as_row)
        if len(found):
            direct, rows = items[found], np.empty(len(found), ROW)
            rows["slot"], rows["source"], rows["is_int16"] = slots[found], self.number, direct["kind"] == RUN_INT16
            rows["begin"] = direct["stream"].astype(np.int64) * self._audio.shape[1] + direct["offset"]
            for name in ("size", "end_sample", "origin_sample", "length", "prompt", "stream"):
                rows[name] = direct[name]
            as_row[found] = self._scheduler.enqueue_rows(rows)
        if not as_row.all():
            for item in items[~as_row].tolist():
                self._process_item(*item)

    def _process_item(
        self,
        kind: int,
        reset: int,
        size: int,
        number: int,
        prompt: int,
        offset: int,
        length: int,
        end_sample: int,
        origin: int,
    ) -> None:
        stream = self.streams.get(number)
        if kind == BRANCH:
            branch = self.streams[offset] = _Stream(self, offset, self._audio[offset], {"may_branch": reset == 1})
            if stream is None:
                self._close(branch, None)
            elif stream.state is None:
                stream.items.append(branch)
            else:
                self._branch(stream, branch)
            return
        if stream is None:  # it failed, and was closed before the transport received the error
            return
        if kind == CANCEL:
            return self._cancel(stream)
        if kind == SAVE:
            return self._save(stream)
        if kind == LAST:
            stream.ended = True
            if stream.state is not None:
                self._enqueue(stream, [], last=True)
            return
        chunk = self._chunks[size]
        if kind == RUN:
            audio = stream.audio[offset : offset + 2 * chunk.samples].view(np.float32)
            item = WorkItem("run", chunk, end_sample, origin, audio, length, reset == 1, prompt)
        elif kind == RUN_INT16:
            samples = stream.audio[offset : offset + chunk.samples]
            item = WorkItem("run", chunk, end_sample, origin, samples, length, reset == 1, prompt, INT16_SCALE)
        else:
            item = WorkItem(ITEM_NAMES[kind], chunk, end_sample, origin, prompt=prompt)
        if stream.state is None:
            stream.items.append(item)
        else:
            self._enqueue(stream, [item])

    def _enqueue(self, stream: _Stream, items: list[WorkItem], last: bool = False) -> None:
        """Pass items to the scheduler. Does nothing if the stream was released: it has failed."""
        state = stream.state
        if state is None:
            return
        if state.slot is not None:  # a branch may have received it now
            self._slots[stream.number] = state.slot
        with contextlib.suppress(NemostreamError):  # the stream has failed; the listener sends the error
            self._scheduler.enqueue(state, items, last)
        if last or state.outputs:  # done at once, without a step
            self([state])

    def _save(self, stream: _Stream) -> None:
        """Send the state of a stream when the scheduler has it; none if it cannot be saved."""

        def send(future: Future[dict[str, SavedArrays]]) -> None:
            state = b"" if future.exception() else dump_parts(future.result())
            with self._lock:
                self._send(frame(SAVED, STREAM.pack(stream.number) + state))

        try:
            if stream.state is None:
                raise StreamError("the stream has no slot yet.")
            future = self._scheduler.save(stream.state)
        except NemostreamError as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(send)

    def _cancel(self, stream: _Stream) -> None:
        stream.cancelled = True
        if (state := stream.state) is not None:
            self._scheduler.cancel(state)
        else:
            self._close(stream, None)

    def _close(self, stream: _Stream, error: NemostreamError | None) -> None:
        """Remove a stream that has no state and gets none."""
        number = STREAM.pack(stream.number)
        with self._lock:
            del self.streams[stream.number]
            self._send((frame(ERROR, number + dump_error(error)) if error else b"") + frame(CLOSED, number))

    def end(self) -> None:
        """Close the link of a transport that has ended, and cancel its streams."""
        with self._lock:
            self._ended = True
        for stream in list(self.streams.values()):
            stream.cancelled = True
            if (state := stream.state) is not None:
                self._scheduler.cancel(state)
        self.socket.close()

    # -- on the thread that changed the streams ------------------------------------------------------------------------

    def __call__(self, states: Sequence[StreamState]) -> None:
        """Send the outputs, errors and ends of streams."""
        self.send_outputs(states, None)

    def send_outputs(self, states: Sequence[StreamState], quiet: NDArray[np.int64] | None) -> None:
        """As `__call__`, and an output without tokens and ends for each stream number in `quiet`."""
        results, errors, closed = Results(self._scheduler.last_step), bytearray(), bytearray()
        if quiet is not None and len(quiet):
            results.add_empty(quiet)
        add = results.add
        with self._lock:
            for state in states:
                stream: _Stream = state.consumer
                number = stream.number
                if self.streams.get(number) is not stream:
                    continue
                # Before the outputs are collected: none follow a release. A branch may have no slot yet.
                released = state.slot is None and state.finished
                outputs = state.outputs  # the scheduler's thread only appends to it
                while outputs:
                    _, count, ends = outputs.popleft()
                    add(number, state.hypothesis, max(stream.tokens, state.copied), count, ends)
                    stream.tokens = count
                if state.error is not None and not stream.failed:
                    stream.failed = True
                    if not stream.cancelled:
                        errors += frame(ERROR, STREAM.pack(number) + dump_error(state.error))
                if released:
                    del self.streams[number]
                    self._slots[number] = -1
                    stream.state = None  # the reference back: both are freed at once, and the link after its streams
                    closed += STREAM.pack(number)
            frames = frame(RESULTS, results.pack()) if results.streams else b""
            if frames or errors or closed:
                self._send(frames + errors + (frame(CLOSED, closed) if closed else b""))

    def _send(self, frames: bytes | bytearray) -> None:
        if self._ended:
            return
        try:
            self.is_blocked = not self._writer.send(frames)
        except OSError:  # the transport ended; `receive` reads end-of-file
            self._ended = True


class EngineHost:
    """The links of an engine, and the streams that wait for a slot. The feed of the scheduler (`RowFeed`).

    Links are served on the scheduler's thread, once per step: what arrives meanwhile wakes no thread. The main thread
    only waits for what arrives while the scheduler is idle.
    """

    def __init__(self, model: Model, control: Control) -> None:
        self.model, self.scheduler = model, cast(Scheduler, model.context.scheduler)
        self.links: list[TransportLink] = []
        self._control = control
        self._poll = select.epoll()
        self._poll.register(control.socket, select.EPOLLIN)
        self._wake_file = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake_file, select.EPOLLIN)
        self._waiting: deque[_Stream] = deque()  # for a slot, in the order of their opening
        self._numbers = itertools.count()  # of links
        self._error: NemostreamError | None = None
        self.scheduler.set_feed(self)

    def run(self) -> None:
        """Serve the transports until the supervisor closes its connection. Raises the scheduler's error if it fails."""
        while self._error is None:
            for file, _ in self._poll.poll():
                if file == self._control.socket.fileno():
                    if not self._receive_control():
                        return
                elif file != self._wake_file:  # of a link; it is not reported again before `before_wait`
                    for link in list(self.links):
                        if link.socket.fileno() == file:
                            link.is_armed = False
                    self.scheduler.wake()
        raise self._error

    def close(self) -> None:
        """Close the links. Streams must not run any more."""
        for link in self.links:
            link.socket.close()
        self._poll.close()
        os.close(self._wake_file)

    def _receive_control(self) -> bool:
        message = self._control.receive()
        if message is None:
            return False
        _, (link_file, audio_file) = message
        link = TransportLink(self, next(self._numbers), socket.socket(fileno=link_file), audio_file)
        os.close(audio_file)
        self._poll.register(link.socket, 0)
        self.links.append(link)
        self.scheduler.wake()
        return True

    # -- on the scheduler's thread: `RowFeed` --------------------------------------------------------------------------

    def receive(self) -> None:
        for link in list(self.links):
            if not link.receive():
                self._poll.unregister(link.socket)
                self.links.remove(link)
                link.end()
        while self._waiting and self._waiting[0].link.open_waiting(self._waiting[0]):
            self._waiting.popleft()

    def before_wait(self) -> None:
        for link in self.links:
            if link.is_blocked or not link.is_armed:
                link.is_armed = True
                events = select.EPOLLIN | select.EPOLLONESHOT
                self._poll.modify(link.socket, events | (select.EPOLLOUT if link.is_blocked else 0))

    def audio(self, rows: Rows, samples: int) -> Floats:
        links, begins = {link.number: link for link in self.links}, rows["begin"]
        places = 2 * rows["source"] + rows["is_int16"]
        found = np.unique(places).tolist()
        if len(found) == 1:
            return links[found[0] // 2].audio(begins, found[0] % 2 == 1, samples)
        audio = np.empty((len(rows), samples), np.float32)
        for place in found:
            there = places == place
            audio[there] = links[place // 2].audio(begins[there], place % 2 == 1, samples)
        return audio

    def deliver(self, rows: Rows, streams: Sequence[StreamState]) -> None:
        changed: dict[TransportLink, list[StreamState]] = {}
        for stream in streams:
            changed.setdefault(stream.consumer.link, []).append(stream)
        for link in list(self.links):
            quiet = rows["stream"][rows["source"] == link.number]
            if link in changed or len(quiet):
                link.send_outputs(changed.get(link, ()), quiet)

    def stopped(self) -> None:
        self.before_wait()  # a later stream wakes the main thread, and `wake` raises

    def open(self, stream: _Stream) -> None:
        """Open a stream, after those that wait for a slot. A stream that may branch does not wait, but fails."""
        if (self._waiting and not stream.may_branch) or not stream.link.open_waiting(stream):
            self._waiting.append(stream)

    def fail(self, error: NemostreamError) -> None:
        """End the process: the scheduler cannot be used any more."""
        self._error = error
        os.eventfd_write(self._wake_file, 1)


def main() -> None:
    """Load the model and serve the transports."""
    sys.setswitchinterval(SWITCH_SECONDS)
    control, start, board_file = connect()
    log_to_stderr(start.text, start.name)
    share_metrics(start.folder, start.name)
    metrics, board = Metrics(), Board(board_file, start.transports, start.entries)
    settings, began = start.restore_settings(), time.monotonic()
    try:
        loaded = load_model(settings, time.monotonic)
        start.check(loaded.model.manifest)
    except NemostreamError as error:
        control.send_error(error)
        raise SystemExit(1) from error
    recorder = StepRecorder(loaded.model, metrics, board.add_step, lambda state: control.send(state=state))
    loaded.model.watch(recorder.on_step, recorder.on_failure)
    try:
        host = EngineHost(loaded.model, control)
        host.scheduler.records_times = settings.otel
        freeze_heap()
        log_ready(loaded, settings, time.monotonic() - began)
        control.send(state="ready", max_streams=loaded.max_streams, model=loaded.model.manifest.name)
        host.run()
    except NemostreamError as error:
        log.error("engine failed", extra={"reason": str(error)})
        raise SystemExit(1) from error
    except ConnectionError:  # the supervisor ended
        pass
    finally:
        loaded.model.close()


if __name__ == "__main__":
    main()
