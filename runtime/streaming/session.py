"""One open stream: audio in, results or events out. Only `wait`, `save` and opening with `block=True` block.

This module does not depend on the kind of backend, on batches or on asyncio.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import OptionError, StreamError
from nemostream.runtime.audio.preprocessor import BLOCK, AudioPreprocessor, as_float32
from nemostream.runtime.audio.silence import SilenceSplitter
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.compiled import SessionFields, compiled
from nemostream.runtime.streaming.items import StepOutput, WorkItem
from nemostream.runtime.streaming.lanes import AccurateLane, JoinedTokens, LaneState, TwoLanes
from nemostream.runtime.streaming.scheduler import StreamScheduler
from nemostream.runtime.streaming.snapshot import (
    Checkpointer,
    Digest,
    SavedArrays,
    Stateful,
    StreamSnapshot,
    restore,
    saved_counts,
)
from nemostream.runtime.streaming.state import Hypothesis, Listener, StreamState, StreamTrace
from nemostream.runtime.streaming.tokens import SavedTokens, TokenList, clip
from nemostream.runtime.text.endpointing import Endpoint, Endpointer, RepetitionGuard, UtteranceEnd
from nemostream.runtime.text.events import Event, EventBuilder, EventState, RevisableText
from nemostream.runtime.text.joining import Joiner
from nemostream.runtime.text.languages import reported_language
from nemostream.runtime.text.tokenizer import Detokenizer, Tokenizer
from nemostream.runtime.text.words import Result, Token

if TYPE_CHECKING:
    from nemostream.runtime.audio.vad import VadFilter

P = ParamSpec("P")
T = TypeVar("T")

Pcm = NDArray[Any]  # [N] or [N, channels]: int16, int32, or float in [-1, 1]


class Options(TypedDict, total=False):
    """
    chunk_ms: chunk size in milliseconds (default: the model's).
    final_chunk_ms: larger chunk size for the text of finals (default: that of `chunk_ms`). Takes a second slot.
    endpoint: an `Endpoint`, the rules for the end of an utterance (default: none; for `listen`: `Endpoint()`).
    phrases: a list of phrases to boost, or a mapping of phrases to weights.
    confidence: a `Confidence`, the confidence measure (default: the model's).
    vad: skip chunks without speech; requires the `vad` extra (default: False).
    language: one of the model's `languages`, such as "de" or "de-DE" (default: the model's).
    """

    chunk_ms: int | None
    final_chunk_ms: int | None
    endpoint: Endpoint | None
    phrases: Mapping[str, float] | Sequence[str] | Boosting | None
    confidence: Confidence | None
    vad: bool
    language: str | None


_OPTIONS: dict[str, Any] = dict.fromkeys(Options.__annotations__) | {"vad": False}


def with_options(method: Callable[P, T]) -> Callable[P, T]:
    """Add the `Options` to the signature and the documentation of a method with `**options: Unpack[Options]`.

    The method raises a `TypeError` that lists the valid options for an unknown one, and an `OptionError` for a value of
    the wrong type.
    """
    signature = inspect.signature(method)
    parameters = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_OPTIONS[name], annotation=annotation)
        for name, annotation in Options.__annotations__.items()
    ]
    valid = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    names = {one.name for one in parameters}

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in names:
                raise TypeError(f"{method.__name__}() has no option {name!r}; its options are {', '.join(valid)}.")
        for name in ("sample_rate", "channels"):
            value: object = kwargs.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise OptionError(f"{name} is {value!r}; it must be a number, not {type(value).__name__}.")
        for name, type_ in (("endpoint", Endpoint), ("confidence", Confidence)):
            if not isinstance(value := kwargs.get(name), type_ | None):
                raise OptionError(f"{name} is {value!r}; it must be nemostream.{type_.__name__}(...) or None.")
        return method(*args, **kwargs)

    checked.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    checked.__doc__ = f"{inspect.getdoc(method)}\n\nOptions:\n\n{inspect.cleandoc(Options.__doc__ or '')}"
    return checked


def final_chunk_of(manifest: Manifest, final_chunk_ms: int, chunk_ms: int) -> ChunkConfig:
    """Return the chunk of an accurate lane beside one of `chunk_ms`. Raises `OptionError` if it is not larger."""
    chunk = manifest.chunk(final_chunk_ms)
    if chunk.ms <= chunk_ms:
        larger = [str(one.ms) for one in manifest.chunks if one.ms > chunk_ms]
        raise OptionError(
            f"final_chunk_ms is {chunk.ms}; it must be larger than chunk_ms, {chunk_ms}"
            + (f": choose one of {', '.join(larger)}." if larger else "; choose a smaller chunk_ms.")
        )
    return chunk


class OpenSession(Protocol):
    """Opens a session with options that are already set."""

    def __call__(self, sample_rate: int, channels: int) -> StreamSession: ...


@dataclass(frozen=True)
class SessionContext:
    """What all sessions of a model share."""

    scheduler: StreamScheduler
    manifest: Manifest
    tokenizer: Tokenizer
    delay_ms: int  # subtracted from the time of every token


class StreamSession(SessionFields):
    """An open stream. Opened by `Model.open_session`. For one thread at a time, except `close`.

    With a `checkpointer`, the stream continues from its snapshot: the same audio must be fed again from the start, and
    is not run again. `block=True` waits for a free slot.
    """

    def __init__(
        self,
        context: SessionContext,
        sample_rate: int,
        channels: int,
        *,
        chunk: ChunkConfig,
        final_chunk_ms: int | None = None,
        confidence: Confidence,
        endpoint: Endpoint | None = None,
        phrases: Boosting | None = None,
        vad: VadFilter | None = None,
        language: str | None = None,
        checkpointer: Checkpointer | None = None,
        snapshot: StreamSnapshot | None = None,
        block: bool = False,
    ) -> None:
        manifest, tokenizer = context.manifest, context.tokenizer
        final_chunk = None if final_chunk_ms is None else final_chunk_of(manifest, final_chunk_ms, chunk.ms)
        self._scheduler, self._manifest, self._tokenizer = context.scheduler, manifest, tokenizer
        self._context, self._confidence = context, confidence
        self._rate = manifest.features.sample_rate
        self._language_names = manifest.languages.by_prompt
        # Audio
        self.preprocessor = AudioPreprocessor(sample_rate, channels, self._rate)
        self._silence = SilenceSplitter(self.preprocessor.sample_rate)
        self._vad = vad
        self._ended = False  # `finish` was called
        # Results
        self._tokens = TokenList(manifest, tokenizer, confidence, context.delay_ms)
        self._aggregation = confidence.aggregation
        self._pending_outputs: deque[StepOutput] = deque()  # of steps that no result or event covers yet
        self._end_sample = 0  # processed samples, up to the last output that was returned
        self.steps = 0  # chunks run, up to the last output that was returned
        self.chunk_ms = chunk.ms  # size of the last of these chunks
        self._prompt = manifest.languages.prompt(language)  # of the last output that was returned
        self._detokenizer = Detokenizer(tokenizer)
        self._text_tokens = 0  # tokens in the detokenizer's text
        self._last = Result("", (), 0.0, chunk.ms, False, aggregation=confidence.aggregation)
        self._backchannel = tokenizer.backchannel if endpoint is not None and endpoint.model else None
        self._event_builder = EventBuilder(tokenizer, confidence.aggregation, self._rate, self._backchannel is not None)
        self._end_reported = False  # whether `events` returned the stream's last event
        # State, restored from a snapshot if there is one
        self._endpointer = Endpointer.of_tokenizer(endpoint, manifest, tokenizer) if endpoint else None
        self._guard = RepetitionGuard(manifest)
        hypothesis, chunker = Hypothesis(), Chunker(manifest, chunk, vad, self._prompt)
        lane = None if final_chunk is None else self._new_lane(final_chunk)
        self._checkpointer, self._digest = checkpointer, Digest()
        # The checkpointer's; None once its audio has been fed again
        self._snapshot = checkpointer.load() if checkpointer else None
        parts, nodes = self._parts(chunker, hypothesis, lane), len(phrases.fail) if phrases else 1
        if checkpointer and self._snapshot:
            checkpointer.restore(self._snapshot, parts, manifest.decoder.vocabulary, nodes)
            self._end_sample, self._prompt = chunker.end_sample, chunker.prompt
        events, last = EventState(), _LastOutput([0, chunk.ms, self._prompt, 0])
        if snapshot:
            restore(snapshot, parts | self._live_parts(events, last), manifest.decoder.vocabulary, nodes)
            self.steps, self.chunk_ms, self._prompt, self._end_sample = last.counts
        self._tokens.extend(hypothesis, len(hypothesis.tokens))
        self._event_builder.resume(events, self._tokens.tokens)
        self._chunker = chunker
        self._phrases = phrases
        self._resets_decoder = endpoint is not None and endpoint.decoder == "reset"
        self._accepts_unchanged = vad is None and checkpointer is None  # `_accept` only passes audio on
        # Last, so that an error above does not take a slot.
        self._stream = self._scheduler.open(
            chunker,
            block=block,
            hypothesis=hypothesis,
            endpointer=self._endpointer,
            guard=self._guard,
            phrases=phrases,
            saved_slot=saved.parts["slot"] if (saved := snapshot or self._snapshot) else None,
        )
        # With an accurate lane
        self._received = 0  # outputs of the stream
        self._lanes: TwoLanes | None = None  # once there was such a lane
        self._joined_outputs: deque[_JoinedOutput] = deque()  # of steps that no result or event covers yet
        self._lanes_ended = False  # the lanes were completed at the end of the stream
        self._joined_end: tuple[UtteranceEnd, JoinedTokens] | None = None  # the last utterance
        if lane is not None:
            try:
                self._open_lane(lane, block, saved)
            except BaseException:
                self._scheduler.cancel(self._stream)
                raise
            if snapshot:  # the events of the current utterance follow those that were returned
                self._text_tokens = len(hypothesis.tokens)
                assert self._lanes is not None
                tokens, stable, _ = self._lanes.joined(self._text_tokens)
                self._revisable_events.partial(tokens, stable, self.preprocessor.seconds, self.chunk_ms)

    # -- audio ---------------------------------------------------------------------------------------------------------

    @compiled(SessionFields)
    def feed(self, pcm: Pcm) -> None:
        """Queue audio at the scheduler.

        Raises `AudioError` if `pcm` is invalid (none of it is queued), `StreamError` after `finish`.
        """
        self._feed(pcm)

    def _feed(self, pcm: Pcm) -> None:
        """`feed`, of which the C function only covers audio that is copied."""
        self._scheduler.check_process()  # first, because a forked child has no threads for the VAD either
        self._check_open()
        preprocessor = self.preprocessor
        accepts_unchanged = self._accepts_unchanged and self._lanes is None
        if accepts_unchanged and preprocessor.keeps(pcm) and self._silence.keeps(pcm):  # most audio of servers
            preprocessor.received += len(pcm)
            return self._scheduler.accept(self._stream, pcm)
        preprocessor.check(pcm)
        if len(pcm) <= BLOCK:
            return self._feed_block(pcm)
        for begin in range(0, len(pcm), BLOCK):
            self._feed_block(pcm[begin : begin + BLOCK])

    def _feed_block(self, pcm: Pcm) -> None:
        for part, silent in self._silence.split(pcm):
            if silent:
                self._skip_silence(len(part))
                continue
            for block in self.preprocessor.push(part):
                self._accept(block)

    def trace(self) -> StreamTrace:
        """Record when chunks of `chunk_ms` are run. Called before the first audio."""
        return self._scheduler.trace(self._stream)

    @property
    def end_sample(self) -> int:
        """Samples at the model's rate that were processed up to the last result or event returned."""
        return self._end_sample

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """Change the chunk size. Raises `OptionError` if the model does not support it."""
        self._scheduler.set_chunk(self._stream, self._manifest.chunk(chunk_ms))

    @property
    def final_chunk_ms(self) -> int | None:
        """Chunk size of the accurate lane that is set; None without one."""
        return self._lanes.chunk_ms if self._lanes else None

    def set_final_chunk_ms(self, final_chunk_ms: int | None) -> None:
        """Change the chunk size of finals; None: to that of partials.

        A new accurate lane provides finals from the next utterance on. Without one, the current utterance keeps the
        words that are complete. Raises `OptionError` if the model does not support the size, `CapacityError` if no slot
        is free, `StreamError` after `finish`.
        """
        self._scheduler.check_process()
        self._check_open()
        if final_chunk_ms is None:
            if self._lanes:
                self._lanes.stop()
            return
        chunk = final_chunk_of(self._manifest, final_chunk_ms, self._chunker.chunk.ms)
        lanes = self._active_lanes
        if not lanes:
            return self._branch_lane(chunk)
        for lane in lanes:
            lane.set_chunk(self._due(), chunk)

    @property
    def language(self) -> str:
        """The name of the language that is set."""
        return self._language_names[self._chunker.prompt]

    def set_language(self, language: str | None) -> None:
        """Change the language; None: to the model's default. Raises `OptionError` if the model does not support it."""
        prompt = self._manifest.languages.prompt(language)
        self._scheduler.set_prompt(self._stream, prompt)
        for lane in self._active_lanes:
            lane.set_prompt(self._due(), prompt)

    def end_utterance(self) -> None:
        """End the utterance. Raises `StreamError` after `finish`."""
        self._scheduler.check_process()
        self._check_open()
        self._accept(self.preprocessor.flush())
        self._silence.restart()
        self._scheduler.end_utterance(self._stream)
        for lane in self._active_lanes:
            lane.end_utterance(self._chunker.taken)

    def finish(self) -> None:
        """End the audio. Does nothing if already ended."""
        self._scheduler.check_process()
        if self._ended:
            return
        self._ended = True
        self._accept(self.preprocessor.finish())
        self._scheduler.finish(self._stream)
        for lane in self._active_lanes:
            lane.finish(self._chunker.taken)

    def _check_open(self) -> None:
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")

    def _accept(self, block: NDArray[Any]) -> None:
        if self._vad or self._checkpointer:
            block = as_float32(block)
            if self._in_snapshot(block):
                return
            if self._vad:
                self._vad.push(block)  # on this thread: on the scheduler's it would delay other streams
        if not (lanes := self._active_lanes):
            return self._scheduler.accept(self._stream, block)
        block = block.copy()  # the lane receives it later; the caller may reuse the array
        while len(block):  # part by part, so that the lane receives the audio of a chunk with the chunk's output
            part, block = block[: (room := self._chunker.room)], block[room:]
            due = self._chunker.taken + 1
            self._scheduler.accept(self._stream, part)
            for lane in lanes:
                lane.accept(max(due, self._chunker.taken), part)

    def _skip_silence(self, samples: int) -> None:
        """Accept digital silence of `samples` input samples, which is not run (`runtime/audio/silence.py`)."""
        self._accept(self.preprocessor.flush())
        rate = self.preprocessor.sample_rate
        before, self.preprocessor.received = self.preprocessor.received, self.preprocessor.received + samples
        count = self.preprocessor.received * self._rate // rate - before * self._rate // rate
        silence = np.zeros(count, np.float32)
        if self._in_snapshot(silence):
            return
        if self._vad:
            self._vad.push(silence)
        due = self._due()
        self._scheduler.skip_silence(self._stream, count)
        for lane in self._active_lanes:
            lane.skip_silence(max(due, self._chunker.taken), count)

    # -- accurate lane -------------------------------------------------------------------------------------------------

    @property
    def _active_lanes(self) -> Sequence[AccurateLane]:
        """The accurate lanes that receive audio."""
        return self._lanes.lanes if self._lanes is not None else ()

    def _due(self) -> int:
        """Return the number of items of the stream of which the last one is not complete yet."""
        return self._chunker.taken + 1

    def _new_lane(self, chunk: ChunkConfig) -> _LaneParts:
        """Return the parts of an accurate lane at the start of the stream."""
        vad = self._vad.follow() if self._vad else None
        return _LaneParts(
            Chunker(self._manifest, chunk, vad, self._prompt),
            Hypothesis(),
            RepetitionGuard(self._manifest),
            vad,
            LaneState(),
            SavedTokens([], self._tokenizer),
        )

    def _open_lane(self, lane: _LaneParts, block: bool, snapshot: StreamSnapshot | None) -> None:
        """Open an accurate lane at the start of the stream, or as it was saved."""
        stream = self._scheduler.open(
            lane.chunker,
            block=block,
            hypothesis=lane.hypothesis,
            guard=lane.guard,
            phrases=self._phrases,
            saved_slot=snapshot.parts["laneslot"] if snapshot else None,
            may_branch=True,
        )
        self._use_lane(stream, lane.chunker, lane.vad, at_once=True, state=lane.state, begin=lane.state.fast_begin)
        self._committed.settle(lane.joined.tokens)

    def _branch_lane(self, chunk: ChunkConfig) -> None:
        """Open an accurate lane that continues from the state of the stream."""
        vad = self._vad.follow() if self._vad else None
        chunker = self._chunker.copy(vad)
        chunker.set_chunk(chunk)
        self._use_lane(self._scheduler.branch(self._stream, chunker, may_branch=True), chunker, vad, at_once=False)

    def _use_lane(
        self,
        stream: StreamState,
        chunker: Chunker,
        vad: VadFilter | None,
        at_once: bool,
        state: LaneState | None = None,
        begin: int | None = None,
    ) -> None:
        """Use an accurate lane, `at_once` or with the next utterance; the current one begins with token `begin`."""
        context, hypothesis = self._context, self._stream.hypothesis
        if self._lanes is None:
            self._revisable_events, first = self._event_builder.revisable()
            self._committed = RevisableText(self._tokenizer)  # the tokens of utterances that have ended
            if begin is None:
                begin = first
                self._committed.settle(self._tokens.tokens[:begin])
            self._joiner = Joiner(self._manifest, self._tokenizer)
            self._lanes = TwoLanes(hypothesis, self._tokens, self._joiner, begin)
            for output in self._pending_outputs:
                self._lanes.receive(0, output, False)
        tokens = TokenList(self._manifest, self._tokenizer, self._confidence, context.delay_ms)
        start = self._chunker.taken
        lane = AccurateLane(
            self._scheduler,
            stream,
            chunker,
            tokens,
            hypothesis,
            self._tokens,
            self._joiner,
            vad=vad,
            start=start,
            state=state,
        )
        if self._stream.listener is not None:
            lane.notify(self._stream.listener, self._stream.consumer)
        self._lanes.start(lane, at_once)

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def save(self) -> StreamSnapshot:
        """Return a snapshot. Every complete chunk must have been processed, and `saveable` be True."""
        if self._lanes is not None and self._lanes.lane is not None:
            while (joined := self._join_next()) is not None:
                self._joined_outputs.append(joined)  # for the next results
        return self._begin_save({})()

    def save_live(self) -> Callable[[], StreamSnapshot] | None:
        """Begin to save the stream so that it can continue without its earlier audio (option `snapshot`).

        Every complete chunk must have been processed and its events returned. The result is a function that returns the
        snapshot of the present state, whatever the stream does meanwhile. It blocks and may be called on any thread;
        it raises the errors of the backend. None if the stream cannot be saved at present: an accurate lane has not
        completed what it received, or was stopped during the current utterance. Raises the stream's error if it failed.
        """
        if self._ended or self._pending_outputs or self._joined_outputs or not self._scheduler.settled(self._stream):
            return None
        events = self._event_builder.state()
        if (lanes := self._lanes) is not None:
            if not lanes.at_rest or (self._revisable_events.begun and (lanes.lane is None or lanes.lane.stopped)):
                return None
            language = self._language_names[self._prompt]
            events = self._revisable_events.state(lanes.begin, len(self._tokens.tokens), language)
        last = _LastOutput([self.steps, self.chunk_ms, self._prompt, self._end_sample])
        return self._begin_save(self._live_parts(events, last))

    def _begin_save(self, more: dict[str, Stateful]) -> Callable[[], StreamSnapshot]:
        """Return a function that returns a snapshot of the present state, with more parts."""
        stream, lane = self._stream, None
        saving = {"": self._scheduler.save(stream)}  # by the prefix of the names of its parts
        if self._lanes is not None and (accurate := self._lanes.lane) is not None and not accurate.stopped:
            state, lane_stream = accurate.save()
            assert lane_stream.chunker is not None
            committed = SavedTokens(self._committed.settled, self._tokenizer)
            lane = _LaneParts(lane_stream.chunker, lane_stream.hypothesis, None, accurate.vad, state, committed)
            saving["lane"] = self._scheduler.save(lane_stream)
        of_scheduler = {f"{prefix}{name}" for prefix in saving for name in ("guard", "endpoint")}
        parts: dict[str, SavedArrays] = {
            name: part.save()
            for name, part in (self._parts(self._chunker, stream.hypothesis, lane) | more).items()
            if name not in of_scheduler
        }
        samples, digest = self._digest.samples if self._checkpointer else self._chunker.samples, self._digest.value

        def complete() -> StreamSnapshot:
            for prefix, saved in saving.items():
                parts.update({f"{prefix}{name}": arrays for name, arrays in saved.result().items()})
            return StreamSnapshot(parts, samples, digest)

        return complete

    @property
    def saveable(self) -> bool:
        """Whether `save` can be called: the accurate lane, if one was requested, has not failed."""
        return self._lanes is None or (self._lanes.lane is not None and not self._lanes.lane.stopped)

    @property
    def replaying(self) -> bool:
        """Whether audio that the snapshot already contains is still being fed."""
        return self._snapshot is not None

    def _parts(self, chunker: Chunker, hypothesis: Hypothesis, lane: _LaneParts | None) -> dict[str, Stateful]:
        """Return the parts of a snapshot except the slots."""
        parts: dict[str, Stateful | None] = {
            "chunker": chunker,
            "hypothesis": hypothesis,
            "guard": self._guard,
            "endpoint": self._endpointer,
            "vad": self._vad,
        }
        if lane is not None:
            parts |= {"joined": lane.joined, "lane": lane.state, "lanevad": lane.vad, "lanechunker": lane.chunker}
            parts |= {"lanehypothesis": lane.hypothesis, "laneguard": lane.guard}
        return {name: part for name, part in parts.items() if part}

    def _live_parts(self, events: EventState, last: _LastOutput) -> dict[str, Stateful]:
        """Return the further parts of a snapshot of a stream that continues without its earlier audio."""
        return {"audio": self.preprocessor, "silence": self._silence, "events": events, "last": last}

    def _in_snapshot(self, block: NDArray[Any]) -> bool:
        """Return whether the snapshot already contains this audio. Raises `OptionError` if its audio differs."""
        if self._checkpointer is None:
            return False
        self._digest.add(block)
        snapshot = self._snapshot
        if snapshot is None:
            return False
        if self._digest.samples < snapshot.samples and not self._ended:
            return True
        if (self._digest.samples, self._digest.value) != (snapshot.samples, snapshot.digest):
            raise self._checkpointer.wrong_recording()
        self._snapshot = None
        return True

    # -- waiting -------------------------------------------------------------------------------------------------------

    def notify(self, listener: Listener | None, consumer: Any) -> None:
        """Call `listener` after changes, with `consumer` as that of the stream (`StreamState`). None: call nothing."""
        self._stream.consumer, self._stream.listener = consumer, listener
        if self._lanes:
            self._lanes.notify(listener, consumer)

    @property
    def ended(self) -> bool:
        """Whether `finish` was called. Once the session has settled, the result is then final."""
        return self._ended

    @property
    def has_vad(self) -> bool:
        """Whether `feed` runs the VAD, which takes time."""
        return self._vad is not None

    def settled(self) -> bool:
        """Return whether every complete chunk was processed. Raises the stream's error if it failed."""
        settled = self._scheduler.settled(self._stream)
        if self._lanes is None:
            return settled
        self._fetch_outputs()
        if settled:
            self._complete_lanes()
        return self._lanes.settled(self._ended) and settled

    def wait(self, backlog: int = 0) -> None:
        """Block until at most `backlog` complete chunks are unprocessed. Raises the stream's error if it failed."""
        self._scheduler.wait(self._stream, backlog)
        if self._lanes is not None:
            self._fetch_outputs()
            if self._scheduler.settled(self._stream):
                self._complete_lanes()
            self._lanes.wait(self._ended)

    def close(self) -> None:
        """Release the slots without waiting for pending audio. Does nothing if they are released."""
        self._scheduler.cancel(self._stream)
        if self._lanes:
            self._lanes.close()

    # -- results -------------------------------------------------------------------------------------------------------

    @property
    def result(self) -> Result:
        """The current result, from all audio processed so far. Does not consume pending results or events."""
        if self._last.final:
            return self._last
        self._fetch_outputs()
        if self._lanes is not None:
            return self._result_of_lanes()
        tokens = self._tokens.tokens
        text = self._last.text
        if len(tokens) > len(self._last.tokens):
            text = Detokenizer(self._tokenizer).push([token.id for token in tokens])
        return self._current_result(text)

    def collect(self) -> list[Result]:
        """Return one partial result for each step since the last call."""
        self._fetch_outputs()
        if self._lanes is not None:
            return self._results_of_lanes()
        results = []
        while self._pending_outputs:
            output = self._next_output()
            if output.item.kind != "run":
                continue
            text = self._last.text
            if output.count > self._text_tokens:  # without new tokens, share the string of the previous result
                new = self._tokens.tokens[self._text_tokens : output.count]
                text = self._detokenizer.push([token.id for token in new])
                self._text_tokens = output.count
            self._last = self._partial(text, output.count, self._end_sample, self.chunk_ms, self._prompt)
            results.append(self._last)
        return results

    @compiled(SessionFields)
    def poll(self) -> list[Event] | None:
        """Return `events` if the stream has `settled`, otherwise None. Raises the stream's error if it failed."""
        return self._poll()

    def _poll(self) -> list[Event] | None:
        """`poll`, of which the C function does not cover accurate lanes, and waiting for a lock."""
        return self.events() if self.settled() else None

    @compiled(SessionFields)
    def events(self) -> list[Event]:
        """Return the events since the last call. The last event of the stream follows when all steps are done."""
        return self._events()

    def _events(self) -> list[Event]:
        """`events`, of which the C function only covers outputs without events, and a single one without ends."""
        if self._lanes is not None:
            self._fetch_outputs()
            return self._events_of_lanes()
        if self._ended or self._pending_outputs:
            self._fetch_outputs()
        elif not self._fetch_unless_quiet():
            return []
        tokens, seconds = self._tokens.tokens, self.preprocessor.seconds
        done = self._ended and self.settled()
        if done:
            self._tokens.clip(len(tokens), seconds)
        events: list[Event] = []
        while self._pending_outputs:
            output = self._next_output()
            if not output.ends and output.count == self._event_builder.token_count:
                continue
            language = self._language_names[self._prompt]
            events += self._event_builder.step(tokens, output.count, output.ends, seconds, self.chunk_ms, language)
        if done and not self._end_reported:
            self._end_reported = True
            samples, language = self._chunker.samples, self._language_names[self._prompt]
            events += self._event_builder.finish(tokens, samples, seconds, self.chunk_ms, language)
        return events

    def final(self) -> Result:
        """Return the final result. All steps must be done."""
        if not self._last.final:
            self._fetch_outputs()
            if self._lanes is not None:
                return self._final_of_lanes()
            tokens = self._tokens.tokens
            self._tokens.clip(len(tokens), self.preprocessor.seconds)
            result = self._current_result(self._tokenizer.decode([token.id for token in tokens]))
            self._last = dataclasses.replace(result, tokens=tuple(tokens), final=True)
        return self._last

    def discard_results(self) -> None:
        """Discard pending results."""
        self._fetch_outputs()
        if self._lanes is not None:
            while (joined := self._next_joined()) is not None:
                self._consume(joined.output.item)
            return
        while self._pending_outputs:
            self._next_output()

    @property
    def decoded(self) -> float:
        """Seconds of audio processed up to the last result. After `finish`: all, as the last steps cover the rest."""
        return self._decoded(self._end_sample)

    def _decoded(self, end_sample: int) -> float:
        seconds = self.preprocessor.seconds
        return seconds if self._ended else min(end_sample / self._rate, seconds)

    def _current_result(self, text: str) -> Result:
        """Return the result up to the newest output, which may be pending."""
        end_sample, chunk_ms, prompt = self._end_sample, self.chunk_ms, self._prompt
        for output in self._pending_outputs:
            end_sample, prompt = output.item.end_sample, output.item.prompt
            if output.item.kind == "run":
                chunk_ms = output.item.chunk.ms
        return self._partial(text, len(self._tokens.tokens), end_sample, chunk_ms, prompt)

    def _partial(self, text: str, count: int, end_sample: int, chunk_ms: int, prompt: int) -> Result:
        """Return a result that is not final, with the first `count` tokens."""
        tokens = self._last.tokens
        if count > len(tokens):
            tokens = tuple(self._tokens.tokens[:count])
        language = reported_language(self._language_names[prompt], self._tokens.languages.last(count))
        return Result(
            text,
            tokens,
            self.preprocessor.seconds,
            chunk_ms,
            False,
            self._decoded(end_sample),
            self._aggregation,
            language,
        )

    def _next_output(self) -> StepOutput:
        """Consume the next pending output."""
        output = self._pending_outputs.popleft()
        self._consume(output.item)
        return output

    def _consume(self, item: WorkItem) -> None:
        self._end_sample, self._prompt = item.end_sample, item.prompt
        if item.kind == "run":
            self.steps += 1
            self.chunk_ms = item.chunk.ms

    def _fetch_unless_quiet(self) -> bool:
        """As `_fetch_outputs`, but consume outputs that cause no events, up to the first other one, at once.

        Return whether there are pending outputs now. There must be none before.
        """
        outputs, known = self._scheduler.collect(self._stream), self._event_builder.token_count
        for index, (item, count, ends) in enumerate(outputs):
            if count != known or ends:
                self._received += index
                self._add_outputs(outputs[index:] if index else outputs)
                return True
            self._consume(item)
        self._received += len(outputs)
        return False

    def _fetch_outputs(self) -> None:
        """Move the stream's outputs from the scheduler to the pending ones, and add their tokens."""
        if outputs := self._scheduler.collect(self._stream):
            self._add_outputs(outputs)

    def _add_outputs(self, outputs: list[StepOutput]) -> None:
        self._pending_outputs += outputs
        lanes, received = self._lanes, self._received
        self._received += len(outputs)
        if outputs[-1].count > len(self._tokens.tokens):
            self._tokens.extend(self._stream.hypothesis, outputs[-1].count)
        for item, count, ends in outputs:
            if ends and item.kind == "end_of_utterance":
                self._tokens.clip(count, item.end_sample / self._rate)
        if lanes is not None:
            for items, output in enumerate(outputs, received + 1):
                lanes.receive(items, output, self._resets_decoder)

    # -- results with an accurate lane ---------------------------------------------------------------------------------

    def _complete_lanes(self) -> None:
        """Complete the lanes at the end of the stream, once all its outputs were received."""
        if self._ended and not self._lanes_ended:
            assert self._lanes is not None
            self._lanes_ended = True
            self._tokens.clip(len(self._tokens.tokens), self.preprocessor.seconds)
            self._lanes.end_stream(self._stream_end())

    def _join_next(self) -> _JoinedOutput | None:
        """Join the lanes for the next pending output. Return None without one, or if its finals are not known yet."""
        lanes = self._lanes
        assert lanes is not None
        if not self._pending_outputs:
            return None
        if (joined := lanes.next(self._pending_outputs[0])) is None:
            return None
        finals, current = joined
        for _, final in finals:
            self._committed.settle(final.tokens)
        return _JoinedOutput(self._pending_outputs.popleft(), finals, current, len(self._committed.settled))

    def _next_joined(self) -> _JoinedOutput | None:
        """Return the joined lanes for the next output that no result or event covers; None if there is none yet."""
        return self._joined_outputs.popleft() if self._joined_outputs else self._join_next()

    def _stream_end(self) -> UtteranceEnd:
        """Return the end of the last utterance, once all outputs were received."""
        return UtteranceEnd(len(self._tokens.tokens), self._chunker.samples, "finish")

    def _join_end(self) -> None:
        """Join the lanes at the end of the stream, if it is known and all outputs were joined."""
        assert self._lanes is not None
        if not self._lanes_ended or self._joined_end is not None or self._pending_outputs:
            return
        if finals := self._lanes.finals([self._stream_end()]):
            self._joined_end = finals[0]
            self._committed.settle(finals[0][1].tokens)

    def _events_of_lanes(self) -> list[Event]:
        builder, seconds = self._revisable_events, self.preprocessor.seconds
        events: list[Event] = []
        while (joined := self._next_joined()) is not None:
            output = joined.output
            self._consume(output.item)
            language = self._language_names[self._prompt]
            for end, final in joined.finals:
                events += builder.end(final.tokens, end, seconds, self._chunk_ms_of(final), language)
            new = self._tokens.tokens[self._text_tokens : output.count]
            self._text_tokens = output.count
            tokens, stable = joined.current.tokens, joined.current.stable
            for token in new:
                if token.id == self._backchannel:
                    events += builder.backchannel(tokens, stable, token.end, seconds, self.chunk_ms, language)
            events += builder.partial(tokens, stable, seconds, self.chunk_ms, language)
        self._join_end()
        if self._joined_end is not None and not self._end_reported:
            self._end_reported = True
            end, final = self._joined_end
            language = self._language_names[self._prompt]
            events += builder.end(final.tokens, end, seconds, self._chunk_ms_of(final), language)
        return events

    def _chunk_ms_of(self, final: JoinedTokens) -> int:
        return final.chunk_ms or self.chunk_ms

    def _results_of_lanes(self) -> list[Result]:
        results = []
        while (joined := self._next_joined()) is not None:
            self._consume(joined.output.item)
            if joined.output.item.kind == "run":
                self._last = self._joined_result(joined.current.tokens, joined.committed)
                results.append(self._last)
        return results

    def _result_of_lanes(self) -> Result:
        """Return the result up to the newest output whose lanes were joined, and the current tokens of both lanes."""
        assert self._lanes is not None
        tokens = self._lanes.joined(len(self._tokens.tokens)).tokens
        return self._joined_result(tokens, len(self._committed.settled))

    def _final_of_lanes(self) -> Result:
        while (joined := self._join_next()) is not None:
            self._joined_outputs.append(joined)  # for `events`
            self._end_sample, self._prompt = joined.output.item.end_sample, joined.output.item.prompt
        self._join_end()
        tokens = [*self._committed.settled]
        clip(tokens, len(tokens), self.preprocessor.seconds)
        text = self._tokenizer.decode([token.id for token in tokens])
        self._last = dataclasses.replace(
            self._joined_result([], len(tokens)), text=text, tokens=tuple(tokens), final=True
        )
        return self._last

    def _joined_result(self, tokens: list[Token], committed: int) -> Result:
        """Return a result with the first `committed` tokens of utterances that have ended, and those of the current."""
        settled = self._committed.settled
        all_tokens = (*settled[:committed], *tokens)
        language = next((token.language for token in reversed(all_tokens) if token.language), None)
        if committed == len(settled):
            text = self._committed.with_tokens(tokens)
        else:  # utterances have ended since
            text = Detokenizer(self._tokenizer).push([token.id for token in all_tokens])
        return Result(
            text,
            all_tokens,
            self.preprocessor.seconds,
            self.chunk_ms,
            False,
            self._decoded(self._end_sample),
            self._aggregation,
            reported_language(self._language_names[self._prompt], language),
        )


class _JoinedOutput(NamedTuple):
    """The tokens of both lanes after an output of the stream."""

    output: StepOutput
    finals: list[tuple[UtteranceEnd, JoinedTokens]]  # of the utterances that ended with it
    current: JoinedTokens  # of the utterance after them
    committed: int  # tokens of all utterances that have ended


class _LaneParts(NamedTuple):
    """The parts of an accurate lane that are saved and restored, except its slot."""

    chunker: Chunker
    hypothesis: Hypothesis
    guard: RepetitionGuard | None  # None when saving: the scheduler saves it
    vad: VadFilter | None
    state: LaneState
    joined: SavedTokens  # of utterances that have ended


class _LastOutput:
    """The number of steps, and the chunk size (ms), prompt and end of the last output, as a part of a snapshot."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def save(self) -> dict[str, NDArray[Any]]:
        return {"counts": np.array(self.counts, np.int64)}

    def load(self, state: SavedArrays) -> None:
        """Restore a saved state. Raises `ValueError` if it does not come from `save`."""
        self.counts = saved_counts(state, "counts", 4)
