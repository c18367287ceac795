"""The events of a stream: partial and final transcripts of utterances, and their ends.

The grammar of a stream is ``(partial* final? end)*``. Greedy RNN-T decoding never revises a token, so the text of a
partial is a prefix of that of the next event. Only its last word may still grow; `stable` is the text before it.

All events of an utterance share its tokens and its text. Creating an event takes time and memory proportional to what
is new in it, so the cost of all events of an utterance is proportional to the number of its tokens.

This module does not depend on endpointing rules, streams or the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from nemostream.runtime.text.endpointing import Reason, UtteranceEnd
from nemostream.runtime.text.scripts import WordBreaker
from nemostream.runtime.text.tokenizer import Detokenizer, Tokenizer
from nemostream.runtime.text.words import Token, Word, WordGrouper, join_words


@dataclass(frozen=True)
class Event:
    """An update of an utterance. Times are seconds from the start of the stream.

    A *partial* has the transcript of the utterance so far, a *final* the complete one; neither is ever revised. An
    *end* states when and why the utterance ended: by "silence" or "length" (see `Endpoint`), "forced" by the client,
    or at the "finish" of the stream. An utterance without any token has no final, and the next utterance has the same
    number.

    `text`, `stable`, `tokens` and `words` cover the whole utterance and are computed when they are read. A consumer
    that keeps the values of earlier events can read only what is new, in time proportional to that:

        text = text[: event.text_from] + event.new_text
        tokens = tokens[: event.tokens_from] + event.new_tokens
        words = words[: event.words_from] + event.new_words
    """

    kind: Literal["partial", "final", "end"]
    utterance: int  # number of the utterance, from 0
    text: str  # of the utterance; empty for an end
    stable: str  # the prefix of `text` that consists of complete words
    start: float  # time of the first token, in seconds; for an end: when the utterance ended
    end: float  # end of the last token, in seconds; for an end: when the utterance ended
    audio: float  # seconds of audio received
    chunk_ms: int  # milliseconds
    tokens: tuple[Token, ...] = field(repr=False)  # of the utterance; empty for an end
    reason: Reason | None = None  # why the utterance ended, for an end
    grouper: WordGrouper = field(default_factory=lambda: WordGrouper("min"), repr=False, compare=False)
    text_from: int = field(default=0, repr=False)  # characters of `text` in the previous event of the utterance
    tokens_from: int = field(default=0, repr=False)  # tokens that are unchanged since the previous event

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
        tokens, count = self._token_prefix()
        return self.grouper.changed_words(tokens, self.tokens_from, count, self.kind == "final")

    def with_words(self, words: Sequence[Word]) -> Event:
        """Return this final event with other words and their text; the tokens are unchanged."""
        text = join_words(words)
        event = replace(self, text=text, stable=text, text_from=0)
        event.__dict__["_rewritten"] = tuple(words)
        return event

    def __reduce__(self) -> tuple[Any, ...]:
        return Event, tuple(getattr(self, item.name) for item in fields(self))

    if not TYPE_CHECKING:  # a type checker would accept any attribute name

        def __getattr__(self, name: str) -> Any:
            """Compute the fields that events of `EventBuilder` do not store."""
            prefix = self.__dict__.get("_prefix")
            if prefix is None or name not in ("text", "stable", "tokens"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(prefix, name)


class _Transcript:
    """The tokens of an utterance and its text in parts, shared by its events. Both lists only grow."""

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


@dataclass(frozen=True, eq=False, slots=True)
class _Prefix:
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


class _CurrentUtterance:
    """The utterance that new tokens are added to."""

    def __init__(self, tokenizer: Tokenizer, aggregation: str) -> None:
        self.transcript = _Transcript([], [])
        self.grouper = WordGrouper(aggregation)
        self.event_length = self.event_tokens = self.event_parts = 0  # characters, tokens, parts of the last event
        self.length = 0  # characters of the text
        self.stable_length = 0  # characters before the last word and the white space before it
        self._space: int | None = None  # position of the white space at the end of the text, if any
        self._breaker = WordBreaker()
        self._detokenizer = Detokenizer(tokenizer)

    def add(self, tokens: Sequence[Token]) -> None:
        self.transcript.tokens += tokens
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

    def _append(self, text: str) -> None:
        """Append to the text, and update `stable_length`."""
        self.transcript.parts.append(text)
        for part, kind in self._breaker.split(text):
            if kind == "space":
                if self._space is None:
                    self._space = self.length
            elif self._space is not None:
                self.stable_length, self._space = self._space, None
            elif kind == "word":
                self.stable_length = self.length
            self.length += len(part)


class EventBuilder:
    """Create the events of one stream from its tokens and the ends of its utterances.

    `aggregation` defines the confidence of words (see `Confidence`), `rate` is the sample rate of `UtteranceEnd`.
    """

    def __init__(self, tokenizer: Tokenizer, aggregation: str, rate: int) -> None:
        self._tokenizer, self._aggregation, self._rate = tokenizer, aggregation, rate
        self._number = 0  # of the current utterance
        self._first_token = 0  # index of its first token in the stream
        self._end_sample = 0  # at which the last utterance ended
        self._token_count = 0  # tokens of the stream that have been processed
        self._between_utterances = False  # whether an utterance has ended and none has begun since
        self._current = _CurrentUtterance(tokenizer, aggregation)

    def step(
        self, tokens: Sequence[Token], token_count: int, ends: Sequence[UtteranceEnd], audio: float, chunk_ms: int
    ) -> list[Event]:
        """Return the events of a step, after which the stream has the first `token_count` of `tokens`.

        `audio` is the duration of the received audio in seconds.
        """
        events: list[Event] = []
        for end in ends:
            events += self._end_utterance(tokens, end, audio, chunk_ms)
        if self._add_tokens(tokens, token_count):
            events.append(self._make_event("partial", audio, chunk_ms))
        return events

    def finish(self, tokens: Sequence[Token], end_sample: int, audio: float, chunk_ms: int) -> list[Event]:
        """Return the last events of the stream, which ends at `end_sample`."""
        return self._end_utterance(tokens, UtteranceEnd(len(tokens), end_sample, "finish"), audio, chunk_ms)

    def _add_tokens(self, tokens: Sequence[Token], token_count: int) -> bool:
        """Process the first `token_count` tokens of the stream; return whether they extend the current utterance.

        Punctuation after the end of an utterance belongs to that utterance. Its final has already been sent, so this
        punctuation is dropped.
        """
        first = self._token_count
        if self._between_utterances:
            while first < token_count and self._tokenizer.closing_punctuation[tokens[first].id]:
                first += 1
            self._first_token = first
        self._token_count = token_count
        if first == token_count:
            return False
        self._between_utterances = False
        self._current.add(tokens[first:token_count])
        return True

    def _end_utterance(self, tokens: Sequence[Token], end: UtteranceEnd, audio: float, chunk_ms: int) -> list[Event]:
        self._add_tokens(tokens, end.token_count)
        # The last frames of a recording, and thus the end of an utterance, may be after the end of the recording.
        self._end_sample = max(self._end_sample, end.end_sample)
        time, events = self._end_sample / self._rate, []
        if self._current.transcript.tokens:
            self._current.finish(tokens, self._first_token)
            events.append(self._make_event("final", audio, chunk_ms))
        events.append(Event("end", self._number, "", "", time, time, audio, chunk_ms, (), end.reason))
        self._number += len(events) - 1
        self._current = _CurrentUtterance(self._tokenizer, self._aggregation)
        self._first_token, self._between_utterances = end.token_count, True
        return events

    def _make_event(self, kind: Literal["partial", "final"], audio: float, chunk_ms: int) -> Event:
        """Return an event of the current utterance without copying its text and tokens; see `Event.__getattr__`."""
        current, event = self._current, object.__new__(Event)
        transcript = current.transcript
        tokens, parts = transcript.tokens, transcript.parts
        end = tokens[-1].end
        event.__dict__.update(
            kind=kind,
            utterance=self._number,
            start=min(tokens[0].time, end),
            end=end,
            audio=audio,
            chunk_ms=chunk_ms,
            reason=None,
            grouper=current.grouper,
            text_from=current.event_length,
            tokens_from=current.event_tokens,
            _prefix=_Prefix(
                transcript,
                len(tokens),
                len(parts),
                current.length if kind == "final" else current.stable_length,
                "".join(parts[current.event_parts :]),
            ),
        )
        current.event_length, current.event_tokens, current.event_parts = current.length, len(tokens), len(parts)
        return event
