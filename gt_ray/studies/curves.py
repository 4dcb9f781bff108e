"""Scaling curves: a power law with an offset, score(x) = c - a x^-b, of a measure that rises, or c + a x^-b.

For a given exponent b the best c and a are those of a straight line in x^-b, so all that is searched is a grid of
exponents: no starting values, no local optima, and thousands of resampled curves are fitted at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_POINTS = 4
EXPONENTS = np.geomspace(0.02, 5, 240)
AHEAD = (2, 4)
MISSES = 3.0  # standard errors by which a curve may miss a point without a word
ENDS = [2.5, 97.5]
NOTHING = 1e-9  # a standard error of rounding alone

Array = np.ndarray[Any, Any]
Interval = tuple[float, float, float]
"""Low end, value, high end."""


class NotFitted(ValueError):
    """The points do not carry a curve; the message says why."""


@dataclass(frozen=True)
class Curve:
    """A fitted power law with offset, and what resampled points give instead.

    Attributes:
        sign: 1 of a measure that rises with x, -1 of one that falls.
        parameters: offset c (the limit for large x), factor a, exponent b.
        resampled_R3: the same of resampled points.
        largest: x of the last point.
        notes: what is to be known before it is believed.
    """

    sign: int
    parameters: tuple[float, float, float]
    resampled_R3: Array
    largest: float
    notes: tuple[str, ...] = ()

    def at(self, x: float) -> Interval:
        """The curve at x with its 95 % interval."""
        value = float(_values(np.asarray([self.parameters]), self.sign, np.asarray([x]))[0, 0])
        low, high = np.percentile(_values(self.resampled_R3, self.sign, np.asarray([x])), ENDS)
        return float(low), value, float(high)

    @property
    def intervals(self) -> dict[str, Interval]:
        """Of c, a and b."""
        lows, highs = np.percentile(self.resampled_R3, ENDS, axis=0)
        values = zip("cab", lows, self.parameters, highs, strict=True)
        return {name: (float(low), value, float(high)) for name, low, value, high in values}

    @property
    def predictions(self) -> dict[int, Interval]:
        """Times the largest x -> the curve there."""
        return {factor: self.at(factor * self.largest) for factor in AHEAD}

    @property
    def formula(self) -> str:
        """The curve in numbers."""
        c, a, b = self.parameters
        return f"{c:.2f} {'-' if self.sign > 0 else '+'} {a:.4g} x^-{b:.3g}"


def fit(
    x: Sequence[float], scores: Sequence[float], draws_RN: Array | None, least: float = 0.0, most: float = 100.0
) -> Curve:
    """Least squares, points weighted by their standard errors.

    Args:
        x: above 0.
        scores: of the N points.
        draws_RN: resampled scores of the points; none: their errors are not known.
        least: bound of the offset c.
        most: the same, from above.

    Raises:
        NotFitted: too few points, or none that rise or fall by more than their errors.
    """
    if len(set(x)) < LEAST_POINTS:
        raise NotFitted(f"not fitted: {len(set(x))} points, at least {LEAST_POINTS} are needed")
    if min(x) <= 0:
        raise NotFitted("not fitted: a power law needs values above 0")
    if draws_RN is None or not ((ses_N := draws_RN.std(0)) > NOTHING).all():
        raise NotFitted("not fitted: the errors of the points are not known")
    x_N, y_N = np.asarray(x, dtype=float), np.asarray(scores, dtype=float)
    weights_N = ses_N**-2.0
    log_N = np.log(x_N) - np.average(np.log(x_N), weights=weights_N)
    low, high = np.percentile(draws_RN @ (weights_N * log_N), ENDS)
    if low <= 0 <= high:
        raise NotFitted("not fitted: the points do not rise or fall by more than their errors")
    sign = 1 if low > 0 else -1
    unit = float(np.exp(np.mean(np.log(x_N))))  # so that x^-b stays near 1 for every b
    found_R3 = _fits(x_N / unit, np.vstack([y_N, draws_RN]), weights_N, sign, least, most)
    found_R3[:, 1] *= unit ** found_R3[:, 2]
    c, a, b = map(float, found_R3[0])
    missed_N = np.abs(y_N - _values(found_R3[:1], sign, x_N)[0]) / ses_N
    notes = []
    if missed_N.max() > MISSES:
        notes.append(f"it misses the point at {x_N[missed_N.argmax()]:g} by {missed_N.max():.1f} standard errors")
    if np.isin(b, EXPONENTS[[0, -1]]) or np.isclose(c, (least, most)).any():
        notes.append("a parameter is at its bound: the points do not tell the curve's shape")
    return Curve(sign, (c, a, b), found_R3[1:], float(x_N.max()), tuple(notes))


def _fits(x_N: Array, y_RN: Array, weights_N: Array, sign: int, least: float, most: float) -> Array:
    """Offset, factor and exponent [R, 3] with the least weighted squares, the offset within bounds, the factor >= 0."""
    w_N = weights_N / weights_N.sum()
    best_R, found_R3 = np.full(len(y_RN), np.inf), np.zeros((len(y_RN), 3))
    y_R = y_RN @ w_N
    for b in EXPONENTS:
        z_N = -sign * x_N**-b
        z = z_N @ w_N
        a_R = (y_RN - y_R[:, None]) @ (w_N * (z_N - z)) / (w_N @ (z_N - z) ** 2)
        c_R = np.clip(y_R - np.maximum(a_R, 0) * z, least, most)
        a_R = np.maximum((y_RN - c_R[:, None]) @ (w_N * z_N) / (w_N @ z_N**2), 0)  # the best for the clipped offset
        squares_R = ((y_RN - c_R[:, None] - a_R[:, None] * z_N) ** 2) @ w_N
        better_R = squares_R < best_R
        best_R[better_R] = squares_R[better_R]
        found_R3[better_R] = np.stack([c_R, a_R, np.full_like(c_R, b)], 1)[better_R]
    return found_R3


def _values(parameters_R3: Array, sign: int, x_N: Array) -> Array:
    c_R, a_R, b_R = parameters_R3.T
    values_RN: Array = c_R[:, None] - sign * a_R[:, None] * x_N[None] ** -b_R[:, None]
    return values_RN
