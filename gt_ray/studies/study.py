"""Studies: one main job per cell, a list of overrides over a base preset; resumable cell by cell."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from gt_ray.config import Config, load_config
from gt_ray.errors import UserError
from gt_ray.evaluation.run import scores_of_report
from gt_ray.evaluation.summary import by_population
from gt_ray.progress import say
from gt_ray.studies.paper import write_table
from gt_ray.studies.pipeline import pipeline
from gt_ray.updates.files import write_atomically
from gt_ray.updates.store import unit_key


def run_study(preset: str, common: list[str], cells: list[list[str]], name: str) -> dict[str, Any]:
    """Run every cell; `runs/<name>/study.json` lists the cells with their overrides and reports.

    Where the preset names a table of the paper, `table.md` beside it is that table.

    All configs are checked before the first cell starts. Cells share the store, so a unit that two need is made once.

    Args:
        cells: none: those of the preset. Where they differ in their seed alone, `populations` sums up all of them.

    Raises:
        UserError: a config is wrong, or two cells are the same.
    """
    cells = cells or [shlex.split(cell) for cell in load_config(preset, common).cells] or [[]]
    configs = [_cell_config(preset, [*common, *cell], name) for cell in cells]
    hashes = [_content(config) for config in configs]
    if len(set(hashes)) < len(hashes):
        raise UserError(f"study {name}: two cells are the same: {[' '.join(cell) for cell in cells]}")
    folder = configs[0].run_folder.parent
    entries: list[dict[str, Any]] = []
    for number, (cell, config, content) in enumerate(zip(cells, configs, hashes, strict=True)):
        report = _finished(config, content)
        if report is None:
            say(f"study {name}: cell {number + 1} of {len(cells)}: {' '.join(cell) or 'the preset as it is'}")
            report = pipeline(config)
            write_atomically(config.run_folder / "done.json", json.dumps({"config": content}).encode())
        else:
            say(f"study {name}: cell {number + 1} of {len(cells)} is done")
        entries.append(
            {
                "overrides": cell,
                "report": f"{config.run_folder.name}/report.json",
                "summary": report["summary"],
            }
        )
        tree: dict[str, Any] = {"name": name, "preset": preset, "overrides": common, "cells": entries}
        if config.table:
            tree["table"] = config.table
        write_atomically(folder / "study.json", json.dumps(tree, indent=1).encode())
    if len(cells) > 1 and all(override.startswith("seed=") for cell in cells for override in cell):
        reports = [_read(config.run_folder / "report.json") for config in configs]
        results = [
            result
            for config, report in zip(configs, reports, strict=True)
            for result in scores_of_report(config.run_folder, report)
        ]
        tree["populations"] = by_population(results)
        for population, summary in tree["populations"].items():
            averages = [report["populations"][population]["average"] for report in reports]
            if shares := [average["out_of_range"] for average in averages if "out_of_range" in average]:
                summary["average"]["out_of_range"] = sum(shares) / len(shares)
        write_atomically(folder / "study.json", json.dumps(tree, indent=1).encode())
    if "table" in tree:
        write_table(folder)
    return tree


def _cell_config(preset: str, overrides: list[str], name: str) -> Config:
    """A cell's config; its folder is named by content, so that cells may be added or reordered."""
    config = load_config(preset, overrides)
    return config.model_copy(update={"runs": config.runs / name, "name": f"cell-{_content(config)[:12]}"})


def _content(config: Config) -> str:
    return unit_key(config.model_dump(mode="json", exclude={"name", "runs", "cells", "table"}))


def _finished(config: Config, content: str) -> dict[str, Any] | None:
    try:
        done, report = (_read(config.run_folder / name) for name in ("done.json", "report.json"))
    except (OSError, ValueError):
        return None
    return report if done.get("config") == content else None


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
