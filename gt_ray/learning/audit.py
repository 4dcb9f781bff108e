"""Membership inference: who has an update, can they tell which rows it was fine-tuned on, and what does that prove?

M models are fine-tuned, each on the rows whose coins came up heads, and attacked by the losses of all R rows:

    loss              low loss: "in"
    calibrated        low loss compared with the base model's: some rows are easy for any model
    likelihood_ratio  likelier among losses under models that had the row than under those that had not (LiRA, online
                      variant, arXiv 2112.03570); the other models are the shadows

What the attacks prove of epsilon is chosen and measured on different models (epsilon_bounds.py).
Legend: M models, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gt_ray.learning.epsilon_bounds import CONFIDENCE, Array, guesses_bound, quick_guesses_bound, rates_bound

Flags = NDArray[np.bool_]
LEAST_LOSS = 1e-6
"""Cross-entropy in float32 rounds smaller ones to 0."""
PRIOR_MODELS = 32
"""Models' worth of weight that the variance over all rows has beside a row's own."""
RESAMPLES = 1000
CHOICE = 0.9999
"""Confidence of the bounds by which a rule is chosen: the best of thousands of rules at 95 % is luck, of few claims."""
THRESHOLDS = 48
"""Thresholds that are tried on each side of the median."""
LOW_RATE = 0.01
"""False positive rate at which true positives are told: who is named by it is named with reason."""


@dataclass(frozen=True)
class Attack:
    """How well an attack tells members, over all models and rows.

    Attributes:
        auc: area under the ROC curve; 0.5: not at all.
        auc_interval: 95 %, over models, for these rows.
        tpr: share of the members that it finds at `LOW_RATE` false positives.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon and the rule that gave it.

    Attributes:
        right: claims that were right, of `right + wrong` of them, on the half of the models that is measured.
    """

    epsilon: float
    attack: str
    right: int
    wrong: int


@dataclass(frozen=True)
class Audit:
    """What came of attacking one mechanism.

    Attributes:
        scores: [M, R] by attack, the higher the likelier in.
        attacks: by name.
        guesses: the bound that holds whatever rows of one model have in common.
        rates: the bound of true and false positive rates, which counts them as independent.
    """

    scores: dict[str, Array]
    attacks: dict[str, Attack]
    guesses: Bound
    rates: Bound


def audit(losses_MR: Array, member_MR: Flags, base_R: Array, delta: float) -> Audit:
    """Attack every model by the losses of its rows.

    Args:
        losses_MR: mean loss a target token of each row under each model; 4 models at least.
        member_MR: whether the model had the row; independent coins of probability 1/2.
        base_R: the same losses under the base model.
        delta: of the (epsilon, delta) that is bounded.
    """
    alone_MM = ~np.eye(len(losses_MR), dtype=bool)
    scores = attack_scores(losses_MR, member_MR, base_R, alone_MM)
    first_M = np.arange(len(losses_MR)) < len(losses_MR) // 2
    # The measured half is scored by what is known of the first half alone, or its coins were no secret.
    halves = attack_scores(losses_MR, member_MR, base_R, alone_MM & first_M)
    chosen = {name: (found[first_M], member_MR[first_M]) for name, found in halves.items()}
    measured = {name: (found[~first_M], member_MR[~first_M]) for name, found in halves.items()}
    return Audit(
        scores,
        {name: attack(found, member_MR) for name, found in scores.items()},
        _guesses(chosen, measured, delta),
        _rates(chosen, measured, delta),
    )


def attack_scores(losses_MR: Array, member_MR: Flags, base_R: Array, shadows_MM: Flags) -> dict[str, Array]:
    """Scores [M, R] by attack, the higher the likelier in; `shadows_MM`: whose coins each model's attacker knows."""
    return {
        "loss": -losses_MR,
        "calibrated": base_R - losses_MR,
        "likelihood_ratio": likelihood_ratio(confidence(losses_MR), member_MR, shadows_MM),
    }


