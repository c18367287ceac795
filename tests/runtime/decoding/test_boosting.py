"""Phrase boosting compared with the definition and with expected results."""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.bundle import Bundle
from nemostream.errors import OptionError
from nemostream.runtime.decoding.boosting import MAX_PHRASES, MAX_TOKENS, NO_PHRASES, Boosting
from nemostream.runtime.text.tokenizer import Tokenizer

Phrases = list[tuple[list[int], float]]


@pytest.fixture(scope="module")
def tokenizer(demo_bundle: Bundle) -> Tokenizer:
    return Tokenizer(demo_bundle.path / "tokenizer.model", demo_bundle.manifest.decoder.vocabulary)


# -- the automaton -----------------------------------------------------------------------------------------------------


def test_expected_biases() -> None:
    """Phrases 1 2 3 (weight 1) and 2 4 (weight 2) over five tokens."""
    boosting = Boosting([([1, 2, 3], 1.0), ([2, 4], 2.0)], 5)
    second, third = 2 + math.log(2), 2 + math.log(3)
    np.testing.assert_allclose(boosting.bias(0), [0, 1, 2, 0, 0])
    one = boosting.next_node(0, 1)
    # Leaving the path returns the score 1.0 of token 1; staying on it adds to the score.
    np.testing.assert_allclose(boosting.bias(one), [-1, 0, second, -1, -1], rtol=1e-6)
    two = boosting.next_node(one, 2)
    # The score of 1 2 is 1 + second and that of its suffix 2 is 2, so continuing as 2 4 costs the difference.
    back = 2 - (1 + second)
    np.testing.assert_allclose(
        boosting.bias(two), [back - 2, back - 2 + 1, back - 2 + 2, third, back + 4 + math.log(2)], rtol=1e-6
    )
    # The score of a complete phrase is not returned.
    np.testing.assert_allclose(boosting.bias(boosting.next_node(two, 3)), boosting.bias(0))
    assert boosting.next_node(two, 4) == boosting.next_node(boosting.next_node(0, 2), 4) != 0
    assert boosting.next_node(two, 0) == 0
    assert len(boosting) == 6


def test_arrays_of_the_automaton() -> None:
    """Nodes are breadth first, children are ordered by token; backends read the arrays in these types."""
    boosting = Boosting([([1, 2, 3], 1.0), ([2, 4], 2.0)], 5)
    second, third = 2 + math.log(2), 2 + math.log(3)
    # The root, 1, 2, 1 2, 2 4, 1 2 3.
    arrays = {
        "first": ([1, 3, 4, 5, 6, 6, 6], np.int32),
        "token": ([-1, 1, 2, 2, 4, 3], np.int32),
        "score": ([0, 1, 2, second, 4 + math.log(2), third], np.float32),
        "fail": ([0, 0, 0, 2, 0, 0], np.int32),
        "penalty": ([0, -1, -2, 2 - (1 + second), 0, 0], np.float32),
    }
    for name, (expected, dtype) in arrays.items():
        array = getattr(boosting, name)
        assert array.dtype == dtype and array.shape == (len(expected),)
        np.testing.assert_allclose(array, expected, rtol=1e-6)
    assert boosting.vocabulary == len(boosting.bias(0)) == 5
    assert all(boosting.bias(node).dtype == np.float32 for node in range(6))


def plain_bias(phrases: Phrases, emitted: list[int], vocabulary: int) -> np.ndarray:
    """The definition on token sequences, without an automaton."""
    weights: dict[tuple[int, ...], float] = {}
    for tokens, weight in phrases:
        for length in range(1, len(tokens) + 1):
            path = tuple(tokens[:length])
            weights[path] = max(weights.get(path, 0.0), weight)
    complete = {tuple(tokens) for tokens, _ in phrases}

    def score(path: tuple[int, ...]) -> float:
        weight = weights[path]
        return weight if len(path) == 1 else 2 * weight + math.log(len(path))

    @functools.cache
    def total(path: tuple[int, ...]) -> float:
        return sum(score(path[:length]) for length in range(1, len(path) + 1))

    def shorter(path: tuple[int, ...]) -> tuple[int, ...]:
        return next(path[start:] for start in range(1, len(path) + 1) if not path[start:] or path[start:] in weights)

    path = next(
        tuple(emitted[start:])
        for start in range(len(emitted) + 1)
        if not emitted[start:] or tuple(emitted[start:]) in weights
    )
    bias = np.zeros(vocabulary)
    for token in range(vocabulary):
        at, back = path, 0.0
        while at and (*at, token) not in weights:
            back += 0.0 if at in complete else total(shorter(at)) - total(at)
            at = shorter(at)
        bias[token] = back + (score((*at, token)) if (*at, token) in weights else 0.0)
    return bias


