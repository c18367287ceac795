"""The events of a stream: partial and final transcripts of utterances, and their ends.

The grammar of a stream is ``((partial | backchannel)* final? end)*``. Greedy RNN-T decoding never revises a token, so
the text of a partial is a prefix of that of the next event. Only its last word may still grow; `stable` is the text
before it.

All events of an utterance share its tokens and its text. Creating an event takes time and memory proportional to what
is new in it, so the cost of all events of an utterance is proportional to the number of its tokens.

This module does not depend on endpointing rules, streams or the scheduler.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemostream.runtime.streaming.compiled import EventBuilderFields, TranscriptFields, UtteranceFields, compiled
from nemostream.runtime.streaming.snapshot import saved_array, saved_counts
from nemostream.runtime.text.endpointing import Reason, UtteranceEnd
from nemostream.runtime.text.languages import AUTO, reported_language
from nemostream.runtime.text.scripts import SHORT, BreakerState, WordBreaker
from nemostream.runtime.text.tokenizer import Detokenizer, Tokenizer
from nemostream.runtime.text.words import Token, Word, WordGrouper, join_words


@dataclass(frozen=True)
class Event:
    """An update of an utterance. Times are seconds from the start of the stream.

    A *partial* has the transcript of the utterance so far, a *final* the complete one. The text of an event begins with
    that of the previous one; with `final_chunk_ms` only with the `stable` part of it, and the rest may be revised. An
    *end* states when and why the utterance ended: by "model", "silence" or "length" (see `Endpoint`), "forced" by the
    client, or at the "finish" of the stream. An utterance without any text has no final, and the next utterance has the
    same number.

    A *backchannel* states that the model classified the utterance so far as a backchannel, such as "mm-hmm": feedback
    that does not take the turn. The utterance continues. Its text is included in later events, so a consumer may
    ignore backchannels.

    `text`, `stable`, `tokens` and `words` cover the whole utterance and are computed when they are read. A consumer
    that keeps the values of earlier events can read only what is new, in time proportional to that:

        text = text[: event.text_from] + event.new_text
        tokens = tokens[: event.tokens_from] + event.new_tokens
        words = words[: event.words_from] + event.new_words

    "Earlier" and "previous" events are partials and finals; a backchannel can be read in the same way.
    """

    kind: Literal["partial", "backchannel", "final", "end"]
    utterance: int  # number of the utterance, from 0
    text: str  # of the utterance; empty for an end
    stable: str  # the prefix of `text` that consists of complete words, which are not revised
    start: float  # time of the first token, in seconds; for an end: when the utterance ended
    # End of the last token with text, in seconds; for a backchannel: of the token that marks it; for an end: as `start`
    end: float
    audio: float  # seconds of audio received
    chunk_ms: int  # milliseconds
    tokens: tuple[Token, ...] = field(repr=False)  # of the utterance, with its tags; empty for an end
    reason: Reason | None = None  # why the utterance ended, for an end
    grouper: WordGrouper = field(default_factory=lambda: WordGrouper("min"), repr=False, compare=False)
    text_from: int = field(default=0, repr=False)  # characters of `text` in the previous event of the utterance
    tokens_from: int = field(default=0, repr=False)  # tokens that are unchanged since the previous event
    # `set_language`; if the model detects the language: that of the utterance's last tag, None before the first
    language: str | None = None
    set_language: str = AUTO  # the language that was set when the last text was recognized; not of an end

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of `text`. The last word of a partial may still grow."""
        if (rewritten := self.__dict__.get("_rewritten")) is not None:
            return rewritten
        tokens, count = self._token_prefix()
        return self.grouper.words(tokens, self.kind == "final", count)

    @property
    def words_from(self) -> int:
        """Number of words that are unchanged since the previous event of the utterance."""
        return self._changed_words()[0]

    @property
    def new_words(self) -> tuple[Word, ...]:
        """The words from `words_from` on, which are new or may have changed."""
        return self._changed_words()[1]

    @property
    def new_text(self) -> str:
        """The part of `text` that the previous event of the utterance does not have."""
        prefix = self.__dict__.get("_prefix")
        return self.text[self.text_from :] if prefix is None else prefix.new_text

    @property
    def new_tokens(self) -> tuple[Token, ...]:
        """The tokens from `tokens_from` on. A final repeats tokens whose `end` was clipped to the recording."""
        tokens, count = self._token_prefix()
        return tuple(tokens[self.tokens_from : count])

    @property
    def stable_length(self) -> int:
        """Number of characters of `stable`."""
        prefix = self.__dict__.get("_prefix")
        return len(self.stable) if prefix is None else prefix.stable_length

    def _token_prefix(self) -> tuple[Sequence[Token], int]:
        """Return a sequence that begins with the tokens of the event, and the number of these tokens."""
        prefix = self.__dict__.get("_prefix")
        return (self.tokens, len(self.tokens)) if prefix is None else (prefix.transcript.tokens, prefix.token_count)

    def _changed_words(self) -> tuple[int, tuple[Word, ...]]:
        if (rewritten := self.__dict__.get("_rewritten")) is not None:
            return 0, rewritten
        tokens, count = self._token_prefix()
        return self.grouper.changed_words(tokens, self.tokens_from, count, self.kind == "final")

    def with_words(self, words: Sequence[Word], text: str | None = None) -> Event:
        """Return this final event with other words and their text (default: as joined); the tokens are unchanged."""
        text = join_words(words) if text is None else text
        event = replace(self, text=text, stable=text, text_from=0)
        event.__dict__["_rewritten"] = tuple(words)
        return event

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: self.__dict__[name] for name in ("_rewritten",) if name in self.__dict__}
        return Event, tuple(getattr(self, item.name) for item in fields(self)), state

    if not TYPE_CHECKING:  # a type checker would accept any attribute name

        def __getattr__(self, name: str) -> Any:
            """Compute the fields that events of `EventBuilder` do not store."""
            prefix = self.__dict__.get("_prefix")
            if prefix is None or name not in ("text", "stable", "tokens"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(prefix, name)


class _Transcript(TranscriptFields):
    """The tokens of an utterance and its text in parts, shared by its events. Both lists only grow."""

    __slots__ = ()

    def __init__(self, tokens: list[Token], parts: list[str]) -> None:
        self.tokens, self.parts = tokens, parts
        self._cache = 0, ""  # number of parts, and their text; a single attribute because threads may read events

    def text(self, part_count: int) -> str:
        """Return the text of the first `part_count` parts."""
        cached, text = self._cache
        if part_count < cached:
            return "".join(self.parts[:part_count])
        if part_count > cached:
            text += "".join(self.parts[cached:part_count])
            self._cache = part_count, text
        return text


class _Prefix(NamedTuple):
    """The beginning of a transcript that an event refers to, instead of copies of its text and tokens."""

    transcript: _Transcript
    token_count: int
    part_count: int
    stable_length: int  # characters
    new_text: str

    @property
    def text(self) -> str:
        return self.transcript.text(self.part_count)

    @property
    def stable(self) -> str:
        return self.text[: self.stable_length]

    @property
    def tokens(self) -> tuple[Token, ...]:
        return tuple(self.transcript.tokens[: self.token_count])


# How a text ends: the state of its `WordBreaker`, and the number of characters of white space at its end.
_TextEnd = tuple[BreakerState, int]


def _grow(text_end: _TextEnd, text: str) -> tuple[_TextEnd, int | None]:
    """Return how a text ends after another text is appended, and what `stable_length` is then.

    That is relative to the length of the text before; None if it does not change.
    """
    state, space = text_end
    breaker, length, stable = WordBreaker(*state), 0, None
    for part, kind in breaker.split(text):
        if kind == "space":
            space += len(part)
        elif space:
            stable, space = length - space, 0
        elif kind == "word":
            stable = length
        length += len(part)
    return (breaker.state, space), stable


_grow_short = lru_cache(1 << 13)(_grow)  # for texts of few characters, most often of a token


class _CurrentUtterance(UtteranceFields):
    """The utterance that new tokens are added to."""

    __slots__ = ()

    def __init__(self, tokenizer: Tokenizer, aggregation: str) -> None:
        self.transcript = _Transcript([], [])
        self._aggregation, self.grouper = aggregation, WordGrouper(aggregation)
        self.event_length = self.event_tokens = self.event_parts = 0  # characters, tokens, parts of the last event
        self.start = 0.0  # time of the first token
        self.language: str | None = None  # of the last tag
        self.set_language = AUTO  # for the step of the last visible token; the silence after it may have another
        self.last_visible = 0  # index of the last token that is not `Tokenizer.invisible`
        self.length = 0  # characters of the text
        self.stable_length = 0  # characters before the last word and the white space before it
        self._text_end: _TextEnd = WordBreaker().state, 0
        self._invisible, self._detokenizer = tokenizer.invisible, Detokenizer(tokenizer)

    def add(self, tokens: Sequence[Token], set_language: str) -> None:
        known, invisible = self.transcript.tokens, self._invisible
        if not known:
            self.start = tokens[0].time
        for index, token in enumerate(tokens, len(known)):
            if token.language:
                self.language = token.language
            if token.id not in invisible:
                self.last_visible, self.set_language = index, set_language
        known += tokens
        self._append(self._detokenizer.add([token.id for token in tokens]))

    def finish(self, tokens: Sequence[Token], first: int) -> None:
        """Complete the text, and replace the last tokens if they have changed.

        The tokens of the utterance are `tokens` from `first` on.
        """
        self._append(self._detokenizer.flush())
        known = self.transcript.tokens
        unchanged = len(known)
        while unchanged and known[unchanged - 1] is not tokens[first + unchanged - 1]:
            unchanged -= 1
        if unchanged < len(known):  # a new list: earlier events refer to the old one
            changed = tokens[first + unchanged : first + len(known)]
            self.transcript = _Transcript([*known[:unchanged], *changed], self.transcript.parts)
            self.event_tokens = min(self.event_tokens, unchanged)
            self.grouper = WordGrouper(self._aggregation)  # the old one may have words of the replaced tokens

    def _append(self, text: str) -> None:
        """Append to the text, and update `stable_length`."""
        self.transcript.parts.append(text)
        self._text_end, stable = (_grow_short if len(text) <= SHORT else _grow)(self._text_end, text)
        if stable is not None:
            self.stable_length = self.length + stable
        self.length += len(text)


class _Step(NamedTuple):
    """What all events of a step have in common; see `EventBuilder.step`."""

    audio: float
    chunk_ms: int
    set_language: str


# Named tuples are created by tuple's constructor where every event passes: it is three times as fast.
_new_step = partial(tuple.__new__, _Step)
_new_prefix = partial(tuple.__new__, _Prefix)


@dataclass
class EventState:
    """The progress of the events of a stream, as a part of a snapshot. The tokens are in other parts."""

    number: int = 0  # of the current utterance
    first_token: int = 0  # index of its first token in the stream
    end_sample: int = 0  # at which the last utterance ended
    token_count: int = 0  # tokens of the stream that have been processed
    between_utterances: bool = False  # whether an utterance has ended and none has begun since
    begun: bool = False  # whether the current utterance has tokens
    language: str = AUTO  # that was set for the last of them

    def save(self) -> dict[str, NDArray[Any]]:
        counts = [self.number, self.first_token, self.end_sample, self.token_count, self.between_utterances, self.begun]
        return {
            "counts": np.array(counts, np.int64),
            "language": np.frombuffer(self.language.encode(), np.uint8),
        }

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a saved state. Raises `ValueError` if it does not come from `save`."""
        number, first, end_sample, count, between, begun = saved_counts(state, "counts", 6)
        if between > 1 or begun > 1 or (between and begun) or (begun and first >= count) or first > count:
            raise ValueError(f"the counts of the events are {[number, first, end_sample, count, between, begun]}")
        self.number, self.first_token, self.end_sample, self.token_count = number, first, end_sample, count
        self.between_utterances, self.begun = bool(between), bool(begun)
        self.language = saved_array(state, "language", np.uint8, None).tobytes().decode()


class EventBuilder(EventBuilderFields):
    """Create the events of one stream from its tokens and the ends of its utterances.

    `aggregation` defines the confidence of words (see `Confidence`), `rate` is the sample rate of `UtteranceEnd`,
    `backchannels` enables events for backchannels.
    """

    __slots__ = ()

    def __init__(self, tokenizer: Tokenizer, aggregation: str, rate: int, backchannels: bool = False) -> None:
        self._backchannel = tokenizer.backchannel if backchannels else None
        self._tokenizer, self._aggregation, self._rate = tokenizer, aggregation, rate
        self._number = 0  # of the current utterance
        self._first_token = 0  # index of its first token in the stream
        self._end_sample = 0  # at which the last utterance ended
        self.token_count = 0  # tokens of the stream that have been processed
        self._between_utterances = False  # whether an utterance has ended and none has begun since
        self._current = _CurrentUtterance(tokenizer, aggregation)

    def state(self) -> EventState:
        """Return the progress, for `resume`."""
        return EventState(
            self._number,
            self._first_token,
            self._end_sample,
            self.token_count,
            self._between_utterances,
            bool(self._current.transcript.tokens),
            self._current.set_language,
        )

    def resume(self, state: EventState, tokens: Sequence[Token]) -> None:
        """Continue from a saved state of a stream that has `tokens`. The next event follows those that were returned.

        Raises `ValueError` if the stream has fewer tokens than were processed.
        """
        if state.token_count > len(tokens):
            raise ValueError(f"events have {state.token_count} tokens; the stream has {len(tokens)}")
        self._number, self._first_token, self._end_sample = state.number, state.first_token, state.end_sample
        self.token_count, self._between_utterances = state.token_count, state.between_utterances
        if state.begun:
            current = self._current
            current.add(tokens[state.first_token : state.token_count], state.language)
            current.event_length, current.event_tokens = current.length, len(current.transcript.tokens)
            current.event_parts = len(current.transcript.parts)

    def revisable(self) -> tuple[RevisableEventBuilder, int]:
        """Return a builder that continues with revisable events, and the first token of the current utterance."""
        builder = RevisableEventBuilder(
            self._tokenizer,
            self._aggregation,
            self._rate,
            number=self._number,
            end_sample=self._end_sample,
            between_utterances=self._between_utterances,
        )
        return builder, self._first_token

    @compiled(EventBuilderFields)
    def step(
        self,
        tokens: Sequence[Token],
        token_count: int,
        ends: Sequence[UtteranceEnd],
        audio: float,
        chunk_ms: int,
        language: str = AUTO,
    ) -> list[Event]:
        """Return the events of a step, after which the stream has the first `token_count` of `tokens`.

        `audio` is the duration of the received audio in seconds, `language` the one that was set for the stream.
        """
        return self._step(tokens, token_count, ends, audio, chunk_ms, language)

    def _step(
        self, tokens: Sequence[Token], token_count: int, ends: Sequence[UtteranceEnd], *fields: Any
    ) -> list[Event]:
        """`step` with the fields of `_Step`. Its C function only covers one more token of a current utterance."""
        step = _new_step(fields)
        first, current = self.token_count, self._current
        if first < token_count and current.transcript.tokens and not ends and self._backchannel is None:  # most often
            self.token_count = token_count
            current.add(tokens[first:token_count], step.set_language)
            return [self._make_event("partial", step)]
        events: list[Event] = []
        for end in ends:
            events += self._end_utterance(tokens, end, step)
        events += self._add_tokens(tokens, token_count, step)
        if len(self._current.transcript.tokens) > self._current.event_tokens:
            events.append(self._make_event("partial", step))
        return events

    def finish(
        self, tokens: Sequence[Token], end_sample: int, audio: float, chunk_ms: int, language: str = AUTO
    ) -> list[Event]:
        """Return the last events of the stream, which ends at `end_sample`."""
        end = UtteranceEnd(len(tokens), end_sample, "finish")
        return self._end_utterance(tokens, end, _Step(audio, chunk_ms, language))

    def _add_tokens(self, tokens: Sequence[Token], token_count: int, step: _Step) -> list[Event]:
        """Process the first `token_count` tokens of the stream; return an event for each backchannel."""
        events = []
        new = range(self.token_count + 1, token_count + 1) if self._backchannel is not None else ()
        for count in new:
            if tokens[count - 1].id == self._backchannel and self._extend_utterance(tokens, count, step):
                events.append(self._make_event("backchannel", step, tokens[count - 1].end))
        self._extend_utterance(tokens, token_count, step)
        return events

    def _extend_utterance(self, tokens: Sequence[Token], token_count: int, step: _Step) -> bool:
        """Process the first `token_count` tokens of the stream; return whether there is a current utterance.

        Punctuation after the end of an utterance belongs to that utterance, and so do tags. Its final has already been
        sent, so they are dropped. White space belongs to the utterance after it.
        """
        first = self.token_count
        self.token_count = token_count
        if not self._current.transcript.tokens:
            tokenizer, between = self._tokenizer, self._between_utterances
            while first < token_count and (
                (token := tokens[first].id) in tokenizer.invisible or (between and tokenizer.closing_punctuation[token])
            ):
                first += 1
            if first == token_count:
                return False
            while first > self._first_token and tokens[first - 1].text.isspace():
                first -= 1
            self._first_token, self._between_utterances = first, False
        if first < token_count:
            self._current.add(tokens[first:token_count], step.set_language)
        return True

    def _end_utterance(self, tokens: Sequence[Token], end: UtteranceEnd, step: _Step) -> list[Event]:
        events = self._add_tokens(tokens, end.token_count, step)
        # The last frames of a recording, and thus the end of an utterance, may be after the end of the recording.
        self._end_sample = max(self._end_sample, end.end_sample)
        time = self._end_sample / self._rate
        number = self._number
        if self._current.transcript.tokens:
            self._current.finish(tokens, self._first_token)
            events.append(self._make_event("final", step))
            self._number += 1
        events.append(Event("end", number, "", "", time, time, step.audio, step.chunk_ms, (), end.reason))
        self._current = _CurrentUtterance(self._tokenizer, self._aggregation)
        self._first_token, self._between_utterances = end.token_count, True
        return events

    def _make_event(
        self, kind: Literal["partial", "backchannel", "final"], step: _Step, end: float | None = None
    ) -> Event:
        """Return an event of the current utterance without copying its text and tokens; see `Event.__getattr__`.

        `end` is by default that of the last token with text.
        """
        current, event = self._current, object.__new__(Event)
        transcript = current.transcript
        tokens, parts = transcript.tokens, transcript.parts
        last, length, text_length = tokens[current.last_visible].end, len(tokens), current.length
        event.__dict__.update(
            kind=kind,
            utterance=self._number,
            start=min(current.start, last),
            end=last if end is None else end,
            audio=step.audio,
            chunk_ms=step.chunk_ms,
            reason=None,
            grouper=current.grouper,
            text_from=current.event_length,
            tokens_from=current.event_tokens,
            language=reported_language(current.set_language, current.language),
            set_language=current.set_language,
            _prefix=_new_prefix(
                (
                    transcript,
                    length,
                    len(parts),
                    text_length if kind == "final" else current.stable_length,
                    "".join(parts[current.event_parts :]),
                )
            ),
        )
        if kind != "backchannel":  # a consumer may ignore backchannels: the next event repeats what is new in it
            current.event_length, current.event_tokens, current.event_parts = text_length, length, len(parts)
        return event


class RevisableText:
    """The text of a growing list of tokens of which the last may be replaced.

    Time and memory are proportional to the tokens that are new or not settled, and to the copied text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self.settled: list[Token] = []  # tokens that are not replaced any more
        self.settled_text = ""

    def settle(self, tokens: Sequence[Token]) -> None:
        """Append tokens that are not replaced any more."""
        self.settled += tokens
        self.settled_text += self._detokenizer.add([token.id for token in tokens])

    def with_tokens(self, tokens: Sequence[Token], final: bool = False) -> str:
        """Return the text of the settled tokens and `tokens`; if `final`, including an incomplete character."""
        detokenizer = copy.copy(self._detokenizer)
        text = self.settled_text + detokenizer.add([token.id for token in tokens])
        return text + detokenizer.flush() if final else text


def _common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the longest common prefix."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


class RevisableEventBuilder:
    """Create the events of a stream whose partials may be revised: those of two lanes (`runtime/streaming/lanes.py`).

    As `EventBuilder`, except that a partial may replace what follows the `stable` text of the previous one. If the
    final of an utterance with partials has no text, its text is empty.

    To continue a stream, `number` is that of its current utterance, `end_sample` is where the last one ended, and
    `between_utterances` states whether none has begun since.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        aggregation: str,
        rate: int,
        *,
        number: int = 0,
        end_sample: int = 0,
        between_utterances: bool = False,
    ) -> None:
        self._tokenizer, self._aggregation, self._rate = tokenizer, aggregation, rate
        self._number, self._end_sample, self._between_utterances = number, end_sample, between_utterances
        self._begin_utterance()

    def state(self, first_token: int, token_count: int, language: str) -> EventState:
        """Return the progress, for a stream that continues with token `first_token` of `token_count`.

        Its current utterance is not part of it: it is the next `partial`.
        """
        between = self._between_utterances
        return EventState(self._number, first_token, self._end_sample, token_count, between, language=language)

    @property
    def begun(self) -> bool:
        """Whether the current utterance has events."""
        return self._last is not None

    def partial(
        self, tokens: Sequence[Token], stable: int, audio: float, chunk_ms: int, language: str = AUTO
    ) -> list[Event]:
        """Return a partial if the current utterance has changed: it has `tokens`, of which `stable` cannot change."""
        dropped = self._count_dropped(tokens)
        tokens, stable = tokens[dropped:], max(stable - dropped, 0)
        if not tokens or (tokens == self._last_tokens and stable == self._last_stable):
            return []
        return [self._event("partial", tokens, stable, _Step(audio, chunk_ms, language))]

    def backchannel(
        self, tokens: Sequence[Token], stable: int, end: float, audio: float, chunk_ms: int, language: str = AUTO
    ) -> list[Event]:
        """Return the event of a backchannel that the model marked at `end`, if there is a current utterance."""
        dropped = self._count_dropped(tokens)
        tokens, stable = tokens[dropped:], max(stable - dropped, 0)
        if not tokens:
            return []
        return [self._event("backchannel", tokens, stable, _Step(audio, chunk_ms, language), end)]

    def end(
        self, tokens: Sequence[Token], end: UtteranceEnd, audio: float, chunk_ms: int, language: str = AUTO
    ) -> list[Event]:
        """Return the final of the current utterance, which has `tokens`, and its end."""
        tokens = tokens[self._count_dropped(tokens) :]
        number, step = self._number, _Step(audio, chunk_ms, language)
        events = []
        if tokens or self._last is not None:
            events.append(self._event("final", tokens, len(tokens), step))
            self._number += 1
        # The last frames of a recording, and thus the end of an utterance, may be after the end of the recording.
        self._end_sample = max(self._end_sample, end.end_sample)
        time = self._end_sample / self._rate
        events.append(Event("end", number, "", "", time, time, audio, chunk_ms, (), end.reason))
        self._between_utterances = True
        self._begin_utterance()
        return events

    def _begin_utterance(self) -> None:
        self._text = RevisableText(self._tokenizer)
        self._grouper = WordGrouper(self._aggregation)
        self._last: Event | None = None  # partial
        self._last_tokens: Sequence[Token] = ()
        self._last_stable = 0

    def _count_dropped(self, tokens: Sequence[Token]) -> int:
        """Return the number of tokens that are not part of the utterance: see `EventBuilder._extend_utterance`."""
        tokenizer, count = self._tokenizer, 0
        while count < len(tokens) and (
            (token := tokens[count].id) in tokenizer.invisible
            or (self._between_utterances and tokenizer.closing_punctuation[token])
        ):
            count += 1
        if count < len(tokens):
            while count and tokens[count - 1].text.isspace():
                count -= 1
        return count

    def _event(
        self,
        kind: Literal["partial", "backchannel", "final"],
        tokens: Sequence[Token],
        stable: int,
        step: _Step,
        end: float | None = None,
    ) -> Event:
        builder, settled = self._text, self._text.settled
        if any(old is not new for old, new in zip(settled, tokens, strict=False)) or len(settled) > len(tokens):
            builder = self._text = RevisableText(self._tokenizer)  # clipped tokens, or the lanes disagree
            settled, self._grouper = builder.settled, WordGrouper(self._aggregation)
        if stable > len(settled) and kind != "final":
            builder.settle(tokens[len(settled) : stable])
            self._grouper.changed_words(settled, len(settled), len(settled), False)
        text = builder.with_tokens(tokens[len(settled) :], kind == "final")
        last = self._last
        visible = [token for token in tokens if token.id not in self._tokenizer.invisible]
        stop = visible[-1].end if visible else last.end if last else 0.0
        event = Event(
            kind,
            self._number,
            text,
            text if kind == "final" else builder.settled_text.rstrip(),
            min(tokens[0].time, stop) if tokens else last.start if last else 0.0,
            stop if end is None else end,
            step.audio,
            step.chunk_ms,
            tuple(tokens),
            grouper=self._grouper.copy(),
            text_from=_common_prefix(last.text, text) if last else 0,
            tokens_from=_common_prefix(list(map(id, self._last_tokens)), list(map(id, tokens))),
            language=reported_language(
                step.set_language, next((t.language for t in reversed(tokens) if t.language), None)
            ),
            set_language=step.set_language,
        )
        if kind == "partial":
            self._last, self._last_tokens, self._last_stable = event, tokens, stable
        return event
