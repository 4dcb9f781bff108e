"""The cells of a study as points on its axes: cells that differ in their seed alone are one point.

A point's entry is that of its only task, or of several the average. Intervals are 95 % and come from the scores of its
clients and their standard errors: clients are resampled, and each is drawn with the error of its test rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gt_ray.errors import UserError
from gt_ray.evaluation.run import scores_of_report
from gt_ray.evaluation.summary import summarise
from gt_ray.studies.axes import Axis, Settings, axes_of, settings_of, varying
from gt_ray.studies.curves import NOTHING
from gt_ray.studies.facts import finite, scores_of
from gt_ray.studies.sheets import Cell, mean_of
from gt_ray.tasks.data import holder_of

RESAMPLES = 1000
SEEDS_APART = "over seeds, as the mean of their reports: the rows' scores are not at hand"


@dataclass(frozen=True)
class Point:
    """Cells that differ in their seed alone.

    Attributes:
        summary: task, or `average`, -> entry, over all seeds.
        note: what the summary lacks.
    """

    cells: tuple[Cell, ...]
    settings: Settings
    summary: Mapping[str, Mapping[str, Any]]
    note: str = ""

    @cached_property
    def entry(self) -> Mapping[str, Any]:
        """Of the only task, or the average."""
        tasks = [task for task in self.summary if task != "average"]
        return self.summary[tasks[0]] if len(tasks) == 1 else self.summary.get("average", {})

    @property
    def seeds(self) -> list[int]:
        """Of its cells."""
        return [cell.config.seed for cell in self.cells]

    def draws(self, system: str, number: int = 0) -> np.ndarray[Any, Any] | None:
        """Resampled mean scores [R] of a system; none where a client's standard error is not known.

        Points with the same number of clients get the same picks of clients, so that what clients have in common
        does not widen the difference between points; errors of rows are drawn anew for each `number`.
        """
        picked, noise = np.random.default_rng(0), np.random.default_rng([1, number])
        found = self._by_task(system)
        means = []
        for rows in found.values():
            scores, ses = (np.asarray([row[i] for row in rows], dtype=float) for i in (0, 1))
            if not np.isfinite(ses).all() or not np.isfinite(scores).all():
                return None
            picks_RN = picked.integers(0, len(rows), (RESAMPLES, len(rows)))
            means.append((scores[picks_RN] + ses[picks_RN] * noise.standard_normal(picks_RN.shape)).mean(1))
        return np.mean(means, axis=0) if means else None

    def interval(self, system: str) -> tuple[float, float] | None:
        """Low and high end of a system's mean score, percent."""
        draws_R = self.draws(system)
        if draws_R is None or draws_R.std() <= NOTHING:
            return None
        low, high = np.percentile(draws_R, [2.5, 97.5]).clip(0, 100)
        return float(low), float(high)

    def _by_task(self, system: str) -> dict[str, list[tuple[float, float]]]:
        """Task -> scores of clients and their standard errors; NaN where it is not known. A client of several
        mechanisms is one, with their means."""
        found: dict[str, dict[tuple[int, str], list[tuple[float, float]]]] = {}
        for number, cell in enumerate(self.cells):
            for row in cell.report.get("rows") or []:
                if row.get("system") == system:
                    numbers = [finite(row.get(key)) for key in ("score", "se", "n_test")]
                    score, se, n = (float("nan") if one is None else one for one in numbers)
                    holder = number, holder_of(str(row.get("client")), str(row.get("label", "")))
                    of_task = found.setdefault(str(row.get("task")), {})
                    of_task.setdefault(holder, []).append((score, se or _least_error(score, n)))
        return {task: [tuple(np.mean(one, axis=0)) for one in found[task].values()] for task in sorted(found)}


def _least_error(score: float, n: float) -> float:
    """Standard error in percent where all n rows have the same score: as if one more were right and one more wrong."""
    share = (score / 100 * n + 1) / (n + 2)
    return 100 * float(np.sqrt(share * (1 - share) / n)) if n > 0 else 0.0


