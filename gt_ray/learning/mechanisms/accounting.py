"""What noise gives which (epsilon, delta), by the PRV accountant of Opacus (arXiv 2106.02848).

Its errors are absolute, so they are set by the epsilon that is looked for: at the defaults (0.01) an epsilon of 0.09 is
off by a tenth. What is reported is its upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from gt_ray.errors import UserError, require

PRECISION = 1 / 200
"""Of an epsilon, as a share of it."""
LARGEST_NOISE = 1e3
"""Noise multiplier from which no fine-tune learns anything: a batch would have to have as many rows."""


@cache
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Standard deviation of the noise on a sum of clipped gradients, over their bound, that is needed.

    Args:
        sample_rate: probability of a row to be in a batch (Poisson sampling).

    Raises:
        UserError: so small an epsilon needs more noise than makes sense; says which values would work.
    """
    if epsilon < (least := _least(delta, sample_rate, steps)):
        fewer = steps // 2
        while fewer and epsilon < _least(delta, sample_rate, fewer):
            fewer //= 2
        raise UserError(
            f"epsilon={epsilon:g} is not reached with {steps} steps at a sample rate of {sample_rate:.3g} and "
            f"delta={delta:g}: use epsilon of at least {least:.2g}"
            + (f", or at most {fewer} steps" if fewer else "")
            + ", or a smaller batch_size"
        )
    return float(
        require("opacus.accountants.utils", "dp").get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant="prv",
            epsilon_tolerance=PRECISION * epsilon,
            eps_error=PRECISION * epsilon,
        )
    )


def epsilon_spent(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of all of these fine-tunes of one data set together: (noise multiplier, sample rate, steps) of each."""
    error = 0.01
    while (found := _epsilon(history, delta, error)) * PRECISION < error:
        error = found * PRECISION / 2
    return found


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """Epsilon of one release with noise of `multiplier` times its sensitivity (arXiv 1805.06530, theorem 8)."""

    def delta_of(epsilon: float) -> float:
        a, b = 1 / (2 * multiplier), epsilon * multiplier
        # exp(epsilon) * Phi(-a - b) by its logarithm: both factors leave the range of floats
        return _phi(a - b) - math.exp(min(epsilon + _log_phi(-a - b), 0.0))

    low, high = 0.0, 1.0
    while delta_of(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


def _least(delta: float, sample_rate: float, steps: int) -> float:
    """Epsilon at the largest noise, where so many steps are as good as one Gaussian release (arXiv 1911.11607). The
    accountant itself takes hours for epsilons that are this small."""
    return gaussian_epsilon(LARGEST_NOISE / (sample_rate * math.sqrt(steps)), delta)


def _epsilon(history: Sequence[tuple[float, float, int]], delta: float, error: float) -> float:
    accountant: Any = require("opacus.accountants", "dp").PRVAccountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta, eps_error=error))


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _log_phi(x: float) -> float:
    """Logarithm of the normal distribution function, also far out where it is 0 as a float."""
    if x > -30:
        return math.log(_phi(x))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi))
