"""Studies: one main job per cell, a list of overrides over a base preset; shared work is done once (graph.py)."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from gt_ray.cluster import WANTED_GPUS
from gt_ray.config import OF_STUDY, Config, load_config
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.evaluation.run import scores_of_report
from gt_ray.evaluation.summary import by_population
from gt_ray.progress import say
from gt_ray.studies.clock import recorded
from gt_ray.studies.graph import (
    Node,
    Outcome,
    fine_tunes_of,
    graph_of,
    needed,
    places,
    plain_scores,
    run_graph,
    shared_run,
)
from gt_ray.studies.paper import write_table
from gt_ray.studies.sheets import all_cells
from gt_ray.studies.study_report import write_study_report
from gt_ray.updates.files import alone, write_atomically
from gt_ray.updates.store import UpdateStore, unit_key

FOUND = "found.json"
OF_UNITS = ("curate", "clients", "ceilings")
"""Stages of a cell whose device time its units have."""


class Sweep:
    """The cells of a study, and what its folder knows of them.

    All configs, models and rows are checked before any work starts.

    Args:
        cells: none: those of the preset.

    Raises:
        UserError: a config is wrong, or two cells are the same.
    """

    def __init__(self, preset: str, common: list[str], cells: list[list[str]], name: str) -> None:
        self.preset, self.common, self.name = preset, common, name
        self.cells = load_config(preset, common).sweep(cells)
        self.configs = cell_configs(preset, common, self.cells, name)
        self.contents = [_content(config) for config in self.configs]
        self.folder = self.configs[0].run_folder.parent
        self.studies = [Study.load(config) for config in self.configs]
        self.jobs = [{job.key: job for job in fine_tunes_of(study)} for study in self.studies]
        self.graph = graph_of(self.configs, self.jobs)
        known = (_finished(*both) for both in zip(self.configs, self.contents, strict=True))
        self.reports = {number: report for number, report in enumerate(known) if report is not None}
        self.errors: dict[int, str] = {}
        self.walls = self._earlier_walls()
        self._spent: dict[str, float] = {}

    def left(self, side_by_side: bool = False) -> list[Node]:
        """What is still to be done."""
        scores = [plain_scores(study) for study in self.studies] if side_by_side else []
        return needed(graph_of(self.configs, self.jobs, scores), self.reports)

    def done(self, node: Node, outcome: Outcome) -> None:
        """Take note of a node, and write `study.json`."""
        self.walls[node.name] = self.walls.get(node.name, 0.0) + outcome.wall_s
        if node.kind == "cell" and outcome.report:
            self.reports[node.cell] = outcome.report
            content = json.dumps({"config": self.contents[node.cell]})
            write_atomically(node.config.run_folder / "done.json", content.encode())
            say(f"study {self.name}: {self.title(node.cell)} is done")
        elif node.kind == "cell":
            self.errors[node.cell] = outcome.error
        if outcome.error:
            say(f"study {self.name}: {node.name} failed: {outcome.error}")
        self.write(self.tree())

    def title(self, number: int) -> str:
        """A cell for people."""
        cell = " ".join(self.cells[number]) or "the preset as it is"
        return f"cell {number + 1} of {len(self.cells)}: {cell}"

    def begin(self) -> None:
        """Note which units the store has before the study adds any."""
        keys = [key for node in self.graph for key in node.keys]
        content = {"had": sorted(self._had()), "seen": sorted(self._found()["seen"] | set(keys))}
        write_atomically(self.folder / FOUND, json.dumps(content).encode())

    def device_s(self) -> float:
        """Device-seconds that the study has spent, over all its runs: of units that the store did not have before, and
        of the other stages of its cells, whatever became of them."""
        if not self._spent:
            self._spent = dict.fromkeys(self._had(), 0.0)
        for node in self.graph:
            new = [key for key in node.keys if key not in self._spent]
            found = unit_device_s(UpdateStore(node.config.store), new)
            self._spent |= {key: seconds for key, seconds in found.items() if seconds is not None}
        cells = [study.config for study in self.studies]
        stages = [recorded(config)["device_s"] for config in (*cells, *map(shared_run, cells))]
        return sum(self._spent.values()) + sum(s for one in stages for name, s in one.items() if name not in OF_UNITS)

    def _earlier_walls(self) -> dict[str, float]:
        """Wall time by node of earlier runs of the same cells."""
        told = _read(self.folder / "study.json")
        try:
            same = sorted(all_cells(told)) == sorted(self.cells) and told["overrides"] == self.common
            return {name: float(wall) for name, wall in told["wall_s"].items()} if same else {}
        except (AttributeError, KeyError, TypeError, ValueError):  # absent or damaged
            return {}

    def _found(self) -> dict[str, set[str]]:
        """Units that were there before the study, and all that it has known of; cells may be added later."""
        told = _read(self.folder / FOUND)
        told = told if isinstance(told, dict) else {}
        return {name: set(map(str, told.get(name, ()))) for name in ("had", "seen")}

    def _had(self) -> set[str]:
        """Units that were in the store when the study came to know of them."""
        had, seen = self._found().values()
        for node in self.graph:
            found = unit_device_s(UpdateStore(node.config.store), [key for key in node.keys if key not in seen])
            had |= {key for key, seconds in found.items() if seconds is not None}
        return had

    def tree(self) -> dict[str, Any]:
        """`study.json`: finished cells with their overrides and reports, those that failed and those that wait."""
        waiting = [cell for n, cell in enumerate(self.cells) if n not in self.reports and n not in self.errors]
        failed = [{"overrides": self.cells[n], "error": error} for n, error in sorted(self.errors.items())]
        return {
            "name": self.name,
            "preset": self.preset,
            "overrides": self.common,
            "cells": [
                {
                    "overrides": self.cells[number],
                    "report": f"{self.configs[number].run_folder.name}/report.json",
                    "summary": report["summary"],
                }
                for number, report in sorted(self.reports.items())
            ],
            **({"failed": failed} if failed else {}),
            **({"waiting": waiting} if waiting else {}),
            "wall_s": self.walls,
            "device_hours": self.device_s() / 3600,
            **({"table": self.configs[0].table} if self.configs[0].table else {}),
        }

    def write(self, tree: dict[str, Any]) -> None:
        """Write `study.json`."""
        write_atomically(self.folder / "study.json", json.dumps(tree, indent=1).encode())


def run_study(
    preset: str,
    common: list[str],
    cells: list[list[str]],
    name: str,
    parallel: int | None = None,
    max_device_hours: float | None = None,
) -> dict[str, Any]:
    """Run every cell; `runs/<name>/study.json` lists the cells with their overrides and reports.

    Beside it are the study's report (study_report.py), and where the preset names a table of the paper `table.md`.

    Cells share the store, so a unit that two need is made once. A cell that fails keeps no other from running.

    Args:
        cells: none: those of the preset. Where they differ in their seed alone, `populations` sums up all of them.
        parallel: most cells that run at a time; none: as many as the cluster has room for.
        max_device_hours: of GPUs, or without GPUs of cores; where they are spent, no further work is started.

    Raises:
        UserError: a config is wrong, two cells are the same, or another process runs the study; or, at the end, cells
            have failed or wait for a larger budget.
    """
    sweep = Sweep(preset, common, cells, name)
    with alone(sweep.folder, partial(_refuse, sweep)):
        return _run(sweep, parallel, max_device_hours)


def _refuse(sweep: Sweep) -> None:
    raise UserError(
        f"study {sweep.name}: another process runs it in {sweep.folder}; see `gt-ray status {sweep.folder}`, or give "
        "another --name"
    )


def _run(sweep: Sweep, parallel: int | None, max_device_hours: float | None) -> dict[str, Any]:
    sweep.begin()
    if len(sweep.reports) < len(sweep.cells):
        sweep.write(sweep.tree())  # who watches sees what is to come
        parallel = _at_once(sweep, parallel)

        def left_s() -> float | None:
            return None if max_device_hours is None else 3600 * max_device_hours - sweep.device_s()

        for node, outcome in run_graph(sweep.left(parallel > 1), parallel, left_s):
            sweep.done(node, outcome)
    else:
        say(f"study {sweep.name}: nothing to do, all {len(sweep.cells)} cells are done")
    tree = sweep.tree()
    if len(cells := sweep.cells) == len(sweep.reports) > 1 and all(key.startswith("seed=") for c in cells for key in c):
        tree["populations"] = _over_seeds(sweep)
    sweep.write(tree)
    if tree["cells"]:
        write_study_report(sweep.folder)
        if "table" in tree:
            write_table(sweep.folder)
    _complain(tree, sweep, max_device_hours)
    return tree


def _at_once(sweep: Sweep, wanted: int | None) -> int:
    """How many cells run at a time: no more than there is room for, or their trainings would wait for each other.

    On a cluster that grows (GT_RAY_GPUS) there may be room for as many as are wanted.
    """
    if wanted == 1 or len(sweep.cells) == 1:
        return 1
    most = places(sweep.configs)
    room = f"study {sweep.name}: this Ray cluster has room for {most} cells at a time"
    if wanted is None:
        if most < len(sweep.cells):
            say(f"{room}, by the CPUs and GPUs that a cell may hold at once (--parallel)")
        return most
    if wanted > most and os.environ.get(WANTED_GPUS):
        say(f"{room} as it is; {wanted} need nodes that have yet to come")
        return wanted
    if wanted > most:
        say(f"{room}; {wanted} would wait for each other")
    return min(wanted, most)


def _complain(tree: dict[str, Any], sweep: Sweep, budget: float | None) -> None:
    """Say why a study is not finished, and how it goes on.

    Raises:
        UserError: it is not.
    """
    n = len(sweep.cells)
    if failed := tree.get("failed"):
        reasons = [f"{sweep.title(number)}: {why}" for number, why in sorted(sweep.errors.items())]
        others = "the others wait" if "waiting" in tree else "the others are done"
        raise UserError(f"study {sweep.name}: {len(failed)} of {n} cells failed, {others}: {'; '.join(reasons)}")
    if waiting := tree.get("waiting"):
        raise UserError(
            f"study {sweep.name}: {tree['device_hours']:.2f} GPU-hours are spent, the budget is {budget:g}; "
            f"{len(waiting)} of {n} cells wait: give the same command a larger --max-gpu-hours to go on"
        )


def _over_seeds(sweep: Sweep) -> dict[str, Any]:
    """Populations over all cells, which differ in their seed alone."""
    both = [(config.run_folder, sweep.reports[number]) for number, config in enumerate(sweep.configs)]
    found = by_population([result for run, report in both for result in scores_of_report(run, report)])
    for population, summary in found.items():
        averages = [report["populations"][population]["average"] for _, report in both]
        if shares := [average["out_of_range"] for average in averages if "out_of_range" in average]:
            summary["average"]["out_of_range"] = sum(shares) / len(shares)
    return found


def unit_device_s(store: UpdateStore, keys: list[str] | tuple[str, ...]) -> dict[str, float | None]:
    """Device-seconds by unit, None where it is absent or damaged."""

    def look(key: str) -> float | None:
        try:
            return store.header(key).meta.device_s
        except (OSError, ValueError):
            return None

    return dict(store.each(look, keys))


def cell_configs(preset: str, common: list[str], cells: list[list[str]], name: str) -> list[Config]:
    """The configs of a study's cells, given all overrides of each.

    Raises:
        UserError: a config is wrong, or two are the same.
    """
    configs = [_cell_config(preset, [*common, *cell], name) for cell in cells]
    if len({config.name for config in configs}) < len(configs):
        raise UserError(f"study {name}: two cells are the same: {[' '.join(cell) for cell in cells]}")
    return configs


def _cell_config(preset: str, overrides: list[str], name: str) -> Config:
    """A cell's config; its folder is named by content, so that cells may be added or reordered."""
    config = load_config(preset, overrides)
    return config.model_copy(update={"runs": config.runs / name, "name": f"cell-{_content(config)[:12]}"})


def _content(config: Config) -> str:
    return unit_key(config.model_dump(mode="json", exclude={"name", "runs", *OF_STUDY}))


def _finished(config: Config, content: str) -> dict[str, Any] | None:
    done, report = (_read(config.run_folder / name) for name in ("done.json", "report.json"))
    return report if isinstance(report, dict) and isinstance(done, dict) and done.get("config") == content else None


def _read(path: Path) -> Any:
    """What a JSON file holds; None where it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
