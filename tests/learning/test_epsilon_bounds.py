"""Lower bounds on epsilon, against scipy, closed forms and mechanisms of known epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gt_ray.learning.epsilon_bounds import clopper_pearson, guesses_bound, quick_guesses_bound, rates_bound


@pytest.mark.parametrize("hits, trials", [(0, 10), (10, 10), (3, 10), (250, 1000)])
def test_clopper_pearson_is_that_of_scipy(hits: int, trials: int) -> None:
    expected = stats.binomtest(hits, trials).proportion_ci(0.95, "exact")
    assert np.allclose(clopper_pearson(hits, trials, 0.95), (expected.low, expected.high))


def test_the_bound_of_rates_is_the_formula_at_the_ends_of_their_intervals() -> None:
    low = stats.beta.ppf(0.025, 80, 121)
    high = stats.beta.ppf(0.975, 5, 196)
    assert rates_bound(80, 200, 4, 200, 1e-3) == pytest.approx(math.log((low - 1e-3) / high))
    assert rates_bound(4, 200, 80, 200, 1e-3) == 0  # never below
    assert rates_bound(0, 200, 0, 200, 1e-3) == 0
    assert rates_bound(200, 200, 0, 200, 0) == pytest.approx(math.log(0.025 ** (1 / 200) / (1 - 0.025 ** (1 / 200))))


def test_without_delta_the_bound_of_guesses_is_the_logit_of_clopper_pearson() -> None:
    for right, guesses in ((60, 100), (100, 100), (990, 1000)):
        low = stats.beta.ppf(0.05, right, guesses - right + 1)
        assert guesses_bound(right, guesses, 5000, 0) == pytest.approx(math.log(low / (1 - low)), abs=1e-6)
        assert quick_guesses_bound(right, guesses, 0.95) == pytest.approx(math.log(low / (1 - low)))


def test_a_delta_takes_a_little_off_the_bound_of_guesses() -> None:
    bounds = [guesses_bound(195, 200, 4096, delta) for delta in (0, 1e-6, 1e-5, 1e-3)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] - bounds[2] < 0.2 and bounds[3] < bounds[2] - 0.2


def test_guesses_that_are_no_better_than_a_coin_prove_nothing() -> None:
    assert guesses_bound(0, 0, 100, 1e-5) == 0 and guesses_bound(50, 100, 100, 1e-5) == 0
    assert quick_guesses_bound(0, 0, 0.95) == 0


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_bounds_hold_for_randomised_response_of_which_guesses_tell_all(epsilon: float) -> None:
    rng, n, accuracy = np.random.default_rng(0), 400, 1 / (1 + math.exp(-epsilon))
    right = rng.binomial(2 * n, accuracy, 1000)
    of_guesses = np.array([guesses_bound(int(one), 2 * n, 2 * n, 0) for one in right[:300]])
    of_rates = rates_bound(rng.binomial(n, accuracy, 1000), n, rng.binomial(n, 1 - accuracy, 1000), n, 0)
    # It is the worst mechanism of this epsilon, so the bound is missed in nearly, and not more than, 5 % of audits.
    assert (of_guesses > epsilon).mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
    assert (of_rates > epsilon).mean() <= 0.05
    assert of_guesses.mean() > 0.6 * epsilon and of_rates.mean() > 0.5 * epsilon
