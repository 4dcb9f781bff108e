"""Two studies side by side: cells of the same settings, but for what differs between the studies as a whole.

Differences are paired over clients and test rows where both scored the same rows; where not, they are of two means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from gt_ray.errors import UserError
from gt_ray.evaluation.results import read_prompts
from gt_ray.evaluation.run import ClientScores, scores_of_report
from gt_ray.evaluation.summary import difference
from gt_ray.studies.axes import Settings, text_of_value
from gt_ray.studies.facts import Interval, finite, scores_of
from gt_ray.studies.plots import NORMAL_95, forest
from gt_ray.studies.report import render
from gt_ray.studies.sheets import Sheet, markdown, print_sheets, read_study
from gt_ray.studies.study_view import with_interval
from gt_ray.studies.sweep import Point, Sweep, sweep_of
from gt_ray.updates.files import write_atomically

ABSENT = "absent"


@dataclass(frozen=True)
class Pair:
    """What two studies score with the same settings.

    Attributes:
        difference: ours of the first minus ours of the second; none where an error is not known.
        note: over what it is.
    """

    label: str
    first: float
    second: float
    difference: Interval | None
    note: str


@dataclass(frozen=True)
class Comparison:
    """Two studies.

    Attributes:
        whole: settings in which they differ as a whole: name, first, second.
        notes: what has no counterpart.
    """

    names: tuple[str, str]
    whole: list[tuple[str, str, str]]
    pairs: list[Pair]
    notes: list[str]

    @property
    def title(self) -> str:
        """Both names."""
        return f"{self.names[0]} against {self.names[1]}"

    @property
    def lead(self) -> str:
        """What differs, in a sentence."""
        told = "; ".join(f"{key}: {first} against {second}" for key, first, second in self.whole)
        return f"As a whole they differ in {told}." if told else "No setting differs between them as a whole."

    @property
    def sheet(self) -> Sheet:
        """A row for each pair."""
        rows = []
        for pair in self.pairs:
            low, middle, high = pair.difference or (None, pair.first - pair.second, None)
            scores = [with_interval(finite(score), None) for score in (pair.first, pair.second)]
            rows.append([pair.label, *scores, with_interval(finite(middle), (low, high), "+"), pair.note])
        return Sheet("Ours, percent", ["cell", *self.names, "difference", "over"], rows)


def compare(first: Path, second: Path) -> Comparison:
    """Match the cells of two studies, or of a study and itself after other code.

    Raises:
        UserError: a folder is no study, or no cell of one has the settings of one of the other.
    """
    sweeps = [sweep_of(read_study(folder)[1]) for folder in (first, second)]
    names = _names(first, second)
    inner = dict.fromkeys(key for sweep in sweeps for key in _varying(sweep))
    matched, (left, right) = [], ({_key(point, inner): point for point in sweep.points} for sweep in sweeps)
    for key, point in left.items():
        if key in right:
            matched.append(_pair(_label(point, sweeps), point, right[key]))
    if not matched:
        raise UserError(
            f"no cell of {first} has the settings of one of {second}: they would have to agree in "
            f"{', '.join(inner) or 'all'}, in which the cells of a study differ"
        )
    notes = []
    for name, mine, others in ((names[0], left, right), (names[1], right, left)):
        if alone := [_label(point, sweeps) for key, point in mine.items() if key not in others]:
            notes.append(f"Only in {name}: {'; '.join(alone)}.")
    return Comparison(names, _whole(sweeps, inner), matched, notes)


def write_comparison(first: Path, second: Path) -> Comparison:
    """Write `compare-<second>.html` and `.md` into the first study's folder.

    Raises:
        UserError: as `compare`.
    """
    found = compare(first, second)
    stem = f"compare-{second.resolve().name}"
    intervals = {pair.label: pair.difference for pair in found.pairs if pair.difference}
    chart: Markup | None = forest(found.title, intervals) if intervals else None
    page = render("compare.html.jinja", title=found.title, comparison=found, chart=chart)
    write_atomically(first / f"{stem}.html", page.encode())
    write_atomically(first / f"{stem}.md", markdown(found.title, [found.sheet], [found.lead, *found.notes]).encode())
    return found


def print_comparison(comparison: Comparison) -> None:
    """Print it."""
    print_sheets(comparison.title, [comparison.sheet], [comparison.lead, *comparison.notes])


def _names(first: Path, second: Path) -> tuple[str, str]:
    names = first.resolve().name, second.resolve().name
    return names if names[0] != names[1] else (str(first), str(second))


def _varying(sweep: Sweep) -> list[str]:
    keys = dict.fromkeys(key for point in sweep.points for key in point.settings if key != "tuples")
    return [key for key in keys if len({_text(point.settings, key) for point in sweep.points}) > 1]


def _key(point: Point, keys: Mapping[str, None]) -> tuple[str, ...]:
    return tuple(_text(point.settings, key) for key in keys)


def _text(settings: Settings, key: str) -> str:
    return json.dumps(settings[key], sort_keys=True) if key in settings else ABSENT


def _label(point: Point, sweeps: Sequence[Sweep]) -> str:
    axes = {axis.key: axis for sweep in sweeps for axis in sweep.axes if axis.key != "tuples"}
    return ", ".join(f"{axis.name} {axis.text(point.settings)}" for axis in axes.values()) or "the only cell"


def _whole(sweeps: Sequence[Sweep], inner: Mapping[str, None]) -> list[tuple[str, str, str]]:
    first, second = (sweep.points[0].settings for sweep in sweeps)
    keys = [key for key in dict.fromkeys([*first, *second]) if key not in inner and key != "tuples"]
    shown = [(key, *(text_of_value(one[key]) if key in one else ABSENT for one in (first, second))) for key in keys]
    return [(key, a, b) for key, a, b in shown if _text(first, key) != _text(second, key)]


def _pair(label: str, first: Point, second: Point) -> Pair:
    mine, others = _ours(first), _ours(second)
    both = [client for client, (_, prompts) in mine.items() if client in others and others[client][1] == prompts]
    if both:
        found = [{client: side[client][0] for client in both} for side in (mine, others)]
        interval = difference(*found)
        means = [float(np.mean([np.mean([row.score for row in one.rows]) for one in side.values()])) for side in found]
        of = len(set(mine) | set(others))
        note = f"{len(both)} clients" if of == len(both) else f"{len(both)} of {of} clients"
        ends = interval["low"], interval["difference"], interval["high"]
        return Pair(label, means[0], means[1], ends, f"the same rows of {note}")
    scores = [scores_of(point.entry).get("ours", math.nan) for point in (first, second)]
    errors = [float(draws_R.std()) for point in (first, second) if (draws_R := point.draws("ours")) is not None]
    if len(errors) < 2:
        return Pair(label, scores[0], scores[1], None, "no row that both scored; errors not known")
    middle, half = scores[0] - scores[1], NORMAL_95 * math.hypot(*errors)
    return Pair(label, scores[0], scores[1], (middle - half, middle, middle + half), "other rows: not paired")


def _ours(point: Point) -> dict[str, tuple[ClientScores, list[str]]]:
    """Seed and client -> scores of ours, and what it was asked; empty where the rows' scores are not at hand."""
    found = {}
    for cell in point.cells:
        rows = [row for row in cell.report.get("rows") or [] if row.get("system") == "ours"]
        try:
            results = scores_of_report(cell.folder, {"rows": rows})
        except (UserError, KeyError):  # reports of earlier versions do not name their scores
            return {}
        for row, result in zip(rows, results, strict=True):
            if prompts := read_prompts(cell.folder / row["scores"]):
                found[f"seed {cell.config.seed}, {row['client']}"] = result, prompts
    return found
