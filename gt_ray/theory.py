"""Section 5 as functions: Lemma 5.1, Theorem 5.2, Corollary 5.3, each as stated and as it holds.

Losses are in nats a target token, the mean over a row's target tokens, so that a row is a sample; information and
divergences are in nats. `None` is "no bound": unbounded, or unknown.

What was found wrong in section 5 and appendix B (tests/test_theory.py has an exact example of each):

1. R_D is a sum over rows in section 5 and a mean in (23): with sums, Gen of a constant loss is 1 - |D_p|, its bound 0.
2. (23)-(25) take the loss of w~ on D_p for one on fresh rows. Delta-theta_S, which M reads, is fine-tuned on the same
   rows, so it is I(w, Delta-theta_S; D_p) that counts. Corollary 5.3 bounds it as well: both are functions of Phi.
3. (35) takes KL(P_{D_p} || mu^m) for KL(mu~ || mu); it is m times that. (38) needs |D| = |D_p| = m, and R_D(w~) means
   new rows, not those that the client's own update was made from. So no |D| makes a bound small: the limit is
   sqrt(2 sigma^2 KL).
4. (36) centres R_D at the mean of R_{D_p}, so (43) fails for small lambda where the two means differ.
5. (28) needs sigma for every fixed w: a loss that depends on w alone has a mean of rows no narrower than itself.
6. (46) is an inequality, <=, strict as soon as shadows share rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def generalisation_bound(sigma: float, information: float | None, n: float, summed: bool = False) -> float | None:
    """Lemma 5.1: bound of |E Gen| = |E (R_mu~ - R_{D_p})|, in the unit of sigma: sqrt(2 sigma^2 I / n).

    As stated, `information` is I(w; D_p) and `n` is |D_p|. It holds for I(w, Delta-theta_S of all shadows; D_p), and
    where shadows share rows for n = `effective_rows`.

    Args:
        sigma: sub-Gaussian parameter of the loss of fresh rows, for each adapter.
        summed: risks are sums over the n rows, R_mu~ too, as section 5 writes R_D.
    """
    if information is None:
        return None
    return sigma * math.sqrt(2 * information / n) * (n if summed else 1)


def utility_bound_as_stated(sigma: float, information: float | None, kl: float, n_private: float) -> float | None:
    """Theorem 5.2 as printed, sqrt(2 sigma^2 (I + KL) / |D|). It does not hold: see 2 and 3 above."""
    return None if information is None else sigma * math.sqrt(2 * (information + kl) / n_private)


def utility_bound(
    sigma: float, information: float | None, kl: float, n_public: float, independent_rows: float | None = None
) -> float | None:
    """Theorem 5.2 for adapters of public updates: bound of |E (R_mu - R_{D_p})|, sqrt(2 sigma^2 (I / m + KL)).

    R_mu is the risk on private rows of an adapter made from a *public* update, so |D| takes no part: Donsker-Varadhan
    compares (w, Delta-theta_S, D_p) with an independent data set of m rows of mu, whose KL is I + m KL(mu~ || mu).

    Args:
        sigma: sub-Gaussian parameter of the loss of private rows, for each adapter.
        information: I(w, Delta-theta_S; D_p).
        kl: KL(mu~ || mu) of one row, public to private.
        n_public: m; where shadows share rows, their distinct ones.
        independent_rows: `effective_rows`, where shadows share rows.
    """
    if information is None:
        return None
    return sigma * math.sqrt(2 * (information + n_public * kl) / (independent_rows or n_public))


def utility_bound_of_clients(
    sigma: float, information: float | None, kl: float, rows: float, sets: float = 1
) -> float | None:
    """Theorem 5.2 for adapters of clients' own updates: sqrt(2 sigma^2 (I / K + n KL)).

    Each client's risk is a function F(w, D) of its data set, through its update too, so a data set is the sample: n
    times the divergence of a row, and no gain from n unless F is known to vary little.

    Args:
        sigma: of F over data sets of n private rows, for each w; half the range of the loss always does.
        information: I(w; D_p).
        rows: n, of a shadow and of a client alike.
        sets: K, shadows that share no rows; else 1.
    """
    return None if information is None else sigma * math.sqrt(2 * (information / sets + rows * kl))


def implied_information(gap: float, sigma: float, n: float) -> float:
    """Least I(w, Delta-theta_S; D_p) that Lemma 5.1 allows at a measured gap; also where no upper bound exists."""
    return n * gap**2 / (2 * sigma**2)


def effective_rows(counts: ArrayLike) -> float:
    """Independent rows that a mean over all shadows' rows is worth: (sum c)^2 / sum c^2.

    Args:
        counts: in how many shadows each distinct row is. A row's terms are dependent, so their deviations add.
    """
    count = np.asarray(counts, dtype=float)
    return float(count.sum() ** 2 / np.square(count).sum())


def information_of_shadows(per_shadow: Sequence[float | None]) -> float | None:
    """Corollary 5.3: I(Phi; D_p) <= sum_k I(theta_S,k, theta_T,k; D_p); so much tell w and all updates of S at most.

    Needs noise that is independent between shadows, and w that reads D_p through Phi alone. Equality, which (46)
    claims, holds for shadows without common rows.
    """
    known = [one for one in per_shadow if one is not None]
    return math.fsum(known) if len(known) == len(per_shadow) else None


def gaussian_channel(power: float, variance: float, coordinates: int) -> float:
    """Most information through x + N(0, variance) of each coordinate where E||x||^2 <= power."""
    return 0.5 * coordinates * math.log1p(power / (coordinates * variance))


def dp_sgd_information(steps: int, rows: int, sample_rate: float, noise_multiplier: float, coordinates: int) -> float:
    """Bound of I(all steps; D) of DP-SGD; the clipping norm cancels, optimizers and snapshots read noisy sums only.

    The smaller of two: a step is a Gaussian channel whose signal is a sum of R clipped gradients, R ~ Binomial(rows,
    rate), so E||sum||^2 <= E[R^2] C^2; or, for independent rows, the sum over rows of what one tells of itself given
    all others, a channel of norm C that is open with probability `sample_rate`.
    """
    mean = rows * sample_rate
    variance = noise_multiplier**2
    whole = gaussian_channel(mean * (1 - sample_rate) + mean**2, variance, coordinates)
    by_row = mean * gaussian_channel(1.0, variance, coordinates)
    return steps * min(whole, by_row)


def noisy_erm_information(noise: float, square_norm: float, coordinates: int, releases: int = 1) -> float:
    """Bound of I(released updates; D) of noisy ERM.

    Args:
        noise: standard deviation on each number.
        square_norm: bound of the squared norm before noise; an estimate of its mean makes the bound an estimate.
        releases: snapshots, each with noise of its own. The same noise on two would cancel and bound nothing.
    """
    return releases * gaussian_channel(square_norm, noise**2, coordinates)


def gibbs_information(rates: Sequence[float], clip_norm: float, temperature: float, coordinates: int) -> float:
    """Bound of I(all steps; D) of Langevin dynamics: step t moves by at most rate * clip_norm, with noise of variance
    2 rate temperature. Its linear form, sum_t rate C^2 / (4 temperature), is arXiv 1801.04295's."""
    return math.fsum(
        gaussian_channel((rate * clip_norm) ** 2, 2 * rate * temperature, coordinates) for rate in rates if rate
    )


