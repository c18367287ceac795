"""Greedy RNNT decoding (Graves 2012), batched by label looping (NeMo `rnnt_greedy_decoding`, Bataev et al. 2024).

At each encoder frame the joint looks at the frame and at the prediction made of the labels so far: a label is emitted
and changes the prediction, blank moves on to the next frame. So as long as nothing is emitted the prediction stays the
same, and *all* frames a row still has can be joined with it at once: one call finds every row's next label, and a chunk
takes as many calls as its busiest row has labels, plus one.

A row may be boosted (`runtime/decoding/boosting.py`). Whether a frame is blank is decided by the plain logits; if it is not, the
label is the largest of the others' logits plus the boosting's. As in NeMo, what is reported of a label's probability is
of the plain logits: a label that boosting chose may be an unlikely one, and its score says so.

`label_looping` is what backends on a CPU run; `greedy_reference` is its plain twin, one row, one frame at a time.
Neither knows how the two networks are computed.
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
# asr_confidence_utils.py`). The sum of p ** ALPHA over the vocabulary and blank is all that Tsallis' and Renyi's need
# of the distribution that a token was chosen from; NeMo's `max_prob` needs the token's own probability only.
ALPHA = 0.33


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
class DecoderState:
    """What a stream carries from chunk to chunk: the prediction *after* its last label, the LSTM's state, and its node.

    Carrying the prediction itself matters: recomputing it from the advanced state would step the LSTM twice.
    """

    predicted: Floats  # [B, J]
    h: Floats  # [B, R, P]
    c: Floats  # [B, R, P]
    node: Ints  # [B] of the automaton of what a row is boosted by; 0 where nothing is

    @classmethod
    def initial(cls, net: Transducer, layers: int, hidden: int) -> DecoderState:
        """One row that has said nothing: the LSTM has taken one step on blank, whose embedding is zero."""
        zeros = np.zeros((1, layers, hidden), np.float32)
        return cls(*net.predict(np.array([net.blank]), zeros, zeros), np.zeros(1, np.int64))

    def repeat(self, rows: int) -> DecoderState:
        """One row, so many times."""
        h, c = np.repeat(self.h, rows, axis=0), np.repeat(self.c, rows, axis=0)
        return DecoderState(np.repeat(self.predicted, rows, axis=0), h, c, np.repeat(self.node, rows))


@dataclass
class Labels:
    """What a row said, label by label."""

    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # 0 ... T - 1
    scores: list[float] = field(default_factory=list)  # logarithm of each one's probability
    sum_p_alpha: list[float] = field(default_factory=list)  # sum of p ** ALPHA over all logits it was chosen from

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
) -> tuple[list[Labels], NDArray[np.bool_]]:
    """Decode the first `counts[b]` of the T frames `encoded` [B, T, J] of each row; `state` is advanced in place.

    `boosts` has what each row is boosted by, or is empty. Returns what each row said, and which rows met a number that
    is not finite; those stop where they are, and no token is made of it. Of equal logits the lowest id wins, as in
    NeMo.
    """
    rows = len(encoded)
    said = [Labels() for _ in range(rows)]
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
        scores, sum_p_alpha = label_scores(logits[hit], labels)
        if boosts:
            for index, row in enumerate(active.tolist()):
                if (boosting := boosts[row]) is not None:
                    plain, node = logits[hit[index]], int(state.node[row])
                    label = int((plain[: net.blank] + boosting.bias(node)).argmax())
                    # log p of the label: so much less than that of the largest
                    scores[index] += float(plain[label]) - float(plain[labels[index]])
                    labels[index] = label
                    state.node[row] = boosting.next_node(node, label)
        for row, label, frame, score, total in zip(
            active.tolist(), labels.tolist(), where.tolist(), scores.tolist(), sum_p_alpha.tolist(), strict=True
        ):
            symbols[row] = symbols[row] + 1 if said[row].frames and said[row].frames[-1] == frame else 1
            said[row].append(label, frame, score, total)
        at[active] = where + (symbols[active] >= net.max_symbols)
        state.predicted[active], state.h[active], state.c[active] = net.predict(
            labels, state.h[active], state.c[active]
        )
    return said, failed


def label_scores(logits: Floats, largest: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of logits [B, V] whose largest have the ids [B]: the logarithm of its probability, and the sum of p ** ALPHA."""
    about = logits.astype(np.float64)
    about -= about[np.arange(len(about)), largest, None]
    sum_p_alpha = np.exp(ALPHA * about).sum(axis=1)
    score = -np.log(np.exp(about).sum(axis=1))
    return score, sum_p_alpha * np.exp(ALPHA * score)


def greedy_reference(net: Transducer, encoded: Floats, state: DecoderState, boosting: Boosting | None = None) -> Labels:
    """The definition: one row of T frames `encoded` [T, J], `state` of one row advanced in place."""
    said = Labels()
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
            logs = logits - np.logaddexp.reduce(logits.astype(np.float64))
            said.append(label, frame, float(logs[label]), float(np.exp(ALPHA * logs).sum()))
            state.predicted, state.h, state.c = net.predict(np.array([label]), state.h, state.c)
    return said
