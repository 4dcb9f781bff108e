"""From row scores to the report: PGR, gain recovered, paired comparisons with 95 % intervals (DESIGN.md section 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gt_ray.evaluation.results import RowScore
from gt_ray.evaluation.run import ClientScores
from gt_ray.tasks import TASKS

MAIN = ("P_S", "P_T", "base_S", "base_T", "ours")
RESAMPLES = 2000


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
            "mechanism": "sft",
            "seed": seed,
            "system": result.system.name,
            "metric": TASKS[result.client.task].metric,
            "score": float(scores.mean()),
            "se": standard_error(scores),
            "n_test": len(scores),
        }
        if (log_likelihood := mean_log_likelihood(result.rows)) is not None:
            row["log_likelihood"] = log_likelihood
        if too_long := sum(one.finish == "too long" for one in result.rows):
            row["too_long"] = too_long
        rows.append(row)
    return rows


def mean_log_likelihood(rows: Sequence[RowScore]) -> float | None:
    """Mean log-likelihood of the references that fit into the model's window; none where none does."""
    found = [row.log_likelihood for row in rows if row.log_likelihood is not None]
    return float(np.mean(found)) if found else None


def standard_error(values: Any) -> float:
    """Standard error of the mean of values [n]."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _scores(result: ClientScores) -> Any:
    return np.asarray([row.score for row in result.rows])


def summarise(results: Sequence[ClientScores]) -> dict[str, Any]:
    """Per task and on average: main systems, controls, PGR, gain recovered, and `ours` minus every other system."""
    tasks: dict[str, dict[str, dict[str, ClientScores]]] = {}
    for result in results:
        tasks.setdefault(result.client.task, {}).setdefault(result.system.name, {})[result.client.name] = result
    summary = {task: _entry(by_system) for task, by_system in tasks.items()}
    if not summary:
        return summary
    whole: dict[str, dict[str, ClientScores]] = {}
    for result in results:
        whole.setdefault(result.system.name, {})[result.client.name] = result
    average = _entry(whole)
    # Tasks weigh alike, and PGR is averaged over tasks after scores are averaged over clients.
    entries = list(summary.values())
    for name in MAIN:
        if name in average:
            average[name] = _mean(entry.get(name) for entry in entries)
    for part in ("controls", "log_likelihood"):
        for name in average[part]:
            average[part][name] = _mean(entry[part].get(name) for entry in entries)
    for key, of in (("gain_recovered", average), ("gain_recovered_log_likelihood", average["log_likelihood"])):
        if key in average:
            average[key] = 100 * (of["ours"] - of["base_T"]) / (of["P_T"] - of["base_T"])
    for key in ("pgr", "pgr_absent"):
        average.pop(key, None)
    if pgrs := [entry["pgr"] for entry in entries if "pgr" in entry]:
        average["pgr"], average["pgr_tasks"] = _mean(pgrs), len(pgrs)
    elif any("pgr_absent" in entry for entry in entries):
        average["pgr_absent"] = "absent in every task"
    summary["average"] = average
    return summary


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _entry(by_system: dict[str, dict[str, ClientScores]]) -> dict[str, Any]:
    means = {
        name: float(np.mean([_scores(result).mean() for result in clients.values()]))
        for name, clients in by_system.items()
    }
    entry: dict[str, Any] = {name: means[name] for name in MAIN if name in means}
    entry["controls"] = {name: value for name, value in means.items() if name not in MAIN}
    entry["baselines"] = {}
    likelihoods = {
        name: [mean_log_likelihood(result.rows) for result in clients.values()] for name, clients in by_system.items()
    }
    entry["log_likelihood"] = {
        name: _mean(found) for name, found in likelihoods.items() if any(one is not None for one in found)
    }
    if "ours" not in by_system:
        return entry
    if {"P_S", "P_T"} <= means.keys():
        gap, gap_se = _paired(by_system["P_T"], by_system["P_S"])
        if gap < 2 * gap_se or gap <= 0:
            entry["pgr_absent"] = f"P_T - P_S = {gap:.1f} is below 2 paired standard errors ({2 * gap_se:.1f})"
        else:
            entry["pgr"] = 100 * (means["ours"] - means["P_S"]) / (means["P_T"] - means["P_S"])
    if {"base_T", "P_T"} <= means.keys():
        gain, gain_se = _paired(by_system["P_T"], by_system["base_T"])
        if gain > 2 * gain_se:
            entry["gain_recovered"] = 100 * (means["ours"] - means["base_T"]) / (means["P_T"] - means["base_T"])
        log_likelihood = entry["log_likelihood"]
        known = {"ours", "P_T", "base_T"} <= log_likelihood.keys()
        if known and (gain_ll := log_likelihood["P_T"] - log_likelihood["base_T"]) > 0:
            entry["gain_recovered_log_likelihood"] = 100 * (log_likelihood["ours"] - log_likelihood["base_T"]) / gain_ll
    entry["ours_minus"] = {
        name: _interval(by_system["ours"], clients) for name, clients in by_system.items() if name != "ours"
    }
    return entry


def _paired(better: dict[str, ClientScores], worse: dict[str, ClientScores]) -> tuple[float, float]:
    """Mean difference over clients, and its standard error from paired test rows."""
    differences = _differences(better, worse)
    mean = float(np.mean([d.mean() for d in differences]))
    return mean, math.sqrt(sum(standard_error(d) ** 2 for d in differences)) / len(differences)


def _interval(ours: dict[str, ClientScores], other: dict[str, ClientScores]) -> dict[str, float]:
    """Difference with a 95 % bootstrap interval over clients, then over their test rows."""
    differences = _differences(ours, other)
    rng = np.random.default_rng(0)
    n = len(differences)
    means = np.asarray([d.mean() for d in differences])
    ses = np.asarray([standard_error(d) for d in differences])
    # A client's resampled mean is close to normal at hundreds of rows; drawing it directly saves the inner loop.
    picks = rng.integers(0, n, (RESAMPLES, n))
    draws = (means[picks] + ses[picks] * rng.standard_normal((RESAMPLES, n))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"difference": float(means.mean()), "low": float(low), "high": float(high)}


def _differences(first: dict[str, ClientScores], second: dict[str, ClientScores]) -> list[Any]:
    return [_scores(first[name]) - _scores(second[name]) for name in first if name in second]
