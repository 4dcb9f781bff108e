"""Estimators against distributions whose sigma and divergence are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gt_ray.estimates import bag_of_words, bootstrap_mean, kl_by_classifier, subgaussian_sigma
from gt_ray.theory import hoeffding_sigma


def test_sigma_of_a_normal_distribution_is_its_deviation() -> None:
    sigma = subgaussian_sigma(np.random.default_rng(0).normal(3, 2, (40, 100)))
    assert sigma.low <= 2.02 and 1.9 < sigma.value < 2.2 and sigma.value <= sigma.high


def test_each_adapter_has_its_own_mean() -> None:
    loss_KB = np.random.default_rng(0).normal(0, 1, (40, 100)) + 50 * np.arange(40)[:, None]
    assert subgaussian_sigma(loss_KB).value < 1.2


def test_sigma_of_a_rare_loss_is_more_than_its_deviation_and_less_than_the_guarantee() -> None:
    p = 0.05
    known = math.sqrt((1 - 2 * p) / (2 * math.log((1 - p) / p)))  # the least of a bit (arXiv 1405.4496)
    sigma = subgaussian_sigma(np.random.default_rng(0).random(20000) < p)
    assert math.sqrt(p * (1 - p)) < 0.9 * sigma.value
    assert sigma.low < known < sigma.high and sigma.value == pytest.approx(known, rel=0.02)
    assert sigma.high < hoeffding_sigma(0, 1) == 0.5


def test_sigma_of_equal_losses_is_zero() -> None:
    assert subgaussian_sigma([[2.0, 2.0], [5.0, 5.0]]).value == 0


@pytest.mark.parametrize(("n_a", "n_b"), [(2000, 2000), (600, 2400)])
def test_divergence_of_shifted_normal_distributions(n_a: int, n_b: int) -> None:
    rng = np.random.default_rng(0)
    shift = np.array([0.6, -0.8, 0.0, 0.0])  # KL = |shift|^2 / 2
    kl = kl_by_classifier(rng.normal(size=(n_a, 4)) + shift, rng.normal(size=(n_b, 4)))
    assert kl.low < 0.5 < kl.high and kl.value == pytest.approx(0.5, abs=0.12)


def test_divergence_of_one_distribution_from_itself_is_nothing() -> None:
    rng = np.random.default_rng(0)
    kl = kl_by_classifier(rng.normal(size=(800, 6)), rng.normal(size=(500, 6)))
    assert kl.low == 0 and kl.value < 0.02


def test_divergence_without_common_support_is_a_finite_number_about_log_n() -> None:
    rng = np.random.default_rng(0)
    kl = kl_by_classifier(rng.normal(size=(300, 2)) + 50, rng.normal(size=(300, 2)))
    assert 2 < kl.value <= kl.high <= math.log(300) + 1


def test_words_are_counted_the_same_everywhere() -> None:
    found = bag_of_words(["A cat, a dog.", "", "dog cat a a . ,"], width=64)
    assert found.shape == (3, 64) and not found[1].any()
    assert np.array_equal(found[0], found[2])


def test_a_mean_has_its_interval() -> None:
    values = np.random.default_rng(0).normal(1, 2, 400)
    mean = bootstrap_mean(values)
    assert mean.value == pytest.approx(values.mean())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