def random_phrases(rng: np.random.Generator, vocabulary: int) -> Phrases:
    lengths = rng.integers(1, 8, rng.integers(1, 16))
    return [(rng.integers(0, vocabulary, length).tolist(), float(rng.choice([0.3, 1, 2.5]))) for length in lengths]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equals_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = int(rng.integers(2, 10))
    phrases = random_phrases(rng, vocabulary)
    boosting, node, emitted = Boosting(phrases, vocabulary), 0, []
    for _ in range(12):
        np.testing.assert_allclose(boosting.bias(node), plain_bias(phrases, emitted, vocabulary), atol=1e-4)
        emitted.append(int(rng.integers(vocabulary)))
        node = boosting.next_node(node, emitted[-1])


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ([], "phrases is empty"),
        ({}, "phrases is empty"),
        ("one two", "phrases is 'one two'; pass a list of phrases"),
        (b"one", "phrases is b'one'; pass a list of phrases"),
        ({"one"}, r"phrases is \{'one'\}; pass a list of phrases"),
        (5, "phrases is 5; pass a list of phrases"),
        ([["one", 2]], r"the phrase \['one', 2\] is not a string"),
        ([None], "the phrase None is not a string"),
        (["\ud800"], "is not Unicode text"),
        (["one \udfff"], "is not Unicode text"),
        (["\ud7ff"], "has characters outside the model's vocabulary"),
        (["\ue000"], "has characters outside the model's vocabulary"),
        (["one", ""], "the phrase '' is empty"),
        (["  "], "the phrase '  ' is empty"),
        ([3], "the phrase 3 is not a string"),
        (["one", "Zürich"], "the phrase 'Zürich' has characters outside the model's vocabulary"),
        (["one " * 65], "has 65 tokens; the maximum is 64"),
        (["one " * 250], "has 250 tokens; the maximum is 64"),
        (["one " * 250 + "o"], "has 1001 characters; the maximum is 1000"),
        ({"one": 1.0, "two": 100.1}, "the phrase 'two' has weight 100.1"),
        ({"one": 0}, "the phrase 'one' has weight 0; it must be above 0 and at most 100"),
        ({"one": -1.5}, "weight -1.5"),
        ({"one": math.nan}, "weight nan"),
        ({"one": math.inf}, "weight inf"),
        ({"one": 100.5}, "weight 100.5"),
        ({"one": True}, "weight True"),
        ({"one": "2"}, "weight '2'"),
        ([f"one{' two' * i}" for i in range(1001)], "phrases has 1001 entries; the maximum is 1000"),
    ],
)
def test_invalid_phrases_are_rejected(phrases: Any, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match=message):
        Boosting.from_phrases(phrases, tokenizer)


@pytest.mark.parametrize(
    "phrases", ["x" * 10**6, ["x" * 10**6], [["x" * 10**6] * 9], {"one": 10**200}, {"one": "x" * 10**6}]
)
def test_message_about_a_huge_value_is_short(phrases: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError) as caught:
        Boosting.from_phrases(phrases, tokenizer)
    assert len(str(caught.value)) < 600


def test_limits_are_inclusive(tokenizer: Tokenizer) -> None:
    boosting = Boosting.from_phrases({" ".join(["one"] * MAX_TOKENS): 100.0}, tokenizer)
    assert len(boosting) == MAX_TOKENS + 1 and boosting.score[1] == 100


def test_node_with_more_arcs_than_a_warp_has_threads() -> None:
    """The root and an inner node with 100 arcs; a suffix of the inner node's path with 60, 40 of which are the same."""
    vocabulary = 200
    phrases: Phrases = [([7, 9, token], 1.0 + token / 100) for token in range(100)]
    phrases += [([9, token], 2.0) for token in range(60, 120)]
    phrases += [([token], 0.5) for token in range(100, 200)]
    boosting = Boosting(phrases, vocabulary)
    for emitted in ([], [7], [7, 9], [9], [7, 9, 63], [7, 9, 110], [7, 9, 199], [150]):
        node = functools.reduce(boosting.next_node, emitted, 0)
        for _ in range(2):  # computed, and from the cache
            np.testing.assert_allclose(boosting.bias(node), plain_bias(phrases, emitted, vocabulary), atol=1e-4)