def confidence(losses_MR: Array) -> Array:
    """Logit of the probability of a target token, log(p / (1 - p)) with p = exp(-loss): nearly normal (LiRA, Eq. 3)."""
    return np.asarray(-np.log(np.expm1(np.maximum(losses_MR, LEAST_LOSS))))


def likelihood_ratio(confidence_MR: Array, member_MR: Flags, shadows_MM: Flags) -> Array:
    """Logarithm of the likelihood ratio [M, R] of "in" to "out" (LiRA, algorithm 1), by each model's shadows.

    A row's confidence is normal with one variance and, under models that had the row, shifted. Few shadows tell little
    of a single row, so its variance is drawn towards that of all rows, and its shift towards the mean shift as far as
    it is noise: otherwise rows that hardly shift are ranked by noise. Rows that all shadows had, or none, have the
    mean shift.
    """
    inside, weights = member_MR.astype(float), shadows_MM.astype(float)
    n_in, n_out = weights @ inside, weights @ (1 - inside)
    known = (n_in > 0) & (n_out > 0)
    mean_in = weights @ (inside * confidence_MR) / np.maximum(n_in, 1)
    mean_out = weights @ ((1 - inside) * confidence_MR) / np.maximum(n_out, 1)
    squares = weights @ confidence_MR**2 - n_in * mean_in**2 - n_out * mean_out**2
    freedom = np.maximum(n_in - 1, 0) + np.maximum(n_out - 1, 0)
    common_M1 = squares.sum(1, keepdims=True) / np.maximum(freedom.sum(1, keepdims=True), 1)
    variance = np.maximum((squares + PRIOR_MODELS * common_M1) / (freedom + PRIOR_MODELS), 1e-12)
    noise = variance * (1 / np.maximum(n_in, 1) + 1 / np.maximum(n_out, 1))
    raw = mean_in - mean_out
    shift_M1 = _mean(raw, known)
    spread_M1 = np.maximum(_mean((raw - shift_M1) ** 2 - noise, known), 0)
    shift = shift_M1 + known * spread_M1 / (spread_M1 + noise) * (raw - shift_M1)
    out = (weights @ confidence_MR - n_in * shift) / np.maximum(n_in + n_out, 1)
    return np.asarray((confidence_MR - out - shift / 2) * shift / variance)


