"""How sure the model is of a token, and of a word: NeMo's measures (`asr_confidence_utils.py`; Laptev & Ginsburg 2023).

A measure looks at the V probabilities (blank's included) that a token was chosen from. Its maximum alone, or their
entropy: Tsallis's or Renyi's of order alpha, which for an alpha below one heeds the unlikely ones too. Either is mapped
so that 1 is certainty and 0 is a guess among V equals. NeMo's defaults are ours.
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
    """Which confidence tokens and words get.

    `measure` is "tsallis", "renyi" (entropies) or "max_prob"; `norm` how an entropy is mapped to 0 ... 1, "exp" or
    "lin" (`max_prob` has no choice); `alpha` the power that `max_prob` raises probabilities to, entropies always having
    0.33; `aggregation` makes a word's confidence of its tokens': "min", "max", "mean" or "prod".

    Raises `OptionError` naming an option that cannot be.
    """

    measure: str = "tsallis"
    norm: str = "exp"
    alpha: float = ALPHA
    aggregation: str = "min"

    def __post_init__(self) -> None:
        for name, known in (
            ("measure", ("max_prob", "tsallis", "renyi")),
            ("norm", ("exp", "lin")),
            ("aggregation", tuple(AGGREGATIONS)),
        ):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        if not (isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf):
            raise OptionError(f"alpha is {self.alpha!r}; it must be above 0.")
        if self.measure != "max_prob" and self.alpha != ALPHA:
            raise OptionError(f"alpha is {self.alpha}; the entropies have {ALPHA} only, max_prob takes any.")

    def token_measure(self, vocabulary: int) -> Callable[[float, float], float]:
        """A token's confidence from its score, log p, and its power, the sum of every p**0.33 of the `vocabulary`
        (blank included) that it was chosen from."""
        size, alpha = float(vocabulary), self.alpha
        if self.measure == "max_prob":
            if alpha == 1:
                return lambda score, sum_p_alpha: (math.exp(score) * size - 1) / (size - 1)
            whole = size**alpha
            return lambda score, sum_p_alpha: (math.exp(score * alpha) * whole - 1) / (whole - 1)
        most = size ** (1 - alpha)  # the power of V equal probabilities
        if self.measure == "tsallis":
            if self.norm == "lin":
                return lambda score, sum_p_alpha: 1 + (1 - sum_p_alpha) / (most - 1)
            least = math.exp((1 - most) / (1 - alpha))
            return lambda score, sum_p_alpha: (math.exp((1 - sum_p_alpha) / (1 - alpha)) - least) / (1 - least)
        if self.norm == "lin":
            return lambda score, sum_p_alpha: 1 + math.log(sum_p_alpha) / (alpha - 1) / math.log(size)
        return lambda score, sum_p_alpha: (sum_p_alpha ** (1 / (alpha - 1)) * size - 1) / (size - 1)
