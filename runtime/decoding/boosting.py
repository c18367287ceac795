"""Phrase boosting for one stream by shallow fusion, with a prefix automaton over tokens.

The semantics are those of NeMo's boosting tree (GPU-PB, Andrusenko et al. 2025: `context_graph_universal.py` and
`boosting_graph_batched.py` in `nemo/collections/asr/parts/context_biasing`) with NeMo's defaults. Every phrase is a
path from the root. After its first n - 1 tokens, the logit of its n-th token is increased by the phrase's weight w for
n = 1, and by 2 w + ln n for n > 1. Where phrases share a prefix, the largest weight is used. A token that leaves the
path returns the accumulated score, down to that of the longest suffix that begins a phrase (Aho and Corasick 1975). The
score of a complete phrase is not returned.

Boosting changes *which* token is emitted, never whether one is: the plain logits decide whether a frame is blank
(`runtime/decoding/greedy.py`).

This module does not depend on logits, streams or backends.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import OptionError
from nemostream.runtime.text.scripts import begins_unspaced
from nemostream.runtime.text.tokenizer import Tokenizer

WEIGHT = 1.0  # default weight of a phrase: NeMo's `context_score`
DEPTH_SCALING = 2.0  # NeMo's value for transducers
MAX_PHRASES = 1000
MAX_CHARACTERS = 1000  # per phrase, checked before tokenization; tokens of speech models have at most 15 characters
MAX_TOKENS = 64  # per phrase: the maximum depth of the automaton
MAX_WEIGHT = 100.0  # larger sums would lose the precision of the logits in fp32

NO_PHRASES = np.zeros(32, np.uint8)  # the digest of a stream without phrases

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(slots=True)
class _TrieNode:
    score: float = 0.0  # added to the logit of the token that leads to the node
    total: float = 0.0  # sum of the scores on the path from the root
    complete: bool = False  # whether a phrase ends at the node
    children: dict[int, _TrieNode] = field(default_factory=dict)  # by token


class Boosting:
    """The automaton of a list of phrases. Immutable; streams, threads and backends may share it.

    Nodes are numbered breadth first. The children of node n are `first[n]` ... `first[n + 1] - 1`, ordered by token;
    node 0 is the root. All arrays are [nodes], except `first`, which is [nodes + 1].
    """

    def __init__(self, phrases: Sequence[tuple[Sequence[int], float]], vocabulary: int) -> None:
        """Build the automaton from phrases as (token ids, weight), with ids below `vocabulary` (blank excluded).

        `from_phrases` accepts text.
        """
        assert all(0 < len(tokens) <= MAX_TOKENS for tokens, _ in phrases)
        nodes, tokens, first = _breadth_first(_build_trie(phrases))
        self._child = {
            (node, tokens[to]): to for node in range(len(nodes)) for to in range(first[node], first[node + 1])
        }
        fails = [0] * len(nodes)
        for node in range(1, len(nodes)):
            for child in range(first[node], first[node + 1]):
                fails[child] = self._step(fails, fails[node], tokens[child])
        penalties = [
            0.0 if node.complete else nodes[fail].total - node.total for node, fail in zip(nodes, fails, strict=True)
        ]
        self.vocabulary = vocabulary
        self.first: Ints = _read_only(np.array(first, np.int32))
        self.token: Ints = _read_only(np.array(tokens, np.int32))  # that leads to the node
        self.score: Floats = _read_only(np.array([node.score for node in nodes], np.float32))  # added to its logit
        self.fail: Ints = _read_only(np.array(fails, np.int32))  # the longest proper suffix that is a node
        self.penalty: Floats = _read_only(np.array(penalties, np.float32))  # added on the transition to `fail`
        parts = (self.first, self.token, self.score, self.fail, self.penalty, np.array([vocabulary]))
        digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()
        self.digest: NDArray[np.uint8] = np.frombuffer(digest, np.uint8)  # [32]; equal for equal phrases
        self._fails, self._first = fails, first
        self._arcs: dict[int, Any] = {}  # cache of `_collect_arcs` by node
        self._root_bias = np.zeros(vocabulary, np.float32)
        self._root_bias[self.token[1 : first[1]]] = self.score[1 : first[1]]
        _read_only(self._root_bias)

    @classmethod
    def from_phrases(cls, phrases: Mapping[str, float] | Sequence[str], tokenizer: Tokenizer) -> Boosting:
        """Build the automaton from text: a list of phrases (weight `WEIGHT`), or a mapping of phrases to weights.

        Phrases must be spelled as the model writes them, including case. A phrase is tokenized by SentencePiece,
        starting at a word boundary. A phrase that begins in a script without spaces is also boosted
        within a word.

        Raises `OptionError` if there are no or too many phrases, if a phrase is empty, too long, or has characters
        outside the model's vocabulary, and if a weight is not in (0, `MAX_WEIGHT`].
        """
        if isinstance(phrases, str | bytes) or not isinstance(phrases, Mapping | Sequence):
            raise OptionError(
                f"phrases is {_shorten(phrases)}; pass a list of phrases, or a mapping of phrases to weights."
            )
        if len(phrases) > MAX_PHRASES:
            raise OptionError(f"phrases has {len(phrases)} entries; the maximum is {MAX_PHRASES}.")
        for phrase in phrases:
            if not isinstance(phrase, str):
                raise OptionError(f"the phrase {_shorten(phrase)} is not a string.")
            if len(phrase) > MAX_CHARACTERS:
                raise OptionError(
                    f"the phrase {_shorten(phrase)} has {len(phrase)} characters; the maximum is {MAX_CHARACTERS}."
                )
        weights = dict(phrases) if isinstance(phrases, Mapping) else dict.fromkeys(phrases, WEIGHT)
        if not weights:
            raise OptionError("phrases is empty; pass at least one phrase, or None.")
        encoded: list[tuple[list[int], float]] = []
        for phrase, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight <= MAX_WEIGHT:
                raise OptionError(
                    f"the phrase {_shorten(phrase)} has weight {_shorten(weight)}; it must be above 0 and at most "
                    f"{MAX_WEIGHT:g}."
                )
            if any("\ud800" <= letter <= "\udfff" for letter in phrase):  # unpaired surrogates, which JSON permits
                raise OptionError(f"the phrase {_shorten(phrase)} is not Unicode text.")
            tokens = tokenizer.encode(phrase)
            if not tokens:
                raise OptionError(f"the phrase {_shorten(phrase)} is empty; remove it.")
            if tokenizer.unknown in tokens:
                raise OptionError(f"the phrase {_shorten(phrase)} has characters outside the model's vocabulary.")
            if len(tokens) > MAX_TOKENS:
                raise OptionError(
                    f"the phrase {_shorten(phrase)} has {len(tokens)} tokens; the maximum is {MAX_TOKENS}."
                )
            inside = tokenizer.without_space(tokens) if begins_unspaced(phrase) else []
            if inside:
                encoded.append((inside, float(weight)))
            if not inside or tokenizer.piece(tokens[0]) != " ":  # a space of its own would be boosted everywhere
                encoded.append((tokens, float(weight)))
        return cls(encoded, tokenizer.vocabulary)

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.token)

    def bias(self, node: int) -> Floats:
        """Return what is added to the logits for a stream at `node`, [vocabulary] without blank. Read-only."""
        if node == 0:
            return self._root_bias
        penalty, tokens, biases = self._arcs.get(node) or self._arcs.setdefault(node, self._collect_arcs(node))
        bias = self._root_bias + penalty
        bias[tokens] = biases
        return bias

    def _collect_arcs(self, node: int) -> tuple[np.float32, NDArray[np.intp], Floats]:
        """Return the penalty for falling back to the root, and the arcs of `node` and its suffixes except the root.

        The arcs are tokens and their biases; those of longer suffixes come later and take precedence.
        """
        tokens: list[Ints] = []
        biases: list[Floats] = []
        penalty = np.float32(0)
        while node:
            children = slice(self._first[node], self._first[node + 1])
            tokens.append(self.token[children])
            biases.append(penalty + self.score[children])
            penalty, node = penalty + self.penalty[node], self._fails[node]
        return penalty, np.concatenate(tokens[::-1]).astype(np.intp), np.concatenate(biases[::-1])

    def next_node(self, node: int, token: int) -> int:
        """Return the node that a stream at `node` reaches with a token."""
        return self._step(self._fails, node, token)

    def _step(self, fails: list[int], node: int, token: int) -> int:
        while (child := self._child.get((node, token))) is None and node:
            node = fails[node]
        return child or 0


def _build_trie(phrases: Sequence[tuple[Sequence[int], float]]) -> _TrieNode:
    """Return the root of the trie. A shared prefix has the largest weight of its phrases, whatever their order."""
    root = _TrieNode()
    for tokens, weight in sorted(phrases, key=lambda phrase: -phrase[1]):  # the largest weight first
        node = root
        for depth, token in enumerate(tokens):
            if token not in node.children:
                score = weight * DEPTH_SCALING + float(np.log(depth + 1)) if depth else weight
                node.children[token] = _TrieNode(score, node.total + score)
            node = node.children[token]
        node.complete = True
    return root


def _breadth_first(root: _TrieNode) -> tuple[list[_TrieNode], list[int], list[int]]:
    """Return the nodes breadth first, the token that leads to each, and the index of its first child.

    Children are ordered by token. The root's token is -1. The last list has one more entry, the number of nodes.
    """
    nodes, tokens, first = [root], [-1], []
    for node in nodes:
        first.append(len(nodes))
        for token, child in sorted(node.children.items()):
            nodes.append(child)
            tokens.append(token)
    return nodes, tokens, [*first, len(nodes)]


def _shorten(value: Any) -> str:
    """Return a shortened representation for an error message; values come from clients and may be huge."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = 80
    return shortened.repr(value)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
