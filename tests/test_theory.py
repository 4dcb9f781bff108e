"""The bounds of section 5 against exact small examples, and what is wrong with them as they are printed.

Rows are bits and every data set is enumerated, so that risks and information are exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import quad

from gt_ray.theory import (
    dp_sgd_information,
    effective_rows,
    gaussian_channel,
    generalisation_bound,
    gibbs_information,
    hoeffding_sigma,
    implied_information,
    information_of_shadows,
    mechanism_information,
    noisy_erm_information,
    utility_bound,
    utility_bound_as_stated,
    utility_bound_of_clients,
)

Array = NDArray[np.float64]
HALF = hoeffding_sigma(0, 1)


def data_sets(m: int, p: float) -> tuple[Array, Array]:
    """All data sets [2^m, m] of m bits that are 1 with probability p, and the probability of each."""
    sets = np.array(list(itertools.product([0, 1], repeat=m)))
    return sets, p ** sets.sum(1) * (1 - p) ** (m - sets.sum(1))


def information(joint: Array) -> float:
    """Mutual information in nats of a joint distribution [x, y]."""
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    at = joint > 0
    return float((joint[at] * np.log(joint[at] / independent[at])).sum())


def kl_of_bits(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def mean_loss(loss_wz: Array, p: float) -> Array:
    return loss_wz @ np.array([1 - p, p])


@pytest.mark.parametrize("seed", range(20))
def test_the_bounds_hold_for_any_channel_from_rows_to_w(seed: int) -> None:
    """M ignores the update here, and w is any random function of D_p: Lemma 5.1, and Theorem 5.2 as corrected."""
    rng = np.random.default_rng(seed)
    m, p, q = 4, float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.2, 0.8))
    sets, probability = data_sets(m, p)
    channel = rng.dirichlet(np.full(3, 0.1), size=len(sets))  # nearly deterministic
    loss_wz = rng.random((3, 2))
    joint = probability[:, None] * channel
    w = joint.sum(0)
    of_data = float((joint * np.array([loss_wz[:, one].mean(1) for one in sets])).sum())
    told, kl = information(joint), kl_of_bits(p, q)
    gap = abs(float(w @ mean_loss(loss_wz, p)) - of_data)
    bound = generalisation_bound(HALF, told, m)
    assert bound is not None and gap <= bound == pytest.approx(math.sqrt(told / (2 * m)))
    assert implied_information(gap, HALF, m) <= told
    gap = abs(float(w @ mean_loss(loss_wz, q)) - of_data)
    bound = utility_bound(HALF, told, kl, m)
    assert bound is not None and gap <= bound == pytest.approx(math.sqrt((told / m + kl) / 2))


def test_flaw_1_summed_risks_do_not_have_the_bound_of_means() -> None:
    n = 5  # w and its loss, 1, are constants, so that I = 0
    assert abs(1 - sum([1.0] * n)) == 4  # R_mu~ is of one row, R_{D_p} a sum
    assert generalisation_bound(HALF, 0.0, n) == generalisation_bound(HALF, 0.0, n, summed=True) == 0
    mean, total = (generalisation_bound(HALF, 1.0, n, summed) for summed in (False, True))
    assert mean is not None and total == n * mean


def test_flaw_2_what_the_update_tells_of_the_rows_counts() -> None:
    """w is constant, M the identity, and the update the mean of the rows, which minimises the loss (z - theta)^2."""
    m, p = 3, 0.5
    sets, probability = data_sets(m, p)
    theta = sets.mean(1)
    of_data = float(probability @ np.square(sets - theta[:, None]).mean(1))
    of_fresh = float(probability @ (p * (1 - theta) ** 2 + (1 - p) * theta**2))
    gap = of_fresh - of_data
    assert gap == pytest.approx(2 * p * (1 - p) / m)
    assert generalisation_bound(HALF, 0.0, m) == 0 < gap  # I(w; D_p) = 0
    joint = np.array(
        [[mass * (at == value) for value in np.unique(theta)] for mass, at in zip(probability, theta, strict=True)]
    )
    corrected = generalisation_bound(HALF, information(joint), m)
    assert corrected is not None and gap < corrected


def test_flaw_3_a_large_private_data_set_does_not_make_up_for_another_distribution() -> None:
    """w is constant and the loss of a row is the row: Util is the difference of the two means, whatever |D|."""
    p, q, m = 0.5, 0.9, 100
    gap, kl = q - p, kl_of_bits(0.5, 0.9)
    stated, corrected = utility_bound_as_stated(HALF, 0.0, kl, n_private=100), utility_bound(HALF, 0.0, kl, n_public=m)
    assert stated is not None and corrected is not None
    assert stated < 0.06 < gap <= corrected == pytest.approx(math.sqrt(kl / 2))
    # Eq. 35: the divergence of m rows is m times that of one.
    of_p, of_q = data_sets(3, p)[1], data_sets(3, q)[1]
    assert float((of_p * np.log(of_p / of_q)).sum()) == pytest.approx(3 * kl)


@pytest.mark.parametrize("seed", range(10))
def test_adapters_of_clients_own_updates_keep_to_the_bound_of_data_sets(seed: int) -> None:
    """M reads the update, which is the number of ones among the rows; w is any function of D_p."""
    rng = np.random.default_rng(seed)
    m, p, q = 3, 0.5, float(rng.uniform(0.3, 0.7))
    sets, of_p = data_sets(m, p)
    _, of_q = data_sets(m, q)
    channel, loss_wtz = rng.dirichlet(np.full(2, 0.1), size=len(sets)), rng.random((2, m + 1, 2))
    joint = of_p[:, None] * channel
    risk_Dw = np.array([[loss_wtz[w, one.sum(), one].mean() for w in range(2)] for one in sets])
    util = float(of_q @ risk_Dw @ joint.sum(0)) - float((joint * risk_Dw).sum())
    bound = utility_bound_of_clients(HALF, information(joint), kl_of_bits(p, q), m)
    assert bound is not None and abs(util) <= bound


def test_flaw_3_theorem_5_2_fails_for_clients_own_updates_of_the_same_distribution() -> None:
    """Public and private rows are alike, KL = 0, but one shadow has 2 rows and the client 200; M is as in flaw 2."""
    p = 0.5

    def risk(m: int) -> float:
        return p * (1 - p) * (1 - 1 / m)  # of the mean on its own rows

    assert utility_bound_as_stated(HALF, 0.0, 0.0, n_private=200) == 0 < risk(200) - risk(2)


def test_flaw_4_what_is_called_a_cumulant_generating_function_is_not_centred() -> None:
    p, q, n, at = 0.5, 0.9, 10, 0.5
    psi = n * math.log(1 - q + q * math.exp(at / n)) - at * p  # (37), w constant, loss of a row the row
    assert psi > at**2 * HALF**2 / (2 * n)  # (43)
    assert psi - at * (q - p) <= at**2 * HALF**2 / (2 * n)  # centred at its own mean


def test_flaw_5_a_mean_over_rows_is_no_narrower_than_w() -> None:
    n, at = 100, 2.0  # the loss is w, a fair bit, and sub-Gaussian with 1/2; so is its mean over any rows
    psi = math.log((math.exp(at / 2) + math.exp(-at / 2)) / 2)
    assert at**2 * HALF**2 / (2 * n) < psi <= at**2 * HALF**2 / 2


def test_flaw_6_shadows_that_share_rows_tell_less_than_their_sum() -> None:
    flip, p = 0.1, 0.5

    def of_shadows(own_rows: bool) -> tuple[float, float]:
        """I(phi_1, phi_2; D_p), and of each alone: two noisy copies of one row, or of a row each."""
        rows = [0, 1] if own_rows else [0, 0]
        sets, probability = data_sets(2, p)
        joint, alone = np.zeros((4, 4)), np.zeros((4, 2))
        for d, (one, mass) in enumerate(zip(sets, probability, strict=True)):
            for phi in itertools.product([0, 1], repeat=2):
                chances = [1 - flip if phi[k] == one[rows[k]] else flip for k in range(2)]
                joint[d, 2 * phi[0] + phi[1]] += mass * chances[0] * chances[1]
                alone[d, phi[0]] += mass * chances[0] * chances[1]
        return information(joint), information(alone)

    together, alone = of_shadows(own_rows=True)
    assert information_of_shadows([alone, alone]) == pytest.approx(together)
    together, alone = of_shadows(own_rows=False)
    bound = information_of_shadows([alone, alone])
    assert bound is not None and together < 0.75 * bound
    assert information_of_shadows([alone, None]) is None
    assert generalisation_bound(1.0, None, 9) is utility_bound(1.0, None, 0.0, 9) is None


def test_rows_that_shadows_share_count_for_less() -> None:
    assert effective_rows([1] * 12) == 12 == effective_rows([3] * 12)
    # Two losses of row 0 and one of row 1, each +-1: the mean of the three has this variance, worth 1.8 rows.
    variance = np.mean([((2 * a + b) / 3) ** 2 for a, b in itertools.product([-1, 1], repeat=2)])
    assert effective_rows([2, 1]) == pytest.approx(1 / variance) == pytest.approx(1.8)
    assert utility_bound(1.0, 0.3, 0.1, 2, effective_rows([2, 1])) == pytest.approx(math.sqrt(2 * 0.5 / 1.8))


def of_levels(levels: list[float], noise: float) -> float:
    """Information in nats through equally likely levels plus Gaussian noise, by integration."""

    def density(x: float) -> float:
        return (
            sum(math.exp(-((x - at) ** 2) / (2 * noise**2)) for at in levels)
            / len(levels)
            / noise
            / math.sqrt(2 * math.pi)
        )

    def entropy(x: float) -> float:
        at = density(x)
        return -at * math.log(at) if at > 0 else 0.0

    ends = min(levels) - 12 * noise, max(levels) + 12 * noise
    found, _ = quad(entropy, *ends, limit=500)
    return float(found - 0.5 * math.log(2 * math.pi * math.e * noise**2))


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
def test_no_mechanism_tells_more_than_its_bound(noise: float) -> None:
    """One trained number, gradients of +-C; steps that do not adapt tell what their mean tells."""
    one = of_levels([-1, 1], noise)
    assert one <= gaussian_channel(1.0, noise**2, 1) + 1e-9
    for steps in (1, 4):
        whole = of_levels([-1, 1], noise / math.sqrt(steps))
        assert whole <= dp_sgd_information(steps, 1, 1.0, noise, 1) + 1e-9
    # Four rows with a sum of -4, -2 (four times), 0 (six times), 2, 4, twice over.
    sums = [float(sum(rows)) for rows in itertools.product([-1, 1], repeat=4)]
    assert of_levels(sums, noise / math.sqrt(2)) <= dp_sgd_information(2, 4, 1.0, noise, 1) + 1e-9
    assert of_levels([-3, 3], noise) <= noisy_erm_information(noise, 9.0, 1) + 1e-9
    rate, clip, temperature = 0.1, 2.0, noise
    through = of_levels([-rate * clip, rate * clip], math.sqrt(2 * rate * temperature))
    assert through <= gibbs_information([rate], clip, temperature, 1) <= rate * clip**2 / (4 * temperature)


def test_dp_sgd_takes_the_smaller_of_two_bounds() -> None:
    rate, z, P = 0.1, 2.0, 10**6
    by_row = 5 * 1000 * rate / (2 * z**2)  # T n q / (2 z^2) for many coordinates
    assert dp_sgd_information(5, 1000, rate, z, P) == pytest.approx(by_row, rel=1e-5)
    single = dp_sgd_information(1, 1000, rate, z, 1)
    assert single == pytest.approx(0.5 * math.log1p((100**2 + 90) / z**2))  # few coordinates: the sum's channel


STATED: list[tuple[dict[str, object], Callable[[], float | None]]] = [
    ({"name": "sft"}, lambda: None),
    (
        {"name": "dp_sgd", "epsilon": 4.0, "noise_multiplier": 1.5, "sample_rate": 0.25, "steps": 3},
        lambda: dp_sgd_information(3, 8, 0.25, 1.5, 20),
    ),
    ({"name": "noisy_erm", "noise": 0.1, "update_norm": 2.0}, lambda: noisy_erm_information(0.1, 4.0, 20, 2)),
    ({"name": "noisy_erm", "noise": 0.1}, lambda: noisy_erm_information(0.1, 5.0, 20, 2)),
    (
        {"name": "gibbs", "temperature": 1e-3, "learning_rate": 0.3, "clip_norm": 0.1, "steps": 3},
        lambda: gibbs_information([0.3, 0.2, 0.1], 0.1, 1e-3, 20),
    ),
]


@pytest.mark.parametrize(("stated", "expected"), STATED)
def test_information_follows_from_what_an_update_states(
    stated: dict[str, object], expected: Callable[[], float | None]
) -> None:
    found = mechanism_information(stated, rows=8, coordinates=20, releases=2, square_norm=5.0)
    assert found == (None if (known := expected()) is None else pytest.approx(known))
    if stated["name"] == "noisy_erm" and "update_norm" not in stated:
        assert mechanism_information(stated, 8, 20) is None
