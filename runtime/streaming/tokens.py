"""The tokens of a stream with their texts and times, made from its hypothesis."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Manifest
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.streaming.compiled import TokenListFields, compiled
from nemostream.runtime.streaming.snapshot import SavedArrays, saved_array, saved_counts
from nemostream.runtime.streaming.state import Hypothesis
from nemostream.runtime.text.languages import LanguageTags
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.runtime.text.words import Token


class TokenList(TokenListFields):
    """The `Token`s of a stream, made from its hypothesis, and its language tags. `tokens` is appended to in place.

    `languages` is empty, without a count, if the vocabulary has no tags.
    """

    __slots__ = ()

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, confidence: Confidence, delay_ms: int) -> None:
        self.tokens: list[Token] = []
        self.languages = LanguageTags()
        self._rate, self._frame = manifest.features.sample_rate, manifest.samples_per_frame
        self._delay = delay_ms * self._rate // 1000  # samples
        self._texts, self._tags, self._language_of_tag = tokenizer.texts, tokenizer.tags, tokenizer.languages.get
        self._confidence_of = confidence.token_measure(manifest.decoder.vocabulary + 1)

    def extend(self, hypothesis: Hypothesis, count: int) -> None:
        """Append the tokens of the hypothesis up to the first `count`."""
        new = self.make(hypothesis, len(self.tokens), count)
        self.tokens += new
        if self._tags:
            self.languages.extend(token.language for token in new)

    @compiled(TokenListFields)
    def make(self, hypothesis: Hypothesis, begin: int, end: int) -> list[Token]:
        """Return the tokens [begin, end) of a hypothesis."""
        rate, frame, delay = self._rate, self._frame, self._delay
        ids, positions = hypothesis.tokens, hypothesis.sample_positions
        tokens = []
        for index in range(begin, end):
            id_, position, score = ids[index], positions[index], hypothesis.scores[index]
            if delay:
                position = max(position - delay, 0)
            tokens.append(
                Token(
                    id=id_,
                    text=self._texts[id_],
                    time=position / rate,
                    end=(position + frame) / rate,
                    score=score,
                    confidence=self._confidence_of(score, hypothesis.sum_p_alpha[index]),
                    language=self._language_of_tag(id_),
                    tag=id_ in self._tags,
                )
            )
        return tokens

    def clip(self, count: int, end: float) -> None:
        """Clip the first `count` tokens to the end of their recording (seconds). Its last frames extend beyond it."""
        clip(self.tokens, count, end)


class SavedTokens:
    """Tokens of a stream as a part of a snapshot. `tokens` are those to save, or those that were loaded."""

    def __init__(self, tokens: list[Token], tokenizer: Tokenizer) -> None:
        self.tokens, self._tokenizer = tokens, tokenizer

    def save(self) -> dict[str, NDArray[Any]]:
        values = [(token.time, token.end, token.score, token.confidence) for token in self.tokens]
        ids = np.array([token.id for token in self.tokens], np.int64)
        return {"ids": ids, "values": np.array(values, np.float64).reshape(-1, 4)}

    def load(self, state: SavedArrays) -> None:
        """Replace the tokens by saved ones. Raises `ValueError` if `state` does not come from `save`."""
        tokenizer, tags, ids = self._tokenizer, self._tokenizer.tags, saved_counts(state, "ids")
        values = saved_array(state, "values", np.float64, len(ids), 4)
        if ids and max(ids) >= tokenizer.vocabulary:
            raise ValueError(f"a token is {max(ids)}; the vocabulary has {tokenizer.vocabulary} tokens")
        if not np.isfinite(values).all():
            raise ValueError("a value of a token is not finite")
        self.tokens = [
            Token(id_, tokenizer.piece(id_), time, end, score, confidence, tokenizer.languages.get(id_), id_ in tags)
            for id_, (time, end, score, confidence) in zip(ids, values.tolist(), strict=True)
        ]


def clip(tokens: list[Token], count: int, end: float) -> None:
    """Clip the first `count` tokens to `end` (seconds), in place."""
    while count and tokens[count - 1].end > end:
        count -= 1
        tokens[count] = dataclasses.replace(tokens[count], end=end)
