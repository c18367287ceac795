"""Batched label looping compared with the definition, on difficult logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.greedy import DecoderState, greedy_reference, label_looping, label_scores

J = 4


class TableNet:
    """A transducer with tabulated logits: joining frame f with the n-th prediction of a row returns table[f, n % N].

    `h` counts the labels so far, `encoded` and `predicted` carry indices in their first element, so using
    a wrong row, frame or state results in other logits.
    """

    blank, max_symbols = 3, 5

    def __init__(self, table: np.ndarray) -> None:
        self.table = table  # [rows, frames, predictions, V]

    def predict(self, tokens, h, c):  # type: ignore[no-untyped-def]
        count = h[:, 0, 0] + 1
        mixed = (c[:, 0, 0] * 7 + tokens + 1) % 11  # depends on every token, in order
        predicted = np.zeros((len(tokens), J), np.float32)
        predicted[:, 0], predicted[:, 1] = count, mixed
        return predicted, count[:, None, None].astype(np.float32), mixed[:, None, None].astype(np.float32)

    largest_call = 0  # pairs

    def join(self, encoded, predicted):  # type: ignore[no-untyped-def]
        self.largest_call = max(self.largest_call, len(encoded))
        row, frame = encoded[:, 0].astype(int), encoded[:, 1].astype(int)
        which = (predicted[:, 0] + predicted[:, 1]).astype(int) % self.table.shape[2]
        return self.table[row, frame, which]

    def frames(self) -> np.ndarray:
        rows, frames = self.table.shape[:2]
        encoded = np.zeros((rows, frames, J), np.float32)
        encoded[..., 0], encoded[..., 1] = np.arange(rows)[:, None], np.arange(frames)
        return encoded


def decode_both(  # type: ignore[no-untyped-def]
    table: np.ndarray, counts: np.ndarray, splits: list[int], boosts=(), max_pairs: int | None = None
):
    """Decode batched in chunks of the sizes `splits`, and with the definition row by row."""
    net, rows = TableNet(table), len(table)
    start = DecoderState.initial(net, 1, 1)
    state = start.repeat(rows)
    tokens: list[list[int]] = [[] for _ in range(rows)]
    frames: list[list[int]] = [[] for _ in range(rows)]
    scores: list[list[float]] = [[] for _ in range(rows)]
    sum_p_alpha: list[list[float]] = [[] for _ in range(rows)]
    begin = 0
    for size in splits:
        part = net.frames()[:, begin : begin + size]
        decoded = np.clip(counts - begin, 0, part.shape[1])
        labels, failed = label_looping(net, part, decoded, state, boosts, max_pairs)
        assert max_pairs is None or net.largest_call <= max(max_pairs, rows)
        assert not failed.any()
        for row in range(rows):
            tokens[row] += labels[row].tokens
            frames[row] += [begin + frame for frame in labels[row].frames]
            scores[row] += labels[row].scores
            sum_p_alpha[row] += labels[row].sum_p_alpha
        begin += size
    expected = []
    for row in range(rows):
        alone = DecoderState.initial(net, 1, 1)
        boosting = boosts[row] if boosts else None
        definition = greedy_reference(net, net.frames()[row, : counts[row]], alone, boosting)
        expected.append((definition.tokens, definition.frames))
        np.testing.assert_allclose(scores[row], definition.scores, atol=1e-6)
        np.testing.assert_allclose(sum_p_alpha[row], definition.sum_p_alpha, rtol=1e-6)
        np.testing.assert_array_equal(alone.predicted[0], state.predicted[row])
        assert alone.node[0] == state.node[row]
    return list(zip(tokens, frames, strict=True)), expected


def random_phrases(rng: np.random.Generator, vocabulary: int) -> Boosting:
    """Return short phrases of few tokens, which overlap, are suffixes of each other, and are reached."""
    phrases = {}
    for _ in range(int(rng.integers(1, 6))):
        tokens = tuple(rng.integers(0, vocabulary, rng.integers(1, 5)).tolist())
        phrases[tokens] = float(rng.choice([0.5, 1.0, 3.0]))
    return Boosting([*phrases.items()], vocabulary)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["random", "ties", "blanks", "labels"]),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([None, 1, 5, 12, 40]),
)
def test_equals_the_definition(seed: int, kind: str, rows: int, boosted: bool, max_pairs: int | None) -> None:
    rng = np.random.default_rng(seed)
    frames = int(rng.integers(1, 30))
    table = rng.standard_normal((rows, frames, 9, 4)).astype(np.float32)
    if kind == "ties":
        table = np.round(table)  # many equal maxima; the lowest id must win
    elif kind == "blanks":
        table[..., 3] += 10
    elif kind == "labels":
        table[..., 3] -= 10  # the maximum number of symbols at every frame
    counts = rng.integers(0, frames + 1, rows)
    splits, left = [], frames
    while left:
        splits.append(int(rng.integers(1, left + 1)))
        left -= splits[-1]
    boosts = [random_phrases(rng, 3) if rng.random() < 0.6 else None for _ in range(rows)] if boosted else ()
    actual, expected = decode_both(table, counts, splits, boosts, max_pairs)
    assert actual == expected
    if kind == "labels":
        assert all(len(tokens) == 5 * count for (tokens, _), count in zip(actual, counts, strict=True))
    if kind == "blanks":
        assert not any(tokens for tokens, _ in actual)


@pytest.mark.parametrize("max_pairs", [None, 6])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_logits_affect_only_their_row(value: float, max_pairs: int | None) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((3, 8, 9, 4)).astype(np.float32)
    clean, _ = decode_both(table, np.full(3, 8), [8])
    table[1, 4, :, 2] = value
    net = TableNet(table)
    start = DecoderState.initial(net, 1, 1)
    labels, failed = label_looping(net, net.frames(), np.full(3, 8), start.repeat(3), max_pairs=max_pairs)
    assert failed.tolist() == [False, True, False]
    assert [(labels[row].tokens, labels[row].frames) for row in (0, 2)] == [clean[0], clean[2]]
    assert all(frame < 4 for frame in labels[1].frames)


def test_non_finite_frames_are_rejected_before_decoding() -> None:
    net = TableNet(np.zeros((2, 3, 9, 4), np.float32))
    net.table[..., 1] = 1.0
    start = DecoderState.initial(net, 1, 1)
    encoded = net.frames()
    encoded[0, 2, 3] = np.nan
    labels, failed = label_looping(net, encoded, np.array([3, 3]), start.repeat(2))
    assert failed.tolist() == [True, False]
    assert not labels[0].tokens
    assert len(labels[1].tokens) == 3 * net.max_symbols


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("column", [0, 2, 3])
@pytest.mark.parametrize("frame", [0, 3, 7])
def test_row_stops_at_logits_that_are_not_finite(value: float, column: int, frame: int) -> None:
    """In a label or in blank, in the first, an inner or the last frame; the labels before it are kept."""
    rng = np.random.default_rng(1)
    table = rng.standard_normal((2, 8, 9, 4)).astype(np.float32)
    table[1, frame, :, column] = value
    net = TableNet(table)
    start = DecoderState.initial(net, 1, 1)
    for max_pairs in (None, 2):
        state = start.repeat(2)
        labels, failed = label_looping(net, net.frames(), np.full(2, 8), state, max_pairs=max_pairs)
        assert failed.tolist() == [False, True]
        for row, frames in ((0, 8), (1, frame)):
            alone = start.repeat(1)
            before = greedy_reference(net, net.frames()[row, :frames], alone)
            assert (labels[row].tokens, labels[row].frames) == (before.tokens, before.frames)
            for name in ("predicted", "h", "c"):
                np.testing.assert_array_equal(getattr(state, name)[row], getattr(alone, name)[0])
        with pytest.raises(FloatingPointError, match=f"the logits of frame {frame} are not finite"):
            greedy_reference(net, net.frames()[1], start.repeat(1))


def test_row_of_logits_of_minus_infinity_fails() -> None:
    net = TableNet(np.full((1, 2, 9, 4), -np.inf, np.float32))
    labels, failed = label_looping(net, net.frames(), np.array([2]), DecoderState.initial(net, 1, 1))
    assert failed.tolist() == [True] and not labels[0].tokens


def test_impossible_labels_do_not_fail() -> None:
    """A logit of minus infinity is a probability of zero."""
    table = np.full((1, 2, 9, 4), -np.inf, np.float32)
    table[0, :, :, 1], table[0, :, :, 3] = [[1.0], [0.0]], [[0.0], [1.0]]
    net = TableNet(table)
    labels, failed = label_looping(net, net.frames(), np.array([2]), DecoderState.initial(net, 1, 1))
    assert not failed.any() and labels[0].frames == [0] * 5 and labels[0].tokens == [1] * 5
    p = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    np.testing.assert_allclose(labels[0].scores, [np.log(p[0])] * 5)
    np.testing.assert_allclose(labels[0].sum_p_alpha, [(p**0.33).sum()] * 5)


@pytest.mark.parametrize(
    ("max_pairs", "sizes"),
    [
        (None, [8, 4, 2]),  # all remaining frames of every row; again from the frame of each label
        (6, [5, 4, 2]),
        (4, [4, 4, 4, 2]),
        (3, [2, 2, 3, 3, 2]),
        (1, [2, 2, 1, 1, 1, 1, 1, 1]),  # at least one frame of each row
    ],
)
def test_pairs_of_each_call(max_pairs: int | None, sizes: list[int]) -> None:
    """Row 0 has two frames without a label, row 1 has six frames with a label at frames 2 and 4."""

    calls = []

    class Counting:
        blank, max_symbols = 1, 5

        def predict(self, tokens, h, c):  # type: ignore[no-untyped-def]
            return h[:, 0] + 1, h + 1, c  # the number of labels, and 1 for the initial blank

        def join(self, encoded, predicted):  # type: ignore[no-untyped-def]
            calls.append(len(encoded))
            label = (encoded == 2) & (predicted == 1) | (encoded == 4) & (predicted == 2)
            return np.concatenate([label, ~label], axis=1).astype(np.float32)

    net = Counting()
    encoded = np.stack([np.full((6, 1), 9), np.arange(6)[:, None]]).astype(np.float32)
    state = DecoderState.initial(net, 1, 1).repeat(2)
    labels, _ = label_looping(net, encoded, np.array([2, 6]), state, max_pairs=max_pairs)
    assert [(row.tokens, row.frames) for row in labels] == [([], []), ([0, 0], [2, 4])]
    assert calls == sizes


def test_initial_state_is_that_after_blank() -> None:
    net = TableNet(np.zeros((1, 1, 9, 4), np.float32))
    state = DecoderState.initial(net, 2, 3)
    predicted, h, c = net.predict(np.array([3]), np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32))
    for actual, expected in ((state.predicted, predicted), (state.h, h), (state.c, c), (state.node, [0])):
        np.testing.assert_array_equal(actual, expected)
    state = DecoderState(*(np.arange(1, 5, dtype=np.float32)[:, None] * [[1, 2]] for _ in range(3)), np.arange(4))
    one = DecoderState(state.predicted[2:3], state.h[1:2], state.c[3:4], state.node[2:3])
    three = one.repeat(3)
    assert (three.predicted.tolist(), three.h.tolist()) == ([[3, 6]] * 3, [[2, 4]] * 3)
    assert (three.c.tolist(), three.node.tolist()) == ([[4, 8]] * 3, [2] * 3)


@pytest.mark.parametrize("vocabulary", [2, 1025])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_scores_are_those_of_the_softmax(vocabulary: int, scale: float) -> None:
    """Compared with float64; of large logits, the exponentials do not overflow."""
    logits = (scale * np.random.default_rng(2).standard_normal((5, vocabulary)) + 500).astype(np.float32)
    labels = logits.argmax(axis=1)
    shifted = logits.astype(np.float64) - 500
    p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    scores, sum_p_alpha = label_scores(logits, labels)
    np.testing.assert_allclose(scores, np.log(p[np.arange(5), labels]), atol=1e-12)
    np.testing.assert_allclose(sum_p_alpha, (p**0.33).sum(axis=1), rtol=1e-12)


def test_large_vocabulary(tmp_path: Path) -> None:
    """More threads and fewer pairs in a call of the joint change no bit of the results."""
    pytest.importorskip("onnx")
    from nemostream.benchmarks.harness.random_bundle import random_bundle
    from nemostream.benchmarks.harness.synthetic import Sizes
    from nemostream.benchmarks.studies.features import RandomBlankTransducer
    from nemostream.runtime.backends.cpu import OrtTransducer

    sizes = Sizes(n_layers=1, d_model=32, n_heads=2, conv_channels=4, pred_layers=1, vocab=13087, contexts=((70, 13),))
    bundle = random_bundle(tmp_path / "bundle", sizes=sizes)
    plain, large = (RandomBlankTransducer(OrtTransducer(bundle, threads), 6.0) for threads in (1, 2))
    assert OrtTransducer(bundle).max_pairs == 32
    encoded = np.random.default_rng(0).standard_normal((8, 14, 640)).astype(np.float32)
    start = DecoderState.initial(plain, 1, 640)
    results = []
    for net, max_pairs in ((plain, None), (large, 32)):
        state = start.repeat(8)
        results.append((label_looping(net, encoded, np.full(8, 14), state, max_pairs=max_pairs)[0], state))
    (wanted, wanted_state), (got, got_state) = results
    assert got == wanted
    assert sum(len(row.tokens) for row in got) > 20
    for name in ("predicted", "h", "c"):
        np.testing.assert_array_equal(getattr(got_state, name), getattr(wanted_state, name))
