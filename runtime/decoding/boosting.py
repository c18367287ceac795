"""Phrases that one stream should be more ready to hear: a prefix automaton over tokens, for shallow fusion.

The semantics are those of NeMo's boosting tree (GPU-PB, Andrusenko et al. 2025: `context_graph_universal.py` and
`boosting_graph_batched.py` in `nemo/collections/asr/parts/context_biasing`) with NeMo's defaults. Every phrase is a
path from the root. Having said its first n - 1 tokens, the logit of its n-th is raised by the phrase's weight w for
n = 1, and by 2 w + ln n for n > 1; where phrases share a beginning, the largest weight counts. Tokens that lead off the
path give all of it back, down to the longest suffix that begins a phrase (Aho and Corasick 1975), unless a phrase was
complete: what a complete phrase has earned, it keeps.

Only *which* token is said is changed by it, never whether one is: a frame is blank, or not, by the plain logits
(`runtime/decoding/greedy.py`).

What the module does not know: logits, streams, backends.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import OptionError
from nemostream.runtime.text.tokenizer import Tokenizer

WEIGHT = 1.0  # of phrases given without one: NeMo's `context_score`
DEPTH_SCALING = 2.0  # NeMo's for transducers
MAX_PHRASES = 1000
MAX_CHARACTERS = 1000  # of one phrase, checked before it is tokenised: no token of a speech model is longer than 15
MAX_TOKENS = 64  # of one phrase: as deep as the automaton may be
MAX_WEIGHT = 100.0  # beyond it, fp32 would begin to lose the logits in the sum

NO_PHRASES = np.zeros(32, np.uint8)  # what stands for the digest of none

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class Boosting:
    """Immutable; any number of streams, threads and backends may share one.

    Nodes are numbered breadth first, so that the children of node n are `first[n]` ... `first[n + 1] - 1`, in order of
    their tokens; node 0 is the root. All arrays are [nodes] but `first`, [nodes + 1].
    """

    def __init__(self, phrases: Sequence[tuple[Sequence[int], float]], vocabulary: int) -> None:
        """`phrases` are their tokens, of `vocabulary` (blank left out), and weights; `from_phrases` makes them from text."""
        assert all(0 < len(tokens) <= MAX_TOKENS for tokens, _ in phrases)
        # The heaviest first: what is shared then has the largest weight, whatever the order in which they were given.
        children: list[dict[int, int]] = [{}]
        scores, totals, complete = [0.0], [0.0], [False]
        for tokens, weight in sorted(phrases, key=lambda phrase: -phrase[1]):
            node = 0
            for depth, token in enumerate(tokens):
                if token not in children[node]:
                    score = weight * DEPTH_SCALING + float(np.log(depth + 1)) if depth else weight
                    children[node][token] = len(children)
                    children.append({})
                    scores.append(score)
                    totals.append(totals[node] + score)
                    complete.append(False)
                node = children[node][token]
            complete[node] = True
        order, came_by = [0], [-1]  # old numbers of the nodes, breadth first, and the token that led to each
        first = []
        for node in order:
            first.append(len(order))
            for token, child in sorted(children[node].items()):
                order.append(child)
                came_by.append(token)
        new = {old: number for number, old in enumerate(order)}
        fails = [0] * len(order)
        self._child = {(new[old], token): new[to] for old in order for token, to in children[old].items()}
        for number, old in enumerate(order):
            for token, child in children[old].items():
                fails[new[child]] = self._step(fails, fails[number], token) if number else 0
        penalties = [
            0.0 if complete[old] else totals[order[fails[number]]] - totals[old] for number, old in enumerate(order)
        ]
        self.vocabulary = vocabulary
        self.first: Ints = _kept(np.array([*first, len(order)], np.int32))
        self.token: Ints = _kept(np.array(came_by, np.int32))  # that leads to the node
        self.score: Floats = _kept(np.array([scores[old] for old in order], np.float32))  # what is added to its logit
        self.fail: Ints = _kept(np.array(fails, np.int32))  # the longest proper suffix that is a node
        self.penalty: Floats = _kept(np.array(penalties, np.float32))  # added on the way to `fail`
        parts = (self.first, self.token, self.score, self.fail, self.penalty, np.array([vocabulary]))
        digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()
        self.digest: NDArray[np.uint8] = np.frombuffer(digest, np.uint8)  # [32], the same for the same phrases
        self._fails, self._bounds = fails, self.first.tolist()
        self._met: dict[int, Any] = {}  # what `bias` has found out of nodes that were asked for
        self._root = np.zeros(vocabulary, np.float32)
        self._root[self.token[1 : self._bounds[1]]] = self.score[1 : self._bounds[1]]
        _kept(self._root)

    @classmethod
    def from_phrases(cls, phrases: Mapping[str, float] | Sequence[str], tokenizer: Tokenizer) -> Boosting:
        """Phrases, each with its weight (or all with `WEIGHT`), as the model would write them: case and all.

        A phrase is split as SentencePiece splits text, from a word's start. Raises `OptionError` for no phrase or too
        many, a phrase that is empty, too long, or has characters the model does not know, and weights that are not in
        (0, `MAX_WEIGHT`].
        """
        if isinstance(phrases, str | bytes) or not isinstance(phrases, Mapping | Sequence):
            raise OptionError(f"phrases is {_short(phrases)}; give a list of phrases, or weights by phrase.")
        if len(phrases) > MAX_PHRASES:
            raise OptionError(f"{len(phrases)} phrases are too many; a stream can have {MAX_PHRASES}.")
        for phrase in phrases:
            if not isinstance(phrase, str):
                raise OptionError(f"the phrase {_short(phrase)} is not a text.")
            if len(phrase) > MAX_CHARACTERS:
                raise OptionError(
                    f"the phrase {_short(phrase)} has {len(phrase)} characters; it may have {MAX_CHARACTERS}."
                )
        weights = dict(phrases) if isinstance(phrases, Mapping) else dict.fromkeys(phrases, WEIGHT)
        if not weights:
            raise OptionError("phrases is empty; give at least one, or none at all.")
        found: list[tuple[list[int], float]] = []
        for phrase, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight <= MAX_WEIGHT:
                raise OptionError(
                    f"the phrase {_short(phrase)} has weight {_short(weight)}; it must be above 0 and at most "
                    f"{MAX_WEIGHT:g}."
                )
            if any("\ud800" <= letter <= "\udfff" for letter in phrase):  # half a pair, as JSON can spell it
                raise OptionError(f"the phrase {_short(phrase)} is not Unicode text.")
            tokens = tokenizer.encode(phrase)
            if not tokens:
                raise OptionError(f"the phrase {_short(phrase)} is empty; leave it out.")
            if tokenizer.unknown in tokens:
                raise OptionError(f"the phrase {_short(phrase)} has characters that the model never writes.")
            if len(tokens) > MAX_TOKENS:
                raise OptionError(f"the phrase {_short(phrase)} has {len(tokens)} tokens; it may have {MAX_TOKENS}.")
            found.append((tokens, float(weight)))
        return cls(found, tokenizer.vocabulary)

    def __len__(self) -> int:
        """Nodes."""
        return len(self.token)

    def bias(self, node: int) -> Floats:
        """What is added to each logit but blank's, [vocabulary], for a stream at `node`. Not to be written to."""
        if node == 0:
            return self._root
        gained, tokens, biases = self._met.get(node) or self._met.setdefault(node, self._meet(node))
        row = self._root + gained
        row[tokens] = biases
        return row

    def _meet(self, node: int) -> tuple[np.float32, NDArray[np.intp], Floats]:
        """What is given back on the way to the root, and which tokens have arcs before it: the longest suffix last."""
        tokens: list[Ints] = []
        biases: list[Floats] = []
        gained = np.float32(0)
        while node:
            children = slice(self._bounds[node], self._bounds[node + 1])
            tokens.append(self.token[children])
            biases.append(gained + self.score[children])
            gained, node = gained + self.penalty[node], self._fails[node]
        return gained, np.concatenate(tokens[::-1]).astype(np.intp), np.concatenate(biases[::-1])

    def next_node(self, node: int, token: int) -> int:
        """The node after a token."""
        return self._step(self._fails, node, token)

    def _step(self, fails: list[int], node: int, token: int) -> int:
        while (child := self._child.get((node, token))) is None and node:
            node = fails[node]
        return child or 0


def _short(value: Any) -> str:
    """A value for a sentence; values come from clients and may be huge."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = 80
    return shortened.repr(value)


def _kept(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
