"""Greedy RNNT decoding (Graves 2012), batched by label looping (NeMo `rnnt_greedy_decoding`, Bataev et al. 2024).

At each encoder frame the joint combines the frame with the prediction for the labels so far. A label is emitted and
changes the prediction; blank advances to the next frame. As long as no label is emitted the prediction does not change,
so *all* remaining frames of a row can be joined with it at once: one call finds the next label of every row, and a
chunk takes as many calls as the largest number of labels in a row, plus one. The frames after a label are joined in
vain; with a large vocabulary that costs more than additional calls, so the frames of a call can be limited.

A row may have phrase boosting (`runtime/decoding/boosting.py`). The plain logits decide whether a frame is blank; if it
is not, the label is the argmax of the other logits plus the boosting's bias. As in NeMo, scores are those of the plain
logits, so a label chosen by boosting may have a low score.

CPU backends run `label_looping`; `greedy_reference` is the definition, one row and one frame at a time. Neither depends
on how the two networks are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.runtime.decoding.boosting import Boosting

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# The exponent of NeMo's entropies (`ConfidenceMethodConfig.alpha`, `nemo/collections/asr/parts/utils/
# asr_confidence_utils.py`). The Tsallis and Renyi entropies need only the sum of p ** ALPHA over the vocabulary and
# blank; NeMo's `max_prob` needs only the probability of the token.
ALPHA = 0.33


class Transducer(Protocol):
    """The prediction network and the joint.

    Ids are [B] int64; `h` and `c` are [B, R, P]; predictions and frames are [B, J], after projection.
    """

    blank: int  # id of blank, the last one
    max_symbols: int  # maximum number of labels per frame: NeMo's guard against infinite loops

    def predict(self, tokens: Ints, h: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the prediction [B, J], h and c after each row's token."""
        ...

    def join(self, encoded: Floats, predicted: Floats) -> Floats:
        """Return the logits [B, V] of (frame, prediction) pairs."""
        ...


@dataclass
class DecoderState:
    """Decoder state of B rows between chunks: the prediction *after* the last label, the LSTM state, the boosting node.

    The prediction must be stored: recomputing it from the updated LSTM state would step the LSTM twice.
    """

    predicted: Floats  # [B, J]
    h: Floats  # [B, R, P]
    c: Floats  # [B, R, P]
    node: Ints  # [B] node of the row's boosting automaton; 0 without boosting

    @classmethod
    def initial(cls, net: Transducer, layers: int, hidden: int) -> DecoderState:
        """Return the initial state of one row: the LSTM has taken one step on blank, whose embedding is zero."""
        zeros = np.zeros((1, layers, hidden), np.float32)
        return cls(*net.predict(np.array([net.blank]), zeros, zeros), np.zeros(1, np.int64))

    def repeat(self, rows: int) -> DecoderState:
        """Return the state of one row, repeated for `rows` rows."""
        h, c = np.repeat(self.h, rows, axis=0), np.repeat(self.c, rows, axis=0)
        return DecoderState(np.repeat(self.predicted, rows, axis=0), h, c, np.repeat(self.node, rows))


@dataclass
class Labels:
    """The labels that a row emitted."""

    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # 0 ... T - 1
    scores: list[float] = field(default_factory=list)  # log p of each label
    sum_p_alpha: list[float] = field(default_factory=list)  # sum of p ** ALPHA over the vocabulary and blank

    def append(self, token: int, frame: int, score: float, sum_p_alpha: float) -> None:
        self.tokens.append(token)
        self.frames.append(frame)
        self.scores.append(score)
        self.sum_p_alpha.append(sum_p_alpha)


