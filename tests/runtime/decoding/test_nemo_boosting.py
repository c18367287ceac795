"""Phrase boosting and confidence compared with NeMo: its boosting tree, and its decoding of the same audio."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.nemo

Phrases = list[tuple[list[int], float]]


@pytest.fixture(scope="module")
def tokenizer(demo_bundle: Bundle) -> Tokenizer:
    return Tokenizer(demo_bundle.path / "tokenizer.model", demo_bundle.manifest.decoder.vocabulary)


def random_phrases(rng: np.random.Generator, vocabulary: int) -> Phrases:
    lengths = rng.integers(1, 8, rng.integers(1, 16))
    return [(rng.integers(0, vocabulary, length).tolist(), float(rng.choice([0.3, 1, 2.5]))) for length in lengths]


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


def test_bit_identical_to_nemo() -> None:
    rng, met = np.random.default_rng(0), set()
    for _ in range(60):
        vocabulary = int(rng.integers(3, 12))
        phrases = random_phrases(rng, vocabulary)
        boosting, tree = Boosting(phrases, vocabulary), nemo_tree(phrases, vocabulary)
        assert len(boosting) == tree.num_states
        for _ in range(10):
            met |= check_path(boosting, tree, rng.integers(vocabulary, size=12))
    assert len(met) > 30


def check_path(boosting: Boosting, tree: Any, tokens: NDArray[np.int64]) -> set[int]:
    """Compare the biases along a sequence of tokens with those of NeMo's tree. Return the node after each token."""
    node, state, nodes = 0, tree.get_init_states(1), set()
    for token in tokens.tolist():
        expected, following = tree.advance(state)
        np.testing.assert_array_equal(boosting.bias(node), expected[0].detach().numpy())
        node, state = boosting.next_node(node, token), following[:, token]
        nodes.add(node)
    return nodes


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
        check_path(boosting, tree, rng.choice(likely, size=6))


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
