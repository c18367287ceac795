"""Greedy RNNT decoding (Graves 2012), batched by label looping (NeMo `rnnt_greedy_decoding`, Bataev et al. 2024).

At each encoder frame the joint looks at the frame and at the prediction made of the labels so far: a label is emitted
and changes the prediction, blank moves on to the next frame. So as long as nothing is emitted the prediction stays the
same, and *all* frames a row still has can be joined with it at once: one call finds every row's next label, and a chunk
takes as many calls as its busiest row has labels, plus one.

`label_looping` is what backends on a CPU run; `greedy_reference` is its plain twin, one row, one frame at a time.
Neither knows how the two networks are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Transducer(Protocol):
    """The two small networks. Ids are [B] int64; `h` and `c` [B, R, P]; predictions and frames [B, J], projected."""

    blank: int
    max_symbols: int  # most labels at one frame, NeMo's guard against a loop that never ends

    def predict(self, tokens: Ints, h: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
        """Prediction [B, J], h and c after each row's token."""
        ...

    def join(self, encoded: Floats, predicted: Floats) -> Floats:
        """Logits [B, V] of (frame, prediction) pairs."""
        ...


@dataclass
class Predictions:
    """What a stream carries from chunk to chunk: the prediction *after* its last label, and the LSTM's state.

    Carrying the prediction itself matters: recomputing it from the advanced state would step the LSTM twice.
    """

    predicted: Floats  # [B, J]
    h: Floats  # [B, R, P]
    c: Floats  # [B, R, P]

    @classmethod
    def start(cls, net: Transducer, layers: int, hidden: int) -> Predictions:
        """One row that has said nothing: the LSTM has taken one step on blank, whose embedding is zero."""
        zeros = np.zeros((1, layers, hidden), np.float32)
        return cls(*net.predict(np.array([net.blank]), zeros, zeros))


def label_looping(
    net: Transducer, encoded: Floats, counts: Ints, state: Predictions
) -> tuple[list[list[int]], list[list[int]], list[list[float]], NDArray[np.bool_]]:
    """Decode the first `counts[b]` of the T frames `encoded` [B, T, J] of each row; `state` is advanced in place.

    Returns tokens per row, of each the frame (0 ... T-1) and the logarithm of its probability, and which rows met a
    number that is not finite; those stop where they are, and no token is made of it. Of equal logits the lowest id
    wins, as in NeMo.
    """
    rows = len(encoded)
    tokens: list[list[int]] = [[] for _ in range(rows)]
    frames: list[list[int]] = [[] for _ in range(rows)]
    scores: list[list[float]] = [[] for _ in range(rows)]
    failed: NDArray[np.bool_] = np.asarray(~np.isfinite(encoded).all(axis=(1, 2)))
    at = np.zeros(rows, np.int64)  # the frame each row stands at
    symbols = np.zeros(rows, np.int64)  # labels emitted at that frame
    end = np.where(failed, 0, counts)
    while (active := np.flatnonzero(at < end)).size:
        # Every pair (row, frame still to come), row by row.
        left = end[active] - at[active]
        first = np.cumsum(left) - left
        pair_row = np.repeat(active, left)
        pair_frame = np.arange(left.sum()) - np.repeat(first - at[active], left)
        logits = net.join(encoded[pair_row, pair_frame], state.predicted[pair_row])
        best = logits.argmax(axis=1)
        finite = np.isfinite(logits[np.arange(len(best)), best])
        # Each row's first pair that is not a plain blank: a label, or a number that is not one (argmax stops at NaN).
        stop = np.append(np.flatnonzero((best != net.blank) | ~finite), len(best))
        hit = stop[np.searchsorted(stop, first)]
        at[active] = end[active]
        found = hit < first + left
        active, hit = active[found], hit[found]
        broken = ~finite[hit]
        failed[active[broken]] = True
        active, hit = active[~broken], hit[~broken]
        if not active.size:
            break
        labels, where = best[hit], pair_frame[hit]
        said = logits[hit].astype(np.float64)
        score = -np.log(np.exp(said - said.max(axis=1, keepdims=True)).sum(axis=1))  # log softmax at its largest
        for row, label, frame, sure in zip(
            active.tolist(), labels.tolist(), where.tolist(), score.tolist(), strict=True
        ):
            symbols[row] = symbols[row] + 1 if frames[row] and frames[row][-1] == frame else 1
            tokens[row].append(label)
            frames[row].append(frame)
            scores[row].append(sure)
        at[active] = where + (symbols[active] >= net.max_symbols)
        state.predicted[active], state.h[active], state.c[active] = net.predict(
            labels, state.h[active], state.c[active]
        )
    return tokens, frames, scores, failed


def greedy_reference(net: Transducer, encoded: Floats, state: Predictions) -> tuple[list[int], list[int], list[float]]:
    """The definition: one row of T frames `encoded` [T, J], `state` of one row advanced in place.

    Returns tokens, the frame of each and the logarithm of its probability.
    """
    tokens: list[int] = []
    frames: list[int] = []
    scores: list[float] = []
    for frame in range(len(encoded)):
        for _ in range(net.max_symbols):
            logits = net.join(encoded[frame : frame + 1], state.predicted)[0]
            if not np.isfinite(logits.max()):
                raise FloatingPointError(f"the logits of frame {frame} are not finite")
            label = int(logits.argmax())
            if label == net.blank:
                break
            tokens.append(label)
            frames.append(frame)
            scores.append(float(logits[label] - np.logaddexp.reduce(logits.astype(np.float64))))
            state.predicted, state.h, state.c = net.predict(np.array([label]), state.h, state.c)
    return tokens, frames, scores