def test_digest_covers_tokens_weights_and_vocabulary() -> None:
    base: tuple[Phrases, int] = ([([1, 2], 1.0), ([2, 3], 1.0)], 5)
    others: list[tuple[Phrases, int]] = [
        ([([1, 2], 1.0), ([2, 4], 1.0)], 5),
        ([([1, 2], 1.0), ([2, 3], 1.5)], 5),
        ([([1, 2], 1.0), ([2, 3], 1.0), ([1], 1.0)], 5),  # only a penalty differs
        ([([1, 2], 1.0)], 5),
        (base[0], 6),
    ]
    digests = [Boosting(*each).digest.tobytes() for each in (base, *others)]
    assert len(set(digests)) == len(digests) and all(len(digest) == 32 for digest in digests)
    assert Boosting(*base).digest.tobytes() == digests[0]
    assert NO_PHRASES.tobytes() == bytes(32)


def test_maximum_number_of_phrases(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    phrases = {" ".join(rng.choice(names, MAX_TOKENS)): 100.0 for _ in range(MAX_PHRASES)}
    boosting = Boosting.from_phrases(phrases, tokenizer)
    assert len(boosting) > 60_000
    assert np.isfinite(boosting.penalty).all()


def test_order_of_phrases_is_irrelevant(tokenizer: Tokenizer) -> None:
    phrases = {"one two": 2.0, "one two three": 1.0, "two": 0.5}
    one, other = (
        Boosting.from_phrases(phrases, tokenizer),
        Boosting.from_phrases(dict(reversed(phrases.items())), tokenizer),
    )
    assert one.digest.tobytes() == other.digest.tobytes()
    assert (
        one.digest.tobytes() == Boosting.from_phrases({**phrases, "two": np.float32(0.5)}, tokenizer).digest.tobytes()
    )
    assert one.digest.tobytes() != Boosting.from_phrases({**phrases, "two": 0.6}, tokenizer).digest.tobytes()
    assert (
        Boosting.from_phrases(["one", "one"], tokenizer).digest.tobytes()
        == Boosting.from_phrases({"one": 1}, tokenizer).digest.tobytes()
    )


def test_arrays_are_read_only(tokenizer: Tokenizer) -> None:
    boosting = Boosting.from_phrases(["one two"], tokenizer)
    for array in (boosting.first, boosting.token, boosting.score, boosting.fail, boosting.penalty, boosting.bias(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_phrase_starts_a_word(tmp_path: Path, tokenizer_model: bytes) -> None:
    """Tokens are those of the phrase after other words: the first includes the space; case is preserved."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=tokenizer_model)
    boosting = Boosting.from_phrases({"quick dog": 3}, Tokenizer(tmp_path / "tokenizer.model", model.get_piece_size()))
    tokens = model.encode("the quick dog")[len(model.encode("the")) :]
    node = 0
    for depth, token in enumerate(tokens):
        assert boosting.bias(node)[token] == pytest.approx(3 if depth == 0 else 6 + math.log(depth + 1))
        node = boosting.next_node(node, token)
    assert node == len(boosting) - 1


def test_phrase_of_a_script_without_spaces_is_boosted_within_text(tmp_path: Path) -> None:
    """Chinese has a space at the start of a text only, as a token of its own or with the first character."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["我在北京友好", "北京", "友好 hello"] * 20),
        model_writer=model,
        vocab_size=30,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["\u2581友", "\u2581去", "北", "京", "友", "好", "我"],
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = Tokenizer(path, pieces.get_piece_size())
    ids = {
        piece: pieces.piece_to_id(piece) for piece in ("\u2581", "北", "京", "\u2581友", "友", "好", "我", "\u2581去")
    }

    def arrays(boosting: Boosting) -> list[list[float]]:
        return [boosting.token.tolist(), boosting.first.tolist(), boosting.score.tolist()]

    for phrase, paths in {
        "北京": [["北", "京"]],
        "友好": [["\u2581友", "好"], ["友", "好"]],
        "去好": [["\u2581去", "好"]],  # no piece without the space
    }.items():
        expected = [([ids[piece] for piece in path], 2.0) for path in paths]
        boosting = Boosting.from_phrases({phrase: 2.0}, tokenizer)
        assert arrays(boosting) == arrays(Boosting(expected, tokenizer.vocabulary))
    hello = Boosting.from_phrases({"hello": 2.0}, tokenizer)
    assert arrays(hello) == arrays(Boosting([(pieces.encode("hello"), 2.0)], tokenizer.vocabulary))
