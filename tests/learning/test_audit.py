"""Membership inference and what it proves, on losses of which the truth is known."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from gt_ray.learning import audit as module
from gt_ray.learning.audit import Audit, attack, audit, confidence, likelihood_ratio
from gt_ray.learning.mechanisms.accounting import gaussian_epsilon

DELTA = 1e-5


def losses_of(confidence_MR: np.ndarray) -> np.ndarray:
    """The inverse of `confidence`."""
    return np.log1p(np.exp(-confidence_MR))


def coins(rng: np.random.Generator, M: int, R: int) -> np.ndarray:
    return rng.random((M, R)) < 0.5


def gaussian(seed: int, noise: float, M: int = 16, R: int = 64, common: float = 0.0, worth: float = 1.0) -> Audit:
    """An audit of: what a row is worth, and noise on it. Rows differ in how easy they are.

    Args:
        common: deviation of what all rows of a model have in common.
    """
    rng = np.random.default_rng(seed)
    member_MR = coins(rng, M, R)
    easy_R = rng.normal(0, 3, R)
    shared_M1 = rng.normal(0, common, (M, 1))
    losses_MR = losses_of(easy_R + shared_M1 + worth * member_MR + rng.normal(0, noise, (M, R)))
    return audit(losses_MR, member_MR, losses_of(easy_R), DELTA)


def test_confidence_is_the_logit_of_the_probability() -> None:
    p = np.array([0.1, 0.5, 0.999])
    assert np.allclose(confidence(-np.log(p)), np.log(p / (1 - p)))
    assert np.isfinite(confidence(np.zeros(1))).all()


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_area_of_two_normal_distributions_is_the_closed_form(shift: float) -> None:
    rng = np.random.default_rng(0)
    member_MR = coins(rng, 40, 500)
    found = attack(rng.normal(0, 1, member_MR.shape) + shift * member_MR, member_MR)
    expected = NormalDist().cdf(shift / 2**0.5)
    low, high = found.auc_interval
    assert low < expected < high and high - low < 0.04 and found.auc == pytest.approx(expected, abs=0.01)
    # true positives at a hundredth of false ones: the normal distribution's 99th percentile, seen from the shifted one
    assert found.tpr == pytest.approx(NormalDist(shift).cdf(shift * 2 - NormalDist().inv_cdf(0.99)), abs=0.02)


def test_ties_count_half() -> None:
    member_MR = np.array([[True, True, False, False]] * 4)
    assert attack(np.zeros((4, 4)), member_MR).auc == 0.5
    assert attack(member_MR.astype(float), member_MR).auc == 1.0


def test_the_interval_is_over_models_where_rows_of_one_model_are_alike() -> None:
    """A model that learned nothing of any row widens the interval, which rows by themselves would not."""
    rng = np.random.default_rng(0)
    member_MR, learned_M1 = coins(rng, 20, 400), np.arange(20)[:, None] % 2
    low, high = attack(rng.normal(0, 1, member_MR.shape) + 3 * member_MR * learned_M1, member_MR).auc_interval
    assert high - low > 0.08


def test_the_likelihood_ratio_beats_a_threshold_where_rows_differ() -> None:
    found = gaussian(0, noise=1.0).attacks
    best = NormalDist().cdf(1 / 2**0.5)  # with all of the truth known
    assert found["loss"].auc < 0.65 < best - 0.03 < found["likelihood_ratio"].auc < best + 0.03
    assert found["calibrated"].auc > found["loss"].auc + 0.03


def test_the_likelihood_ratio_is_that_of_normal_distributions_where_shadows_abound() -> None:
    rng = np.random.default_rng(0)
    M, shift_R = 4000, np.array([0.0, 1.0, 3.0])
    member_MR = coins(rng, M, 3)
    values_MR = rng.normal(5, 0.5, (M, 3)) + shift_R * member_MR
    shadows_MM = np.broadcast_to(np.arange(M) > 0, (M, M))[:2]
    expected = (values_MR[0] - 5 - shift_R / 2) * shift_R / 0.25
    ratio_R = likelihood_ratio(values_MR, member_MR, np.concatenate([shadows_MM, np.zeros((M - 2, M), dtype=bool)]))[0]
    assert np.allclose(ratio_R, expected, atol=0.2, rtol=0.15)


def test_a_row_that_every_shadow_had_has_the_shift_of_the_others() -> None:
    rng = np.random.default_rng(0)
    member_MR = coins(rng, 8, 50)
    member_MR[1:, 0], member_MR[1:, 1] = True, False
    ratio_MR = likelihood_ratio(rng.normal(0, 0.1, (8, 50)) + member_MR, member_MR, ~np.eye(8, dtype=bool))
    assert np.isfinite(ratio_MR).all()
    assert ((ratio_MR[0] > 0) == member_MR[0]).all()


def test_shadows_are_the_other_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own coins say nothing of its scores; the measured half says nothing of the chosen rule."""
    rng = np.random.default_rng(0)
    member_MR, values_MR = coins(rng, 6, 30), rng.normal(0, 1, (6, 30))
    shadows_MM = ~np.eye(6, dtype=bool)
    flipped_MR = member_MR.copy()
    flipped_MR[2] = ~flipped_MR[2]
    before, after = (likelihood_ratio(values_MR, one, shadows_MM) for one in (member_MR, flipped_MR))
    assert np.array_equal(before[2], after[2]) and not np.allclose(before[0], after[0])
    seen = []
    monkeypatch.setattr(module, "_guesses", lambda chosen, measured, delta: seen.append((chosen, measured)))
    for flip in (False, True):
        own_MR = member_MR ^ (flip & (np.arange(6) >= 3)[:, None])
        audit(np.exp(values_MR), own_MR, np.exp(values_MR[0]), DELTA)
    (chosen, measured), (chosen_2, measured_2) = seen
    for name in ("loss", "calibrated", "likelihood_ratio"):
        assert np.array_equal(chosen[name][0], chosen_2[name][0])
        assert np.array_equal(measured[name][0], measured_2[name][0])


