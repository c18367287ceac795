"""The accurate lane of a stream: a second stream of the same audio, with larger chunks, for the text of finals.

The *fast lane* (small chunks) provides partials and the ends of utterances. The accurate lane receives audio when the
fast lane has processed it, chunk by chunk. What it recognizes thus depends on the audio only, not on how it was pushed
or how long the steps took.

When the fast lane ends an utterance, a branch of the accurate lane (a copy of its slot) processes the remaining audio
as at the end of a stream, and provides the final. The lane itself continues with the next utterance.

This module does not depend on events, transports or the kind of backend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig
from nemostream.errors import NemostreamError
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.items import StepOutput, WorkItem
from nemostream.runtime.streaming.scheduler import StreamScheduler
from nemostream.runtime.streaming.snapshot import SavedArrays, saved_array, saved_counts
from nemostream.runtime.streaming.state import Hypothesis, Listener, StreamState
from nemostream.runtime.streaming.tokens import TokenList, clip
from nemostream.runtime.text.endpointing import UtteranceEnd
from nemostream.runtime.text.joining import Joiner, TokenSpan
from nemostream.runtime.text.words import Token

if TYPE_CHECKING:
    from nemostream.runtime.audio.vad import VadFilter

_BACKLOG = 2  # chunks of the accurate lane that may be unprocessed when a stream has settled


class JoinedTokens(NamedTuple):
    """The tokens of an utterance from both lanes."""

    tokens: list[Token]
    stable: int  # leading tokens that cannot change any more: complete words of the accurate lane
    chunk_ms: int | None = None  # of a final: chunk size of the accurate lane; None: tokens of the fast lane were used


@dataclass
class _Completion:
    """The completion of the accurate lane at the ends of utterances that the fast lane found in one step."""

    ends: tuple[UtteranceEnd, ...]
    outputs: int  # of the lane that precede it
    whole: bool  # the recording ends with the last of the utterances: it has all tokens that follow
    audio_end: float  # seconds: end of the audio that was processed
    branch: StreamState | None = None  # processes the rest of the audio
    stopped: bool = False  # the lane was stopped before, so nothing processes the rest


class LaneState:
    """The progress of an accurate lane, a part of a snapshot. Its stream and its audio are other parts."""

    def __init__(self) -> None:
        self.outputs: list[tuple[int, int]] = []  # of each output: tokens and processed samples after it
        self.fast_begin = 0  # first token of the current utterance in the fast lane
        self.begin = 0  # in this lane; not after it while `before` is set
        # The words of the previous utterance, its end, and the lane's outputs before it. The lane's first word after
        # them is known once it has passed that end: output `found[0]` was the first to do so.
        self.before: TokenSpan | None = None
        self.boundary = self.outputs_before = 0
        self.found: tuple[int, int] | None = None

    def save(self) -> dict[str, NDArray[Any]]:
        before = self.before or TokenSpan([], [], 0, 0)
        counts = [self.fast_begin, self.begin, self.boundary, self.outputs_before, self.before is not None]
        rows = [*zip(before.ids[before.begin : before.end], before.positions[before.begin : before.end], strict=True)]
        return {
            "counts": np.array(counts, np.int64),
            "found": np.array(self.found or (), np.int64),
            "outputs": np.array(self.outputs, np.int64).reshape(-1, 2),
            "before": np.array(rows, np.int64).reshape(-1, 2),
        }

    def load(self, state: SavedArrays) -> None:
        """Restore a saved state. Raises `ValueError` if it does not come from `save`."""
        fast_begin, begin, boundary, outputs_before, has_before = saved_counts(state, "counts", 5)
        outputs = saved_array(state, "outputs", np.int64, None, 2)
        before = saved_array(state, "before", np.int64, None, 2)
        found = saved_counts(state, "found")
        # Not their ends: the last frame of a recording ends after its audio, where the next recording begins.
        if (np.diff(outputs[:, 0]) < 0).any() or (outputs < 0).any() or outputs_before > len(outputs):
            raise ValueError("the outputs of the accurate lane are not in order")
        if (before < 0).any() or has_before > 1:
            raise ValueError("the words before the utterance have a negative token or position")
        count = int(outputs[-1, 0]) if len(outputs) else 0
        # `begin` may be after them: it is known from the completion of the previous utterance, which has more tokens.
        if len(found) not in (0, 2) or (found and (found[0] >= len(outputs) or found[1] > count)):
            raise ValueError(f"the utterance begins with token {found} of {count}")
        self.fast_begin, self.begin, self.boundary, self.outputs_before = fast_begin, begin, boundary, outputs_before
        self.outputs = [(tokens, samples) for tokens, samples in outputs.tolist()]
        if has_before:
            self.before = TokenSpan(before[:, 0].tolist(), before[:, 1].tolist(), 0, len(before))
        self.found = (found[0], found[1]) if found else None


class AccurateLane:
    """The accurate lane of one stream. For the thread of its session.

    `stream` is its stream and `chunker` that stream's; `tokens` is its list of tokens, and `fast_tokens` and `fast` are
    the list and the hypothesis of the fast lane. The lane begins after the first `start` items of the fast lane, or
    continues from a saved `state`.
    """

    def __init__(
        self,
        scheduler: StreamScheduler,
        stream: StreamState,
        chunker: Chunker,
        tokens: TokenList,
        fast: Hypothesis,
        fast_tokens: TokenList,
        joiner: Joiner,
        *,
        vad: VadFilter | None = None,
        start: int = 0,
        state: LaneState | None = None,
    ) -> None:
        self._scheduler, self._stream, self._chunker, self.vad = scheduler, stream, chunker, vad
        self._tokens, self._fast, self._fast_tokens, self._joiner = tokens, fast, fast_tokens, joiner
        self.chunk_ms = chunker.chunk.ms
        # Operations on the lane, each with the number of items of the fast lane after whose outputs it is due
        self._operations: deque[tuple[int, Callable[[], None]]] = deque()
        self._completions: deque[_Completion] = deque()
        self.start = start
        self._state = state or LaneState()
        if state is not None:
            chunker.taken = len(state.outputs)
            tokens.extend(stream.hypothesis, self._count(len(state.outputs)))
        # The last result of `joined`, and what it was computed from, which most steps do not change
        self._joined_for: tuple[int, int, bool] | None = None
        self._last_joined = JoinedTokens([], 0)
        self.stopped = False  # no more audio is processed: the lane failed, or was disabled
        self.error: NemostreamError | None = None  # why it failed

    # -- audio ---------------------------------------------------------------------------------------------------------
    # `due` is the number of items of the fast lane after whose outputs the operation is applied.

    def accept(self, due: int, samples_N: NDArray[Any]) -> None:
        self._add(due, lambda: self._scheduler.accept(self._stream, samples_N))

    def skip_silence(self, due: int, samples: int) -> None:
        self._add(due, lambda: self._scheduler.skip_silence(self._stream, samples))

    def end_utterance(self, due: int) -> None:
        self._add(due, lambda: self._scheduler.end_utterance(self._stream))

    def finish(self, due: int) -> None:
        self._add(due, lambda: self._scheduler.finish(self._stream))

    def set_prompt(self, due: int, prompt: int) -> None:
        self._add(due, lambda: self._scheduler.set_prompt(self._stream, prompt))

    def set_chunk(self, due: int, chunk: ChunkConfig) -> None:
        self._add(due, lambda: self._set_chunk(chunk))

    @property
    def items(self) -> int:
        """Number of the lane's items that are due so far."""
        return self._chunker.taken

    def begin(self, token: int) -> None:
        """Begin an utterance with a token of the fast lane, which the lane has too, before any other result is used."""
        self._state.fast_begin = self._state.begin = token
        self._joined_for = None

    def advance(self, items: int) -> None:
        """Apply the operations that are due after `items` items of the fast lane."""
        operations = self._operations
        while operations and operations[0][0] <= items:
            self._attempt(operations.popleft()[1])

    def end(self, output: StepOutput, reset_decoder: bool) -> None:
        """Complete the lane for the ends of utterances in an output of the fast lane. Called after `advance`.

        With `reset_decoder`, the lane continues with the initial state of its decoder.
        """
        whole = output.item.kind == "end_of_utterance"
        completion = self._add_completion(tuple(output.ends), whole)
        if not whole and not self._chunker.ended:
            self._attempt(lambda: self._branch(completion, reset_decoder))
        completion.stopped = self.stopped

    def end_stream(self, end: UtteranceEnd) -> None:
        """Complete the lane at the end of the stream. Called after `finish`, once the fast lane has settled."""
        while self._operations:
            self._attempt(self._operations.popleft()[1])
        self._add_completion((end,), True).stopped = self.stopped

    def _add_completion(self, ends: tuple[UtteranceEnd, ...], whole: bool) -> _Completion:
        completion = _Completion(ends, self._chunker.taken, whole, self._chunker.samples / self._joiner.rate)
        self._completions.append(completion)
        return completion

    def stop(self) -> None:
        """Process no more audio. The current utterance keeps the words that are complete."""
        self.stopped = True
        self._operations.clear()
        self._scheduler.cancel(self._stream)

    def close(self) -> None:
        """Release all slots."""
        self.stop()
        for completion in [*self._completions]:  # may be called by another thread
            if completion.branch is not None:
                self._scheduler.cancel(completion.branch)

    def save(self) -> tuple[LaneState, StreamState]:
        """Return the progress of the lane, and its stream. All ends before must have been returned by `finals`."""
        # The audio of the fast lane's incomplete chunk: no utterance ends before the lane would receive it.
        while self._operations:
            self._attempt(self._operations.popleft()[1])
        self._wait(self._stream, 0)
        self._collect()
        return self._state, self._stream

    def _add(self, due: int, operation: Callable[[], None]) -> None:
        if not self.stopped:
            self._operations.append((due, operation))

    def _set_chunk(self, chunk: ChunkConfig) -> None:
        self._scheduler.set_chunk(self._stream, chunk)
        self.chunk_ms = chunk.ms

    def _branch(self, completion: _Completion, reset_decoder: bool) -> None:
        rest = self._chunker.copy(None if self.vad is None else self.vad.copy())
        rest.finish()
        items = rest.take()
        if any(item.kind == "run" for item in items):  # not in digital silence, before which the lane was completed
            completion.branch = self._scheduler.branch(self._stream, None)
            self._scheduler.enqueue(completion.branch, items, last=True)
        if reset_decoder:
            self._scheduler.enqueue(self._stream, [WorkItem("reset_decoder", self._chunker.chunk, 0)])

    def _attempt(self, operation: Callable[[], None]) -> None:
        """Apply an operation. If the lane has failed, it stops, and the stream continues without it."""
        try:
            if not self.stopped:
                operation()
        except NemostreamError as error:
            self._fail(error)

    def _fail(self, error: NemostreamError) -> None:
        self.error = self.error or error
        self.stop()

    # -- waiting -------------------------------------------------------------------------------------------------------

    def notify(self, listener: Listener | None, consumer: Any) -> None:
        """Call `listener` after changes of the lane, with `consumer` as that of its streams."""
        branches = (completion.branch for completion in self._completions)
        for stream in filter(None, (self._stream, *branches)):
            stream.consumer, stream.listener = consumer, listener

    def settled(self, ended: bool) -> bool:
        """Return whether the finals of all ended utterances are known and the lane is not late.

        `ended`: no audio follows, and the lane must have processed all.
        """
        self._collect()
        return all(map(self._completed, self._completions)) and (
            self.stopped or self._settled(self._stream, 0 if ended else _BACKLOG)
        )

    @property
    def at_rest(self) -> bool:
        """Whether the lane was stopped, or has processed what it received and completed all utterances.

        A lane that began while the stream ran must have run a chunk.
        """
        if self.stopped:
            return True
        self._collect()
        if self._stream.copied and not self._state.outputs:
            return False
        return not self._completions and self._settled(self._stream)

    def wait(self, ended: bool) -> None:
        """Block until `settled`."""
        self._collect()
        for completion in self._completions:
            if completion.branch is not None:
                self._wait(completion.branch, 0)
        if not self.stopped:
            due = ended or any(len(self._state.outputs) < completion.outputs for completion in self._completions)
            self._wait(self._stream, 0 if due else _BACKLOG)

    def _completed(self, completion: _Completion) -> bool:
        if completion.branch is not None and not self._settled(completion.branch):
            return False
        return self.stopped or len(self._state.outputs) >= completion.outputs

    def _settled(self, stream: StreamState, backlog: int = 0) -> bool:
        """Return whether a stream has settled or failed."""
        try:
            return self._scheduler.settled(stream, backlog)
        except NemostreamError as error:
            self._note(stream, error)
            return True

    def _wait(self, stream: StreamState, backlog: int) -> None:
        """Block until a stream has settled or failed."""
        try:
            self._scheduler.wait(stream, backlog)
        except NemostreamError as error:
            self._note(stream, error)

    def _note(self, stream: StreamState, error: NemostreamError) -> None:
        """Stop the lane if the stream that failed is its own. A branch that failed concerns one final only."""
        if stream is self._stream and not self.stopped:
            self._fail(error)

    # -- results -------------------------------------------------------------------------------------------------------

    def joined(self, fast_count: int, limit: int | None = None) -> JoinedTokens:
        """Return the tokens of the current utterance: this lane's, and after them those of the fast lane.

        `fast_count` is the number of tokens of the fast lane to use, `limit` that of outputs of this lane. All ends
        before must have been returned by `finals`.
        """
        self._collect()
        outputs = len(self._state.outputs) if limit is None else min(limit, len(self._state.outputs))
        if self._joined_for != (key := (outputs, fast_count, self.stopped)):
            self._joined_for, self._last_joined = key, self._joined(outputs, fast_count)
        return self._last_joined

    def finals(self) -> list[tuple[UtteranceEnd, JoinedTokens]] | None:
        """Return the utterances that ended in the next output with ends; None if their tokens are not known yet."""
        self._collect()
        completion = self._completions[0]
        if not self._completed(completion):
            return None
        self._completions.popleft()
        return [(end, self._final(completion, end)) for end in completion.ends]

    def _final(self, completion: _Completion, end: UtteranceEnd) -> JoinedTokens:
        """Return the tokens of the utterance that ended with `end`, and begin the next one."""
        if (branch := completion.branch) is not None and branch.error is None:
            hypothesis, known, count = branch.hypothesis, branch.copied, len(branch.hypothesis.tokens)
        elif branch is None and not completion.stopped and len(self._state.outputs) >= completion.outputs:
            hypothesis = self._stream.hypothesis
            known = count = self._count(completion.outputs)
        else:
            return self._final_without_completion(completion, end)
        begin, _ = self._find_begin(hypothesis, count, completion.outputs)
        lane = TokenSpan(hypothesis.tokens, hypothesis.sample_positions, begin, count)
        fast = TokenSpan(self._fast.tokens, self._fast.sample_positions, self._state.fast_begin, end.token_count)
        last = completion.whole and end is completion.ends[-1]
        if last:
            stop = count
        elif end.reason == "length":  # between two words of continuous speech: the fast lane defines which
            stop = self._joiner.continuation(fast, lane, end.end_sample)
        else:
            stop = self._joiner.end(fast, lane, end.end_sample, end.reason == "silence")
        if known > len(self._tokens.tokens):
            self._tokens.extend(self._stream.hypothesis, known)
        tokens = self._tokens.tokens[begin : min(stop, known)]
        tokens += self._tokens.make(hypothesis, max(begin, known), max(stop, known))
        clip(tokens, len(tokens), completion.audio_end)
        if last:
            self._begin_next(completion, end, count, None)
        else:
            self._begin_next(completion, end, begin, TokenSpan(lane.ids, lane.positions, begin, stop))
        return JoinedTokens(tokens, len(tokens), self.chunk_ms)

    def _final_without_completion(self, completion: _Completion, end: UtteranceEnd) -> JoinedTokens:
        """Return the tokens that both lanes have, because the lane or its branch failed."""
        outputs = min(completion.outputs, len(self._state.outputs))
        joined = self._joined(outputs, end.token_count)
        error = self.error or (completion.branch and completion.branch.error)
        if completion.whole:
            clip(joined.tokens, len(joined.tokens), end.end_sample / self._joiner.rate)
        if error and joined.tokens and self._scheduler.on_fallback is not None:
            self._scheduler.on_fallback(error)
        if self.stopped:
            self._begin_next(completion, end, self._count(outputs), None)
        else:
            fast = TokenSpan(self._fast.tokens, self._fast.sample_positions, self._state.fast_begin, end.token_count)
            self._begin_next(completion, end, self._state.begin, fast)
        return joined._replace(stable=len(joined.tokens))

    def _begin_next(self, completion: _Completion, end: UtteranceEnd, begin: int, before: TokenSpan | None) -> None:
        self._state.fast_begin, self._state.begin = end.token_count, begin
        self._state.before, self._state.boundary, self._state.found = before, end.end_sample, None
        self._state.outputs_before = min(completion.outputs, len(self._state.outputs))
        self._joined_for = None

    def _joined(self, outputs: int, fast_count: int) -> JoinedTokens:
        hypothesis, count = self._stream.hypothesis, self._count(outputs)
        begin, found = self._find_begin(hypothesis, count, outputs)
        lane = TokenSpan(hypothesis.tokens, hypothesis.sample_positions, begin, count)
        fast = TokenSpan(self._fast.tokens, self._fast.sample_positions, self._state.fast_begin, fast_count)
        if begin == count and self.stopped:
            following = self._state.fast_begin
        else:
            end_sample = self._state.outputs[outputs - 1][1] if outputs else 0
            count, following = self._joiner.join(lane, fast, end_sample)
        stable = self._joiner.complete_words(lane) - begin if found else 0
        tokens = self._tokens.tokens[begin:count] + self._fast_tokens.tokens[following:fast_count]
        return JoinedTokens(tokens, stable)

    def _find_begin(self, hypothesis: Hypothesis, count: int, outputs: int) -> tuple[int, bool]:
        """Return the first token of the current utterance, and whether that is certain.

        `count` is the number of tokens of `hypothesis` to use, `outputs` the number of the lane's outputs before. It is
        certain if the lane has passed the end of the previous utterance with these outputs.
        """
        begin = min(self._state.begin, count)
        if self._state.before is None:
            return begin, True
        if self._state.found is None:
            limit = self._state.boundary + self._joiner.tolerance
            for output in range(self._state.outputs_before, len(self._state.outputs)):
                found, end_sample = self._state.outputs[output]
                if end_sample >= limit:
                    begin_then = min(self._state.begin, found)
                    self._state.found = output, self._continuation(self._stream.hypothesis, begin_then, found)
                    break
        if self._state.found is not None and self._state.found[0] < outputs:
            return self._state.found[1], True
        return self._continuation(hypothesis, begin, count), False

    def _continuation(self, hypothesis: Hypothesis, begin: int, count: int) -> int:
        assert self._state.before is not None
        lane = TokenSpan(hypothesis.tokens, hypothesis.sample_positions, begin, count)
        return self._joiner.continuation(self._state.before, lane, self._state.boundary)

    def _count(self, outputs: int) -> int:
        """Return the number of tokens of the lane after its first outputs."""
        return self._state.outputs[outputs - 1][0] if outputs else 0

    def _collect(self) -> None:
        """Receive the lane's outputs."""
        if outputs := self._scheduler.collect(self._stream):
            self._state.outputs += [(output.count, output.item.end_sample) for output in outputs]
            self._tokens.extend(self._stream.hypothesis, outputs[-1].count)


