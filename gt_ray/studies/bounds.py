"""`gt-ray bounds`: the bounds of section 5 beside the gaps that a finished run has.

An expectation over w and D_p is measured on the one w that there is; intervals are over shadows and clients. A share of
the shadows, or of the private rows, is the same w measured on fewer of them: what it would have learned from fewer is a
run of its own.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gt_ray.config import Config, FineTuneSettings
from gt_ray.curation.jobs import SIDES, FineTuneJob, Side
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.estimates import Estimate, bag_of_words, bootstrap_mean, kl_by_classifier, subgaussian_sigma
from gt_ray.learning.mechanisms import statement
from gt_ray.studies.gaps import Gaps, Losses, measure
from gt_ray.tasks import TASKS
from gt_ray.theory import (
    effective_rows,
    generalisation_bound,
    hoeffding_sigma,
    implied_information,
    information_of_shadows,
    mechanism_information,
    utility_bound,
    utility_bound_as_stated,
    utility_bound_of_clients,
)
from gt_ray.training.run import MODEL, load_trained
from gt_ray.updates.files import write_atomically

BOUNDS = "bounds.json"
KINDS = ("own_KB", "fresh_KB", "private_KB", "clients_CB")
SHARES = (0.25, 0.5, 1.0)
MOST_ROWS = 2000
"""Of each side, that the classifier sees."""


def run_bounds(config: Config, rows: int = 64, loss_bound: float | None = None) -> dict[str, Any]:
    """Measure, write `bounds.json` into the run folder and renew `report.html`, where there is one; returns it.

    Args:
        rows: of every shadow and client, of each kind, that losses are computed on.
        loss_bound: cut every loss off at so many nats, so that sigma is a guarantee; none: estimate it.

    Raises:
        UserError: the run is not there, or not as the config says.
    """
    run = config.run_folder
    if not (run / MODEL).is_dir():
        raise UserError(
            f"there is no finished run at {run}; run `gt-ray pipeline --preset {config.preset}` with the same "
            "overrides first"
        )
    study = Study.load(config)
    gaps = measure(study, load_trained(study), rows)
    found = compare(study, gaps, loss_bound)
    write_atomically(run / BOUNDS, json.dumps(found, indent=1).encode())
    if (run / "report.json").is_file():
        from gt_ray.studies.report import write_html

        write_html(run)
    return found


def compare(study: Study, gaps: Gaps, loss_bound: float | None = None) -> dict[str, Any]:
    """What was measured and what bounds it, as `bounds.json` holds it; no bound is null, and `unbounded` says why."""
    if loss_bound:
        cut = {name: np.minimum(getattr(gaps, name), loss_bound) for name in KINDS}
        gaps = replace(gaps, **cut)
        sigma = dict.fromkeys(("public", "private", "data_sets"), Estimate(*[hoeffding_sigma(0, loss_bound)] * 3))
    else:
        sigma = {
            "public": subgaussian_sigma(gaps.fresh_KB),
            "private": subgaussian_sigma(gaps.private_KB),
            "data_sets": subgaussian_sigma(_beyond_shadows(study, gaps)[0].mean(1)),
        }
    kl = kl_by_classifier(*_features(study, gaps))
    mechanisms, told, unbounded = _information(study, gaps.shadows)
    values = {name: one.value for name, one in sigma.items()}
    counts = _counts(study, gaps.shadows)
    return {
        "preset": study.config.preset,
        "seed": study.config.seed,
        "unit": "nats a target token",
        "mechanisms": mechanisms,
        "rows_of_each": gaps.own_KB.shape[1],
        "loss_bound": loss_bound,
        "sigma": {name: one._asdict() for name, one in sigma.items()} | {"guaranteed": loss_bound is not None},
        "kl": kl._asdict(),
        "information_of_a_shadow": told[0],
        "unbounded": unbounded,
        "least_utility_bound": utility_bound(values["private"], 0.0, kl.value, len(counts), effective_rows(counts)),
        "table": [
            *(_generalisation(study, gaps, values, told, share) for share in SHARES),
            *(_of_public_updates(study, gaps, values, told, kl.value, share) for share in SHARES),
            *(_of_clients(study, gaps, values, told, kl.value, share) for share in SHARES),
        ],
    }


Told = Sequence[float | None]
"""Most information in each shadow's tuple."""