def mechanism_information(
    stated: Mapping[str, Any], rows: int, coordinates: int, releases: int = 1, square_norm: float | None = None
) -> float | None:
    """Most that an update tells of its rows, by what is stated of its mechanism, as update files do.

    Args:
        rows: that it was fine-tuned on.
        coordinates: trained numbers.
        releases: snapshots that are kept.
        square_norm: mean squared norm without noise, where noisy_erm states no bound.

    Returns:
        None of a mechanism without noise: an update that follows from the rows may tell all that there is to them.
    """
    name = stated["name"]
    if name == "dp_sgd":
        if not stated["noise_multiplier"]:
            return None
        return dp_sgd_information(stated["steps"], rows, stated["sample_rate"], stated["noise_multiplier"], coordinates)
    if name == "gibbs":
        steps = stated["steps"]
        rates = [stated["learning_rate"] * (1 - step / steps) for step in range(steps)]  # schedule.py
        return gibbs_information(rates, stated["clip_norm"], stated["temperature"], coordinates)
    if name == "noisy_erm":
        bound = stated.get("update_norm")
        square_norm = bound**2 if bound is not None else square_norm
        if square_norm is not None:
            return noisy_erm_information(stated["noise"], square_norm, coordinates, releases)
    return None


def hoeffding_sigma(low: float, high: float) -> float:
    """Sub-Gaussian parameter of any loss between two bounds. This one is a guarantee."""
    return (high - low) / 2
