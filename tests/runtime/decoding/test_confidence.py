"""Confidence of tokens, computed from whole distributions by the definition of each measure."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nemostream.errors import OptionError
from nemostream.runtime.decoding.confidence import AGGREGATIONS, Confidence

ALPHA = 0.33

ENTROPIES = list(itertools.product(("tsallis", "renyi"), ("exp", "lin")))


def distributions(vocabulary: int) -> np.ndarray:
    """Return distributions from nearly certain to nearly uniform, [5, vocabulary]."""
    logits = np.array([20.0, 5.0, 2.0, 0.5, 0.01])[:, None] * np.random.default_rng(0).standard_normal((5, vocabulary))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def entropy(measure: str, p: np.ndarray) -> float:
    """Return the Tsallis entropy, or the Renyi entropy in bits."""
    total = float((p**ALPHA).sum())
    return (total - 1) / (1 - ALPHA) if measure == "tsallis" else math.log2(total) / (1 - ALPHA)


@pytest.mark.parametrize("vocabulary", [2, 129, 1025])
@pytest.mark.parametrize(("measure", "norm"), ENTROPIES)
def test_entropy_is_mapped_linearly_or_exponentially(measure: str, norm: str, vocabulary: int) -> None:
    function = Confidence(measure, norm).token_measure(vocabulary)
    base, uniform = math.e if measure == "tsallis" else 2.0, np.full(vocabulary, 1 / vocabulary)
    largest = entropy(measure, uniform)
    for p in distributions(vocabulary):
        found = entropy(measure, p)
        if norm == "lin":
            expected = 1 - found / largest
        else:
            expected = (base**-found - base**-largest) / (1 - base**-largest)
        assert function(math.log(p.max()), float((p**ALPHA).sum())) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("vocabulary", [2, 129, 1025])
@pytest.mark.parametrize("alpha", [1, 1.0, 0.33, 2.0])
def test_probability_of_the_token_is_scaled_to_that_of_the_uniform_distribution(alpha: float, vocabulary: int) -> None:
    function = Confidence("max_prob", alpha=alpha).token_measure(vocabulary)
    for p in distributions(vocabulary).max(axis=1).tolist():
        expected = (p**alpha - vocabulary**-alpha) / (1 - vocabulary**-alpha)
        assert function(math.log(p), math.nan) == pytest.approx(expected, rel=1e-9)


MEASURES = [Confidence(*entropy) for entropy in ENTROPIES] + [Confidence("max_prob"), Confidence("max_prob", alpha=1.0)]


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_certainty_is_1_and_the_uniform_distribution_is_0(measure: Confidence) -> None:
    for vocabulary in (2, 1025):
        function = measure.token_measure(vocabulary)
        assert function(0.0, 1.0) == pytest.approx(1.0, abs=1e-12)
        uniform = vocabulary * (1 / vocabulary) ** ALPHA
        assert function(-math.log(vocabulary), uniform) == pytest.approx(0.0, abs=1e-12)


def test_defaults_are_those_of_nemo() -> None:
    assert Confidence() == Confidence("tsallis", "exp", ALPHA, "min")


def test_aggregations() -> None:
    values = [0.5, 0.25, 0.9]
    assert {name: function(values) for name, function in AGGREGATIONS.items()} == {
        "min": 0.25,
        "max": 0.9,
        "mean": pytest.approx(0.55),
        "prod": pytest.approx(0.1125),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": math.inf}, "alpha is inf; it must be above 0"),
        ({"alpha": -0.5}, "alpha is -0.5; it must be above 0"),
        ({"alpha": "1"}, "alpha is '1'; it must be above 0"),
        ({"alpha": None}, "alpha is None; it must be above 0"),
    ],
)
def test_invalid_alpha_is_rejected(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Confidence("max_prob", **options)


@pytest.mark.parametrize("measure", ["tsallis", "renyi"])
def test_entropies_support_one_alpha(measure: str) -> None:
    with pytest.raises(OptionError, match=r"alpha is 1\.0; tsallis and renyi support 0\.33 only"):
        Confidence(measure, alpha=1.0)