def test_who_leaks_everything_is_found_out_and_who_leaks_nothing_is_not_accused() -> None:
    leaks = gaussian(0, noise=0.01)
    assert leaks.attacks["likelihood_ratio"].auc > 0.99 and leaks.attacks["likelihood_ratio"].tpr > 0.99
    assert leaks.guesses.epsilon > 4 and leaks.rates.epsilon > 3 and leaks.guesses.wrong == 0
    nothing = [gaussian(seed, noise=1.0, worth=0.0) for seed in range(20)]
    assert np.mean([one.attacks["likelihood_ratio"].auc for one in nothing]) == pytest.approx(0.5, abs=0.02)
    for bounds in ([one.guesses.epsilon for one in nothing], [one.rates.epsilon for one in nothing]):
        assert np.median(bounds) == 0 and np.mean(bounds) < 0.05 and min(bounds) >= 0


@pytest.mark.parametrize("noise, common, least", [(0.5, 0.0, 0.2), (1.0, 0.0, 0.2), (2.0, 0.0, 0.05), (1.0, 2.0, 0.0)])
def test_bounds_are_not_above_the_epsilon_of_the_gaussian_mechanism(noise: float, common: float, least: float) -> None:
    """Nor are they empty: on average they reach this share of it. Normal distributions cross it far out alone, where
    hardly a row is, the more so the smaller it is."""
    true = gaussian_epsilon(noise, DELTA)
    found = [gaussian(seed, noise, R=128, common=common) for seed in range(40)]
    for bounds in ([one.guesses.epsilon for one in found], [one.rates.epsilon for one in found]):
        assert sum(bound > true for bound in bounds) <= 2  # 5 % of 40
        assert np.mean(bounds) >= least * true


def test_four_models_are_enough_to_run() -> None:
    found = gaussian(0, noise=1.0, M=4, R=16)
    assert 0 <= found.guesses.epsilon < 5 and 0 <= found.attacks["likelihood_ratio"].auc <= 1
