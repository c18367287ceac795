"""Inverse text normalization in several languages, with small grammars instead of those of `nemo_text_processing`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from nemostream.errors import OptionError
from nemostream.runtime.text.itn import LANGUAGES, InverseNormalizer, check_language, code_of
from nemostream.runtime.text.words import Token, Word, group_words, join_words

TIMEOUT = 20
REPLACED = {
    "de": {"zweiundzwanzig": "22", "drei euro": "3 €"},
    "en": {"twenty two": "22"},
    "es": {"veintidós": "22"},
    "fr": {"vingt-deux": "22"},
    "ja": {"二千二十四": "2024", "二十": "20"},
    "zh": {"二零二四": "2024", "五百块": "¥500", "百分之五": "5%", "二": "2"},
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Install the grammars; return the languages that have been loaded."""
    languages: list[str] = []

    class Rules:
        def __init__(self, lang: str) -> None:
            languages.append(lang)
            self._replaced = REPLACED[lang]

        def inverse_normalize(self, text: str, verbose: bool) -> str:
            assert text == text.lower()
            for spoken, written in self._replaced.items():
                text = text.replace(spoken, written)
            return text

    module = ModuleType("inverse_normalize")
    module.InverseNormalizer = Rules  # type: ignore[attr-defined]
    for name in ("nemo_text_processing", "nemo_text_processing.inverse_text_normalization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "nemo_text_processing.inverse_text_normalization.inverse_normalize", module)
    return languages


def transcript(text: str, language: str | None = None) -> list[Word]:
    """Return the words of a text whose tokens are single characters of 100 ms."""
    tokens = [Token(0, each, i / 10, (i + 1) / 10, -1.0, 0.9) for i, each in enumerate(text)]
    return [
        Word(word.text, word.start, word.end, word.confidence, language, word.after_space)
        for word in group_words(tokens)
    ]


@pytest.mark.parametrize(
    ("language", "code"), [("de", "de"), ("de-DE", "de"), ("ZH_cn", "zh"), ("en-GB", "en"), ("auto", "auto")]
)
def test_languages_with_and_without_a_region(language: str, code: str) -> None:
    assert check_language(language) == code
    assert code_of(language) == (None if language == "auto" else code)


@pytest.mark.parametrize("language", ["fi-FI", "", "english", "zhx", None])
def test_other_languages_are_rejected(language: str, loaded: list[str]) -> None:
    with pytest.raises(OptionError, match=f"does not support the language .*{', '.join(LANGUAGES)}"):
        InverseNormalizer(language)
    assert not loaded


@pytest.mark.parametrize(
    ("language", "spoken", "written"),
    [
        ("de-DE", "Er sagte „Zweiundzwanzig“, drei Euro.", "Er sagte „22“, 3 €."),
        ("es-ES", "¿Son veintidós? «veintidós»", "¿Son 22? «22»"),
        ("fr", "J'ai vingt-deux chiens", "J'ai 22 chiens"),  # compounds are divided in English only
        ("zh-CN", "二零二四年，我用iPhone花了五百块。", "2024年，我用iPhone花了¥500。"),
        ("zh-CN", "（二）“百分之五”", "（2）“5%”"),
        ("zh", "iPhone 二 iPad二", "iPhone 2 iPad2"),  # words of other scripts are unchanged
        ("ja-JP", "これは二千二十四年です。二十", "これは2024年です。20"),
    ],
)
def test_written_text(language: str, spoken: str, written: str, loaded: list[str]) -> None:
    words = transcript(spoken)
    assert join_words(InverseNormalizer(language)(words)) == written
    assert loaded == [check_language(language)]


def test_words_of_chinese_keep_their_times(loaded: list[str]) -> None:
    words = transcript("在二零二四年五月")
    written = InverseNormalizer("zh")(words)
    assert [(word.text, word.start, word.end, word.after_space) for word in written] == [
        ("在", 0.0, pytest.approx(0.1), True),
        ("2024", pytest.approx(0.1), pytest.approx(0.5), False),
        *[(word.text, word.start, word.end, False) for word in words[5:]],
    ]


def test_auto_uses_the_tag_of_each_word(loaded: list[str]) -> None:
    normalize = InverseNormalizer("auto")
    assert loaded == []
    parts = [
        *transcript(" zweiundzwanzig Hunde", "de-DE"),
        *transcript(" twenty two", "fi-FI"),  # no grammars
        *transcript(" twenty two", "en-US"),
        *transcript(" twenty two"),  # no tag yet
    ]
    assert join_words(normalize(parts)) == "22 Hunde twenty two 22 twenty two"
    assert join_words(normalize(transcript("zweiundzwanzig", "de-AT"))) == "22"
    assert join_words(normalize(transcript("zweiundzwanzig", "DE_de"))) == "22"  # as `check_language` accepts
    assert loaded == ["de", "en"]


@pytest.mark.parametrize("at", ["construction", "call"])
def test_threads_wait_for_the_grammars(at: str, loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammars of a language are loaded once, and are called by one thread at a time: their parser has state."""
    rules = sys.modules["nemo_text_processing.inverse_text_normalization.inverse_normalize"].InverseNormalizer
    normalize, running, threads, results = InverseNormalizer("auto"), [0], [], []

    def interrupted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            running[0] += 1
            assert running[0] == 1, "two threads are in the grammars"
            if not threads:
                threads.append(threading.Thread(target=run, args=("zweiundzwanzig Hunde",), daemon=True))
                threads[0].start()
                threads[0].join(0.2)  # it ends here only if it does not wait for this thread
            result = function(*args, **options)
            running[0] -= 1
            return result

        return call

    def run(text: str) -> None:
        results.append(join_words(normalize(transcript(text, "de-DE"))))

    name = "__init__" if at == "construction" else "inverse_normalize"
    monkeypatch.setattr(rules, name, interrupted(getattr(rules, name)))
    run("zweiundzwanzig")
    threads[0].join(TIMEOUT)
    assert not threads[0].is_alive()
    assert (sorted(results), loaded) == (["22", "22 Hunde"], ["de"])


def word_times(words: tuple[Word, ...]) -> list[tuple[str, float, float, float]]:
    return [(word.text, word.start, word.end, word.confidence) for word in words]


def test_written_word_has_the_times_and_the_lowest_confidence_of_the_spoken_words(loaded: list[str]) -> None:
    """A pause of 0.8 s is part of a number, a longer one is not; an overlapping word may end later."""
    words = [Word("Twenty", 0.0, 1.5, 0.5, after_space=False), Word("two", 1.0, 1.25, 0.25), Word("x", 3.0, 4.0, 0.75)]
    normalize = InverseNormalizer("en")
    assert word_times(normalize(words)) == [("22", 0.0, 1.5, 0.25), ("x", 3.0, 4.0, 0.75)]
    assert not normalize(words)[0].after_space
    for pause, texts in ((0.75, ["22"]), (0.875, ["twenty", "two"])):
        pair = [Word("twenty", 0.0, 0.25, 0.5), Word("two", 0.25 + pause, 2.0, 0.5)]
        assert [word.text for word in normalize(pair)] == texts


def test_case_and_punctuation_are_those_of_the_spoken_words(loaded: list[str]) -> None:
    normalize = InverseNormalizer("en")
    for text, written in {
        "Twenty-two": "22",
        "(twenty two)": "(22)",
        "Doctor. twenty, two": "Doctor. twenty, two",
        "Twenty two, TWENTY TWO!": "22, 22!",
        "twenty twenty two": "twenty 22",
        "Sixty-four Two-three": "Sixty-four Two-three",  # unchanged, with case and hyphens
        "ninety-eight twenty-two": "ninety-eight 22",
    }.items():
        assert join_words(normalize(transcript(text))) == written


def test_long_runs_are_divided_at_the_longest_pause_in_their_middle(loaded: list[str], monkeypatch: Any) -> None:
    """At most 100 words for each call; the outer quarters are not divided."""
    rules = sys.modules["nemo_text_processing.inverse_text_normalization.inverse_normalize"].InverseNormalizer
    calls: list[int] = []
    original = rules.inverse_normalize

    def count(self: Any, text: str, verbose: bool) -> str:
        calls.append(len(text.split()))
        return original(self, text, verbose)

    monkeypatch.setattr(rules, "inverse_normalize", count)

    def run(number: int, pauses: dict[int, float]) -> list[int]:
        words, at = [], 0.0
        for index in range(number):
            at += pauses.get(index, 0.125)
            words.append(Word(f"w{index}", at, at + 0.125, 0.5))
            at += 0.125
        calls.clear()
        assert InverseNormalizer("en")(words) == tuple(words)
        return calls

    assert run(100, {50: 0.5}) == [100]
    assert run(101, {20: 0.75, 40: 0.5, 60: 0.25, 80: 0.75}) == [40, 61]
    assert run(104, {25: 0.75, 26: 0.5}) == [26, 78]
    assert run(104, {26: 0.5, 77: 0.625, 78: 0.75}) == [77, 27]
    assert run(3, {1: 0.875}) == [1, 2]
