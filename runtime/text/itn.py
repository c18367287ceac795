"""Inverse text normalisation: spoken words (*twenty two dollars*) as they are written (*$22*).

The rules are NVIDIA's `nemo_text_processing` (Zhang et al., 2021), of the extra `itn`. It knows plain text only; here
words keep their times: what it changed is found again among the words, and each written word stands for the spoken ones
that it came of.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import TYPE_CHECKING

from nemostream.errors import BackendError
from nemostream.extras import install_command

if TYPE_CHECKING:
    from nemostream.runtime.text.words import Word

# Punctuation around a word; the rules want words without.
_PARTS = re.compile(r"(?s)([\"'“‘(\[¿¡]*)(.*?)([.,?!;:…\"'”’)\]]*)")
_COMPOUND = re.compile(r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty-[a-z]+")

_PAUSE = 0.8  # seconds between words that are no number together
_LONGEST = 100  # words that the rules get at a time: theirs is not the time to read a book
_AHEAD = 20  # words: most numbers have fewer

# Some words as they were, or a written form and the words that it came of: (form or None, first, behind the last).
_Piece = tuple[str | None, int, int]


class InverseNormalizer:
    """English numbers, dates, times and amounts as people write them. Call it with words; threads may share it.

    Making one takes seconds. Raises `BackendError` if the extra is not installed.
    """

    def __init__(self) -> None:
        try:
            logger = logging.getLogger("NeMo-text-processing")
            from nemo_text_processing.inverse_text_normalization.inverse_normalize import InverseNormalizer as Rules

            logger.handlers.clear()  # its own, which tells of every grammar
            rules = Rules(lang="en")
        except ImportError as error:
            raise BackendError(f"--itn needs more ({error}): {install_command('itn')}") from error
        lock = threading.Lock()  # its parser has a state

        @lru_cache(4096)
        def written(spoken: str) -> str:
            with lock:
                return rules.inverse_normalize(spoken, verbose=False)

        self._written: Callable[[str], str] = written

    def __call__(self, words: Sequence[Word]) -> tuple[Word, ...]:
        """The words as they are written, for finished utterances: more words could make another number of these.

        Nothing is joined over punctuation or a pause. A written word begins and ends as the spoken ones it came of
        and is as certain as the least certain of them; where those became several that cannot be told apart (*july 4
        1999* of a date), they share the time in proportion to their letters. Words that the rules fail on stay.
        """
        found: list[Word] = []
        run: list[Word] = []
        for word in words:
            lead, _, trail = _split(word.text)
            if run and (lead or word.start - run[-1].end > _PAUSE):
                found += self._run(run)
                run = []
            run.append(word)
            if trail:
                found += self._run(run)
                run = []
        return (*found, *self._run(run)) if run else tuple(found)

    def _run(self, words: list[Word]) -> list[Word]:
        """Words with punctuation before the first and after the last only."""
        if len(words) > _LONGEST:  # in two, where the voice rested longest
            middle = range(len(words) // 4, 3 * len(words) // 4)
            at = max(middle, key=lambda index: words[index].start - words[index - 1].end)
            return [*self._run(words[:at]), *self._run(words[at:])]
        lead, trail = _split(words[0].text)[0], _split(words[-1].text)[2]
        cores = [_split(word.text)[1] for word in words]
        spoken: list[str] = []  # the rules know "twenty two" and lower case
        owner: list[int] = []  # of each, the word it is of
        for index, core in enumerate(cores):
            parts = core.lower().split("-") if _COMPOUND.fullmatch(core.lower()) else [core.lower()]
            spoken += parts
            owner += [index] * len(parts)
        try:
            if not all(spoken) or any(character.isspace() for core in spoken for character in core):
                return words
            forms = self._written(" ".join(spoken)).split()
            if forms == spoken or not forms:
                return words
            pieces = _whole(self._aligned(spoken, forms), spoken, owner)
        except Exception:  # of a grammar, which is no reason to lose what was said
            return words
        found: list[Word] = []
        for form, first, last in pieces:
            if form is None:
                found += words[first:last]
                continue
            if cores[first][:1].isupper():
                form = form[:1].upper() + form[1:]
            form = (lead if first == 0 else "") + form
            if last == len(words):
                form += trail[1:] if form.endswith(".") and trail.startswith(".") else trail
            found += _shared(form.split(), words[first:last])
        return found

    def _aligned(self, spoken: list[str], forms: list[str]) -> list[_Piece]:
        """Which forms came of which words."""
        pieces: list[_Piece] = []
        for kind, first, last, begin, end in SequenceMatcher(None, spoken, forms, autojunk=False).get_opcodes():
            if kind == "equal":
                pieces += [(None, index, index + 1) for index in range(first, last)]
            elif kind == "replace":
                pieces += self._divided(spoken, first, last, forms[begin:end])
            # Words that left, or came, belong to a neighbour.
            elif pieces:
                form, before, _ = pieces.pop()
                pieces.append((" ".join([form or spoken[before], *forms[begin:end]]), before, last))
            else:
                raise ValueError("a form of nothing")
        return pieces

    def _divided(self, spoken: list[str], first: int, last: int, forms: list[str]) -> list[_Piece]:
        """The smallest pieces that, normalised alone, become these forms, as far as `_AHEAD` words let see."""
        for middle in range(first + 1, min(last, first + _AHEAD)):
            head = self._written(" ".join(spoken[first:middle])).split()
            if head != forms[: len(head)] or len(head) == len(forms):
                continue
            left, seen = forms[len(head) :], min(last, middle + _AHEAD)
            tail = self._written(" ".join(spoken[middle:seen])).split()
            if tail == left if seen == last else tail[:1] == left[:1]:
                form = None if head == spoken[first:middle] else " ".join(head)
                return [(form, first, middle), *self._divided(spoken, middle, last, left)]
        return [(" ".join(forms), first, last)]


def _split(text: str) -> tuple[str, str, str]:
    match = _PARTS.fullmatch(text)
    assert match is not None  # its middle takes anything
    return match[1], match[2], match[3]


def _whole(pieces: list[_Piece], spoken: list[str], owner: list[int]) -> list[_Piece]:
    """Pieces of words, made of pieces of parts of words: none has a part of a word only."""
    found: list[_Piece] = []
    waiting: list[_Piece] = []
    for piece in pieces:
        waiting.append(piece)
        first, last = waiting[0][1], piece[2]
        if last == len(owner) or owner[last] != owner[last - 1]:
            form = None
            if any(form is not None for form, _, _ in waiting):
                form = " ".join(" ".join(spoken[a:b]) if form is None else form for form, a, b in waiting)
            found.append((form, owner[first], owner[last - 1] + 1))
            waiting = []
    return found


def _shared(forms: list[str], words: Sequence[Word]) -> list[Word]:
    """Forms in the time of the words that they came of."""
    start, end = words[0].start, max(word.end for word in words)
    letters, at, found = sum(map(len, forms)), 0, []
    for form in forms:
        begin, at = at, at + len(form)
        found.append(
            dataclasses.replace(
                words[0],
                text=form,
                start=start + (end - start) * begin / letters,
                end=start + (end - start) * at / letters,
                confidence=min(word.confidence for word in words),
            )
        )
    return found
