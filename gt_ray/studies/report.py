"""The report for people: a table for the terminal, and `report.html`, a page that needs nothing beside itself.

Both show what `report.json` holds; what it does not hold is a dash or left out, never zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gt_ray.errors import UserError
from gt_ray.studies.cells import is_cell
from gt_ray.studies.facts import (
    CERTAINTY,
    GAP,
    LIKELIHOOD,
    RATIOS,
    averages_of,
    bounds_of,
    command_of,
    duration,
    essentials,
    finite,
    grid_of,
    holder,
    intervals_of,
    label_of,
    lead,
    normalised_of,
    origin_of,
    pair_of,
    scores_of,
    summary_of,
    systems_of,
    walls_of,
)
from gt_ray.studies.plots import bars, curves, fans, forest, role_of
from gt_ray.studies.sheets import print_sheets
from gt_ray.studies.times import time_tables
from gt_ray.updates.files import write_atomically

IN_FANS = ("P_S", "ours", "P_T")
OF_POPULATIONS = RATIOS | LIKELIHOOD | GAP | CERTAINTY
UNBOUNDED = 10_000  # columns of an output that is no terminal


def print_table(report: dict[str, Any], ratios: Mapping[str, str] = RATIOS) -> None:
    """Print systems by tasks, scores and ratios in percent, with the reasons for what is absent.

    Wide tables are split at a terminal's width; where the output is no terminal, nothing is wrapped.
    """
    grid, notes = grid_of(report, ratios)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=UNBOUNDED)
    tasks = list(summary_of(report))
    widths = [max(map(cell_len, [task, *(str(row[i]) for row in grid.values())])) for i, task in enumerate(tasks)]
    label_width = max(map(cell_len, map(label_of, grid)), default=0)
    for chunk in _chunks(widths, console.width - label_width - 2) if grid else []:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
        table.add_column(Text("%"), overflow="fold")
        for i in chunk:
            table.add_column(Text(tasks[i]), justify="right", overflow="fold")
        for system, row in grid.items():
            style = "bold" if system == "ours" else None
            table.add_row(Text(label_of(system)), *(str(row[i]) for i in chunk), style=style)
        console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}")
    if facts := essentials(report):
        console.print(f"{facts}.")
    print_times(report)


def print_times(report: dict[str, Any]) -> None:
    """Print what a client saves and what the provider's part took, where the report has it (Tables 7 and 8)."""
    sheets, notes = time_tables({pair_of(report) or "this run": [report]})
    if sheets:
        print_sheets("", sheets, notes)


def print_populations(populations: dict[str, Any]) -> None:
    """Print systems by populations, on average over tasks."""
    print_table({"summary": averages_of({"populations": populations})}, OF_POPULATIONS)


def write_html(run_folder: Path) -> Path:
    """Write `report.html` from `report.json`, and from the Grad-Transformer's history and `bounds.json` where they are.

    Raises:
        UserError: `report.json` is not there, a file is damaged, or matplotlib is not installed.
    """
    report = read_json(run_folder / "report.json")
    if not isinstance(report, dict):
        raise UserError(f"{run_folder / 'report.json'} is not there or no report; run `gt-ray evaluate` first")
    history = read_history(run_folder)
    bounds = read_json(run_folder / "bounds.json")
    summary = summary_of(report)
    tasks = sorted(summary, key=lambda task: task != "average")  # the average first: a phone shows few columns
    grid, notes = grid_of(report, RATIOS | LIKELIHOOD)
    populations = averages_of(report)
    population_grid, population_notes = grid_of({"summary": populations}, OF_POPULATIONS)
    intervals = intervals_of({task: summary[task] for task in tasks})
    walls = walls_of(report)
    time, time_words = time_tables({pair_of(report) or "this run": [report]})
    page = render(
        "report.html.jinja",
        title=f"gt-ray report: {report['preset']}" if "preset" in report else "gt-ray report",
        essentials=essentials(report),
        lead=lead(summary),
        tasks=tasks,
        grid={name: dict(zip(summary, row, strict=True)) for name, row in grid.items()},
        notes=notes,
        normalised=normalised_of(report),
        populations=list(populations) if len(populations) > 1 else [],
        population_grid={name: dict(zip(populations, row, strict=True)) for name, row in population_grid.items()},
        population_notes=population_notes,
        label_of=label_of,
        first_ratio=next((name for name in grid if name in RATIOS | LIKELIHOOD), None),
        roles=set(map(role_of, systems_of(summary))),
        score_charts=_score_charts(report),
        mechanism_charts=_mechanism_charts(report),
        intervals=intervals,
        compared=list(dict.fromkeys(name for named in intervals.values() for name in named)),
        forests={task: forest(task, named) for task, named in intervals.items()},
        loss_charts=_loss_charts(history),
        bounds=bounds_of(bounds) if bounds else None,
        walls=[(stage, duration(wall), 100 * wall / max(walls.values())) for stage, wall in walls.items()],
        total=duration(sum(walls.values())),
        time_sheets=time,
        time_notes=time_words,
        list_of_names={*grid, *(population_grid if len(populations) > 1 else ())},
        origin=origin_of(report),
        command=_command(report, run_folder),
        has_config=(run_folder / "config.yaml").is_file(),
    )
    path = run_folder / "report.html"
    write_atomically(path, page.encode())
    return path