def _generalisation(study: Study, gaps: Gaps, sigma: Mapping[str, float], told: Told, share: float) -> dict[str, Any]:
    """Lemma 5.1, on the first of the shadows."""
    K, information, sizes = _first(study, gaps, told, share)
    gap = bootstrap_mean((gaps.fresh_KB - gaps.own_KB).mean(1)[:K])
    distinct, n = sizes["public_rows"], sizes["effective_rows"]
    certain = max(0.0, gap.low, -gap.high)
    return {
        "gap": "generalisation",
        **sizes,
        "measured": gap._asdict(),
        "stated": generalisation_bound(sigma["public"], information, distinct),
        "corrected": generalisation_bound(sigma["public"], information, n),
        "implied_information": implied_information(certain, sigma["public"], n) if sigma["public"] else 0.0,
    }


def _of_public_updates(
    study: Study, gaps: Gaps, sigma: Mapping[str, float], told: Told, kl: float, share: float
) -> dict[str, Any]:
    """Theorem 5.2 as corrected, of adapters of the shadows' updates on private rows."""
    K, information, sizes = _first(study, gaps, told, share)
    gap = bootstrap_mean((gaps.private_KB - gaps.own_KB).mean(1)[:K])
    bound = utility_bound(sigma["private"], information, kl, sizes["public_rows"], sizes["effective_rows"])
    return {"gap": "utility of public updates", **sizes, "measured": gap._asdict(), "corrected": bound}


def _of_clients(
    study: Study, gaps: Gaps, sigma: Mapping[str, float], told: Told, kl: float, share: float
) -> dict[str, Any]:
    """Theorem 5.2, of clients' own adapters on some of their rows; data sets of other sizes have no corrected bound."""
    _, information, sizes = _first(study, gaps, told, 1.0)
    clients_CB, shadows_K = _beyond_shadows(study, gaps)
    B = max(1, round(share * clients_CB.shape[1]))
    private = round(share * sum(len(client.private) for client in study.data.clients))
    n = {len(study.shadows[k].positions) for k in gaps.shadows} | {len(one.private) for one in study.data.clients}
    sets = 1 if max(_counts(study, gaps.shadows)) > 1 else len(gaps.shadows)
    row = {
        "gap": "utility",
        "public_rows": sizes["public_rows"],
        "private_rows": private,
        "measured": bootstrap_mean(clients_CB[:, :B].mean(1), shadows_K)._asdict(),
        "stated": utility_bound_as_stated(sigma["private"], information, kl, private),
    }
    if len(n) == 1 and share == 1:
        row["corrected"] = utility_bound_of_clients(sigma["data_sets"], information, kl, n.pop(), sets)
    return row


def _first(study: Study, gaps: Gaps, told: Told, share: float) -> tuple[int, float | None, dict[str, float]]:
    """How many shadows are so large a share, what they tell at most, and of how many rows."""
    K = max(1, round(share * len(gaps.shadows)))
    counts = _counts(study, gaps.shadows[:K])
    information = information_of_shadows([told[i] for i in _connected(study, gaps.shadows, K)])
    return K, information, {"shadows": K, "public_rows": len(counts), "effective_rows": effective_rows(counts)}


def _connected(study: Study, shadows: Sequence[int], K: int) -> list[int]:
    """The first K shadows and those that they share rows with, one way or another: all that can tell of their rows."""
    rows = [{(study.shadows[k].task, position) for position in study.shadows[k].positions} for k in shadows]
    found, reached = set(range(K)), set().union(*rows[:K])
    while more := [i for i in range(len(rows)) if i not in found and rows[i] & reached]:
        found.update(more)
        reached.update(*(rows[i] for i in more))
    return sorted(found)


