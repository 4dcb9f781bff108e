"""Finished cells of a study as they lie in its folder, and sheets of texts, for the terminal and as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gt_ray.config import PLACES, Config, load_config
from gt_ray.errors import UserError
from gt_ray.studies.facts import finite

Entry = Mapping[str, Any]
"""Of a report's summary: scores, PGR and more of one task, or of the average."""
UNBOUNDED = 10_000  # columns of an output that is no terminal


@dataclass(frozen=True)
class Cell:
    """A finished cell of a study: its settings and its report, its run folder and overrides."""

    config: Config
    report: Mapping[str, Any]
    folder: Path = Path()
    overrides: tuple[str, ...] = ()

    @property
    def entries(self) -> dict[str, Entry]:
        """Task -> entry."""
        return {task: entry for task, entry in self.report["summary"].items() if task != "average"}

    @property
    def entry(self) -> Entry:
        """That of the only task, or of several the average."""
        found: Entry = self.report["summary"]["average"]
        return next(iter(self.entries.values())) if len(self.entries) == 1 else found

    @property
    def sizes(self) -> tuple[str, str]:
        """The pair's sizes as Table 3 writes them, such as 3B; of models other than the paper's their names."""
        pair = self.config.pair
        return size_of(pair.tinylm.model), size_of(pair.llm.model)

    @property
    def snapshots(self) -> int:
        """Of each shadow."""
        return len(self.config.curation.snapshot_steps)

    @property
    def tuples(self) -> int:
        """All update vector tuples, those of validation shadows among them."""
        return self.config.curation.shadows * self.snapshots

    def by_client(self, system: str, task: str | None = None) -> dict[str, float]:
        """Client -> score of a system."""
        rows = [row for row in self.report["rows"] if row["system"] == system and task in (None, row["task"])]
        return {row["client"]: row["score"] for row in rows}


@dataclass(frozen=True)
class Sheet:
    """Rows of texts under a head."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def read_study(folder: Path) -> tuple[dict[str, Any], list[Cell]]:
    """`study.json` of a study, which may have further cells to do, and its finished cells.

    Raises:
        UserError: it is not there, or a file of it is damaged.
    """
    try:
        tree: dict[str, Any] = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        places = [(folder / cell["report"]).parent for cell in tree["cells"]]
        overrides = [tuple(map(str, cell["overrides"])) for cell in tree["cells"]]
        reports = [json.loads((place / "report.json").read_text(encoding="utf-8")) for place in places]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no study with finished cells; run `gt-ray study` first ({error})") from error
    for place, report in zip(places, reports, strict=True):
        if not isinstance(report, dict) or not (place / "config.yaml").is_file():
            raise UserError(f"{place} has no config.yaml, or a damaged report.json; remove it and run the study again")
    configs = [load_config(str(place / "config.yaml")) for place in places]
    return tree, list(map(Cell, configs, reports, places, overrides))


def all_cells(tree: Mapping[str, Any]) -> list[list[str]]:
    """Overrides of all cells that `study.json` names: finished, failed and waiting ones."""
    done = [one.get("overrides") or () for one in (*tree["cells"], *(tree.get("failed") or ()))]
    return [list(map(str, one)) for one in (*done, *(tree.get("waiting") or ()))]


def changed_settings(tree: Mapping[str, Any], config: Config) -> list[str]:
    """Overrides of a study, for all cells or for one, that its preset does not have.

    Args:
        tree: `study.json`.
        config: of one of its cells.
    """
    of_preset = config.sweep()
    own = [override for cell in tree["cells"] if cell["overrides"] not in of_preset for override in cell["overrides"]]
    found = dict.fromkeys([*tree["overrides"], *own])
    return [override for override in found if override.partition("=")[0] not in PLACES | {"seed"}]


def size_of(model: str) -> str:
    """A model as Table 3 writes it, such as 3B; of models other than the paper's the name."""
    name = re.split("[/:]", model)[-1]
    found = re.fullmatch(r"Qwen2\.5-([\d.]+B)-Instruct", name)
    return found[1] if found else name


def text_of(found: float | None, printed: float | None = None) -> str:
    """A number, or a dash, and in brackets what the paper prints."""
    shown = "-" if (value := finite(found)) is None else f"{value:z.2f}"
    return shown if printed is None else f"{shown} ({printed:z.2f})"


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def pgr_of(entry: Entry) -> dict[str, float | None]:
    """System -> PGR in percent."""
    return {"ours": finite(entry.get("pgr")), **entry.get("pgr_of", {})}


def print_sheets(title: str, sheets: Sequence[Sheet], notes: Sequence[str]) -> None:
    """Print sheets, nothing wrapped where the output is no terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=UNBOUNDED)
    console.print(title)
    for sheet in sheets:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
        for number, name in enumerate([sheet.title if not sheet.head[0] else sheet.head[0], *sheet.head[1:]]):
            table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        console.print()
        console.print(table)
    for note in notes:
        console.print(f"- {note}")


def markdown(title: str, sheets: Sequence[Sheet], notes: Sequence[str], plots: Sequence[str] = ()) -> str:
    """The same as Markdown, with plots as `<name>.svg`."""
    parts = [f"# {plain(title)}"]
    for sheet in sheets:
        rule = [":--", *("--:" for _ in sheet.head[1:])]
        rows = [[plain(text) for text in row] for row in (sheet.head, *sheet.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
        parts += [f"## {sheet.title}"] * bool(sheet.title) + ["\n".join(lines)]
    parts += [f"![{name}]({name}.svg)" for name in plots]
    parts += ["\n".join(f"- {plain(note)}" for note in notes)] * bool(notes)
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """A text that is no markup in Markdown."""
    for mark, name in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("\n", " ")):
        text = text.replace(mark, name)
    return text
