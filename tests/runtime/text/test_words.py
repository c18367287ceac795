"""Words against SentencePiece's own text, and against hand-worked groups."""

from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import OptionError
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.runtime.text.words import Result, Token, Word, WordGrouper, group_words


def said(*pieces: str) -> list[Token]:
    """Tokens of 80 ms, one after the other, each surer than the one before."""
    return [Token(i, piece, 0.08 * i, 0.08 * (i + 1), -1.0, 0.5 + 0.01 * i) for i, piece in enumerate(pieces)]


def spans(*pieces: str) -> list[tuple[str, int, int]]:
    """Words as text, first token, last token."""
    return [(word.text, round(word.start / 0.08), round(word.end / 0.08) - 1) for word in group_words(said(*pieces))]


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        ([], []),
        ([" the", " quick", "er"], [("the", 0, 0), ("quicker", 1, 2)]),
        (["er", " the"], [("er", 0, 0), ("the", 1, 1)]),  # begins within a word
        ([" don", "'", "t", "."], [("don't.", 0, 3)]),
        ([" yes", " ,", " no"], [("yes,", 0, 1), ("no", 2, 2)]),  # punctuation that stands apart
        ([" yes", " ", "?", " no"], [("yes?", 0, 2), ("no", 3, 3)]),
        ([" ,", " no"], [(",", 0, 0), ("no", 1, 1)]),  # nothing to attach it to
        ([" yes", " &", " no"], [("yes", 0, 0), ("&", 1, 1), ("no", 2, 2)]),
        ([" ", "a", "b"], [("ab", 0, 2)]),  # a space of its own belongs to the word after it
        ([" ", " ab"], [("ab", 1, 1)]),
        ([" of the", "m"], [("of", 0, 0), ("them", 0, 1)]),  # a token of two words
        ([" a", " \u2047 ", "b"], [("a", 0, 0), ("\u2047", 1, 1), ("b", 2, 2)]),  # unknown
        ([" a", "", "b"], [("ab", 0, 2)]),  # a control token
        ([" ", "<0xE2>", "<0x82>", "<0xAC>", "s"], [("\u20acs", 0, 4)]),
        ([" a", "<0xE2>", "<0x82>"], [("a\ufffd\ufffd", 0, 2)]),
        ([" a", "<0x20>", "<0xC3>", "<0xA9>"], [("a", 0, 0), ("\u00e9", 1, 3)]),
    ],
)
def test_words_by_hand(pieces, wanted):
    assert spans(*pieces) == wanted


def test_a_character_that_is_not_complete_waits_until_the_result_is_final():
    tokens = tuple(said(" a", "<0xE2>", "<0x82>"))
    assert [word.text for word in Result("a", tokens, 1.0, 80, False).words] == ["a"]
    assert [word.text for word in Result("a\ufffd\ufffd", tokens, 1.0, 80, True).words] == ["a\ufffd\ufffd"]


@pytest.mark.parametrize(("aggregation", "wanted"), [("min", 0.5), ("max", 0.52), ("mean", 0.51), ("prod", 0.13260)])
def test_a_words_confidence_is_made_of_its_tokens(aggregation, wanted):
    (word,) = group_words(said(" a", "b", "c"), aggregation)
    assert word == Word("abc", 0.0, 0.24, pytest.approx(wanted))


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
def test_words_are_those_of_sentencepieces_text(bundle, oracle, pieces):
    """Any pieces at all: the words are the text's, in order, and their tokens are in order and leave out no text."""
    tokenizer = Tokenizer(bundle.path / "tokenizer.model", bundle.manifest.decoder.vocabulary)
    ids = [oracle.piece_to_id(piece) for group in pieces for piece in group]
    text = oracle.decode(ids)
    words = group_words(said(*map(tokenizer.piece, ids)))
    # Punctuation that stands apart is the one difference that is meant; these pieces spell some by chance.
    assert "".join(word.text for word in words) == "".join(text.split())
    if not set(text) & set(".,?!:;"):
        assert [word.text for word in words] == text.split()
    # And the same bit by bit, with a look back at any of it.
    tokens, grouper = said(*map(tokenizer.piece, ids)), WordGrouper("min")
    for count in [*range(len(ids) + 1), len(ids) // 2]:
        assert grouper.words(tokens[:count], False) == group_words(tokens[:count], final=False)
    assert grouper.words(tokens, True) == words
    starts, ends = [word.start for word in words], [word.end for word in words]
    assert starts == sorted(starts) and ends == sorted(ends) and all(a < b for a, b in zip(starts, ends, strict=True))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"measure": "gibbs"}, "measure is 'gibbs'; choose one of max_prob, tsallis, renyi"),
        ({"norm": "log"}, "norm is 'log'"),
        ({"aggregation": "median"}, "aggregation is 'median'"),
        ({"alpha": 0.5}, "alpha is 0.5; tsallis and renyi support 0.33 only"),
        ({"measure": "max_prob", "alpha": 0}, "alpha is 0; it must be above 0"),
        ({"measure": "max_prob", "alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_a_confidence_that_cannot_be_is_refused_by_name(options, name):
    with pytest.raises(OptionError, match=name):
        Confidence(**options)
