"""Inverse text normalization of words, compared with NeMo's pipeline, which aligns the same grammars differently."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nemo_text_processing")

import nemostream
from nemostream.runtime.text.words import Word


@pytest.fixture(scope="module")
def normalizer() -> nemostream.InverseNormalizer:
    return nemostream.InverseNormalizer()


def spoken(text: str) -> list[Word]:
    """Return one word per second, each half a second long, with increasing confidence."""
    return [Word(word, float(i), i + 0.5, (i + 1) / 100) for i, word in enumerate(text.split())]


PLAIN = [
    "i paid twenty two dollars and fifty cents for it",
    "we met in nineteen ninety nine",
    "two zero two six four one five eight",
    "one hundred and one dalmatians",
    "the twenty first of may",
    "five dollars ten dollars",
    "two hundred two hundred",
    "at three thirty p m or at ten",
    "first second third",
    "three point one four is pi",
    "doctor smith has one dog",
    "sixty miles per hour",
    "call me at five five five one two three four now",
    "mail bob at example dot com",
    "nothing of note was said here",
    "ten thousand and fifty three people and twenty six dogs",
    "on july fourth nineteen ninety nine it rained",
]


@cache
def nemo() -> Any:
    from nemo.collections.asr.inference.itn.inverse_normalizer import AlignmentPreservingInverseNormalizer

    return AlignmentPreservingInverseNormalizer(lang="en")


@pytest.mark.nemo
@pytest.mark.parametrize("text", PLAIN)
def test_spans_equal_those_of_nemo(normalizer: nemostream.InverseNormalizer, text: str) -> None:
    """A form of several words in NeMo is several words here, within the same time."""
    words = spoken(text)
    _, out, alignment = nemo().get_word_alignment(text, sep=" ")
    ours = list(normalizer(words))
    assert [word.text for word in ours] == out
    for inside, forms, _ in alignment:
        part = ours[forms[0] : forms[-1] + 1]
        first, last = words[inside[0]], words[inside[-1]]
        assert first.start <= part[0].start and part[-1].end <= last.end
        assert min(word.confidence for word in part) >= first.confidence
    assert (ours[0].start, ours[-1].end) == (words[0].start, words[-1].end)


# Expected results: the form, and the first and last word that it replaces.
MARKED = {
    "I paid twenty-two dollars, I think.": [("I", 0, 0), ("paid", 1, 1), ("$22,", 2, 3), ("I", 4, 4), ("think.", 5, 5)],
    "In two thousand ten. Twenty people came!": [
        ("In", 0, 0),
        ("2010.", 1, 3),
        ("20", 4, 4),
        ("people", 5, 5),
        ("came!", 6, 6),
    ],
    '"Twenty two," he said': [('"22,"', 0, 1), ("he", 2, 2), ("said", 3, 3)],
    "Doctor Smith": [("Dr.", 0, 0), ("Smith", 1, 1)],
    "The well-known forty-second street": [("The", 0, 0), ("well-known", 1, 1), ("42nd", 2, 2), ("street", 3, 3)],
    "Two, two.": [("Two,", 0, 0), ("two.", 1, 1)],
    "It is in the U.S.": [("It", 0, 0), ("is", 1, 1), ("in", 2, 2), ("the", 3, 3), ("U.S.", 4, 4)],
}


@pytest.mark.parametrize("text", MARKED)
def test_punctuation_and_case(normalizer: nemostream.InverseNormalizer, text: str) -> None:
    """Punctuation and case of the model's output are preserved."""
    words = spoken(text)
    assert [(w.text, w.start, w.end, w.confidence) for w in normalizer(words)] == [
        (form, words[first].start, words[last].end, words[first].confidence) for form, first, last in MARKED[text]
    ]


def test_period_is_not_doubled(normalizer: nemostream.InverseNormalizer) -> None:
    assert [word.text for word in normalizer(spoken("at three p.m."))] == ["at", "03:00", "p.m."]


def test_words_of_a_date_share_its_time(normalizer: nemostream.InverseNormalizer) -> None:
    """`july` is aligned; `4` and `1999` share 3.5 seconds in the ratio of their characters, 1 : 4."""
    forms = normalizer(spoken("july fourth nineteen ninety nine"))
    assert [(word.text, word.start, word.end) for word in forms] == [
        ("july", 0.0, 0.5),
        ("4", 1.0, pytest.approx(1.7)),
        ("1999", pytest.approx(1.7), 4.5),
    ]


def test_pause_ends_a_number(normalizer: nemostream.InverseNormalizer) -> None:
    near, far = ([Word("twenty", 0.0, 0.3, 0.9), Word("two", start, start + 0.3, 0.9)] for start in (1.0, 1.2))
    assert [[word.text for word in normalizer(words)] for words in (near, far)] == [["22"], ["20", "two"]]


def test_long_text_without_punctuation(normalizer: nemostream.InverseNormalizer) -> None:
    """The grammars receive parts that are split at pauses, so no number is split."""
    words, at = [], 0.0
    for index in range(400):
        words.append(Word(("dog", "dog", "twenty", "two")[index % 4], at, at + 0.2, 0.9))
        at += 0.2 if index % 4 == 2 else 0.25
    assert [word.text for word in normalizer(words)] == ["dog", "dog", "22"] * 100


def test_words_are_unchanged_if_the_grammars_fail(
    normalizer: nemostream.InverseNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = spoken("twenty two dogs, twenty two cats")

    def fail(text: str) -> str:
        if "dogs" in text:
            raise RuntimeError("a grammar")
        return "" if "nothing" in text else text.replace("twenty two", "22")

    monkeypatch.setattr(normalizer, "_normalize", fail)
    assert [word.text for word in normalizer(words)] == ["twenty", "two", "dogs,", "22", "cats"]
    assert normalizer(spoken("nothing")) == tuple(spoken("nothing"))
    assert normalizer([]) == ()


VOCABULARY = [
    "one",
    "two",
    "ten",
    "twenty",
    "hundred",
    "thousand",
    "and",
    "point",
    "five",
    "dollars",
    "cents",
    "percent",
    "july",
    "first",
    "at",
    "p",
    "m",
    "half",
    "of",
    "the",
    "a",
    "dog",
    "dogs,",
    "twenty-two",
    "Twenty.",
    "(two)",
    "three?",
    "—",
    "…",
    "o'clock",
    "é",
    "中",
    "[x]",
    "\\",
    "{",
    "&",
    "7",
    "U.S.",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(VOCABULARY), max_size=12))
def test_arbitrary_words(normalizer: nemostream.InverseNormalizer, texts: list[str]) -> None:
    """Words stay in order and within the spoken time; words outside numbers are unchanged."""
    words = spoken(" ".join(texts))
    written = normalizer(words)
    assert bool(written) == bool(words)
    assert all(word.text and not any(c.isspace() for c in word.text) for word in written)
    assert all(one.end <= next.start + 1e-9 for one, next in pairwise(written))
    if words:
        assert (written[0].start, written[-1].end) == (words[0].start, words[-1].end)
    unchanged = [text for text in texts if text in ("dog", "dogs,", "中", "é")]
    assert [word.text for word in written if word.text in ("dog", "dogs,", "中", "é")] == unchanged
