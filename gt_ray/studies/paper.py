"""A finished study as the table or figure of the paper that its preset names, from its reports alone.

The paper's rows and columns, with its numbers (paper.yaml) in brackets where the models are the paper's; then what the
paper lacks: base models, controls, further baselines. What is absent is a dash, never zero.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from gt_ray.baselines.proxy_tuning import operations_ratio
from gt_ray.errors import UserError
from gt_ray.studies.facts import scores_of, systems_of
from gt_ray.studies.plots import fans, standalone
from gt_ray.studies.sheets import Cell, Entry, Sheet, changed_settings, markdown, mean_of, pgr_of, read_study, text_of
from gt_ray.tasks import TASKS
from gt_ray.updates.files import write_atomically

SYSTEMS = {"P_S": "P_S", "w2s": "W2S", "conf": "Conf", "vissup": "VisSup", "ours": "Ours", "P_T": "P_T"}
SEES_PRIVATE_DATA = {"w2s": "✓", "conf": "✓", "vissup": "✓", "ours": "✗"}
METRICS = {"accuracy": "Acc", "rouge1": "R-1"}
MAIN_PAIR, CLIENTS = "3B → 7B", 5
ROUNDING = 0.02  # by which a PGR that the paper prints may differ from that of the scores beside it
LAST = "Of cells that differ in none of the table's things the last is shown."

Shares = Mapping[str, float | None]
"""System -> PGR in percent."""


class PaperTable:
    """A study laid out as one of the paper's tables.

    Args:
        table: such as `table1`, `figure7`.
        cells: the finished ones, at least one.
        changed: overrides of the study that its preset does not have.

    Attributes:
        sheets: the paper's rows and columns, then what it lacks.
        plots: name -> chart, of a figure.
    """

    def __init__(self, table: str, cells: Sequence[Cell], changed: Sequence[str] = ()) -> None:
        self.cells, first = cells, cells[0].config
        number = re.sub(r"(\d)", r" \1", table).capitalize()
        self.title = f"{number} of the paper, preset {first.preset}, seed {first.seed}, scores in percent"
        self.notes: list[str] = []
        self.plots: dict[str, Markup] = {}
        self.entries = {task: entry for cell in cells for task, entry in cell.entries.items()}
        self.pairs = {cell.sizes: cell for cell in cells}
        known = set(numbers()["table3"]["ours"] if table == "table3" else [MAIN_PAIR])
        real = all(" → ".join(cell.sizes) in known and cell.config.data.source != "embedded" for cell in cells)
        self.printed: Mapping[Any, Any] = numbers()[table] if real else {}
        names, order = numbers()["names"], [*numbers()[table], *numbers()["names"]]
        self.names = {t: names[t] for t in order if t in names and (t in self.entries or t in self.printed)}
        clients = [len(cell.by_client("ours", task)) for cell in cells for task in cell.entries]
        self.clients = max([CLIENTS if real else 0, *clients])
        self.client_head = ["", *(f"Client {number + 1}" for number in range(self.clients)), "Avg."]
        if real:
            self._note("In brackets what the paper prints; docs/paper-tables.md says what is not the same.")
            self._note(f"Settings other than the preset's: {' '.join(changed)}." if changed else "")
        lay_out: Callable[[], list[Sheet]] = getattr(self, table)
        self.sheets = lay_out()
        if any("proxy_tuning" in scores_of(entry) for entry in self.entries.values()):
            for cell in self.pairs.values():
                self._note(_cost_of_proxy_tuning(cell))

    def table1(self) -> list[Sheet]:
        rows = [["Access client's private data", "", *(SEES_PRIVATE_DATA.get(system, "-") for system in SYSTEMS)]]
        for task, name in self.names.items():
            scores = _texts(scores_of(self.entries.get(task, {})), self.printed.get(task, {}))
            rows += [[name, METRICS[TASKS[task].metric], *scores], ["", "PGR", *_texts(*self._shares(task))]]
        rows.append(["Average", "PGR", *_texts(*self._mean_shares())])
        return [Sheet("", ["", "Metric", *SYSTEMS.values()], rows), self._others(self._by_task())]

    def table2(self) -> list[Sheet]:
        cells = {task: cell for cell in self.cells for task in cell.entries}
        sheets = []
        for task, title in self.names.items():
            shares, printed = _texts(*self._shares(task)), self.printed.get(task, {})
            rows = [
                [name, *self._by_client(cells.get(task), system, printed.get(system), task), share]
                for (system, name), share in zip(SYSTEMS.items(), shares, strict=True)
            ]
            sheets.append(Sheet(title, [*self.client_head, "Avg-PGR"], rows))
        return [*sheets, self._others(self._by_task())]

    def table3(self) -> list[Sheet]:
        small = dict.fromkeys([*self.printed.get("P_S", {}), *(S for S, _ in self.pairs)])
        large = dict.fromkeys([*self.printed.get("P_T", {}), *(T for _, T in self.pairs)])
        cells: dict[tuple[str, str], Cell] = {}
        for (S, T), cell in self.pairs.items():
            cells |= {("P_S", S): cell, ("P_T", T): cell, ("ours", f"{S} → {T}"): cell}
        order = [("P_S", S) for S in small]
        for T in large:
            order += [*(("ours", f"{S} → {T}") for S in small), ("P_T", T)]
        rows = []
        for system, label in order:
            printed = self.printed.get(system, {}).get(label)
            rows.append([f"{SYSTEMS[system]} ({label})", *self._by_client(cells.get((system, label)), system, printed)])
        columns = {f"{S} → {T}": cell.entry for (S, T), cell in self.pairs.items()}
        self._note(LAST if len(columns) < len(self.cells) else "")
        return [Sheet("", self.client_head, rows), self._others(columns, average=False)]

    def table6(self) -> list[Sheet]:
        rows = []
        for system in ("P_S", "P_T", "ours"):
            found = [scores_of(self.entries.get(task, {})).get(system) for task in self.names]
            printed = [self.printed.get(task, {}).get(system) for task in self.names]
            rows.append([SYSTEMS[system], "Acc", *map(text_of, found, printed), ""])
        shares = [*map(self._shares, self.names), self._mean_shares()]
        rows.append(["", "PGR", *(text_of(found.get("ours"), printed.get("ours")) for found, printed in shares)])
        return [Sheet("", ["", "Metric", *self.names.values(), "Average"], rows), self._others(self._by_task())]

    def figure7(self) -> list[Sheet]:
        return self._sweep("rows of a shadow", "figure7", self.cells, lambda cell: cell.config.curation.samples)

    def figure8(self) -> list[Sheet]:
        """Shadows with the most snapshots, then snapshots of the number of shadows that most cells have."""
        most = max(cell.snapshots for cell in self.cells)
        usual = Counter(cell.config.curation.shadows for cell in self.cells).most_common(1)[0][0]
        by_shadows = [cell for cell in self.cells if cell.snapshots == most]
        by_snapshots = [cell for cell in self.cells if cell.config.curation.shadows == usual]
        titles = f"tuples: shadows of {most} snapshots", f"tuples: snapshots of {usual} shadows"
        return [
            *self._sweep(titles[0], "figure8-shadows", by_shadows, lambda cell: cell.tuples),
            *self._sweep(titles[1], "figure8-snapshots", by_snapshots, lambda cell: cell.tuples),
        ]

    def _sweep(self, what: str, name: str, cells: Sequence[Cell], value: Callable[[Cell], int]) -> list[Sheet]:
        """Scores by a value that cells differ in, and a plot of them with a light line for each client."""
        swept = {value(cell): cell for cell in sorted(cells, key=value)}
        self._note(LAST if len(swept) < len(cells) else "")
        columns = {f"{number:,}": cell.entry for number, cell in swept.items()}
        rows = []
        for number, (label, entry) in zip(swept, columns.items(), strict=True):
            scores, printed = scores_of(entry), self.printed.get(number, {})
            texts = [text_of(scores.get(system), printed.get(system)) for system in ("P_S", "ours", "P_T")]
            rows.append([label, *texts, text_of(entry.get("pgr"))])
        lines = {}
        for system in ("P_S", "ours", "P_T"):
            found = [cell.by_client(system) for cell in swept.values()]
            if in_all := [client for client in found[0] if all(client in one for one in found)]:
                lines[SYSTEMS[system]] = [[one[client] for one in found] for client in in_all]
        self.plots[name] = fans(what, list(columns), lines, list(swept))
        return [Sheet("", [what, "P_S", "Ours", "P_T", "PGR"], rows), self._others(columns, average=False)]

    def _others(self, columns: Mapping[str, Entry], average: bool = True) -> Sheet:
        """Scores of ours and of all systems that the paper's tables lack; with their average and PGR."""
        rows = []
        for system in [one for one in systems_of(columns) if one == "ours" or one not in SYSTEMS]:
            scores = [scores_of(entry).get(system) for entry in columns.values()]
            rows.append([system, *map(text_of, scores)])
            if average:
                share = mean_of(pgr_of(entry).get(system) for entry in columns.values())
                rows[-1] += [text_of(None if None in scores else mean_of(scores)), text_of(share)]
        return Sheet("What the paper lacks", ["", *columns, *(("Average", "PGR") if average else ())], rows)

    def _by_task(self) -> dict[str, Entry]:
        self._note(LAST if len(self.entries) < sum(len(cell.entries) for cell in self.cells) else "")
        return {name: self.entries[task] for task, name in self.names.items() if task in self.entries}

    def _shares(self, task: str) -> tuple[Shares, Shares]:
        """PGR of every system, measured, and as the paper prints it, where that is what its scores give."""
        name, entry, printed = self.names[task], self.entries.get(task, {}), self.printed.get(task, {})
        if reason := entry.get("pgr_absent"):
            self._note(f"PGR of {name} is absent: {reason}.")
        of_paper = dict(printed.get("pgr", {}))
        for system, told in printed.get("pgr", {}).items():
            P_S, score, P_T = (_last(printed[one]) for one in ("P_S", system, "P_T"))
            if abs((share := 100 * (score - P_S) / (P_T - P_S)) - told) > ROUNDING:
                of_paper[system] = share
                self._note(f"PGR of {name}: the paper prints {told:.2f}; its own scores give {share:.2f}.")
        return pgr_of(entry), of_paper

    def _mean_shares(self) -> tuple[Shares, Shares]:
        """The same, on average over the tasks that have one."""
        both = [self._shares(task) for task in self.names]
        if 0 < (counted := sum(found.get("ours") is not None for found, _ in both)) < len(both):
            self._note(f"The average PGR is over {counted} of {len(both)} tasks.")
        found, of_paper = ({s: mean_of(pair[i].get(s) for pair in both) for s in SYSTEMS} for i in (0, 1))
        return found, of_paper

    def _by_client(
        self, cell: Cell | None, system: str, printed: Sequence[float] | None, task: str | None = None
    ) -> list[str]:
        """A system's score of each client, and their average."""
        scores = list(cell.by_client(system, task).values()) if cell else []
        told: Sequence[float | None] = printed or [None]
        *of_paper, average = told
        pairs = itertools.zip_longest(scores, of_paper, [None] * self.clients)
        return [*(text_of(score, number) for score, number, _ in pairs), text_of(mean_of(scores), average)]

    def _note(self, text: str) -> None:
        if text and text not in self.notes:
            self.notes.append(text)


