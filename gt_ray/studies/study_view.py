"""What the report of a study shows, as texts and charts: the same for the page, for Markdown and for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gt_ray.config import load_config
from gt_ray.errors import UserError
from gt_ray.studies.curves import AHEAD, Curve
from gt_ray.studies.facts import duration, finite, intervals_of, scores_of
from gt_ray.studies.plots import Chart
from gt_ray.studies.report import read_history
from gt_ray.studies.sheets import Cell, Sheet, all_cells, mean_of, read_study
from gt_ray.studies.study_charts import charts_of, fits_of
from gt_ray.studies.sweep import Point, Sweep, mean_entry, sweep_of
from gt_ray.studies.times import device_s_of, time_tables

SHOWN = ("P_S", "P_T", "base_T")
HEADS = (*SHOWN, "ours", "best control", "ours - best control", "PGR", "gain recovered", "device time")


@dataclass(frozen=True)
class Source:
    """Where a row's numbers are from: a cell's page and config, relative to the study, and its command."""

    seed: int
    page: str
    config: str
    command: str


@dataclass
class StudyView:
    """A study's report.

    Attributes:
        table: a row for each point: cells that differ in their seed alone.
        sources: of each row.
        sections: title -> charts by title.
        fits: fitted curves; `fit_notes` what is to be known of them and of the charts.
        unfitted: what was not fitted, and why.
        unfinished: cells that failed or wait, and why.
    """

    title: str
    lead: str
    command: str
    table: Sheet
    sources: list[list[Source]]
    notes: list[str]
    controls: tuple[str, ...] = ()
    populations: Sheet | None = None
    sections: dict[str, dict[str, Chart]] = field(default_factory=dict)
    fits: Sheet | None = None
    fit_notes: list[str] = field(default_factory=list)
    unfitted: list[str] = field(default_factory=list)
    time_sheets: list[Sheet] = field(default_factory=list)
    time_notes: list[str] = field(default_factory=list)
    unfinished: Sheet | None = None

    @property
    def charts(self) -> dict[str, Chart]:
        """All charts, by title."""
        return {title: chart for charts in self.sections.values() for title, chart in charts.items()}

    @property
    def sheets(self) -> list[Sheet]:
        """All tables."""
        found = [self.table, self.populations, self.fits, *self.time_sheets, self.unfinished]
        return [sheet for sheet in found if sheet is not None and sheet.rows]


def study_view(folder: Path) -> StudyView:
    """Read a study of which some cells may be finished.

    Raises:
        UserError: there is no such study, a file of it is damaged, or matplotlib is not installed.
    """
    tree, cells = read_study(folder)
    sweep = sweep_of(cells)
    notes = [f"Row {i}: {point.note}." for i, point in enumerate(sweep.points, 1) if point.note]
    rows = [_row(number, sweep, point, notes) for number, point in enumerate(sweep.points, 1)]
    axes = [axis.name for axis in sweep.axes]
    curves, unfitted = fits_of(sweep)
    named = {f"{i} {sweep.label(point)}": point for i, point in enumerate(sweep.points, 1)}
    histories = {name: found for name, point in named.items() if (found := _history(point, name, notes))}
    time_sheets, time_notes = time_tables({name: [cell.report for cell in p.cells] for name, p in named.items()})
    return StudyView(
        title=f"Study {tree.get('name') or folder.resolve().name}",
        lead=_lead(tree, cells, sweep),
        command=_command(tree, folder),
        table=Sheet("Scores", ["row", *axes, *HEADS], rows),
        sources=[[_source(tree, cell) for cell in point.cells] for point in sweep.points],
        notes=notes,
        controls=tuple(dict.fromkeys(name for p in sweep.points for name in p.entry.get("controls") or {})),
        populations=_populations(named),
        sections=charts_of(sweep, curves, histories),
        fits=_fits_sheet(curves),
        fit_notes=[*(f"{title}: {note}." for title, curve in curves.items() for note in curve.notes), *_also(sweep)],
        unfitted=unfitted,
        time_sheets=time_sheets,
        time_notes=time_notes,
        unfinished=_unfinished(tree),
    )


def with_interval(value: float | None, ends: Sequence[float | None] | None, sign: str = "") -> str:
    """`71.0 [68.2, 73.9]`, without an interval where it is not known; a dash where nothing is."""
    if value is None:
        return "-"
    known = [end for end in ends or () if end is not None]
    return f"{value:{sign}z.1f}" + (f" [{known[0]:{sign}z.1f}, {known[1]:{sign}z.1f}]" if len(known) == 2 else "")


def system_texts(entry: Mapping[str, Any]) -> dict[str, str]:
    """The columns of an entry that need no more than it."""
    scores = scores_of(entry)
    controls = {name: scores[name] for name in entry.get("controls") or {} if name in scores}
    best = max(controls, key=controls.__getitem__, default=None)
    low, middle, high = intervals_of({"": entry}).get("", {}).get(best or "", (None, None, None))
    return {
        **{name: with_interval(scores.get(name), None) for name in SHOWN},
        "ours": with_interval(scores.get("ours"), None),
        "best control": f"{best} {controls[best]:z.1f}" if best else "-",
        "ours - best control": with_interval(middle, (low, high), "+"),
        "PGR": with_interval(finite(entry.get("pgr")), _ends(entry, "pgr_interval")),
        "gain recovered": with_interval(finite(entry.get("gain_recovered")), _ends(entry, "gain_recovered_interval")),
    }


def _ends(entry: Mapping[str, Any], key: str) -> list[float | None]:
    return [finite(end) for end in entry.get(key) or ()]


def _row(number: int, sweep: Sweep, point: Point, notes: list[str]) -> list[str]:
    texts = system_texts(point.entry)
    texts["ours"] = with_interval(scores_of(point.entry).get("ours"), point.interval("ours"))
    seconds = mean_of(device_s_of(cell.report) for cell in point.cells)
    texts["device time"] = "-" if seconds is None else duration(seconds)
    if reason := point.entry.get("pgr_absent"):
        notes.append(f"PGR of row {number} is absent: {reason}.")
    return [str(number), *(axis.text(point.settings) for axis in sweep.axes), *(texts[head] for head in HEADS)]


def _source(tree: Mapping[str, Any], cell: Cell) -> Source:
    command = ["gt-ray", "pipeline", "--preset", str(tree.get("preset", "")), *_common(tree), *cell.overrides]
    place = quote(cell.folder.name)
    return Source(cell.config.seed, f"{place}/report.html", f"{place}/config.yaml", shlex.join(command))


def _common(tree: Mapping[str, Any]) -> list[str]:
    return [str(override) for override in tree.get("overrides") or ()]


def _command(tree: Mapping[str, Any], folder: Path) -> str:
    """The command that makes the whole study, finished cells or not."""
    cells = all_cells(tree)
    name, preset, common = str(tree.get("name") or folder.resolve().name), str(tree.get("preset", "")), _common(tree)
    command = ["gt-ray", "study", "--preset", preset, "--name", name]
    whole = None
    with suppress(UserError):  # a preset that is no longer there
        whole = load_config(preset, common).sweep()
    if whole is None or sorted(whole) != sorted(cells):
        command += [part for cell in cells for part in ("--cell", shlex.join(cell))]
        common = [*common, "grid={}"]  # its points are in the cells
    return shlex.join([*command, *common])


def _lead(tree: Mapping[str, Any], cells: Sequence[Cell], sweep: Sweep) -> str:
    """How far the study is, and the row that scores best."""
    counts = {"failed": len(tree.get("failed") or ()), "waiting": len(tree.get("waiting") or ())}
    text = f"{len(cells)} finished cell{'s' * (len(cells) != 1)} of preset {tree.get('preset', '')}"
    text += "".join(f", {count} {name}" for name, count in counts.items() if count)
    seeds = sorted({seed for point in sweep.points for seed in point.seeds})
    text += f"; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
    scored = {i: score for i, p in enumerate(sweep.points) if (score := scores_of(p.entry).get("ours")) is not None}
    if len(scored) < 2:
        return f"{text}."
    best = max(scored, key=scored.__getitem__)
    return f"{text}. Ours scores best in row {best + 1} ({sweep.label(sweep.points[best])}): {scored[best]:.1f} %."


def _history(point: Point, name: str, notes: list[str]) -> list[dict[str, Any]]:
    """Of the Grad-Transformer of a row's first cell; empty where there is none, with a note where it is damaged."""
    try:
        return read_history(point.cells[0].folder)
    except UserError as error:
        notes.append(f"No loss curve of row {name.partition(' ')[0]}: {error}.")
        return []


