"""The events of a stream: utterances that grow, become final, and end.

The grammar of a stream is ``(partial* final? end)*``. Greedy RNNT never takes a token back, so a partial's text is the
beginning of the next one's and of the final's; only its last word may still grow, and `stable` is what is before it.

All events of an utterance share its tokens and its text. Making one takes time and memory proportional to what is new
in it, so the events of an utterance of any length cost as much as its tokens.

What the module does not know: when utterances end, streams, the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from nemostream.runtime.text.endpointing import Reason, UtteranceEnd
from nemostream.runtime.text.tokenizer import Detokenizer, Tokenizer
from nemostream.runtime.text.words import Token, Word, WordGrouper


@dataclass(frozen=True)
class Event:
    """Something that became known of an utterance. Times are seconds of the stream's audio.

    A *partial* is the utterance so far, a *final* all of it, and neither is ever taken back. An *end* says where it
    ended and why: by "silence" or "length" (see `Endpoint`), "forced" by the client, or at the "finish" of the stream.
    An utterance in which nothing was said has no final, and leaves its number to the next.

    `text`, `stable`, `tokens` and `words` are the whole utterance's, put together when they are read. Whoever keeps
    what earlier events had reads only what is new, in time proportional to that:

        text = text[: event.text_from] + event.new_text
        tokens = tokens[: event.tokens_from] + event.new_tokens
        words = words[: event.words_from] + event.new_words
    """

    kind: Literal["partial", "final", "end"]
    utterance: int  # from 0
    text: str  # of the utterance; empty at its end
    stable: str  # the part of it that is whole words: it never changes
    start: float  # of the first token; of an end: where the utterance ended
    end: float  # of the last token; of an end: where the utterance ended
    audio: float  # received by then
    chunk_ms: int
    tokens: tuple[Token, ...] = field(repr=False)
    reason: Reason | None = None  # of an end
    grouper: WordGrouper = field(default_factory=lambda: WordGrouper("min"), repr=False, compare=False)
    text_from: int = field(default=0, repr=False)  # characters of `text` that the utterance's previous event had
    tokens_from: int = field(default=0, repr=False)  # tokens that are as in the previous event

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of `text`, grouped when they are asked for. The last one of a partial may still grow."""
        if (rewritten := self.__dict__.get("_rewritten")) is not None:
            return rewritten
        tokens, count = self._said()
        return self.grouper.words(tokens, self.kind == "final", count)

    @property
    def words_from(self) -> int:
        """Words that are as in the utterance's previous event; those from here on are new, or may have changed."""
        return self._new_words()[0]

    @property
    def new_words(self) -> tuple[Word, ...]:
        """The words from `words_from` on."""
        return self._new_words()[1]

    @property
    def new_text(self) -> str:
        """What `text` has more than the utterance's previous event."""
        part = self.__dict__.get("_part")
        return self.text[self.text_from :] if part is None else part

    @property
    def new_tokens(self) -> tuple[Token, ...]:
        """The tokens from `tokens_from` on. Those that a final repeats have had their ends clipped to the recording."""
        tokens, count = self._said()
        return tuple(tokens[self.tokens_from : count])

    @property
    def stable_length(self) -> int:
        """Characters of `stable`."""
        length = self.__dict__.get("_stable")
        return len(self.stable) if length is None else length

    def _said(self) -> tuple[Sequence[Token], int]:
        """Tokens that begin with those of the event, and how many it has."""
        shared = self.__dict__.get("_shared")
        return (self.tokens, len(self.tokens)) if shared is None else (shared.tokens, self.__dict__["_count"])

    def _new_words(self) -> tuple[int, tuple[Word, ...]]:
        tokens, count = self._said()
        return self.grouper.since(tokens, self.tokens_from, count, self.kind == "final")

    def with_words(self, words: Sequence[Word]) -> Event:
        """Return this final event with other words, and their text; the tokens stay."""
        text = " ".join(word.text for word in words)
        event = replace(self, text=text, stable=text, text_from=0)
        event.__dict__["_rewritten"] = tuple(words)
        return event

    def __reduce__(self) -> tuple[Any, ...]:
        return Event, tuple(getattr(self, one.name) for one in fields(self))

    if not TYPE_CHECKING:  # a type checker would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """The fields that an event of `EventBuilder` does not hold itself."""
            shared = self.__dict__.get("_shared")
            if shared is None or name not in ("text", "stable", "tokens"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            if name == "tokens":
                return tuple(shared.tokens[: self._count])
            text = shared.text(self._parts)
            return text if name == "text" else text[: self._stable]


class _Shared:
    """What the events of one utterance have in common. Lists only grow, so that the beginnings they refer to stay."""

    def __init__(self, tokens: list[Token], parts: list[str]) -> None:
        self.tokens, self.parts = tokens, parts
        self._joined = 0, ""  # the newest text that was asked for; one attribute, as threads may read events

    def text(self, parts: int) -> str:
        joined, text = self._joined
        if parts < joined:
            return "".join(self.parts[:parts])
        if parts > joined:
            text += "".join(self.parts[joined:parts])
            self._joined = parts, text
        return text


class _Utterance:
    """An utterance under way."""

    def __init__(self, tokenizer: Tokenizer, aggregation: str) -> None:
        self.shared = _Shared([], [])
        self.grouper = WordGrouper(aggregation)
        self.told_text = self.told_tokens = self.told_parts = 0  # of the event before
        self.length = 0  # characters
        self.stable = 0  # of them, before the last word and the space before it
        self._space: int | None = None  # where white space at the end begins, if there is any
        self._detokenizer = Detokenizer(tokenizer)

    def add(self, tokens: Sequence[Token]) -> None:
        self.shared.tokens += tokens
        self._write(self._detokenizer.add([token.id for token in tokens]))

    def finish(self, tokens: Sequence[Token], begin: int) -> None:
        """Nothing more is added. `tokens` from `begin` on are the utterance's; the last ones may have changed."""
        self._write(self._detokenizer.rest())
        at, known = len(self.shared.tokens), self.shared.tokens
        while at and known[at - 1] is not tokens[begin + at - 1]:
            at -= 1
        if at < len(known):  # earlier events keep what they had
            self.shared = _Shared([*known[:at], *tokens[begin + at : begin + len(known)]], self.shared.parts)
            self.told_tokens = min(self.told_tokens, at)

    def _write(self, text: str) -> None:
        self.shared.parts.append(text)
        began, self.length = self.length, self.length + len(text)
        said = text.rstrip()
        if not said:
            if text and self._space is None:
                self._space = began
            return
        before, *word = said.rsplit(maxsplit=1)
        if word:
            self.stable = began + len(before)
        elif said[0].isspace():
            self.stable = began if self._space is None else self._space
        elif self._space is not None:
            self.stable = self._space
        self._space = began + len(said) if len(said) < len(text) else None


class EventBuilder:
    """Makes the events of one stream, of its tokens and of the ends that were decided."""

    def __init__(self, tokenizer: Tokenizer, aggregation: str, rate: int) -> None:
        self._tokenizer, self._aggregation, self._rate = tokenizer, aggregation, rate
        self._number = 0
        self._begin = 0  # tokens before the utterance's first
        self._at = 0  # sample that the last one ended at
        self._known = 0  # tokens that were told of, or are of earlier ones
        self._between = False  # whether an utterance ended and none began since
        self._now = _Utterance(tokenizer, aggregation)

    def step(
        self, tokens: Sequence[Token], count: int, ends: Sequence[UtteranceEnd], audio: float, chunk_ms: int
    ) -> list[Event]:
        """What a step made known: after it the stream has the first `count` of `tokens`."""
        events: list[Event] = []
        for end in ends:
            events += self._end(tokens, end, audio, chunk_ms)
        if self._read(tokens, count):
            events.append(self._event("partial", audio, chunk_ms))
        return events

    def finish(self, tokens: Sequence[Token], at: int, audio: float, chunk_ms: int) -> list[Event]:
        """The stream is over, at this sample."""
        return self._end(tokens, UtteranceEnd(len(tokens), at, "finish"), audio, chunk_ms)

    def _read(self, tokens: Sequence[Token], count: int) -> bool:
        """Whether the first `count` tokens of the stream add to the utterance.

        Punctuation after the end of an utterance belongs to that one, whose final is out: it is in no utterance.
        """
        first = self._known
        while self._between and first < count and self._tokenizer.closing_punctuation[tokens[first].id]:
            first += 1
        if self._between:
            self._begin = first
        self._known = count
        if first == count:
            return False
        self._between = False
        self._now.add(tokens[first:count])
        return True

    def _end(self, tokens: Sequence[Token], end: UtteranceEnd, audio: float, chunk_ms: int) -> list[Event]:
        self._read(tokens, end.count)
        # The last frames of a recording stand a little after its end, and so may an utterance's.
        self._at = max(self._at, end.at)
        at, events = self._at / self._rate, []
        if self._now.shared.tokens:
            self._now.finish(tokens, self._begin)
            events.append(self._event("final", audio, chunk_ms))
        events.append(Event("end", self._number, "", "", at, at, audio, chunk_ms, (), end.reason))
        self._number += len(events) - 1
        self._now, self._begin, self._between = _Utterance(self._tokenizer, self._aggregation), end.count, True
        return events

    def _event(self, kind: Literal["partial", "final"], audio: float, chunk_ms: int) -> Event:
        """The utterance as it is now. Its text and tokens are not copied; see `Event.__getattr__`."""
        now, event = self._now, object.__new__(Event)
        shared = now.shared
        tokens, parts = shared.tokens, len(shared.parts)
        end = tokens[-1].end
        event.__dict__.update(
            kind=kind,
            utterance=self._number,
            start=min(tokens[0].time, end),
            end=end,
            audio=audio,
            chunk_ms=chunk_ms,
            reason=None,
            grouper=now.grouper,
            text_from=now.told_text,
            tokens_from=now.told_tokens,
            _shared=shared,
            _count=len(tokens),
            _parts=parts,
            _part="".join(shared.parts[now.told_parts :]),
            _stable=now.length if kind == "final" else now.stable,
        )
        now.told_text, now.told_tokens, now.told_parts = now.length, len(tokens), parts
        return event
