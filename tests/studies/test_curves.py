"""Fitted power laws: known parameters are found, intervals cover them, and what is no curve is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit

from gt_ray.studies.curves import Curve, NotFitted, fit

X = np.asarray([15.0, 30.0, 60.0, 120.0, 240.0])
C, A, B = 80.0, 200.0, 0.6


def power(x: Any, c: float, a: float, b: float) -> Any:
    return c - a * x**-b


def draws(y: Any, error: float, seed: int, count: int = 400) -> Any:
    return y + np.random.default_rng(seed).normal(0, error, (count, len(y)))


def fitted(x: Any, y: Any, error: float = 0.01, seed: int = 0) -> Curve:
    return fit(list(x), list(y), draws(np.asarray(y), error, seed))


def test_known_parameters_are_found() -> None:
    curve = fitted(X, power(X, C, A, B))
    assert curve.sign == 1 and not curve.notes
    assert curve.parameters == pytest.approx((C, A, B), rel=0.03)
    for factor, (low, value, high) in curve.predictions.items():
        assert value == pytest.approx(power(240 * factor, C, A, B), abs=0.05)
        assert low < value < high
    assert curve.formula.startswith("80.") and " - " in curve.formula


def test_it_is_what_scipy_finds() -> None:
    y = power(X, C, A, B) + np.asarray([0.5, -0.7, 0.3, 0.6, -0.4])
    errors = np.asarray([0.4, 0.8, 0.5, 1.0, 0.6])
    noise = np.random.default_rng(1).normal(0, 1, (4000, 5))
    noise = (noise - noise.mean(0)) / noise.std(0)
    curve = fit(list(X), list(y), y + errors * noise)
    expected, _ = curve_fit(power, X, y, p0=(70, 100, 0.5), sigma=errors, bounds=([0, 0, 0.02], [100, np.inf, 5]))
    assert curve.parameters == pytest.approx(expected, rel=0.03)
    assert [curve.at(x)[1] for x in X] == pytest.approx(power(X, *expected), abs=0.05)


def test_a_falling_measure_is_the_mirror_image() -> None:
    curve, mirrored = fitted(X, power(X, C, A, B), seed=2), fitted(X, 100 - power(X, C, A, B), seed=2)
    assert mirrored.sign == -1 and " + " in mirrored.formula
    assert mirrored.parameters[1:] == pytest.approx(curve.parameters[1:], rel=0.03)
    assert mirrored.at(480)[1] == pytest.approx(100 - curve.at(480)[1], abs=0.05)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    hits, studies, truth = 0, 100, power(4 * X[-1], C, A, B)
    for seed in range(studies):
        y = power(X, C, A, B) + rng.normal(0, 0.5, len(X))
        low, _, high = fitted(X, y, 0.5, seed).at(4 * X[-1])
        hits += low <= truth <= high
    assert 0.88 * studies <= hits <= studies


def test_units_of_x_do_not_matter() -> None:
    y = power(X, C, A, B) + np.asarray([0.5, -0.7, 0.3, 0.6, -0.4])
    curve, scaled = fitted(X, y, 0.5), fitted(1e6 * X, y, 0.5)
    assert scaled.parameters[0] == pytest.approx(curve.parameters[0])
    assert scaled.at(1e6 * 480) == pytest.approx(curve.at(480))


@pytest.mark.parametrize(
    ("x", "y", "error", "reason"),
    [
        (X[:3], power(X[:3], C, A, B), 0.1, "3 points, at least 4 are needed"),
        ([15, 15, 30, 30, 60], [40, 41, 50, 51, 60], 0.1, "3 points, at least 4"),
        ([0, 1, 2, 3], [1, 2, 3, 4], 0.1, "values above 0"),
        (X, [60.1, 59.9, 60.2, 60.0, 60.1], 1.0, "do not rise or fall by more than their errors"),
    ],
)
def test_what_carries_no_curve_is_refused(x: Any, y: Any, error: float, reason: str) -> None:
    with pytest.raises(NotFitted, match=reason):
        fitted(x, y, error)


def test_points_without_errors_are_refused() -> None:
    with pytest.raises(NotFitted, match="errors of the points are not known"):
        fit(list(X), list(power(X, C, A, B)), None)
    with pytest.raises(NotFitted, match="errors of the points are not known"):
        fitted(X, power(X, C, A, B), error=0.0)


def test_a_curve_that_misses_a_point_or_has_no_shape_says_so() -> None:
    rises_then_falls = [40, 55, 62, 64, 58]
    assert "misses the point at 240" in " ".join(fitted(X, rises_then_falls, 0.3).notes)
    assert "at its bound" in " ".join(fitted(X, 10 * np.log(X), 0.3).notes)


def test_the_offset_stays_within_what_a_score_can_be() -> None:
    curve = fitted(X, 60 + 8 * np.log(X / 15), 0.5)
    assert curve.resampled_R3[:, 0].max() <= 100 and curve.resampled_R3[:, 1].min() >= 0
