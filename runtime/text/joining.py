"""Join two transcripts of the same audio, recognized with different chunk sizes, at a word boundary.

A decoder with another chunk size may emit the same word a few frames earlier or later. A boundary in time alone would
lose or repeat a word near it. Here, the words near the boundary are aligned by their text first.

This module does not depend on streams or the scheduler. Positions are samples of the stream at the model's sample rate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from nemostream.bundle import Manifest
from nemostream.runtime.text.tokenizer import Tokenizer

_TOLERANCE_FRAMES = 8  # by which the positions of the same word may differ (640 ms at 80 ms per frame)


class TokenSpan(NamedTuple):
    """The tokens [begin, end) of a transcript: their ids, and the samples at which they were emitted."""

    ids: Sequence[int]
    positions: Sequence[int]  # in ascending order
    begin: int
    end: int


class _Word(NamedTuple):
    first: int  # index of its first token
    position: int  # sample of its first token
    text: str  # without case, spaces and punctuation


class Joiner:
    """Aligns transcripts of one model. Thread-safe."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.rate = manifest.features.sample_rate
        self.tolerance = _TOLERANCE_FRAMES * manifest.samples_per_frame  # samples

    def starts_word(self, token: int) -> bool:
        """Return whether a word begins with a token. Closing punctuation belongs to the word before it."""
        return self._tokenizer.word_starts[token] and not self._tokenizer.closing_punctuation[token]

    def complete_words(self, span: TokenSpan) -> int:
        """Return the end of the words that are complete: the index of the first token of the last word."""
        for index in range(span.end - 1, span.begin - 1, -1):
            if self.starts_word(span.ids[index]):
                return index
        return span.begin

    def continuation(self, done: TokenSpan, other: TokenSpan, boundary: int) -> int:
        """Return the index of the token at which `other` continues after the words of `done`.

        `done` has the words up to the sample `boundary`. Words of `other` near it that equal words of `done` are not
        repeated, and other words near it that follow them are not lost.
        """
        near, candidates = self._near(done, boundary), self._near(other, boundary)
        last_done, last = _last_match(near, candidates)
        # Words of `done` without a counterpart replace as many of `other`. Words long before the boundary are complete.
        replaced = sum(word.position >= boundary - self.tolerance for word in near[last_done + 1 :])
        before = sum(word.position < boundary for word in candidates)
        settled = sum(word.position < boundary - self.tolerance for word in candidates)
        known = max(last + 1, settled)
        count = known + max(min(replaced, before - known), 0)
        return self._index(other, candidates, count, boundary)

    def join(self, done: TokenSpan, other: TokenSpan, boundary: int) -> tuple[int, int]:
        """Return the end of the tokens of `done`, and the token of `other` that follows them.

        As `continuation`, except that the last word of `done` is left to `other` if that has more of it.
        """
        last = self.complete_words(done)
        if last < done.end:
            following = self.continuation(done._replace(end=last), other, done.positions[last])
            near = self._words(other._replace(begin=following), 0, done.positions[last] + self.tolerance)
            word = self._word(done, last, done.end)
            if near and near[0].text != word.text and near[0].text.startswith(word.text):
                return last, following
        return done.end, self.continuation(done, other, boundary)

    def end(self, other: TokenSpan, done: TokenSpan, boundary: int, silence: bool) -> int:
        """Return the end of the tokens of `done` that belong to the utterance `other`, which ends at `boundary`.

        These are the words of `done` before the boundary, and those after it that are near it and in `other`. With
        `silence`, the utterance ends after a silence in `other`: words shortly before the boundary that are not in
        `other` begin the next utterance.
        """
        candidates = self._near(done, boundary)
        _, last = _last_match(self._near(other, boundary), candidates)
        limit = boundary - (self.tolerance // 2 if silence else 0)
        before = sum(word.position < limit for word in candidates)
        return self._index(done, candidates, max(before, last + 1), boundary)

    def _near(self, span: TokenSpan, boundary: int) -> list[_Word]:
        """Return the words near the boundary, and those shortly before them, which may have counterparts there."""
        return self._words(span, boundary - 2 * self.tolerance, boundary + self.tolerance)

    def _index(self, span: TokenSpan, near: list[_Word], count: int, boundary: int) -> int:
        """Return the index of the first token after the first `count` of the words near the boundary."""
        if count < len(near):
            return near[count].first
        return self._next_word(span, bisect_left(span.positions, boundary + self.tolerance, span.begin, span.end))

    def _next_word(self, span: TokenSpan, index: int) -> int:
        """Return the index of the first token from `index` on that begins a word, or the end."""
        while index < span.end and not (self.starts_word(span.ids[index]) or index == span.begin):
            index += 1
        return index

    def _words(self, span: TokenSpan, begin: int, end: int) -> list[_Word]:
        """Return the words that begin in the samples [begin, end)."""
        words: list[_Word] = []
        index = self._next_word(span, bisect_left(span.positions, begin, span.begin, span.end))
        while index < span.end and span.positions[index] < end:
            next_word = self._next_word(span, index + 1)
            words.append(self._word(span, index, next_word))
            index = next_word
        return words

    def _word(self, span: TokenSpan, begin: int, end: int) -> _Word:
        text = "".join(map(self._tokenizer.piece, span.ids[begin:end]))
        key = "".join(filter(str.isalnum, text)).casefold()
        return _Word(begin, span.positions[begin], key or text.strip())


def _last_match(first: list[_Word], second: list[_Word]) -> tuple[int, int]:
    """Return the indices of the last pair of equal words in the best alignment; -1 and -1 without one.

    The best alignment has the most pairs, and of those with as many the smallest differences of position.
    """
    # Best alignment of first[:i] and second[:j]: its number of pairs, differences (negative), and last pair
    best = [[(0, 0, (-1, -1))] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            candidates = [best[i][j + 1], best[i + 1][j]]
            if one.text == other.text:
                pairs, difference, _ = best[i][j]
                candidates.append((pairs + 1, difference - abs(one.position - other.position), (i, j)))
            best[i + 1][j + 1] = max(candidates)
    return best[-1][-1][2]