def label_looping(
    net: Transducer,
    encoded: Floats,
    counts: Ints,
    state: DecoderState,
    boosts: Sequence[Boosting | None] = (),
    max_pairs: int | None = None,
) -> tuple[list[Labels], NDArray[np.bool_]]:
    """Decode the first `counts[b]` of the T frames `encoded` [B, T, J] of each row; update `state` in place.

    `boosts` has the phrases of each row, or is empty. A call of the joint has at most `max_pairs` (row, frame) pairs,
    but at least one of each row; by default all remaining ones. Returns the labels of each row, and which rows have a
    value that is not finite; such a row stops there, and no label is made of that value. Of equal logits the lowest id
    wins, as in NeMo.
    """
    rows = len(encoded)
    emitted = [Labels() for _ in range(rows)]
    failed: NDArray[np.bool_] = np.asarray(~np.isfinite(encoded).all(axis=(1, 2)))
    current = np.zeros(rows, np.int64)  # current frame of each row
    symbols = np.zeros(rows, np.int64)  # labels emitted at that frame
    end = np.where(failed, 0, counts)
    while (active := np.flatnonzero(current < end)).size:
        # The pairs (row, remaining frame), row by row.
        remaining = end[active] - current[active]
        if max_pairs is not None:
            remaining = np.minimum(remaining, max(1, max_pairs // len(active)))
        first = np.cumsum(remaining) - remaining
        pair_row = np.repeat(active, remaining)
        pair_frame = np.arange(remaining.sum()) - np.repeat(first - current[active], remaining)
        logits = net.join(encoded[pair_row, pair_frame], state.predicted[pair_row])
        best = logits.argmax(axis=1)
        finite = np.isfinite(logits[np.arange(len(best)), best])
        # The first pair of each row that is not a finite blank: a label, or a value that is not finite (argmax returns
        # the index of a NaN).
        stops = np.append(np.flatnonzero((best != net.blank) | ~finite), len(best))
        stop = stops[np.searchsorted(stops, first)]
        current[active] += remaining
        found = stop < first + remaining
        active, stop = active[found], stop[found]
        broken = active[~finite[stop]]
        failed[broken], end[broken] = True, 0
        active, stop = active[finite[stop]], stop[finite[stop]]
        if not active.size:
            continue
        labels, frames = best[stop], pair_frame[stop]
        label_logits = logits[stop]
        scores, sum_p_alpha = label_scores(label_logits, labels)
        if boosts:
            _boost(label_logits[:, : net.blank], labels, scores, active, state, boosts)
        for row, label, frame, score, total in zip(
            active.tolist(), labels.tolist(), frames.tolist(), scores.tolist(), sum_p_alpha.tolist(), strict=True
        ):
            symbols[row] = symbols[row] + 1 if emitted[row].frames and emitted[row].frames[-1] == frame else 1
            emitted[row].append(label, frame, score, total)
        current[active] = frames + (symbols[active] >= net.max_symbols)
        state.predicted[active], state.h[active], state.c[active] = net.predict(
            labels, state.h[active], state.c[active]
        )
    return emitted, failed


def _boost(
    logits: Floats,
    labels: Ints,
    scores: NDArray[np.float64],
    rows: Ints,
    state: DecoderState,
    boosts: Sequence[Boosting | None],
) -> None:
    """Choose the labels of boosted rows again; update `labels`, `scores` and the nodes of `state` in place.

    `logits` [N, V - 1], without blank, the plain `labels` [N] and their `scores` [N] belong to the rows `rows` [N].
    """
    for index, row in enumerate(rows.tolist()):
        if (boosting := boosts[row]) is not None:
            plain, node = logits[index], int(state.node[row])
            label = int((plain + boosting.bias(node)).argmax())
            # Its log p is lower than that of the plain label by the difference of their logits.
            scores[index] += float(plain[label]) - float(plain[labels[index]])
            labels[index] = label
            state.node[row] = boosting.next_node(node, label)


def label_scores(logits: Floats, labels: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log p of each label and the sum of p ** ALPHA, [B] each.

    `logits` is [B, V]; `labels` [B] are the ids of the largest.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted[np.arange(len(shifted)), labels, None]
    sum_p_alpha = np.exp(ALPHA * shifted).sum(axis=1)
    score = -np.log(np.exp(shifted).sum(axis=1))
    return score, sum_p_alpha * np.exp(ALPHA * score)


def greedy_reference(net: Transducer, encoded: Floats, state: DecoderState, boosting: Boosting | None = None) -> Labels:
    """The definition: decode the T frames `encoded` [T, J] of one row; update `state` of one row in place.

    Raises `FloatingPointError` if logits are not finite.
    """
    emitted = Labels()
    for frame in range(len(encoded)):
        for _ in range(net.max_symbols):
            logits = net.join(encoded[frame : frame + 1], state.predicted)[0]
            if not np.isfinite(logits.max()):
                raise FloatingPointError(f"the logits of frame {frame} are not finite")
            label = int(logits.argmax())
            if label == net.blank:
                break
            if boosting is not None:
                node = int(state.node[0])
                label = int((logits[: net.blank] + boosting.bias(node)).argmax())
                state.node[0] = boosting.next_node(node, label)
            log_p = logits - np.logaddexp.reduce(logits.astype(np.float64))
            emitted.append(label, frame, float(log_p[label]), float(np.exp(ALPHA * log_p).sum()))
            state.predicted, state.h, state.c = net.predict(np.array([label]), state.h, state.c)
    return emitted