def _populations(points: Mapping[str, Point]) -> Sheet | None:
    """Rows by population, where a cell has several."""
    rows = []
    for name, point in points.items():
        found = [cell.report.get("populations") or {} for cell in point.cells]
        if len(found[0]) > 1:
            for population in found[0]:
                average = mean_entry([one[population]["average"] for one in found if population in one])
                texts = system_texts(average if len(found) > 1 else found[0][population]["average"])
                rows.append([name, population, *(texts[head] for head in HEADS[:-1])])
    return Sheet("By population", ["row", "population", *HEADS[:-1]], rows) if rows else None


def _fits_sheet(curves: Mapping[str, Curve]) -> Sheet | None:
    rows = []
    for title, curve in curves.items():
        numbers = {name: f"{v:.3g} [{low:.3g}, {high:.3g}]" for name, (low, v, high) in curve.intervals.items()}
        ahead = [f"{v:z.1f} [{low:z.1f}, {high:z.1f}]" for low, v, high in curve.predictions.values()]
        rows.append([title, curve.formula, numbers["c"], numbers["a"], numbers["b"], *ahead])
    heads = [f"at {factor} times the largest" for factor in AHEAD]
    return Sheet("Fitted curves", ["ours by", "curve", "c", "a", "b", *heads], rows) if rows else None


def _also(sweep: Sweep) -> list[str]:
    """Series along which more than their axis differs."""
    return [f"Along {one.title} also differs: {', '.join(one.also)}." for one in sweep.series if one.also]


def _unfinished(tree: Mapping[str, Any]) -> Sheet | None:
    preset = shlex.join(_common(tree)) or "the preset as it is"
    rows = [
        [shlex.join(map(str, one.get("overrides") or ())) or preset, "failed", str(one.get("error", ""))]
        for one in tree.get("failed") or ()
    ]
    rows += [[shlex.join(map(str, one)) or preset, "waiting", ""] for one in tree.get("waiting") or ()]
    return Sheet("Failed and waiting cells", ["cell", "state", "error"], rows) if rows else None
