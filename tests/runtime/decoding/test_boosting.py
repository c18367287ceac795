"""Phrase boosting compared with NeMo's boosting tree, with the definition, and with expected results."""

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

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.decoding.boosting import MAX_PHRASES, MAX_TOKENS, Boosting
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


def nemo_tree(phrases: Phrases, vocabulary: int) -> Any:
    """NeMo's tree of tokens. Largest weight first: otherwise NeMo lowers shared scores (`ContextGraph.build`)."""
    from nemo.collections.asr.parts.context_biasing.boosting_graph_batched import GPUBoostingTreeModel
    from nemo.collections.asr.parts.context_biasing.context_graph_universal import ContextGraph

    graph = ContextGraph(context_score=1.0, depth_scaling=2.0)
    ordered = sorted(phrases, key=lambda phrase: -phrase[1])
    graph.build([tokens for tokens, _ in ordered], scores=[weight for _, weight in ordered])
    return GPUBoostingTreeModel.from_context_graph(
        graph, vocab_size=vocabulary, unk_score=0.0, final_eos_score=1.0, use_triton=False, uniform_weights=False
    )


@pytest.mark.nemo
def test_bit_identical_to_nemo() -> None:
    rng, met = np.random.default_rng(0), set()
    for _ in range(60):
        vocabulary = int(rng.integers(3, 12))
        phrases = random_phrases(rng, vocabulary)
        boosting, tree = Boosting(phrases, vocabulary), nemo_tree(phrases, vocabulary)
        assert len(boosting) == tree.num_states
        for _ in range(10):
            node, state = 0, tree.get_init_states(1)
            for _ in range(12):
                expected, following = tree.advance(state)
                np.testing.assert_array_equal(boosting.bias(node), expected[0].detach().numpy())
                token = int(rng.integers(vocabulary))
                node, state = boosting.next_node(node, token), following[:, token]
                met.add(node)
    assert len(met) > 30


# -- NeMo's decoding ---------------------------------------------------------------------------------------------------


def stream(backend: OrtBackend, bundle: Bundle, parts: list[tuple[np.ndarray, int]], chunk: ChunkConfig) -> Any:
    """Return the tokens, scores and `sum_p_alpha` of a recording in slot 0."""
    columns: list[list[Any]] = [[], [], []]
    for samples, length in parts:
        step = backend.submit(Batch(chunk, np.array([0]), samples[None], np.array([length]))).result()
        for column, part in zip(columns, (step.tokens, step.scores, step.sum_p_alpha), strict=True):
            column += part[0].tolist()
    return columns


def nemo_decoding(oracle: Any, tree: Any = None, confidence: dict[str, Any] | None = None) -> Any:
    """Return a function that decodes `encoded` [T, D] with NeMo's batched greedy decoding of the oracle's model."""
    import copy

    import torch
    from nemo.collections.asr.parts.submodules.rnnt_decoding import RNNTBPEDecoding
    from omegaconf import OmegaConf

    model = oracle.model
    config = OmegaConf.create(OmegaConf.to_container(copy.deepcopy(model.cfg.decoding), resolve=True))
    config.strategy = "greedy_batch"
    if confidence:
        config.confidence_cfg = {"preserve_token_confidence": True, "exclude_blank": True, "method_cfg": confidence}
    decoding = RNNTBPEDecoding(config, decoder=model.decoder, joint=model.joint, tokenizer=model.tokenizer)
    if tree is not None:
        computer = decoding.decoding.decoding_computer
        computer.fusion_models, computer.fusion_models_alpha = [tree], [1.0]

    def decode(encoded: np.ndarray) -> Any:
        with torch.inference_mode():
            frames = torch.from_numpy(encoded.T[None].copy())
            return decoding.rnnt_decoder_predictions_tensor(
                frames, torch.tensor([len(encoded)]), return_hypotheses=True
            )[0]

    return decode


