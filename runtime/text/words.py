"""What was said: tokens, the words they make, results.

What the module does not know: streams, the tokenizer (a token carries its text), how anything was recognised.
"""

from __future__ import annotations

import codecs
import re
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nemostream.runtime.decoding.confidence import AGGREGATIONS

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PARTS = re.compile(r"\s+|\S+")
_ENDS = frozenset(".,?!:;")  # punctuation that belongs to the word before it, even after a space
# SentencePiece shows every byte that is no UTF-8 as one of these; Python's own "replace" would join some.
codecs.register_error("nemostream-byte", lambda error: ("\ufffd", getattr(error, "start", 0) + 1))


@dataclass(frozen=True)
class Token:
    """Tokens are compared without `end`, which the end of the recording may clip after the token is known."""

    id: int
    text: str  # its leading space included
    time: float  # seconds from the stream's start: the encoder frame that it was emitted at
    end: float = field(compare=False)  # the end of that frame, or of the recording if that is earlier
    score: float  # natural logarithm of its probability, given everything before
    confidence: float  # 0 to 1, by the stream's `Confidence`


@dataclass(frozen=True)
class Word:
    """A word and the punctuation attached to it. Times are those of NeMo's `timestamps=True`, within the recording."""

    text: str
    start: float  # seconds from the stream's start: the frame of its first token
    end: float  # the end of its last one
    confidence: float  # of its tokens', by the stream's `Confidence`


@dataclass(frozen=True)
class Result:
    """What a stream said up to some moment."""

    text: str
    tokens: tuple[Token, ...]
    duration: float  # seconds of audio received by then; of a final one: of the whole recording
    chunk_ms: int
    final: bool
    decoded: float = 0.0  # seconds of it that the model has heard; silence since the last token is counted from here
    aggregation: str = "min"  # of the words' confidence

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The words of `text`, grouped when first asked for. The last one may still grow while the stream goes on."""
        return group_words(self.tokens, self.aggregation, self.final)


def group_words(tokens: Sequence[Token], aggregation: str = "min", final: bool = True) -> tuple[Word, ...]:
    """Group tokens into words (as NeMo's `get_words_offsets`), in time proportional to them.

    A word begins where the text has a space, be that a token's first character or a token of its own, and takes in
    punctuation that stands apart. `aggregation` makes its confidence of its tokens'. Unless `final`, bytes of a
    character that is not complete at the end are left out, as they are of the text.
    """
    return WordGrouper(aggregation).words(tokens, final)


class WordGrouper:
    """`group_words` for tokens that keep coming: only the last words, which may still change, are grouped again.

    Every call is about the beginning of the same tokens. Threads may share it.
    """

    def __init__(self, aggregation: str) -> None:
        self._aggregation, self._aggregate = aggregation, AGGREGATIONS[aggregation]
        self._lock = threading.Lock()
        self._done: list[Word] = []
        # Places where the tokens can be divided, as (token, word): the word begins with the token, which is in no other
        # word and does not go on with a character. All words before the last one are in `_done`.
        self._marks = [(0, 0)]

    def words(self, tokens: Sequence[Token], final: bool, count: int | None = None) -> tuple[Word, ...]:
        """The words of the first `count` tokens (default: of all)."""
        count = len(tokens) if count is None else count
        first, words = self.since(tokens, count, count, final)
        return (*self._done[:first], *words)

    def since(self, tokens: Sequence[Token], known: int, count: int, final: bool) -> tuple[int, tuple[Word, ...]]:
        """The words of the first `count` tokens that those of the first `known` do not have, or have otherwise.

        Return how many words come before them, and the words: the last word of the known tokens may have grown.
        """
        with self._lock:
            self._settle(tokens, count)
            begin, word = self._marks[max(bisect_left(self._marks, (known, 0)) - 1, 0)]
        part = tokens[begin:count]
        return word, tuple(self._word(part, *group) for group in _groups(part, final))

    def _settle(self, tokens: Sequence[Token], count: int) -> None:
        begin, word = self._marks[-1]
        if count <= begin:  # somebody asks about earlier ones
            return
        part = tokens[begin:count]
        groups = _groups(part, False)
        clean = [
            index
            for index in range(1, len(groups))
            if groups[index][1] > groups[index - 1][2] and part[groups[index][1]].text[:1] != "<"
        ]
        if clean:
            self._done += [self._word(part, *group) for group in groups[: clean[-1]]]
            self._marks += [(begin + groups[index][1], word + index) for index in clean]

    def _word(self, tokens: Sequence[Token], text: str, first: int, last: int) -> Word:
        sure = self._aggregate([token.confidence for token in tokens[first : last + 1]])
        end = tokens[last].end
        # The last frame may stand behind the recording's end, where its tokens end.
        return Word(text, min(tokens[first].time, end), end, sure)

    def __reduce__(self) -> tuple[type[WordGrouper], tuple[str]]:
        return WordGrouper, (self._aggregation,)


def _groups(tokens: Sequence[Token], final: bool) -> list[tuple[str, int, int]]:
    """Text, first and last token of each word."""
    groups: list[tuple[str, int, int]] = []
    growing, space = False, -1  # whether the last group is; a token of mere space, which belongs to the word after it
    for start, end, piece in _pieces(tokens, final):
        for part in _PARTS.findall(piece):
            if part.isspace():
                growing, space = False, start if part == piece else -1
            elif growing or (groups and _ENDS.issuperset(part)):
                text, first, _ = groups[-1]
                groups[-1], growing = (text + part, first, end), True
            else:
                groups.append((part, start if space < 0 else space, end))
                growing, space = True, -1
    return groups


def _pieces(tokens: Sequence[Token], final: bool) -> Iterator[tuple[int, int, str]]:
    """First token, last token and text of everything that has a text: a token, or a character of several bytes."""
    at = 0
    while at < len(tokens):
        text = tokens[at].text
        if text[:1] != "<" or not _BYTE.fullmatch(text):
            yield at, at, text
            at += 1
            continue
        decoder, begin = codecs.getincrementaldecoder("utf-8")("nemostream-byte"), at
        while at < len(tokens) and (byte := _BYTE.fullmatch(tokens[at].text)):
            if text := decoder.decode(bytes([int(byte[1], 16)])):
                yield begin, at, text
                begin = at + 1
            at += 1
        if text := decoder.decode(b"", final or at < len(tokens)):
            yield begin, at - 1, text
