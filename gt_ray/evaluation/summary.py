"""From row scores to the report: PGR, gain recovered, paired comparisons with 95 % intervals (DESIGN.md section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gt_ray.baselines.weak_to_strong import WEAK_TO_STRONG
from gt_ray.config import DpSgdSettings
from gt_ray.evaluation.results import RowScore
from gt_ray.evaluation.run import ClientScores
from gt_ray.tasks import TASKS
from gt_ray.tasks.data import Client

MAIN = ("P_S", "P_T", "base_S", "base_T", "ours")
BASELINES = (
    *WEAK_TO_STRONG,
    "proxy_tuning",
    "cross_lora",
    "ours_unrefined",
    "ours_alone",
    "ours_product",
    "P_T_mean",
    "oracle_domain",
)
"""What is no control: methods without a Grad-Transformer, variants of ours, and ceilings that know what is private."""
RESAMPLES = 2000

ByClient = Mapping[str, ClientScores]
"""One system's scores, by client."""
BySystem = Mapping[str, ByClient]
"""All systems' scores of one task."""


def report_rows(results: Sequence[ClientScores], seed: int) -> list[dict[str, Any]]:
    """One row per (client, system): mean score, its standard error, mean log-likelihood of the references."""
    rows = []
    for result in results:
        scores = _scores(result)
        row: dict[str, Any] = {
            "task": result.client.task,
            "population": result.client.population,
            "client": result.client.name,
            "domain": result.client.domain,
            **_mechanism_of(result.client),
            "seed": seed,
            "system": result.system.name,
            "metric": TASKS[result.client.task].metric,
            "score": float(scores.mean()),
            "se": standard_error(scores),
            "n_test": len(scores),
        }
        if (normalised := mean_normalised(result.client.task, result.rows)) is not None:
            row["score_normalised"] = normalised
        if (log_likelihood := mean_log_likelihood(result.rows)) is not None:
            row["log_likelihood"] = log_likelihood
        if result.key:
            row["scores"] = f"scores/{result.key}.parquet"
        if too_long := sum(one.finish == "too long" for one in result.rows):
            row["too_long"] = too_long
        rows.append(row)
    return rows


def _mechanism_of(client: Client) -> dict[str, Any]:
    """Name of a client's mechanism, its epsilon where it has one, its label where the study has several mechanisms."""
    mechanism = client.mechanism
    found: dict[str, Any] = {"mechanism": mechanism if isinstance(mechanism, str) else mechanism.name}
    if isinstance(mechanism, DpSgdSettings) and mechanism.epsilon is not None:
        found["epsilon"] = mechanism.epsilon
    return {**found, "label": client.label} if client.label else found


def mean_normalised(task: str, rows: Sequence[RowScore]) -> float | None:
    """Mean normalised score in percent; none for ROUGE-1, of which there is no other."""
    return float(np.mean([row.normalised for row in rows])) if TASKS[task].metric == "accuracy" else None


def mean_log_likelihood(rows: Sequence[RowScore]) -> float | None:
    """Mean log-likelihood of the references that fit into the model's window; none where none does."""
    found = [row.log_likelihood for row in rows if row.log_likelihood is not None]
    return float(np.mean(found)) if found else None


