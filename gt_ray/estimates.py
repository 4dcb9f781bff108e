"""What the bounds of theory.py need, from samples: sub-Gaussian parameter, divergence, means, with 95 % intervals.

Estimates, not guarantees: a bound with an estimate in it holds as far as the estimate does. The one guarantee is
`theory.hoeffding_sigma`, of a loss that is cut off at a stated value.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
RESAMPLES = 400
"""Of a bootstrap."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
NEWTON_STEPS = 12
"""Newton's method on so well-conditioned a loss has converged by then."""


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def subgaussian_sigma(loss_KB: ArrayLike, seed: int = 0) -> Estimate:
    """Smallest sigma with log E exp(lambda (loss - mean)) <= lambda^2 sigma^2 / 2 on these losses, for all lambda.

    Each row [B] is of one adapter and has its own mean; over adapters the exponentials are averaged, which is not less
    than what a mean of K adapters needs. An estimate: no sample tells what rarer losses would add, nor other w. The
    interval resamples adapters, or of a single adapter its losses.
    """
    loss = np.atleast_2d(np.asarray(loss_KB, dtype=float))
    K, B = loss.shape
    deviation = (loss - loss.mean(1, keepdims=True)) * math.sqrt(B / max(1, B - 1))
    scale = float(deviation.std())
    if not scale:
        return Estimate(0.0, 0.0, 0.0)
    units = deviation / scale if K > 1 else deviation.reshape(-1, 1) / scale
    # Beyond 2 log n an empirical exponential is that of its largest value alone, and the quotient falls.
    positive = np.geomspace(0.05, 2 * math.log(loss.size) + 2, 40)
    lambdas = np.concatenate([-positive, positive])
    largest = np.array([(at * units).max() for at in lambdas])
    means = np.stack([np.exp(at * units - top).mean(1) for at, top in zip(lambdas, largest, strict=True)])
    first, second = units.mean(1), np.square(units).mean(1)

    def sigma(weights: Array) -> float:
        mean = first @ weights  # of a resample not zero
        with np.errstate(divide="ignore"):
            quotients = 2 * (np.log(means @ weights) + largest - lambdas * mean) / lambdas**2
        return scale * math.sqrt(max(float(quotients.max()), float(second @ weights - mean**2)))

    n = len(units)
    rng = np.random.default_rng(seed)
    again = [sigma(rng.multinomial(n, np.full(n, 1 / n)) / n) for _ in range(RESAMPLES)]
    return Estimate(sigma(np.full(n, 1 / n)), *_ends(again))


def bag_of_words(texts: Sequence[str], width: int = 256) -> Array:
    """Features [n, width] of texts: log counts of words, hashed."""
    found = np.zeros((len(texts), width))
    for i, text in enumerate(texts):
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            found[i, zlib.crc32(word.encode()) % width] += 1
    return np.log1p(found)


def kl_by_classifier(a_NF: ArrayLike, b_NF: ArrayLike, folds: int = 5, seed: int = 0) -> Estimate:
    """KL(a || b) in nats, from below: E_a f - E_b exp f + 1, which no f makes larger than it (arXiv 0809.0853).

    f is the log-odds of a logistic regression on features [n, F], that of the two sizes taken off, on rows of folds
    that it has not seen, and at most log n_b: exp f of what is rarer among n_b rows cannot be measured. So the estimate
    is on average no more than the divergence of the features, and that no more than that of the rows. What the
    classifier cannot see is missed, and of data without common support, whose divergence is infinite, about log n_b is
    found. Not below zero. The interval resamples rows; it does not cover what is missed.
    """
    sides = [np.asarray(side, dtype=float) for side in (a_NF, b_NF)]
    rng = np.random.default_rng(seed)
    fold_of = [rng.permutation(len(side)) % folds for side in sides]
    odds = [np.zeros(len(side)) for side in sides]
    for fold in range(folds):
        kept_a, kept_b = (side[own != fold] for side, own in zip(sides, fold_of, strict=True))
        score = _classifier(kept_a, kept_b, rng)
        for side, own, found in zip(sides, fold_of, odds, strict=True):
            found[own == fold] = score(side[own == fold])

    most = math.log(len(sides[1]))

    def divergence(of_a: Array, of_b: Array) -> float:
        return max(0.0, float(np.minimum(of_a, most).mean() - np.exp(np.minimum(of_b, most)).mean() + 1))

    again = [divergence(*(rng.choice(one, len(one)) for one in odds)) for _ in range(RESAMPLES)]
    return Estimate(divergence(*odds), *_ends(again))


def _classifier(a_NF: Array, b_NF: Array, rng: np.random.Generator) -> Callable[[Array], Array]:
    """Log-odds of a against b, sizes taken off; the penalty is chosen on a quarter of the rows."""
    x_NF, y_N = np.concatenate([a_NF, b_NF]), np.repeat([1.0, 0.0], [len(a_NF), len(b_NF)])
    mean_F, scale_F = x_NF.mean(0), x_NF.std(0)
    x_NF = (x_NF - mean_F) / np.where(scale_F > 0, scale_F, 1)
    held = rng.random(len(x_NF)) < 0.25

    def held_loss(penalty: float) -> float:
        weight_F, offset = _logistic(x_NF[~held], y_N[~held], penalty)
        z_N = x_NF[held] @ weight_F + offset
        return float((np.logaddexp(0, z_N) - y_N[held] * z_N).mean())

    weight_F, offset = _logistic(x_NF, y_N, min(PENALTIES, key=held_loss))
    offset -= math.log(len(a_NF) / len(b_NF))
    return lambda one_NF: (one_NF - mean_F) / np.where(scale_F > 0, scale_F, 1) @ weight_F + offset


def _logistic(x_NF: Array, y_N: Array, penalty: float) -> tuple[Array, float]:
    """Weights [F] and offset of logistic regression with penalty / 2 * |weights|^2 on the mean loss, by Newton."""
    # By torch: its threads are under control, numpy's wait for each other on a busy machine.
    x_NG = torch.from_numpy(np.column_stack([x_NF, np.ones(len(x_NF))]))
    y, ridge_G = torch.from_numpy(y_N), torch.full((x_NG.shape[1],), penalty, dtype=torch.float64)
    ridge_G[-1] = 1e-9
    weight_G = torch.zeros_like(ridge_G)
    for _ in range(NEWTON_STEPS):
        p_N = torch.sigmoid((x_NG @ weight_G).clamp(-30, 30))
        gradient_G = x_NG.T @ (p_N - y) / len(y) + ridge_G * weight_G
        hessian_GG = (x_NG * (p_N * (1 - p_N))[:, None]).T @ x_NG / len(y) + ridge_G.diag()
        weight_G = weight_G - torch.linalg.solve(hessian_GG, gradient_G)
    return weight_G[:-1].numpy(), float(weight_G[-1])


def bootstrap_mean(values: ArrayLike, minus: ArrayLike = (0.0,), seed: int = 0) -> Estimate:
    """Mean of independent values, less the mean of others, with its interval."""
    rng = np.random.default_rng(seed)
    sides = [np.asarray(side, dtype=float) for side in (values, minus)]
    again = [side[rng.integers(len(side), size=(RESAMPLES, len(side)))].mean(1) for side in sides]
    return Estimate(float(sides[0].mean() - sides[1].mean()), *_ends(again[0] - again[1]))


def _ends(values: ArrayLike) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(values, dtype=float), (0.025, 0.975))
    return float(low), float(high)
