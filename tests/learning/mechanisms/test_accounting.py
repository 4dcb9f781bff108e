"""Noise and epsilon against an accountant of another make (dp-accounting, privacy loss distributions)."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from gt_ray.errors import UserError
from gt_ray.learning.mechanisms.accounting import epsilon_spent, gaussian_epsilon, noise_multiplier

DELTA = 1e-5


def by_pld(history: list[tuple[float, float, int]]) -> float:
    """Epsilon of Poisson-sampled Gaussian mechanisms by Google's accountant."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-4)
    for noise, rate, steps in history:
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"),
    [(4.0, 0.02, 150), (4.0, 0.25, 60), (1.0, 0.25, 60), (0.5, 1.0, 10), (0.1, 0.25, 60), (0.1, 0.02, 150)],
)
def test_the_noise_gives_the_epsilon_that_was_asked_for(epsilon: float, rate: float, steps: int) -> None:
    noise = noise_multiplier(epsilon, DELTA, rate, steps)
    found = by_pld([(noise, rate, steps)])
    assert found == pytest.approx(epsilon, rel=0.02) and found <= 1.001 * epsilon


def test_several_fine_tunes_of_one_data_set_add_up() -> None:
    history = [(2.0, 0.25, 60), (8.0, 0.1, 200)]
    assert epsilon_spent(history, DELTA) == pytest.approx(by_pld(history), rel=0.02)
    assert epsilon_spent(history, DELTA) > epsilon_spent(history[:1], DELTA)


def test_a_small_epsilon_is_known_as_well_as_a_large_one() -> None:
    """At the accountant's defaults it would be off by a tenth."""
    assert epsilon_spent([(8.75, 0.02, 150)], DELTA) == pytest.approx(0.0865, rel=0.02)


def test_one_release_is_the_analytic_gaussian_mechanism() -> None:
    for multiplier in (0.05, 0.5, 1.0, 5.0, 40.0):
        epsilon = gaussian_epsilon(multiplier, DELTA)
        a, b = 1 / (2 * multiplier), epsilon * multiplier
        delta = norm.cdf(a - b) - math.exp(epsilon + norm.logcdf(-a - b))
        assert delta == pytest.approx(DELTA, rel=1e-4)


def test_an_epsilon_out_of_reach_says_what_would_work() -> None:
    with pytest.raises(UserError, match=r"epsilon=0.001 is not reached with 400 steps.*at least ([\d.]+), or at most"):
        noise_multiplier(1e-3, DELTA, 0.5, 400)
