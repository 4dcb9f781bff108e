"""What an attack that worked proves: lower bounds on the epsilon of (epsilon, delta)-differential privacy.

Two bounds, both from guesses by a rule that was chosen on other models:

    rates_bound     epsilon >= log((TPR - delta) / FPR), and the same of the complements, with Clopper-Pearson bounds of
                    both rates. Counts each guess as an experiment of its own; rows of one model are none.
    guesses_bound   of the number of right guesses (Steinke et al., arXiv 2305.08846, theorem 5.2), for which one model
                    with independent coins for its rows suffices: it holds however its rows depend on each other.

A bound that is above the stated epsilon shows that a mechanism does not keep its promise; one below it shows nothing
about better attacks. No bound is below 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gt_ray.errors import require

Array = NDArray[np.float64]
CONFIDENCE = 0.95
"""Probability, over the audit's randomness, with which a bound is not above the true epsilon."""


def clopper_pearson(hits: Any, trials: Any, confidence: float) -> tuple[Array, Array]:
    """Exact two-sided interval of a probability, of any number of counts at once."""
    beta = require("scipy.stats", "dp").beta
    hits, trials = np.asarray(hits), np.asarray(trials)
    tail = (1 - confidence) / 2
    with np.errstate(all="ignore"):  # no hit and no miss are mended below
        low, high = beta.ppf(tail, hits, trials - hits + 1), beta.ppf(1 - tail, hits + 1, trials - hits)
    return np.where(hits > 0, low, 0.0), np.where(hits < trials, high, 1.0)


def rates_bound(
    right: Any, members: Any, wrong: Any, others: Any, delta: float, confidence: float = CONFIDENCE
) -> Array:
    """Lower bound on epsilon from a test that claims membership for `right` of the members and `wrong` of the others.

    For a test that denies membership, the two change places: the claim is then "no member". Of any number of tests at
    once; each holds by itself.
    """
    # Both rates are within their intervals with `confidence`: what is left is split between them, and of each interval
    # only one end is used.
    low, _ = clopper_pearson(right, members, confidence)
    _, high = clopper_pearson(wrong, others, confidence)
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(0.0, np.log(np.maximum(low - delta, 1e-300) / high)))


def quick_guesses_bound(right: Any, guesses: Any, confidence: float) -> Array:
    """`guesses_bound` at delta = 0, where it is the logit of a Clopper-Pearson bound; of many at once, to choose by."""
    low, _ = clopper_pearson(right, guesses, 2 * confidence - 1)  # one-sided
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(0.0, np.log(np.maximum(low, 1e-300)) - np.log1p(-low)))


def guesses_bound(right: int, guesses: int, coins: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """Lower bound on epsilon from `right` of `guesses` which of `coins` rows were in.

    Several models are one mechanism here, each of whose coins touches one model (parallel composition).
    """
    low, high = 0.0, 1.0
    if _p_value(right, guesses, coins, low, delta) >= 1 - confidence:
        return 0.0
    while high < 100 and _p_value(right, guesses, coins, high, delta) < 1 - confidence:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if _p_value(right, guesses, coins, middle, delta) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def _p_value(right: int, guesses: int, coins: int, epsilon: float, delta: float) -> float:
    """Largest probability of at least so many right guesses under (epsilon, delta)-differential privacy."""
    binom = require("scipy.stats", "dp").binom
    accuracy = 1 / (1 + math.exp(-epsilon))
    p = float(binom.sf(right - 1, guesses, accuracy))
    if right and delta:
        below = binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy).cumsum()
        p += 2 * coins * delta * float((below / np.arange(1, right + 1)).max())
    return min(p, 1.0)