@dataclass(frozen=True)
class Series:
    """Points that differ on one axis, in its order.

    Attributes:
        x: where they lie on the axis; one after the other where it has no distances.
        fixed: what distinguishes the series from others on the same axis.
        also: settings that differ along it, besides the axis.
    """

    axis: Axis
    points: tuple[Point, ...]
    x: tuple[float, ...]
    fixed: str = ""
    also: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The axis, and what is fixed."""
        return f"{self.axis.name}; {self.fixed}" if self.fixed else self.axis.name


@dataclass(frozen=True)
class Sweep:
    """A study's finished cells, laid out."""

    points: list[Point]
    axes: list[Axis]
    series: list[Series] = field(default_factory=list)

    def label(self, point: Point) -> str:
        """What distinguishes a point from the others."""
        axes = [axis for axis in self.axes if axis.key != "tuples"]
        return ", ".join(f"{axis.name} {axis.text(point.settings)}" for axis in axes) or "the only cell"


def sweep_of(cells: Sequence[Cell]) -> Sweep:
    """Finished cells as points, axes, and series of points that differ on one axis."""
    pooled: dict[str, list[Cell]] = {}
    for cell in cells:
        pooled.setdefault(json.dumps(settings_of(cell.config), sort_keys=True), []).append(cell)
    points = [_point(found) for found in pooled.values()]
    axes = axes_of([point.settings for point in points])
    return Sweep(points, axes, [one for axis in axes for one in _series(axis, axes, points)])


def _point(cells: Sequence[Cell]) -> Point:
    settings = settings_of(cells[0].config)
    if len(cells) == 1:
        return Point(tuple(cells), settings, cells[0].report.get("summary") or {})
    try:
        results = [one for cell in cells for one in scores_of_report(cell.folder, cell.report)]
        return Point(tuple(cells), settings, summarise(results))
    except (UserError, KeyError, TypeError):  # reports of earlier versions do not name their scores
        return Point(tuple(cells), settings, mean_summary([cell.report["summary"] for cell in cells]), SEEDS_APART)


def mean_summary(summaries: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means of scores and shares over summaries, as far as all have them; without intervals."""
    return {task: mean_entry([one[task] for one in summaries if task in one]) for task in summaries[0]}


def mean_entry(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same of entries of one task."""
    scores = {name: mean_of(scores_of(entry).get(name) for entry in entries) for name in scores_of(entries[0])}
    found: dict[str, Any] = {"controls": {}, "baselines": {}}
    for name, score in scores.items():
        part = next((part for part in ("controls", "baselines") if name in (entries[0].get(part) or {})), None)
        (found[part] if part else found)[name] = score
    for key in ("pgr", "gain_recovered"):
        known = [finite(entry.get(key)) for entry in entries]
        if None not in known:
            found[key] = mean_of(known)
    return found


def _series(axis: Axis, axes: Sequence[Axis], points: Sequence[Point]) -> list[Series]:
    made_of = ("curation.shadows", "curation.snapshots") if axis.key == "tuples" else (axis.key, "tuples")
    others = [one for one in axes if one.key not in (axis.key, *made_of)]
    groups: dict[str, list[Point]] = {}
    for point in points:
        fixed = ", ".join(f"{one.name} {one.text(point.settings)}" for one in others)
        groups.setdefault(fixed, []).append(point)
    found = []
    for fixed, group in groups.items():
        if axis.numbers:
            placed = sorted(
                ((x, i) for i, point in enumerate(group) if (x := axis.number(point.settings)) is not None),
            )
        else:
            placed = [(float(i), i) for i in range(len(group))]
        if len({x for x, _ in placed}) > 1:
            chosen = tuple(group[i] for _, i in placed)
            also = [key for key in varying([one.settings for one in chosen]) if key not in (axis.key, *made_of)]
            found.append(Series(axis, chosen, tuple(x for x, _ in placed), fixed, tuple(also)))
    return found
