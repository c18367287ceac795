"""Tokens, words and results. All times are seconds from the start of the stream.

This module does not depend on streams or the tokenizer (a token carries its text).
"""

from __future__ import annotations

import codecs
import itertools
import re
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from nemostream.runtime.decoding.confidence import AGGREGATIONS
from nemostream.runtime.streaming.compiled import TokenFields
from nemostream.runtime.text.languages import LanguageTags
from nemostream.runtime.text.scripts import WordBreaker

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# SentencePiece decodes every invalid UTF-8 byte as U+FFFD; Python's "replace" would merge some of them.
codecs.register_error("nemostream-byte", lambda error: ("\ufffd", getattr(error, "start", 0) + 1))


@dataclass(frozen=True, slots=True)
class Token(TokenFields):
    """An emitted token. `end` is not compared: it may be clipped to the end of the recording later."""

    id: int
    text: str  # including its leading space
    time: float  # seconds: start of the encoder frame at which it was emitted
    end: float = field(compare=False)  # seconds: end of that frame, or of the recording if earlier
    score: float  # natural logarithm of its probability, given the audio and the tokens before it
    confidence: float  # 0 to 1, by the stream's `Confidence`
    language: str | None = None  # of a language tag, such as "de-DE"
    tag: bool = False  # whether it is a tag of the model (`Tokenizer.tags`), whose text is empty


@dataclass(frozen=True)
class Word:
    """A word with its punctuation. Times equal those of NeMo's `timestamps=True`, clipped to the recording."""

    text: str
    start: float  # seconds: time of its first token
    end: float  # seconds: end of its last token
    confidence: float  # 0 to 1: aggregate over its tokens, by the stream's `Confidence`
    language: str | None = None  # of the language tag that follows it, if the model emitted one
    after_space: bool = True  # whether a space separates it from the preceding word in the text