def _beyond_shadows(study: Study, gaps: Gaps) -> tuple[Losses, Losses]:
    """Losses of clients [C, B], and mean losses of shadows on their own rows [K], less those of the task's shadows."""
    tasks = np.array([study.shadows[k].task for k in gaps.shadows])
    level = {task: float(gaps.own_KB[tasks == task].mean()) for task in set(tasks)}
    of_clients = np.array([[level[client.task]] for client in study.data.clients])
    return gaps.clients_CB - of_clients, gaps.own_KB.mean(1) - np.array([level[task] for task in tasks])


def _counts(study: Study, shadows: Sequence[int]) -> list[int]:
    """In how many of these shadows each distinct row is."""
    rows = Counter((study.shadows[k].task, position) for k in shadows for position in study.shadows[k].positions)
    return list(rows.values())


def _features(study: Study, gaps: Gaps) -> tuple[Losses, Losses]:
    """Features of the shadows' own rows and of the private rows that they are compared with: words, task and domain.

    A domain may be a matter of how answers follow from prompts, which words do not show; where rows name it, they tell.
    """
    places = []
    for kind in ("own", "private"):
        drawn = [(one.task, one.split, at) for one in gaps.draws if one.kind == kind for at in one.positions]
        # One row in two folds would be known to the classifier that is tried on it.
        places.append(sorted(set(random.Random(0).sample(drawn, min(len(drawn), MOST_ROWS)))))
    rows = [(task, study.data.pools[task, split][at]) for task, split, at in (*places[0], *places[1])]
    kinds = sorted({(task, row.get("domain", "")) for task, row in rows})
    of_kind = np.array([[kind == (task, row.get("domain", "")) for kind in kinds] for task, row in rows], dtype=float)
    words = bag_of_words([f"{TASKS[task].prompt(row)}\n{TASKS[task].target(row)}" for task, row in rows])
    features = np.column_stack([words, of_kind])
    return features[: len(places[0])], features[len(places[0]) :]


def _information(study: Study, shadows: Sequence[int]) -> tuple[dict[str, Any], list[float | None], str | None]:
    """What each model's mechanisms state, the information in each shadow's tuple, and why it has no bound.

    S and T have noise of their own, so a tuple tells no more than both.
    """
    config = study.config
    releases = len(config.curation.snapshot_steps)
    named: dict[str, Any] = {}
    told: dict[Side, list[float | None]] = {}
    reasons = []
    for side in SIDES:
        P, jobs = len(study.roots[side].layout.places), study.shadow_jobs(side)
        chosen = [jobs[k] for k in shadows]
        stated = [
            statement(FineTuneSettings.model_validate(job.made_by["fine_tune"]), len(job.positions)) for job in chosen
        ]
        squares = _square_norms(study, chosen, stated, P)
        told[side] = [
            mechanism_information(one, len(job.positions), P, releases, square)
            for one, job, square in zip(stated, chosen, squares, strict=True)
        ]
        named[side] = [one for i, one in enumerate(stated) if one not in stated[:i]]
        silent = dict.fromkeys(one["name"] for one, most in zip(stated, told[side], strict=True) if most is None)
        reasons += [f"{side} is fine-tuned by {name}, without noise" for name in silent]
    if config.grad_transformer.training.behaviour.steps:
        reasons.append("training on behaviour reads the shadows' rows themselves")
    per_shadow = [None if reasons else (a or 0) + (b or 0) for a, b in zip(*told.values(), strict=True)]
    return named, per_shadow, "; ".join(reasons) or None


def _square_norms(
    study: Study, jobs: Sequence[FineTuneJob], stated: Sequence[Mapping[str, Any]], P: int
) -> list[float | None]:
    """Mean squared norm, without the noise, of the updates of each shadow's mechanism, where it states no bound."""
    unbounded = [one["name"] == "noisy_erm" and "update_norm" not in one for one in stated]
    found: list[float | None] = [None] * len(jobs)
    for i, one in enumerate(stated):
        alike = [k for k, other in enumerate(stated) if other == one]
        if unbounded[i] and i == alike[0]:
            flat = study.roots[jobs[i].side].layout.flat
            squares = [float(flat(study.store.read(jobs[k].key)[0][-1]).square().sum()) for k in alike]
            for k in alike:
                found[k] = max(0.0, float(np.mean(squares)) - P * one["noise"] ** 2)
    return found
