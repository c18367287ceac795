"""Confidence of tokens and words: NeMo's measures (`asr_confidence_utils.py`; Laptev & Ginsburg 2023).

A measure is a function of the V probabilities (including blank) from which a token was chosen: of the token's own
probability, or of the Tsallis or Renyi entropy of order alpha, in which unlikely labels have more weight for an alpha
below one. It is mapped so that 1 is certainty and 0 is a uniform distribution. The defaults are NeMo's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemostream.errors import OptionError
from nemostream.runtime.decoding.greedy import ALPHA


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "max": max,
    "mean": _mean,
    "prod": math.prod,
}


@dataclass(frozen=True)
class Confidence:
    """The measure of confidence of tokens and words.

    `measure`: "tsallis", "renyi" (entropies) or "max_prob" (probability of the token).
    `norm`: how an entropy is mapped to 0 ... 1, "exp" or "lin"; ignored for `max_prob`.
    `alpha`: exponent of probabilities for `max_prob`; the entropies support 0.33 only.
    `aggregation`: how the confidence of a word is computed from its tokens, "min", "max", "mean" or "prod".

    Raises `OptionError` for an invalid value.
    """

    measure: str = "tsallis"
    norm: str = "exp"
    alpha: float = ALPHA
    aggregation: str = "min"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("measure", ("max_prob", "tsallis", "renyi")),
            ("norm", ("exp", "lin")),
            ("aggregation", tuple(AGGREGATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        if not (isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf):
            raise OptionError(f"alpha is {self.alpha!r}; it must be above 0.")
        if self.measure != "max_prob" and self.alpha != ALPHA:
            raise OptionError(
                f"alpha is {self.alpha}; tsallis and renyi support {ALPHA} only, max_prob supports any value."
            )

    def token_measure(self, vocabulary: int) -> Callable[[float, float], float]:
        """Return the function that computes a token's confidence, 0 to 1, from its score and `sum_p_alpha`.

        The score is log p. `sum_p_alpha` is the sum of p ** 0.33 over the `vocabulary`, which includes blank.
        """
        size, alpha = float(vocabulary), self.alpha
        if self.measure == "max_prob":
            if alpha == 1:
                return lambda score, sum_p_alpha: (math.exp(score) * size - 1) / (size - 1)
            scale = size**alpha
            return lambda score, sum_p_alpha: (math.exp(score * alpha) * scale - 1) / (scale - 1)
        max_sum = size ** (1 - alpha)  # `sum_p_alpha` of the uniform distribution
        if self.measure == "tsallis":
            if self.norm == "lin":
                return lambda score, sum_p_alpha: 1 + (1 - sum_p_alpha) / (max_sum - 1)
            minimum = math.exp((1 - max_sum) / (1 - alpha))
            return lambda score, sum_p_alpha: (math.exp((1 - sum_p_alpha) / (1 - alpha)) - minimum) / (1 - minimum)
        if self.norm == "lin":
            return lambda score, sum_p_alpha: 1 + math.log(sum_p_alpha) / (alpha - 1) / math.log(size)
        return lambda score, sum_p_alpha: (sum_p_alpha ** (1 / (alpha - 1)) * size - 1) / (size - 1)
