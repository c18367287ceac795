"""What a stream says as events: utterances that grow, become final, and end.

The grammar of a stream is ``(partial* final? end)*``. Greedy RNNT never takes a token back, so a partial's text is the
beginning of the next one's and of the final's; only its last word may still grow, and `stable` is what is before it.

What the module does not know: when utterances end, streams, the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from nemostream.runtime.endpoint import End, Reason
from nemostream.runtime.tokenizer import Detokenizer, Tokenizer
from nemostream.runtime.words import Grouping, Token, Word


@dataclass(frozen=True)
class Event:
    """Something that became known of an utterance. Times are seconds of the stream's audio.

    A *partial* is the utterance so far, a *final* all of it, and neither is ever taken back. An *end* says where it
    ended and why: by "silence" or "length" (see `Endpoint`), "forced" by the client, or at the "finish" of the stream.
    An utterance in which nothing was said has no final, and leaves its number to the next.
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
    grouping: Grouping = field(default_factory=lambda: Grouping("min"), repr=False, compare=False)

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The words of `text`, grouped when first asked for. The last one of a partial may still grow."""
        return self.grouping.words(self.tokens, self.kind == "final")

    def with_words(self, words: Sequence[Word]) -> Event:
        """Return this final event with other words, and their text; the tokens stay."""
        text = " ".join(word.text for word in words)
        event = replace(self, text=text, stable=text)
        event.__dict__["words"] = tuple(words)  # the value of the cached property
        return event


class Utterances:
    """Makes the events of one stream, of its tokens and of the ends that were decided."""

    def __init__(self, tokenizer: Tokenizer, aggregation: str, rate: int) -> None:
        self._tokenizer, self._aggregation, self._rate = tokenizer, aggregation, rate
        self._number = 0
        self._begin = 0  # tokens of earlier utterances
        self._at = 0  # sample that the last one ended at
        self._known = 0  # tokens that were told of, or are of earlier ones
        self._text, self._words = Detokenizer(tokenizer), Grouping(aggregation)

    def step(
        self, tokens: Sequence[Token], count: int, ends: Sequence[End], audio: float, chunk_ms: int
    ) -> list[Event]:
        """What a step made known: after it the stream has the first `count` of `tokens`."""
        events: list[Event] = []
        for end in ends:
            events += self._end(tokens, end, audio, chunk_ms)
        if count > self._known:
            events.append(
                self._said("partial", self._read(tokens, count), tokens[self._begin : count], audio, chunk_ms)
            )
        return events

    def finish(self, tokens: Sequence[Token], at: int, audio: float, chunk_ms: int) -> list[Event]:
        """The stream is over, at this sample."""
        return self._end(tokens, End(len(tokens), at, "finish"), audio, chunk_ms)

    def _read(self, tokens: Sequence[Token], count: int) -> str:
        new = [token.id for token in tokens[self._known : count]]
        self._known = count
        return self._text.push(new)

    def _end(self, tokens: Sequence[Token], end: End, audio: float, chunk_ms: int) -> list[Event]:
        self._read(tokens, end.count)
        # The last frames of a recording stand a little after its end, and so may an utterance's.
        self._at = max(self._at, end.at)
        said, at, events = tokens[self._begin : end.count], self._at / self._rate, []
        if said:
            events.append(self._said("final", self._text.finish(), said, audio, chunk_ms))
        events.append(Event("end", self._number, "", "", at, at, audio, chunk_ms, (), end.reason))
        if said:
            self._number += 1
            self._begin = end.count
            self._text, self._words = Detokenizer(self._tokenizer), Grouping(self._aggregation)
        return events

    def _said(
        self, kind: Literal["partial", "final"], text: str, tokens: Sequence[Token], audio: float, chunk_ms: int
    ) -> Event:
        whole = text.rsplit(maxsplit=1)[:-1] or [""]
        stable = text if kind == "final" else whole[0]
        return Event(
            kind, self._number, text, stable, tokens[0].time, tokens[-1].end, audio, chunk_ms, tuple(tokens),
            grouping=self._words,
        )  # fmt: skip