def attack(scores_MR: Array, member_MR: Flags, seed: int = 0) -> Attack:
    """ROC of scores at one threshold for all models; the interval by drawing models with replacement."""
    wins_MM, pairs_MM = _wins(scores_MR, member_MR)
    counts_BM = np.random.default_rng(seed).multinomial(len(wins_MM), [1 / len(wins_MM)] * len(wins_MM), size=RESAMPLES)
    areas_B = np.einsum("bm,mn,bn->b", counts_BM, wins_MM, counts_BM)
    areas_B = areas_B / np.maximum(np.einsum("bm,mn,bn->b", counts_BM, pairs_MM, counts_BM), 1)
    low, high = np.quantile(areas_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    outside = np.sort(scores_MR[~member_MR])
    threshold = outside[-1 - int(LOW_RATE * len(outside))]
    return Attack(
        float(wins_MM.sum() / pairs_MM.sum()),
        (float(low), float(high)),
        float((scores_MR[member_MR] > threshold).mean()),
    )


def _wins(scores_MR: Array, member_MR: Flags) -> tuple[Array, Array]:
    """How often [M, M] a member of one model scores above another's non-member, ties half; of how many pairs."""
    outside = [np.sort(scores_R[~member_R]) for scores_R, member_R in zip(scores_MR, member_MR, strict=True)]
    wins_MM = np.empty((len(scores_MR), len(scores_MR)))
    for m, (scores_R, member_R) in enumerate(zip(scores_MR, member_MR, strict=True)):
        inside = scores_R[member_R]
        for n, other in enumerate(outside):
            wins_MM[m, n] = (np.searchsorted(other, inside, "left") + np.searchsorted(other, inside, "right")).sum() / 2
    n_in = member_MR.sum(1)
    return wins_MM, np.outer(n_in, member_MR.shape[1] - n_in).astype(float)


def _mean(values_MR: Array, known_MR: Flags) -> Array:
    """Mean [M, 1] over the rows that are known; 0 of none."""
    total_M1 = (values_MR * known_MR).sum(1, keepdims=True)
    return np.asarray(total_M1 / np.maximum(known_MR.sum(1, keepdims=True), 1))


Scored = Mapping[str, tuple[Array, Flags]]
"""By attack, scores and whether the row was in, of some of the models."""


def _rates(chosen: Scored, measured: Scored, delta: float) -> Bound:
    """Attack, threshold and side that prove most on one half of the models, measured on the other."""
    best = (-1.0, "", 0.0, True)
    for name, (scores, member) in chosen.items():
        thresholds_n = _thresholds(scores)
        for claims_in in (True, False):
            counts = _claims(scores, member, thresholds_n, claims_in)
            bounds_n = _rates_bound(*counts, member, claims_in, delta, CHOICE)
            i = int(bounds_n.argmax())
            best = max(best, (float(bounds_n[i]), name, float(thresholds_n[i]), claims_in))
    _, name, threshold, claims_in = best
    scores, member = measured[name]
    right, wrong = _claims(scores, member, np.array([threshold]), claims_in)
    epsilon = _rates_bound(right, wrong, member, claims_in, delta, CONFIDENCE)
    return Bound(float(epsilon[0]), name, int(right[0]), int(wrong[0]))


def _rates_bound(right: Array, wrong: Array, member: Flags, claims_in: bool, delta: float, confidence: float) -> Array:
    n_in, n_out = int(member.sum()), int((~member).sum())
    return rates_bound(right, n_in if claims_in else n_out, wrong, n_out if claims_in else n_in, delta, confidence)


def _guesses(chosen: Scored, measured: Scored, delta: float) -> Bound:
    """Attack and pair of thresholds, above which "in" and below which "out" is guessed, likewise."""
    best = (-1.0, "", math.inf, -math.inf)
    for name, (scores, member) in chosen.items():
        thresholds_n = np.array([-math.inf, *_thresholds(scores), math.inf])
        right_in, wrong_in = _claims(scores, member, thresholds_n, True)
        right_out, wrong_out = _claims(scores, member, thresholds_n, False)
        right_nn, wrong_nn = right_in[:, None] + right_out, wrong_in[:, None] + wrong_out
        bounds_nn = quick_guesses_bound(right_nn, right_nn + wrong_nn, CHOICE)
        bounds_nn[thresholds_n[:, None] < thresholds_n] = -1.0  # rows between the two would be guessed both ways
        i, j = np.unravel_index(int(bounds_nn.argmax()), bounds_nn.shape)
        best = max(best, (float(bounds_nn[i, j]), name, float(thresholds_n[i]), float(thresholds_n[j])))
    _, name, above, below = best
    scores, member = measured[name]
    right_in, wrong_in = _claims(scores, member, np.array([above]), True)
    right_out, wrong_out = _claims(scores, member, np.array([below]), False)
    right, wrong = int(right_in[0] + right_out[0]), int(wrong_in[0] + wrong_out[0])
    return Bound(guesses_bound(right, right + wrong, member.size, delta), name, right, wrong)


def _claims(scores: Array, member: Flags, thresholds_n: Array, claims_in: bool) -> tuple[Array, Array]:
    """Right and wrong claims [n] at each threshold: "in" of the scores above it, or "out" of those below."""
    sign = 1 if claims_in else -1
    mine, others = (np.sort(sign * scores[flags == claims_in]) for flags in (member, ~member))
    found = [len(one) - np.searchsorted(one, sign * thresholds_n, "right") for one in (mine, others)]
    return found[0].astype(float), found[1].astype(float)


def _thresholds(scores: Array) -> Array:
    """Scores to choose from: quantiles, close together at both ends."""
    tail = np.geomspace(1 / scores.size, 0.5, THRESHOLDS)
    return np.unique(np.quantile(scores, [*tail, *(1 - tail)]))