@dataclass(frozen=True)
class Result:
    """The transcript of a stream up to a point in its audio."""

    text: str
    tokens: tuple[Token, ...]
    duration: float  # seconds of audio received; if final: of the whole recording
    chunk_ms: int  # milliseconds
    final: bool
    decoded: float = 0.0  # seconds of audio processed by the model; trailing silence is counted up to here
    aggregation: str = "min"  # how the confidence of words is computed from that of tokens
    language: str | None = None  # as set for the stream; with "auto": of the last language tag, None before the first

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The words of `text`, computed on first access. Unless the result is final, the last word may still grow."""
        return group_words(self.tokens, self.aggregation, self.final)


def group_words(tokens: Sequence[Token], aggregation: str = "min", final: bool = True) -> tuple[Word, ...]:
    """Group tokens into words (as NeMo's `get_words_offsets`), in time proportional to the number of tokens.

    A word begins where the text has a space, which may be the first character of a token or a token of its own, and
    includes closing punctuation after a space. In scripts without spaces, a word begins at nearly every character
    (`nemostream.runtime.text.scripts`). A tag removes the white space before it, as in the text, so a word may continue
    after it. `aggregation` names the function of the tokens' confidences that is the word's.
    Unless `final`, the bytes of an incomplete character at the end are omitted, as in the text.
    """
    return WordGrouper(aggregation).words(tokens, final)


def join_words(words: Iterable[Word]) -> str:
    """Return the text of words, with spaces where the original text has them.

    The result equals the text of the tokens, except for white space that words do not have: at both ends of the text,
    before closing and after opening punctuation, and more than one space between words.
    """
    return "".join(f"{' ' if word.after_space else ''}{word.text}" for word in words).lstrip()


# The text of a word, its first and its last token, and whether it is after a space.
_Group = tuple[str, int, int, bool]


class WordGrouper:
    """Incremental `group_words`: only the last words, which may still change, are grouped again.

    All calls must pass prefixes of the same token sequence. Thread-safe.
    """

    __slots__ = ("_aggregate", "_aggregation", "_done", "_done_last", "_lock", "_splits", "_tags")

    def __init__(self, aggregation: str) -> None:
        self._aggregation, self._aggregate = aggregation, AGGREGATIONS[aggregation]
        self._lock = threading.Lock()
        self._tags = LanguageTags()
        self._done: list[Word] = []  # without languages, which later tags define
        self._done_last: list[int] = []  # index of the last token of each
        # Positions at which the tokens can be split, as (token index, word index, after space): the word begins with
        # the token, which is not part of another word and does not continue a character. `_done` has all words before
        # the last split.
        self._splits = [(0, 0, True)]

    def copy(self) -> WordGrouper:
        """Return a grouper for sequences that begin with the tokens of the calls so far."""
        copy = WordGrouper(self._aggregation)
        with self._lock:
            copy._tags = self._tags.copy()
            copy._done, copy._done_last, copy._splits = [*self._done], [*self._done_last], [*self._splits]
        return copy

    def words(self, tokens: Sequence[Token], final: bool, count: int | None = None) -> tuple[Word, ...]:
        """Return the words of the first `count` tokens (default: all)."""
        count = len(tokens) if count is None else count
        first, words = self.changed_words(tokens, count, count, final)
        return (*map(self._labelled, self._done[:first], self._done_last, itertools.repeat(count)), *words)

    def changed_words(
        self, tokens: Sequence[Token], known: int, count: int, final: bool
    ) -> tuple[int, tuple[Word, ...]]:
        """Return the words of the first `count` tokens that differ from those of the first `known` tokens.

        The result is the number of unchanged words before them, and the words. The last word of the known tokens may
        have grown, so it is included; a language tag changes all words back to the previous tag.
        """
        with self._lock:
            self._tags.extend(token.language for token in tokens[self._tags.count : count])
            self._advance(tokens, count)
            if self._tags.labelled(count) > known:
                known = self._tags.labelled(known)
            index = bisect_left(self._splits, (known, 0, False))
            splits = self._splits[max(index - 2, 0) : max(index, 1)]
        begin, word, after_space = splits[-1]
        part = tokens[begin:count]
        groups = _group(part, after_space, final)
        if (
            not groups and len(splits) > 1
        ):  # the first character is incomplete: a request for more tokens added the split
            begin, word, after_space = splits[0]
            part = tokens[begin:count]
            groups = _group(part, after_space, final)
        return word, tuple(self._labelled(self._make_word(part, *group), begin + group[2], count) for group in groups)

    def _advance(self, tokens: Sequence[Token], count: int) -> None:
        """Add the splits of the first `count` tokens, and the words before the last split."""
        begin, word, after_space = self._splits[-1]
        if count <= begin:  # a request for earlier tokens
            return
        part = tokens[begin:count]
        groups = _group(part, after_space, False)
        splits = [
            index
            for index in range(1, len(groups))
            if groups[index][1] > groups[index - 1][2] and part[groups[index][1]].text[:1] != "<"
        ]
        if splits:
            self._done += [self._make_word(part, *group) for group in groups[: splits[-1]]]
            self._done_last += [begin + last for _, _, last, _ in groups[: splits[-1]]]
            self._splits += [(begin + groups[index][1], word + index, groups[index][3]) for index in splits]

    def _make_word(self, tokens: Sequence[Token], text: str, first: int, last: int, after_space: bool) -> Word:
        confidence = self._aggregate([token.confidence for token in tokens[first : last + 1]])
        end = tokens[last].end
        # The frame of the last tokens may begin after the end of the recording, to which their `end` is clipped.
        return Word(text, min(tokens[first].time, end), end, confidence, after_space=after_space)

    def _labelled(self, word: Word, last: int, count: int) -> Word:
        """Return the word with the language of its last token, by the tags among the first `count` tokens."""
        language = self._tags.after(last, count)
        return replace(word, language=language) if language else word

    def __reduce__(self) -> tuple[type[WordGrouper], tuple[str]]:
        return WordGrouper, (self._aggregation,)


def _group(tokens: Sequence[Token], after_space: bool, final: bool) -> list[_Group]:
    """Return the words. `after_space`: whether the tokens follow a space."""
    groups: list[_Group] = []
    breaker = WordBreaker()
    space = -1  # a token that is only a space and belongs to the next word; -1: none
    for start, end, piece in _decode_bytes(tokens, final):
        if tokens[end].tag:  # the text does not have the white space before it
            breaker.drop_space()
            after_space, space = after_space and not groups, -1
        for part, kind in breaker.split(piece):
            if kind == "space":
                after_space, space = True, start if part == piece else -1
            elif kind == "rest":
                text, first, _, spaced = groups[-1]
                groups[-1], after_space, space = (text + part, first, end, spaced), False, -1
            else:
                groups.append((part, start if space < 0 else space, end, after_space))
                after_space, space = False, -1
    return groups


def _decode_bytes(tokens: Sequence[Token], final: bool) -> Iterator[tuple[int, int, str]]:
    """Yield the first token, last token and text of each token; the byte pieces of a character are joined."""
    index = 0
    while index < len(tokens):
        text = tokens[index].text
        if text[:1] != "<" or not _BYTE_PIECE.fullmatch(text):
            yield index, index, text
            index += 1
            continue
        decoder, begin = codecs.getincrementaldecoder("utf-8")("nemostream-byte"), index
        while index < len(tokens) and (byte := _BYTE_PIECE.fullmatch(tokens[index].text)):
            if text := decoder.decode(bytes([int(byte[1], 16)])):
                yield begin, index, text
                begin = index + 1
            index += 1
        if text := decoder.decode(b"", final or index < len(tokens)):
            yield begin, index - 1, text
