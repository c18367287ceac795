"""Words and lines in all scripts: which characters begin a word, where a line may break, how wide a text is.

Most languages separate words by spaces. Chinese, Japanese, Thai, Lao, Khmer and Burmese do not; finding their words
needs a dictionary. The rule here needs none, depends on the text only, and never changes a word that is followed by
another one:

* Chinese and Japanese: one word per character. Small kana, the prolonged sound mark and iteration marks belong to the
  character before them.
* Thai, Lao, Khmer, Burmese: one word per character with its vowels, marks and stacked consonants. A vowel that is
  written before its consonant begins the word.
* A change between these scripts and others begins a word: "我用iPhone打" has four words.
* Closing punctuation belongs to the word before it, even after a space; text that follows such punctuation without a
  space begins a word. Opening punctuation belongs to the word after it, even before a space.

A grapheme cluster of these scripts is never divided. All other text is divided at white space only, as in NeMo.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal

# Brackets and quotation marks of East Asia, whose direction does not depend on the language.
_WIDE_OPENING, _WIDE_CLOSING = "「『（［｛〈《【〔〖〘〚〝｟｢", "」』）］｝〉》】〕〗〙〛〞〟｠｣"
_WIDE_STOPS = "。、，．！？：；｡､"
_STOPS = "၊။។៕៖"  # of Burmese and Khmer
# Punctuation that belongs to the preceding word in every language. Quotation marks such as » and ” are not part of it:
# they open a quotation in some languages.
CLOSING = frozenset(".,?!:;…·\u0387\u037e،؛؟۔।॥։።፣፤፥፦፧)]}" + _STOPS + _WIDE_STOPS + _WIDE_CLOSING)
OPENING = frozenset("¿¡([{«‹“‘„‚" + _WIDE_OPENING)

# Letters of scripts without spaces, as ranges of a regular expression: Han, Bopomofo, kana.
_EAST_ASIAN = (
    "\u2e80-\u2fdf\u3006\u3007\u3021-\u3029\u3041-\u3096\u309f\u30a1-\u30fa\u30ff\u3105-\u312f\u31a0-\u31bf"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
_SMALL_KANA = "ぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶ\u31f0-\u31ff\uff67-\uff6f"
_KANA_MARKS = "ー々〻ゝゞヽヾ〜～・\u3099-\u309c\uff70\uff9e\uff9f"
# Thai and Lao, Burmese with its extensions, Khmer.
_BLOCKS = (
    range(0xE00, 0xF00),
    range(0x1000, 0x10A0),
    range(0x1780, 0x1800),
    range(0xA9E0, 0xAA00),
    range(0xAA60, 0xAA80),
)
_VOWELS_BEFORE = "เแโใไ\u0ec0-\u0ec4"  # written before their consonant
_VOWELS_AFTER = "ะาำๅฯๆ\u0eaf\u0eb0\u0eb2\u0eb3\u0ebd\u0ec6\u17d7"  # letters that never begin a word
_STACKING = "\u1039\u17d2"  # the next consonant is written below the previous one


def _characters(category: str) -> str:
    """Return the letters ("L") or marks ("M") of `_BLOCKS`."""
    characters = (chr(code) for block in _BLOCKS for code in block)
    return "".join(each for each in characters if unicodedata.category(each)[0] == category)


_WIDE = re.escape(_WIDE_OPENING)
# What continues a word, even after a space; \U000e0100 to \U000e01ef select variants of Han characters.
_CONTINUING = (
    f"{re.escape(_WIDE_STOPS + _WIDE_CLOSING)}{_STOPS}{_SMALL_KANA}{_KANA_MARKS}{_VOWELS_AFTER}{_characters('M')}"
    "\U000e0100-\U000e01ef"
)
_LETTERS = _EAST_ASIAN + _characters("L")
_PARTS = re.compile(
    rf"\s+|[^\s{_LETTERS}{_CONTINUING}{_WIDE}]+|[{_CONTINUING}]+|[{_WIDE}]+|"
    rf"[{_VOWELS_BEFORE}]*[{_LETTERS}](?:[{_STACKING}][{_LETTERS}]|[{_CONTINUING}])*"
)
_UNSPACED = re.compile(rf"(?P<continuing>[{_CONTINUING}])|(?P<opening>[{_WIDE}])|[{_LETTERS}]")
_CHARACTER = re.compile(rf"[{_LETTERS}{_CONTINUING}{_WIDE}]")
SHORT = 16  # characters of a text whose parts are kept: dividing it takes much longer than finding them again
_INCOMPLETE = re.compile(rf"[{_VOWELS_BEFORE}{_STACKING}]\Z")


# A part of a text: white space, the beginning of a word, or its continuation.
Kind = Literal["space", "word", "rest"]
_Part = tuple[str, Kind]
# How a text ends: with white space, a word that any text continues, even after a space ("opening"), a word that only
# punctuation continues ("unspaced": of a script without spaces, or closed by punctuation after a space), or another.
_End = Literal["space", "opening", "unspaced", "spaced"]
BreakerState = tuple[bool, _End, _End]  # see `WordBreaker.state`


def ends_unspaced(text: str) -> bool:
    """Return whether a text ends with a character of a script without spaces, punctuation included."""
    return bool(_CHARACTER.match(text[-1:]))


def begins_unspaced(text: str) -> bool:
    """Return whether a text begins with a character of a script without spaces, punctuation included."""
    return bool(_CHARACTER.match(text))


def begins_word(text: str) -> bool:
    """Return whether a word begins with the first character of a text, whatever precedes it."""
    first = _UNSPACED.match(text)
    return text[:1] == " " if first is None else first.lastgroup != "continuing"


def separator(text: str) -> str:
    """Return what separates an utterance from the next one: a space, nothing after a script without spaces."""
    return "" if ends_unspaced(text) else " "


def join_texts(texts: Iterable[str]) -> str:
    """Return the text of consecutive utterances."""
    joined = ""
    for text in texts:
        joined += f"{separator(joined)}{text}" if joined and text else text
    return joined


class WordBreaker:
    """Divide a text, which is read in pieces, into words. Takes time proportional to the text."""

    __slots__ = ("_before_space", "_begun", "_end")

    def __init__(self, begun: bool = False, end: _End = "space", before_space: _End = "space") -> None:
        self._begun = begun  # whether there is a word
        self._end = end
        self._before_space = before_space  # how the text ends without its white space

    @property
    def state(self) -> BreakerState:
        """The arguments of a breaker that continues this one."""
        return self._begun, self._end, self._before_space

    def split(self, piece: str) -> Sequence[_Part]:
        """Divide the next piece of the text; its white space is included."""
        if len(piece) > SHORT:
            return self._split(piece)
        parts, (self._begun, self._end, self._before_space) = _split_short(piece, *self.state)
        return parts

    def _split(self, piece: str) -> list[_Part]:
        parts: list[_Part] = []
        for part in _PARTS.findall(piece):
            if part.isspace():
                parts.append((part, "space"))
                if self._end not in ("opening", "space"):
                    self._before_space, self._end = self._end, "space"
            elif not part.isascii() and (first := _UNSPACED.match(part)):
                kind = first.lastgroup
                begins = not self._begun or (self._end != "opening" and kind != "continuing")
                parts.append((part, "word" if begins else "rest"))
                self._begun = True
                self._end = "opening" if kind == "opening" or _INCOMPLETE.search(part) else "unspaced"
            elif self._end == "spaced":
                parts.append((part, "rest"))
            elif self._end == "unspaced" or (self._end == "space" and self._begun and part[0] in CLOSING):
                length = 0  # of the punctuation that belongs to the word
                while length < len(part) and _continues(part[length]):
                    length += 1
                if length:
                    parts.append((part[:length], "rest"))
                    self._end = "unspaced"
                if length < len(part):
                    self._begin_spaced(part[length:], "word", parts)
            else:
                self._begin_spaced(part, "word" if self._end == "space" else "rest", parts)
        return parts

    def drop_space(self) -> None:
        """Continue as if the text did not end with white space."""
        if self._end == "space":
            self._end = self._before_space

    def _begin_spaced(self, part: str, kind: Kind, parts: list[_Part]) -> None:
        parts.append((part, kind))
        self._end = "opening" if part[-1] in OPENING and OPENING.issuperset(part) else "spaced"
        self._begun = True


@lru_cache(1 << 13)
def _split_short(piece: str, begun: bool, end: _End, before_space: _End) -> tuple[Sequence[_Part], BreakerState]:
    """Return the parts of a text of few characters, most often of a token, and the state of the breaker after it."""
    breaker = WordBreaker(begun, end, before_space)
    return breaker._split(piece), breaker.state


def _continues(character: str) -> bool:
    category = unicodedata.category(character)
    return (category[0] in "PM" or category == "Cf") and character not in OPENING


def can_break(before: str, after: str, spaced: bool) -> bool:
    """Return whether a line may end between two words.

    Not after opening and before closing punctuation (*kinsoku*). `spaced`: there is a space between the words.
    """
    if spaced:  # the same mark opens in one language and closes in another, so only marks that stand alone count
        return not OPENING.issuperset(before) and not all(
            each in CLOSING or unicodedata.category(each) in ("Pe", "Pf") for each in after
        )
    return before[-1] not in OPENING and after[0] not in CLOSING


def unbreakable_spans(text: str) -> list[tuple[int, int]]:
    """Return the start and end of the parts of a text that should not be broken across lines."""
    spans: list[tuple[int, int]] = []
    position, spaced, breaker = 0, False, WordBreaker()
    for part, kind in breaker.split(text):
        begin, position = position, position + len(part)
        if kind == "space":
            spaced = True
            continue
        if spans and (kind == "rest" or not can_break(text[slice(*spans[-1])], part, spaced)):
            spans[-1] = spans[-1][0], position
        else:
            spans.append((begin, position))
        spaced = False
    return spans


def separate_characters(text: str) -> str:
    """Return the text with spaces around every character of a script without spaces, for character error rates."""
    return " ".join(_CHARACTER.sub(r" \g<0> ", text).split()) if _CHARACTER.search(text) else text


def columns(text: str) -> int:
    """Return the width of a text in columns of a fixed-width font: 2 for wide characters, 0 for combining marks."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
