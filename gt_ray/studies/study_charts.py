"""Which charts and fitted curves a study gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gt_ray.studies.axes import SIZES
from gt_ray.studies.curves import LEAST_POINTS, Curve, NotFitted, fit
from gt_ray.studies.facts import finite, scores_of
from gt_ray.studies.plots import Chart
from gt_ray.studies.sheets import mean_of
from gt_ray.studies.sweep import Point, Series, Sweep
from gt_ray.studies.sweep_plots import Mark, Scale, along, cost, heat_map, losses, time_bars
from gt_ray.studies.times import MINUTES_FROM, run_times

SYSTEMS = ("P_S", "P_T", "base_T", "ours")
CONTROLS = 2
MOST_CHARTS = 12
"""Of one kind; a large grid has more, which the table has in numbers."""
HOUR, MINUTE = 3600, 60
HOURS_FROM = 1800

LOSSES = {"Behaviour loss, validation": "validation_behaviour", "Loss of Eq. 10, validation": "validation_loss"}

History = Sequence[Mapping[str, Any]]


def fits_of(sweep: Sweep) -> tuple[dict[str, Curve], list[str]]:
    """Title of a series -> curve of ours along it; and what was not fitted, with the reason."""
    curves: dict[str, Curve] = {}
    unfitted: dict[str, str] = {}
    for one in sweep.series:
        if one.axis.numbers and one.axis.key != "tuples":
            few = len(one.points) < LEAST_POINTS
            try:
                curves[one.title] = _fit(one)
            except NotFitted as reason:
                unfitted.setdefault(one.axis.name if few else one.title, str(reason))
    return curves, [f"{title}: {reason}." for title, reason in unfitted.items()]


def _fit(series: Series) -> Curve:
    known = [
        (x, score, point.draws("ours", number))
        for number, (x, point) in enumerate(zip(series.x, series.points, strict=True))
        if (score := scores_of(point.entry).get("ours")) is not None
    ]
    draws = [one for _, _, one in known if one is not None]
    draws_RN = np.stack(draws, 1) if known and len(draws) == len(known) else None
    return fit([x for x, _, _ in known], [score for _, score, _ in known], draws_RN)


def charts_of(
    sweep: Sweep, curves: Mapping[str, Curve], histories: Mapping[str, History]
) -> dict[str, dict[str, Chart]]:
    """Section -> title -> chart; sections without any are left out.

    Args:
        curves: of series, by title.
        histories: row of the table -> `history.json` of its Grad-Transformer.
    """
    shown = sweep.series[:MOST_CHARTS]
    sections: dict[str, list[Chart | None]] = {
        "Scores along each axis": [_scores(one, curves.get(one.title)) for one in shown],
        "PGR along each axis": [_shares(one) for one in shown],
        "TinyLM by LLM": _heat_maps(sweep),
        "Cost against score": [_cost(sweep)],
        "A client's time by TinyLM": [_time_bars(one) for one in sweep.series if one.axis.key == SIZES[0]],
        "Training of the Grad-Transformers": _losses(histories),
    }
    return {
        section: {chart.title: chart for chart in found}
        for section, charts in sections.items()
        if (found := [chart for chart in charts if chart is not None])
    }


def _scale(series: Series) -> Scale:
    texts = [series.axis.text(point.settings) for point in series.points]
    return Scale(
        series.axis.name, dict(zip(series.x, texts, strict=True)), series.axis.is_log, bool(series.axis.numbers)
    )


def _scores(series: Series, curve: Curve | None) -> Chart | None:
    entries = [point.entry for point in series.points]
    controls = {
        name: mean
        for name in dict.fromkeys(name for entry in entries for name in entry.get("controls") or {})
        if (mean := mean_of(scores_of(entry).get(name) for entry in entries)) is not None
    }
    best = sorted(controls, key=controls.__getitem__, reverse=True)[:CONTROLS]
    lines = {}
    for system in (*SYSTEMS, *best):
        marks = []
        for x, point in zip(series.x, series.points, strict=True):
            if (score := scores_of(point.entry).get(system)) is not None:
                low, high = point.interval(system) or (None, None)
                marks.append(Mark(x, score, low, high))
        if marks:
            lines[system] = marks
    return along(f"Scores by {series.title}", _scale(series), lines, curve) if lines else None


def _shares(series: Series) -> Chart | None:
    marks = []
    for x, point in zip(series.x, series.points, strict=True):
        if (share := finite(point.entry.get("pgr"))) is not None:
            ends = [finite(end) for end in point.entry.get("pgr_interval") or (None, None)]
            marks.append(Mark(x, share, *ends))
    return along(f"PGR by {series.title}", _scale(series), {"ours": marks}) if marks else None


def _heat_maps(sweep: Sweep) -> list[Chart | None]:
    axes = {axis.key: axis for axis in sweep.axes}
    if not set(SIZES) <= axes.keys():
        return []
    small, large = (axes[key] for key in SIZES)
    rest = [axis for axis in sweep.axes if axis.key not in (*SIZES, "tuples")]
    groups: dict[str, list[Point]] = {}
    for point in sorted(sweep.points, key=lambda p: (small.number(p.settings) or 0, large.number(p.settings) or 0)):
        fixed = ", ".join(f"{axis.name} {axis.text(point.settings)}" for axis in rest)
        groups.setdefault(fixed, []).append(point)
    charts = []
    for fixed, points in list(groups.items())[:MOST_CHARTS]:
        rows, columns = (list(dict.fromkeys(axis.text(p.settings) for p in points)) for axis in (small, large))
        for name, key in (("ours", "ours"), ("PGR", "pgr")):
            values = {
                (small.text(point.settings), large.text(point.settings)): value
                for point in points
                if (value := finite(point.entry.get(key))) is not None
            }
            if values:
                title = f"{name}, percent; TinyLM down, LLM across{f'; {fixed}' if fixed else ''}"
                charts.append(heat_map(title, rows, columns, values))
    return list(charts)


def _cost(sweep: Sweep) -> Chart | None:
    marks = {}
    for number, point in enumerate(sweep.points, 1):
        times = run_times([cell.report for cell in point.cells])
        score = scores_of(point.entry).get("ours")
        if times and times.total_s is not None and score is not None:
            marks[str(number)] = Mark(times.total_s, score, *(point.interval("ours") or (None, None)))
    if len(marks) < 2:
        return None
    in_hours = max(mark.x for mark in marks.values()) >= HOURS_FROM
    unit = "hours" if in_hours else "minutes"
    scaled = {
        name: Mark(mark.x / (HOUR if in_hours else MINUTE), mark.y, mark.low, mark.high) for name, mark in marks.items()
    }
    return cost("Ours by the provider's cost", scaled, f"device-{unit} of curation and training")


def _time_bars(series: Series) -> Chart | None:
    """Figure 4, where every cell has the times of a client."""
    parts, whole = {}, []
    for point in series.points:
        times = run_times([cell.report for cell in point.cells])
        if times is None or times.tinylm_s is None or not times.llm_s:
            return None
        parts[series.axis.text(point.settings)] = (times.tinylm_s, times.generate_s or 0.0)
        whole.append(times.llm_s)
    llm = sum(whole) / len(whole)
    unit, name = (MINUTE, "minutes") if max(whole) >= MINUTES_FROM else (1, "seconds")
    scaled = {text: (fine_tune / unit, generate / unit) for text, (fine_tune, generate) in parts.items()}
    title = f"Fine-tune and generation, one client{f'; {series.fixed}' if series.fixed else ''}"
    return time_bars(title, scaled, ("fine-tune LLM", llm / unit), f"device-{name}")


def _losses(histories: Mapping[str, History]) -> list[Chart | None]:
    charts: list[Chart | None] = []
    for title, key in LOSSES.items():
        lines = {}
        for label, history in histories.items():
            pairs = [(finite(entry.get("step")), finite(entry.get(key))) for entry in history]
            if points := [(step, value) for step, value in pairs if step is not None and value is not None]:
                lines[label] = points
        charts.append(losses(title, lines) if lines else None)
    return charts