class TwoLanes:
    """The results of a fast lane, and of the accurate lane that there may be. For the thread of a session.

    `fast` and `fast_tokens` are the hypothesis and the tokens of the fast lane, of which `begin` precede the current
    utterance.
    """

    def __init__(self, fast: Hypothesis, fast_tokens: TokenList, joiner: Joiner, begin: int = 0) -> None:
        self._fast, self._fast_tokens, self._joiner = fast, fast_tokens, joiner
        self._begin = begin  # first token of the current utterance in the fast lane
        self.lane: AccurateLane | None = None  # of the audio being received
        self._next: AccurateLane | None = None  # that replaces it with the next utterance
        self._current: AccurateLane | None = None  # of the utterance whose results are returned next
        # For each output with ends that was received and not returned: its lane, and that of the next utterance
        self._ends: deque[tuple[AccurateLane | None, AccurateLane | None]] = deque()
        self._limits: deque[int] = deque()  # for each output that was not returned: the lane's items before it

    @property
    def chunk_ms(self) -> int | None:
        """Chunk size of the lane that is used from the next utterance on, in milliseconds."""
        return self.lanes[-1].chunk_ms if self.lanes else None

    @property
    def begin(self) -> int:
        """First token of the current utterance in the fast lane."""
        return self._begin

    @property
    def at_rest(self) -> bool:
        """Whether all ends that were received were returned, and the lane has processed what it received."""
        return not self._ends and self._next is None and (self.lane is None or self.lane.at_rest)

    @property
    def lanes(self) -> list[AccurateLane]:
        """The lanes that receive audio."""
        return [lane for lane in (self.lane, self._next) if lane is not None and not lane.stopped]

    def start(self, lane: AccurateLane, at_once: bool) -> None:
        """Use an accurate lane from the next utterance on, or `at_once`, at the start of the stream."""
        if at_once:
            self.lane = self._current = lane
            return
        if self._next is not None:
            self._next.close()
        self._next = lane

    def stop(self) -> None:
        """Use no accurate lane any more. The current utterance keeps its complete words."""
        for lane in self.lanes:
            lane.stop()
        self._next = None

    def close(self) -> None:
        """Release all slots of the accurate lanes."""
        ended = (lane for lane, _ in [*self._ends])  # may be called by another thread
        for lane in (*ended, self.lane, self._next):
            if lane is not None:
                lane.close()

    def receive(self, items: int, output: StepOutput, reset_decoder: bool) -> None:
        """Receive output number `items` of the fast lane."""
        for lane in self.lanes:
            if items > lane.start:
                lane.advance(items)
        if output.ends:
            ended = self.lane
            if ended is not None:
                ended.end(output, reset_decoder)
                if ended.stopped and ended.error is None:  # disabled; finals without a lane that failed are reported
                    self.lane = None
            if self._next is not None and items > self._next.start:
                self.lane, self._next = self._next, None
            self._ends.append((ended, self.lane))
        self._limits.append(self.lane.items if self.lane is not None else 0)

    def end_stream(self, end: UtteranceEnd) -> None:
        """Receive the end of the stream, after all outputs."""
        if self.lane is not None:
            self.lane.end_stream(end)
        self._ends.append((self.lane, self.lane))

    def notify(self, listener: Listener | None, consumer: Any) -> None:
        """Call `listener` after changes of the lanes, with `consumer` as that of their streams."""
        for lane in self.lanes:
            lane.notify(listener, consumer)

    def settled(self, ended: bool) -> bool:
        """Return whether the finals of all ended utterances are known and no lane is late (`AccurateLane.settled`)."""
        return all([lane.settled(ended) for lane in self._waiting()])

    def wait(self, ended: bool) -> None:
        """Block until `settled`."""
        for lane in self._waiting():
            lane.wait(ended)

    def _waiting(self) -> list[AccurateLane]:
        lanes = [lane for lane, _ in self._ends if lane is not None]
        return [*{id(lane): lane for lane in (*lanes, *self.lanes)}.values()]

    def finals(self, ends: Sequence[UtteranceEnd]) -> list[tuple[UtteranceEnd, JoinedTokens]] | None:
        """Return the utterances that ended in the next output with `ends`; None if their tokens are not known yet."""
        lane, following = self._ends[0]
        if lane is None:
            finals = []
            for end in ends:
                tokens = self._fast_tokens.tokens[self._begin : end.token_count]
                finals.append((end, JoinedTokens(tokens, len(tokens))))
                self._begin = end.token_count
        else:
            known = lane.finals()
            if known is None:
                return None
            finals, self._begin = known, ends[-1].token_count
        self._ends.popleft()
        if following is not lane and following is not None:
            following.begin(self._begin)
        self._current = following
        return finals

    def next(self, output: StepOutput) -> tuple[list[tuple[UtteranceEnd, JoinedTokens]], JoinedTokens] | None:
        """Return the utterances that ended in the next output, and the tokens of the current one after it.

        None if the tokens of an utterance are not known yet.
        """
        finals = self.finals(output.ends) if output.ends else []
        return None if finals is None else (finals, self.joined(output.count, self._limits.popleft()))

    def joined(self, fast_count: int, limit: int | None = None) -> JoinedTokens:
        """Return the tokens of the current utterance, with the first `fast_count` tokens of the fast lane.

        `limit` is the number of the accurate lane's outputs to use at most.
        """
        if self._current is not None:
            return self._current.joined(fast_count, limit)
        fast = TokenSpan(self._fast.tokens, self._fast.sample_positions, self._begin, fast_count)
        stable = self._joiner.complete_words(fast) - self._begin
        return JoinedTokens(self._fast_tokens.tokens[self._begin : fast_count], stable)