def standard_error(values: Any) -> float:
    """Standard error of the mean of values [n]."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _scores(result: ClientScores) -> Any:
    return np.asarray([row.score for row in result.rows])


def _log_likelihoods(result: ClientScores) -> Any:
    return np.asarray([row.log_likelihood for row in result.rows], dtype=float)  # NaN where there is none


def by_population(results: Sequence[ClientScores]) -> dict[str, dict[str, Any]]:
    """The summary of the clients of each population, and each mechanism where there are several, alone."""
    populations: dict[str, list[ClientScores]] = {}
    for result in results:
        populations.setdefault(result.client.kind, []).append(result)
    return {name: summarise(found) for name, found in populations.items()}


def summarise(results: Sequence[ClientScores]) -> dict[str, Any]:
    """Per task and on average: means of all systems, PGR, gain recovered, `ours` minus every other system."""
    tasks: dict[str, dict[str, dict[str, ClientScores]]] = {}
    for result in results:
        tasks.setdefault(result.client.task, {}).setdefault(result.system.name, {})[result.client.name] = result
    summary = {task: _entry(by_system) for task, by_system in tasks.items()}
    if not summary:
        return summary
    whole: dict[str, dict[str, ClientScores]] = {}
    for result in results:
        whole.setdefault(result.system.name, {})[result.client.name] = result
    summary["average"] = _average(summary, tasks, whole)
    return summary


def _entry(by_system: BySystem) -> dict[str, Any]:
    means = {
        name: float(np.mean([_scores(result).mean() for result in clients.values()]))
        for name, clients in by_system.items()
    }
    likelihoods = {
        name: [mean_log_likelihood(result.rows) for result in clients.values()] for name, clients in by_system.items()
    }
    entry: dict[str, Any] = {name: means[name] for name in MAIN if name in means}
    entry["controls"] = {name: value for name, value in means.items() if name not in (*MAIN, *BASELINES)}
    entry["baselines"] = {name: means[name] for name in BASELINES if name in means}
    entry["log_likelihood"] = {
        name: _mean(found) for name, found in likelihoods.items() if any(one is not None for one in found)
    }
    normalised = {
        name: [mean_normalised(result.client.task, result.rows) for result in clients.values()]
        for name, clients in by_system.items()
    }
    if found := {name: _mean(ones) for name, ones in normalised.items() if None not in ones}:
        entry["normalised"] = found
    if "ours" not in by_system:
        return entry
    if {"P_S", "P_T"} <= means.keys():
        gap, gap_se = _paired(by_system["P_T"], by_system["P_S"])
        if gap < 2 * gap_se or gap <= 0:
            entry["pgr_absent"] = f"P_T - P_S = {gap:.1f} is below 2 paired standard errors ({2 * gap_se:.1f})"
        else:
            entry["pgr_of"] = {
                name: 100 * (mean - means["P_S"]) / gap for name, mean in means.items() if name not in ("P_S", "P_T")
            }
            entry["pgr"] = entry["pgr_of"].pop("ours")
            entry["pgr_interval"] = _percentiles(_share(_draws(by_system, "P_S", _scores, np.random.default_rng(0))))
    return entry | _comparisons(entry, by_system, [by_system])


def _average(by_task: Mapping[str, dict[str, Any]], tasks: Mapping[str, BySystem], whole: BySystem) -> dict[str, Any]:
    """Tasks weigh alike, and PGR is averaged over tasks after scores are averaged over clients."""
    entries = list(by_task.values())
    average: dict[str, Any] = {"tasks": len(entries)}
    for name in MAIN:
        if any(name in entry for entry in entries):
            average[name] = _mean(entry.get(name) for entry in entries)
    for part in ("controls", "baselines", "log_likelihood"):
        names = dict.fromkeys(name for entry in entries for name in entry[part])
        average[part] = {name: _mean(entry[part].get(name) for entry in entries) for name in names}
    if pgrs := [entry["pgr"] for entry in entries if "pgr" in entry]:
        average["pgr"], average["pgr_tasks"] = _mean(pgrs), len(pgrs)
        names = dict.fromkeys(name for entry in entries for name in entry.get("pgr_of", {}))
        average["pgr_of"] = {name: _mean(entry.get("pgr_of", {}).get(name) for entry in entries) for name in names}
        rng = np.random.default_rng(0)
        shares = [_share(_draws(tasks[name], "P_S", _scores, rng)) for name, entry in by_task.items() if "pgr" in entry]
        average["pgr_interval"] = _percentiles(np.mean(shares, axis=0))
    elif any("pgr_absent" in entry for entry in entries):
        average["pgr_absent"] = "absent in every task"
    return average | (_comparisons(average, whole, list(tasks.values())) if "ours" in whole else {})


def difference(first: ByClient, second: ByClient) -> dict[str, float]:
    """Mean difference of scores over clients and test rows that both have, `low` and `high` its 95 % interval."""
    return _interval(first, second, _scores)


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _comparisons(entry: Mapping[str, Any], by_system: BySystem, tasks: Sequence[BySystem]) -> dict[str, Any]:
    """What an entry says of `ours`, by scores and by log-likelihoods: gain recovered, share closed of the gap between
    the best control and P_T, difference to every other system.

    Args:
        entry: the means.
        tasks: `by_system` by task.
    """
    scores = {name: entry[name] for name in MAIN if name in entry} | entry["controls"] | entry["baselines"]
    found: dict[str, Any] = {}
    for suffix, means, values in (
        ("", scores, _scores),
        ("_log_likelihood", entry["log_likelihood"], _log_likelihoods),
    ):
        if "ours" not in means:
            continue
        found |= {f"{key}{suffix}": value for key, value in _recovered(means, by_system, tasks, values).items()}
        closed = _gap_closed(means, entry["controls"], by_system, values)
        found |= {f"{key}{suffix}": value for key, value in closed.items()}
        found[f"ours_minus{suffix}"] = {
            name: _interval(by_system["ours"], clients, values)
            for name, clients in by_system.items()
            if name != "ours" and name in means
        }
    return found


def _recovered(
    means: Mapping[str, float],
    by_system: BySystem,
    tasks: Sequence[BySystem],
    values: Callable[[ClientScores], Any],
) -> dict[str, Any]:
    """(ours - base_T) / (P_T - base_T) in percent with a 95 % interval, where fine-tuning gains more than noise."""
    if not {"base_T", "P_T"} <= means.keys():
        return {}
    gain, gain_se = _paired(by_system["P_T"], by_system["base_T"], values)
    if gain <= 2 * gain_se or means["P_T"] <= means["base_T"]:
        return {}
    rng = np.random.default_rng(0)
    whole = [one for one in tasks if {"ours", "P_T", "base_T"} <= one.keys()]
    draws = np.mean([_draws(one, "base_T", values, rng) for one in whole], axis=0)
    return {
        "gain_recovered": 100 * (means["ours"] - means["base_T"]) / (means["P_T"] - means["base_T"]),
        "gain_recovered_interval": _percentiles(_share(draws)),
    }


def _draws(by_system: BySystem, floor: str, values: Callable[[ClientScores], Any], rng: np.random.Generator) -> Any:
    """Means [RESAMPLES, 3] of ours, P_T and the floor: clients are resampled, and the means of each are drawn together
    from the errors of its test rows, on which the three are paired."""
    systems = [by_system[name] for name in ("ours", "P_T", floor)]
    means, roots = [], []
    for rows in _by_holder(systems, lambda found: np.stack([values(one) for one in found])):
        if (n := (rows := rows[:, np.isfinite(rows).all(0)]).shape[1]) > 0:
            means.append(rows.mean(1))
            variances, axes = np.linalg.eigh(np.cov(rows) / n if n > 1 else np.zeros((3, 3)))
            roots.append(axes * np.sqrt(variances.clip(0)))
    picks = rng.integers(0, len(means), (RESAMPLES, len(means)))
    noise = np.einsum("rcij,rcj->rci", np.stack(roots)[picks], rng.standard_normal((*picks.shape, 3)))
    return (np.stack(means)[picks] + noise).mean(1)


def _share(draws: Any) -> Any:
    """(ours - floor) / (P_T - floor) in percent of each of the draws [n, 3]."""
    ours, best, floor = draws.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * (ours - floor) / (best - floor)


def _percentiles(draws: Any) -> list[float]:
    low, high = np.percentile(draws[np.isfinite(draws)], [2.5, 97.5])
    return [float(low), float(high)]


def _gap_closed(
    means: Mapping[str, float],
    controls: Iterable[str],
    by_system: BySystem,
    values: Callable[[ClientScores], Any],
) -> dict[str, Any]:
    """The best control, and (ours - it) / (P_T - it) in percent, where that gap is more than noise."""
    known = [name for name in controls if name in means]
    if not known or "P_T" not in means:
        return {}
    best = max(known, key=means.__getitem__)
    gap, gap_se = _paired(by_system["P_T"], by_system[best], values)
    if gap <= 2 * gap_se or means["P_T"] <= means[best]:
        return {"best_control": best}
    share = 100 * (means["ours"] - means[best]) / (means["P_T"] - means[best])
    return {"best_control": best, "gap_closed": share}


def _paired(better: ByClient, worse: ByClient, values: Callable[[ClientScores], Any] = _scores) -> tuple[float, float]:
    """Mean difference over clients, and its standard error from paired test rows."""
    differences = _differences(better, worse, values)
    mean = float(np.mean([d.mean() for d in differences]))
    return mean, math.sqrt(sum(standard_error(d) ** 2 for d in differences)) / len(differences)


def _interval(ours: ByClient, other: ByClient, values: Callable[[ClientScores], Any]) -> dict[str, float]:
    """Difference with a 95 % bootstrap interval over clients, then over their test rows."""
    differences = _differences(ours, other, values)
    rng = np.random.default_rng(0)
    n = len(differences)
    means = np.asarray([d.mean() for d in differences])
    ses = np.asarray([standard_error(d) for d in differences])
    # A client's resampled mean is close to normal at hundreds of rows; drawing it directly saves the inner loop.
    picks = rng.integers(0, n, (RESAMPLES, n))
    draws = (means[picks] + ses[picks] * rng.standard_normal((RESAMPLES, n))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"difference": float(means.mean()), "low": float(low), "high": float(high)}


def _differences(first: ByClient, second: ByClient, values: Callable[[ClientScores], Any]) -> list[Any]:
    """Differences of the test rows that both have, for each client that both have."""
    found = _by_holder((first, second), lambda pair: values(pair[0]) - values(pair[1]))
    return [kept for d in found if len(kept := d[~np.isnan(d)])]


def _by_holder(systems: Sequence[ByClient], of: Callable[[Sequence[ClientScores]], Any]) -> list[Any]:
    """What `of` makes, [.., n], of the scores of each client that all systems have.

    One organisation that fine-tunes by several mechanisms has its test rows once: it is one client with the mean.
    """
    found: dict[str, list[Any]] = {}
    for name, result in systems[0].items():
        if all(name in one for one in systems):
            found.setdefault(result.client.holder, []).append(of([one[name] for one in systems]))
    return [np.mean(values, axis=0) for values in found.values()]