@pytest.mark.nemo
@pytest.mark.parametrize("which", ["demo", "tiny"])
@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0, "mixed"])
def test_tokens_equal_nemos_with_its_boosting_tree(
    which: str, weight: Any, clips: Any, cut_chunks: Any, request: pytest.FixtureRequest
) -> None:
    bundle, oracle = request.getfixturevalue(f"{which}_bundle"), request.getfixturevalue(f"{which}_oracle")
    rng, vocabulary, chunk = np.random.default_rng(3), bundle.manifest.decoder.vocabulary, bundle.manifest.chunk(560)
    backend = OrtBackend(bundle, capacity=1)
    spoken = changed = 0
    plain = nemo_decoding(oracle)
    for audio in list(clips.values()):
        encoded = oracle.encode(oracle.features(audio), chunk)
        before = [int(token) for token in plain(encoded).y_sequence]
        some = np.unique([*before, *rng.integers(0, vocabulary, 4)])  # tokens that are likely for the model
        phrases = [
            (
                rng.choice(some, rng.integers(1, 5)).tolist(),
                float(rng.choice([0.5, 1, 3]) if weight == "mixed" else weight),
            )
            for _ in range(12)
        ]
        # And a third of all tokens that were not emitted, some of which are likely.
        others = np.setdiff1d(np.arange(vocabulary), before)
        phrases += [([int(token)], phrases[0][1]) for token in rng.choice(others, vocabulary // 3, replace=False)]
        expected = [int(token) for token in nemo_decoding(oracle, nemo_tree(phrases, vocabulary))(encoded).y_sequence]
        backend.reset(np.array([0]))
        backend.set_phrases(0, Boosting(phrases, vocabulary))
        assert stream(backend, bundle, cut_chunks(bundle.manifest, chunk, audio), chunk)[0] == expected
        spoken, changed = spoken + len(expected), changed + (expected != before)
    assert spoken > 20
    assert changed > 1


@pytest.mark.nemo
def test_phrases_are_tokenized_and_weighted_as_in_nemo(demo_oracle: Any, tokenizer: Tokenizer) -> None:
    """From text, with NeMo's configuration of a boosting tree and its default weight."""
    from nemo.collections.asr.parts.context_biasing.boosting_graph_batched import (
        BoostingTreeModelConfig,
        GPUBoostingTreeModel,
    )

    phrases = ["two zero two", "zero", "nine one one", "nine one two four", "four"]
    tree = GPUBoostingTreeModel.from_config(
        BoostingTreeModelConfig(key_phrases_list=phrases, use_triton=False), demo_oracle.model.tokenizer
    )
    boosting = Boosting.from_phrases(phrases, tokenizer)
    rng, likely = np.random.default_rng(1), sorted({token for phrase in phrases for token in tokenizer.encode(phrase)})
    for _ in range(20):
        node, state = 0, tree.get_init_states(1)
        for _ in range(6):
            expected, following = tree.advance(state)
            np.testing.assert_array_equal(boosting.bias(node), expected[0].detach().numpy())
            token = int(rng.choice(likely))
            node, state = boosting.next_node(node, token), following[:, token]


def nemo_measure(score: np.ndarray, sum_p_alpha: np.ndarray, method: dict[str, Any], v: int) -> np.ndarray:
    """NeMo's formulas (`get_confidence_measure_bank`) as functions of the score and `sum_p_alpha` of a token."""
    t = method["alpha"]
    if method["name"] == "max_prob":
        return (np.exp(t * score) * v**t - 1) / (v**t - 1)
    linear = method["entropy_norm"] == "lin"
    if method["entropy_type"] == "renyi":
        if linear:
            return 1 + np.log2(sum_p_alpha) / (t - 1) / math.log2(v)
        return (sum_p_alpha ** (1 / (t - 1)) * v - 1) / (v - 1)
    if linear:
        return 1 + (1 - sum_p_alpha) / (v ** (1 - t) - 1)
    minimum = math.exp((1 - v ** (1 - t)) / (1 - t))
    return (np.exp((1 - sum_p_alpha) / (1 - t)) - minimum) / (1 - minimum)


METHODS = [{"name": "max_prob", "alpha": alpha} for alpha in (0.33, 1.0)] + [
    {"name": "entropy", "alpha": 0.33, "entropy_type": kind, "entropy_norm": norm}
    for kind in ("tsallis", "renyi")
    for norm in ("lin", "exp")
]


@pytest.mark.nemo
@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("which", ["demo", "tiny"])
def test_confidence_equals_nemo(
    which: str, boosted: bool, clips: Any, cut_chunks: Any, request: pytest.FixtureRequest
) -> None:
    """The score and `sum_p_alpha` of tokens yield NeMo's confidence on the same audio.

    With boosting, NeMo's `max_prob` is that of the most likely label; ours is that of the emitted one.
    """
    bundle, oracle = request.getfixturevalue(f"{which}_bundle"), request.getfixturevalue(f"{which}_oracle")
    rng, vocabulary, chunk = np.random.default_rng(4), bundle.manifest.decoder.vocabulary, bundle.manifest.chunk(560)
    phrases: Phrases = [(rng.integers(0, vocabulary, 2).tolist(), 2.0) for _ in range(40)]
    backend, compared, found = OrtBackend(bundle, capacity=1), 0, []
    for audio in list(clips.values())[:4]:
        backend.reset(np.array([0]))
        backend.set_phrases(0, Boosting(phrases, vocabulary) if boosted else None)
        emitted = stream(backend, bundle, cut_chunks(bundle.manifest, chunk, audio), chunk)
        found.append((oracle.encode(oracle.features(audio), chunk), *emitted))
    for method in METHODS[2:] if boosted else METHODS:
        decode = nemo_decoding(oracle, nemo_tree(phrases, vocabulary) if boosted else None, method)
        for encoded, tokens, scores, sum_p_alpha in found:
            expected = decode(encoded)
            assert tokens == [int(token) for token in expected.y_sequence]
            actual = nemo_measure(np.array(scores), np.array(sum_p_alpha), method, vocabulary + 1)
            np.testing.assert_allclose(actual, expected.token_confidence, atol=2e-4, err_msg=str(method))
            compared += len(tokens)
    assert compared > 40


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ([], "phrases is empty"),
        ({}, "phrases is empty"),
        ("one two", "phrases is 'one two'; pass a list of phrases"),
        (5, "phrases is 5; pass a list of phrases"),
        ([["one", 2]], r"the phrase \['one', 2\] is not a string"),
        ([None], "the phrase None is not a string"),
        (["\ud800"], "is not Unicode text"),
        (["one", ""], "the phrase '' is empty"),
        (["  "], "the phrase '  ' is empty"),
        ([3], "the phrase 3 is not a string"),
        (["one", "Zürich"], "the phrase 'Zürich' has characters outside the model's vocabulary"),
        (["one " * 65], "has 65 tokens; the maximum is 64"),
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
