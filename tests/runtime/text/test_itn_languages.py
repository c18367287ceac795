"""Inverse text normalization in several languages, with small grammars instead of those of `nemo_text_processing`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from nemostream.errors import OptionError
from nemostream.runtime.text.itn import LANGUAGES, InverseNormalizer, check_language, code_of
from nemostream.runtime.text.words import Token, Word, group_words, join_words

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
