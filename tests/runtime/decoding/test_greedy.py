"""Batched label looping compared with the definition, on difficult logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.greedy import DecoderState, greedy_reference, label_looping

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