@cache
def numbers() -> dict[str, Any]:
    """The paper's numbers by table, and how it names tasks."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))
    return found


def paper_table(folder: Path) -> PaperTable:
    """A study of which at least one cell is finished, as its table.

    Raises:
        UserError: there is no such study, or its preset names no table.
    """
    tree, cells = read_study(folder)
    if "table" not in tree:
        raise UserError(f"{folder}: preset {tree['preset']} names no table of the paper (key table)")
    return PaperTable(tree["table"], cells, changed_settings(tree, cells[0].config))


def write_table(folder: Path) -> PaperTable:
    """Write `table.md`, and of a figure its plots, beside a study's `study.json`."""
    found = paper_table(folder)
    for name, plot in found.plots.items():
        write_atomically(folder / f"{name}.svg", standalone(plot).encode())
    write_atomically(folder / "table.md", markdown(found.title, found.sheets, found.notes, list(found.plots)).encode())
    return found


def _texts(found: Shares, printed: Mapping[str, Any]) -> list[str]:
    return [text_of(found.get(system), printed.get(system)) for system in SYSTEMS]


def _last(number: Any) -> float:
    return float(number[-1] if isinstance(number, list) else number)  # of clients' scores and their average


def _cost_of_proxy_tuning(cell: Cell) -> str:
    try:
        ratio = operations_ratio(cell.config.pair)
    except UserError:  # a model whose config is not at hand
        return ""
    pair = " → ".join(cell.sizes)
    return f"proxy_tuning, {pair}: {ratio:.2f} times the operations a token, computed as (T + 2 S) / T by parameters."