def render(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file; everything is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def read_json(path: Path) -> Any:
    """What a file holds; none where it is not there.

    Raises:
        UserError: it is not readable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable: {error}") from error


def read_history(run_folder: Path) -> list[dict[str, Any]]:
    """Losses and measures of the Grad-Transformer's checkpoints; empty where there are none.

    Raises:
        UserError: the file is not readable.
    """
    found = read_json(run_folder / "grad_transformer" / "history.json")
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _chunks(widths: Sequence[int], room: int) -> list[list[int]]:
    """Positions of the columns, split where they would be wider than the room."""
    chunks: list[list[int]] = [[]]
    for i in range(len(widths)):
        if chunks[-1] and sum(widths[j] + 2 for j in (*chunks[-1], i)) > room:
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def _score_charts(report: Mapping[str, Any]) -> dict[str, Markup]:
    """Title -> chart of one task's scores; all on one scale."""
    summary = {task: entry for task, entry in summary_of(report).items() if task != "average" and scores_of(entry)}
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in report.get("rows") or []:
        rows.setdefault(row["task"], []).append(row)
    errors = {
        task: {name: _error(rows.get(task, []), name) for name in scores_of(entry)} for task, entry in summary.items()
    }
    ends = [
        score + (errors[task][name] or 0) for task, entry in summary.items() for name, score in scores_of(entry).items()
    ]
    charts = {}
    for task, entry in summary.items():
        metric = ", ".join(dict.fromkeys(str(row["metric"]) for row in rows.get(task, []) if "metric" in row))
        title = f"{task} ({metric})" if metric else task
        charts[title] = bars(title, scores_of(entry), errors[task], max(ends))
    return charts


def _command(report: Mapping[str, Any], run_folder: Path) -> str:
    """The command that makes the run again: from its preset, or where it had further overrides from its config."""
    plain = is_cell(run_folder, str(report.get("preset")), (f"seed={report.get('seed')}",))
    if plain or not (run_folder / "config.yaml").is_file():
        return command_of(report)
    return "gt-ray pipeline --preset config.yaml"


def _error(rows: Sequence[Mapping[str, Any]], system: str) -> float | None:
    """Standard error of a system's mean score over its clients, where every client has one."""
    ses = [finite(row.get("se")) for row in rows if row.get("system") == system]
    known = [se for se in ses if se is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(ses) else None


def _mechanism_charts(report: Mapping[str, Any]) -> dict[str, Markup]:
    """Title -> each task's scores over the clients' learning mechanisms, where there are several."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    labels = list(dict.fromkeys(str(row["label"]) for row in report.get("rows") or [] if "label" in row))
    for row in report.get("rows") or []:
        if "label" in row and row["system"] in IN_FANS:
            systems = found.setdefault(row["task"], {})
            systems.setdefault(row["system"], {}).setdefault(holder(row), {})[str(row["label"])] = row["score"]
    charts = {}
    for task, systems in found.items() if len(labels) > 1 else ():
        lines = {
            system: [[scores[label] for label in labels] for scores in systems[system].values()]
            for system in IN_FANS
            if system in systems and all(len(scores) == len(labels) for scores in systems[system].values())
        }
        title = f"{task}, by the clients' learning mechanism"
        charts[title] = fans(title, labels, lines)
    return charts


def _loss_charts(history: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """Title -> curves of the Grad-Transformer's training."""
    panels = {
        "Loss (Eq. 10, teacher forcing)": {"training": "loss", "validation": "validation_loss"},
        "Behaviour loss": {"training": "behaviour", "validation": "validation_behaviour"},
        "Error of generated updates (mean update = 1)": {"generated": "validation_generated"},
    }
    charts = {}
    for title, keys in panels.items():
        lines = {label: _points(history, key) for label, key in keys.items()}
        if lines := {label: points for label, points in lines.items() if points}:
            charts[title] = curves(title, lines, reference=1.0 if "generated" in lines else None)
    return charts


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(finite(entry.get("step")), finite(entry.get(key))) for entry in history]
    return [(step, value) for step, value in pairs if step is not None and value is not None]
