"""Inverse text normalization: convert spoken words (*twenty two dollars*) to written form (*$22*).

The grammars are those of NVIDIA's `nemo_text_processing` (Zhang et al., 2021), the `itn` extra, which processes plain
text. This module preserves the times of words: it aligns the written text with the spoken words, so that each written
word has the times of the spoken words that it replaces.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import threading
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import TYPE_CHECKING

from nemostream.errors import BackendError, OptionError
from nemostream.extras import install_command
from nemostream.runtime.text.languages import AUTO
from nemostream.runtime.text.scripts import CLOSING, OPENING, begins_unspaced, ends_unspaced, unbreakable_spans
from nemostream.untrusted import short_repr

if TYPE_CHECKING:
    from nemostream.runtime.text.words import Word

LANGUAGES = ("ar", "de", "en", "es", "fr", "he", "hi", "hy", "ja", "ko", "mr", "pt", "ru", "sv", "vi", "zh")
_UNSPACED = ("ja", "zh")  # written without spaces, also in the grammars

# Punctuation before a word, the word, punctuation after it. The grammars require words without punctuation.
_QUOTES = "\"'«»“”„‘’‚‹›"
_PARTS = re.compile(
    rf"(?s)([{re.escape(_QUOTES + ''.join(sorted(OPENING)))}]*)(.*?)"
    rf"([{re.escape(_QUOTES + ''.join(sorted(CLOSING)))}]*)"
)
_COMPOUND = re.compile(r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty-[a-z]+")  # English

_MAX_PAUSE = 0.8  # seconds between two words of a number
_MAX_WORDS = 100  # words per call of the grammars, whose run time grows faster than the number of words
_LOOKAHEAD = 20  # words; most numbers have fewer

# A written form (None: unchanged) and the range of words that it replaces: (form, begin, end).
_Span = tuple[str | None, int, int]


def code_of(language: str | None) -> str | None:
    """Return the language of the grammars for a language such as "de-DE" or "PT_br", None if there are none."""
    code = re.split("[-_]", language, maxsplit=1)[0].lower() if isinstance(language, str) else ""
    return code if code in LANGUAGES else None


def check_language(language: str) -> str:
    """Return the language of the grammars for a language such as "de-DE", or "auto".

    Raises `OptionError` if there are none.
    """
    code = AUTO if isinstance(language, str) and language.lower() == AUTO else code_of(language)
    if code is None:
        raise OptionError(
            f"inverse text normalization does not support the language {short_repr(language)}; it supports "
            f"{', '.join(LANGUAGES)}, and auto."
        )
    return code


class InverseNormalizer:
    """Convert numbers, dates, times and amounts to written form. A callable on words. Thread-safe.

    `language` is one of `LANGUAGES`, with or without a region. With "auto", the grammars are those of the language tag
    of each word (`Word.language`) and are loaded when they are first needed; words without a tag, and words of a
    language without grammars, are unchanged.

    Construction takes seconds, in some languages a minute. Raises `BackendError` if the extra is not installed,
    `OptionError` if the language has no grammars.
    """

    def __init__(self, language: str = "en") -> None:
        self.language = check_language(language)
        self._tagged: dict[str, InverseNormalizer] = {}  # by language, for "auto"
        self._loading = threading.Lock()
        try:
            logger = logging.getLogger("NeMo-text-processing")
            from nemo_text_processing.inverse_text_normalization.inverse_normalize import InverseNormalizer as Rules

            logger.handlers.clear()  # its handler logs every grammar
            rules = None if self.language == AUTO else Rules(lang=self.language)
        except ImportError as error:
            raise BackendError(
                f"inverse text normalization needs more packages ({error}): {install_command('itn')}"
            ) from error
        lock = threading.Lock()  # the parser has state

        @lru_cache(4096)
        def normalize(spoken: str) -> str:
            assert rules is not None
            with lock:
                return rules.inverse_normalize(spoken, verbose=False)

        self._normalize: Callable[[str], str] = normalize

    def __call__(self, words: Sequence[Word]) -> tuple[Word, ...]:
        """Return the written words of complete utterances; further words could change a number at the end.

        Words are not combined across punctuation or a pause. A written word has the start and end of the spoken words
        that it replaces, and their lowest confidence. If spoken words are replaced by several words that cannot be
        aligned individually (*july 4 1999* for a date), these share the time in proportion to their characters. Words
        on which the grammars fail are unchanged.
        """
        if self.language == AUTO:
            return self._normalize_tagged(words)
        written: list[Word] = []
        run: list[Word] = []
        for word in words:
            lead, _, trail = _split_punctuation(word.text)
            if run and (lead or word.start - run[-1].end > _MAX_PAUSE or self._other_script(run[-1], word)):
                written += self._normalize_run(run)
                run = []
            run.append(word)
            if trail:
                written += self._normalize_run(run)
                run = []
        return (*written, *self._normalize_run(run)) if run else tuple(written)

    def _normalize_tagged(self, words: Sequence[Word]) -> tuple[Word, ...]:
        """Normalize each part of the words by its language tag."""
        written: list[Word] = []
        for tag, group in itertools.groupby(words, lambda word: word.language):
            part = tuple(group)
            if code := code_of(tag):
                with self._loading:
                    if code not in self._tagged:
                        self._tagged[code] = InverseNormalizer(code)
                part = self._tagged[code](part)
            written += part
        return tuple(written)

    def _other_script(self, before: Word, after: Word) -> bool:
        """Return whether two words cannot be part of one number because one is of a script with spaces."""
        return self.language in _UNSPACED and not (ends_unspaced(before.text) and begins_unspaced(after.text))

    def _split(self, text: str) -> list[str]:
        """Divide a text into words, as those of a transcript."""
        return [text[slice(*span)] for span in unbreakable_spans(text)] if self.language in _UNSPACED else text.split()

    def _join(self, words: Sequence[str]) -> str:
        """Return the text of words that `_split` divides again."""
        return words[0] + "".join(
            word if not self._spaced(before, word) else f" {word}" for before, word in itertools.pairwise(words)
        )

    def _spaced(self, before: str, after: str) -> bool:
        return self.language not in _UNSPACED or not (ends_unspaced(before) or begins_unspaced(after))

    def _normalize_run(self, words: list[Word]) -> list[Word]:
        """Normalize words that have punctuation only before the first and after the last one."""
        if len(words) > _MAX_WORDS:  # split at the longest pause
            middle = range(len(words) // 4, 3 * len(words) // 4)
            split = max(middle, key=lambda index: words[index].start - words[index - 1].end)
            return [*self._normalize_run(words[:split]), *self._normalize_run(words[split:])]
        lead, trail = _split_punctuation(words[0].text)[0], _split_punctuation(words[-1].text)[2]
        cores = [_split_punctuation(word.text)[1] for word in words]
        spoken: list[str] = []  # the grammars require lower case and "twenty two" instead of "twenty-two"
        owner: list[int] = []  # index of the word that each entry of `spoken` is part of
        for index, core in enumerate(cores):
            core = core.lower()
            compound = self.language == "en" and _COMPOUND.fullmatch(core)
            parts = core.split("-") if compound else [core]
            spoken += parts
            owner += [index] * len(parts)
        try:
            if not all(spoken) or any(character.isspace() for core in spoken for character in core):
                return words
            forms = self._split(self._normalize(self._join(spoken)))
            if forms == spoken or not forms:
                return words
            spans = self._to_words(self._align(spoken, forms), spoken, owner)
        except Exception:  # an error of the grammars must not lose the transcript
            return words
        written: list[Word] = []
        for form, first, last in spans:
            if form is None:
                written += words[first:last]
                continue
            if cores[first][:1].isupper():
                form = form[:1].upper() + form[1:]
            form = (lead if first == 0 else "") + form
            if last == len(words):
                form += trail[1:] if form.endswith(".") and trail.startswith(".") else trail
            written += self._share_time(self._split(form), words[first:last])
        return written

    def _align(self, spoken: list[str], forms: list[str]) -> list[_Span]:
        """Return the spans of spoken words that the written forms replace."""
        spans: list[_Span] = []
        for kind, first, last, begin, end in SequenceMatcher(None, spoken, forms, autojunk=False).get_opcodes():
            if kind == "equal":
                spans += [(None, index, index + 1) for index in range(first, last)]
            elif kind == "replace":
                spans += self._divide(spoken, first, last, forms[begin:end])
            # Inserted and deleted words belong to the span before.
            elif spans:
                form, before, _ = spans.pop()
                spans.append((self._join([form or spoken[before], *forms[begin:end]]), before, last))
            else:
                raise ValueError("written words without spoken words")
        return spans

    def _divide(self, spoken: list[str], first: int, last: int, forms: list[str]) -> list[_Span]:
        """Divide into the smallest spans that yield the same forms when normalized alone, within `_LOOKAHEAD` words."""
        for middle in range(first + 1, min(last, first + _LOOKAHEAD)):
            head = self._split(self._normalize(self._join(spoken[first:middle])))
            if head != forms[: len(head)] or len(head) == len(forms):
                continue
            remaining, seen = forms[len(head) :], min(last, middle + _LOOKAHEAD)
            tail = self._split(self._normalize(self._join(spoken[middle:seen])))
            if tail == remaining if seen == last else tail[:1] == remaining[:1]:
                form = None if head == spoken[first:middle] else self._join(head)
                return [(form, first, middle), *self._divide(spoken, middle, last, remaining)]
        return [(self._join(forms), first, last)]

    def _to_words(self, spans: list[_Span], spoken: list[str], owner: list[int]) -> list[_Span]:
        """Convert spans of `spoken` to spans of words; spans that end within a word are joined."""
        joined: list[_Span] = []
        pending: list[_Span] = []
        for span in spans:
            pending.append(span)
            first, last = pending[0][1], span[2]
            if last == len(owner) or owner[last] != owner[last - 1]:
                form = None
                if any(form is not None for form, _, _ in pending):
                    form = self._join([self._join(spoken[a:b]) if form is None else form for form, a, b in pending])
                joined.append((form, owner[first], owner[last - 1] + 1))
                pending = []
        return joined

    def _share_time(self, forms: list[str], words: Sequence[Word]) -> list[Word]:
        """Return a word for each form; they share the time of `words` in proportion to their characters."""
        start, end = words[0].start, max(word.end for word in words)
        total, position = sum(map(len, forms)), 0
        written: list[Word] = []
        for form in forms:
            spaced = self._spaced(written[-1].text, form) if written else words[0].after_space
            begin, position = position, position + len(form)
            written.append(
                dataclasses.replace(
                    words[0],
                    text=form,
                    start=start + (end - start) * begin / total,
                    end=start + (end - start) * position / total,
                    confidence=min(word.confidence for word in words),
                    after_space=spaced,
                )
            )
        return written


def _split_punctuation(text: str) -> tuple[str, str, str]:
    match = _PARTS.fullmatch(text)
    assert match is not None  # the middle group matches anything
    return match[1], match[2], match[3]
