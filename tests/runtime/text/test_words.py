"""Words compared with SentencePiece's text and with expected groups."""

from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import OptionError
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.text.scripts import CLOSING, OPENING
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.runtime.text.words import Result, Token, Word, WordGrouper, group_words


def make_tokens(*pieces: str) -> list[Token]:
    """Return consecutive tokens of 80 ms with increasing confidence."""
    return [Token(i, piece, 0.08 * i, 0.08 * (i + 1), -1.0, 0.5 + 0.01 * i) for i, piece in enumerate(pieces)]


def spans(*pieces: str) -> list[tuple[str, int, int]]:
    """Return the text, first token and last token of each word."""
    return [
        (word.text, round(word.start / 0.08), round(word.end / 0.08) - 1) for word in group_words(make_tokens(*pieces))
    ]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        ([" the", " quick", "er"], [("the", 0, 0), ("quicker", 1, 2)]),
        (["er", " the"], [("er", 0, 0), ("the", 1, 1)]),  # starts within a word
        ([" don", "'", "t", "."], [("don't.", 0, 3)]),
        ([" yes", " ,", " no"], [("yes,", 0, 1), ("no", 2, 2)]),  # punctuation after a space
        ([" yes", " ", "?", " no"], [("yes?", 0, 2), ("no", 3, 3)]),
        ([" ,", " no"], [(",", 0, 0), ("no", 1, 1)]),  # no preceding word
        ([" yes", " &", " no"], [("yes", 0, 0), ("&", 1, 1), ("no", 2, 2)]),
        ([" ", "a", "b"], [("ab", 0, 2)]),  # a space token belongs to the next word
        ([" ", " ab"], [("ab", 1, 1)]),
        ([" of the", "m"], [("of", 0, 0), ("them", 0, 1)]),  # a token of two words
        ([" a", " \u2047 ", "b"], [("a", 0, 0), ("\u2047", 1, 1), ("b", 2, 2)]),  # unknown
        ([" a", "", "b"], [("ab", 0, 2)]),  # a control token
        ([" ", "<0xE2>", "<0x82>", "<0xAC>", "s"], [("\u20acs", 0, 4)]),
        ([" a", "<0xE2>", "<0x82>"], [("a\ufffd\ufffd", 0, 2)]),
        ([" a", "<0x20>", "<0xC3>", "<0xA9>"], [("a", 0, 0), ("\u00e9", 1, 3)]),
    ],
)
def test_expected_words(pieces, expected):
    assert spans(*pieces) == expected


def test_incomplete_character_is_omitted_until_the_result_is_final():
    tokens = tuple(make_tokens(" a", "<0xE2>", "<0x82>"))
    assert [word.text for word in Result("a", tokens, 1.0, 80, False).words] == ["a"]
    assert [word.text for word in Result("a\ufffd\ufffd", tokens, 1.0, 80, True).words] == ["a\ufffd\ufffd"]


@pytest.mark.parametrize(("aggregation", "expected"), [("min", 0.5), ("max", 0.52), ("mean", 0.51), ("prod", 0.13260)])
def test_confidence_of_a_word_is_aggregated_over_its_tokens(aggregation, expected):
    (word,) = group_words(make_tokens(" a", "b", "c"), aggregation)
    assert word == Word("abc", 0.0, 0.24, pytest.approx(expected))


@pytest.fixture(scope="session")
def oracle(tokenizer_model):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)


BYTES = st.binary(min_size=1, max_size=4).map(lambda data: [f"<0x{byte:02X}>" for byte in data])
PIECES = st.one_of(
    st.sampled_from(["\u2581", "\u2581the", "he", "\u2581again", "z", "<unk>", "<s>", "</s>"]).map(lambda p: [p]),
    st.sampled_from(["€", "é", "😀", " ", "\u2003"]).map(lambda c: [f"<0x{byte:02X}>" for byte in c.encode()]),
    BYTES,
)


@given(pieces=st.lists(PIECES, max_size=12))
@settings(max_examples=300, deadline=None)
def test_words_equal_those_of_sentencepiece(bundle, oracle, pieces):
    """For arbitrary pieces, the words are those of the text, in order, and their tokens cover the text."""
    tokenizer = Tokenizer(bundle.path / "tokenizer.model", bundle.manifest.decoder.vocabulary)
    ids = [oracle.piece_to_id(piece) for group in pieces for piece in group]
    text = oracle.decode(ids)
    words = group_words(make_tokens(*map(tokenizer.piece, ids)))
    # Punctuation beside a space and scripts without spaces are the only intended differences; these pieces form some by
    # chance.
    assert "".join(word.text for word in words) == "".join(text.split())
    if not set(text) & (CLOSING | OPENING) and all(each < "\u0e00" or each in "€😀\u2003\ufffd" for each in text):
        assert [word.text for word in words] == text.split()
    # The same incrementally, including a request for earlier tokens.
    tokens, grouper = make_tokens(*map(tokenizer.piece, ids)), WordGrouper("min")
    for count in [*range(len(ids) + 1), len(ids) // 2]:
        assert grouper.words(tokens[:count], False) == group_words(tokens[:count], final=False)
    assert grouper.words(tokens, True) == words
    starts, ends = [word.start for word in words], [word.end for word in words]
    assert starts == sorted(starts) and ends == sorted(ends) and all(a < b for a, b in zip(starts, ends, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "gibbs"}, "measure is 'gibbs'; choose one of max_prob, tsallis, renyi"),
        ({"norm": "log"}, "norm is 'log'"),
        ({"aggregation": "median"}, "aggregation is 'median'"),
        ({"alpha": 0.5}, "alpha is 0.5; tsallis and renyi support 0.33 only"),
        ({"measure": "max_prob", "alpha": 0}, "alpha is 0; it must be above 0"),
        ({"measure": "max_prob", "alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_invalid_confidence_is_rejected(options, message):
    with pytest.raises(OptionError, match=message):
        Confidence(**options)
