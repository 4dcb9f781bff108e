"""What is left of a study and what it takes, before it is run: `gt-ray study --dry-run`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from gt_ray.config import Config, ModelSettings
from gt_ray.curation.jobs import SIDES, Side, model_settings
from gt_ray.progress import bar
from gt_ray.studies.graph import Node, graph_of
from gt_ray.studies.study import OF_UNITS, Sweep, unit_device_s
from gt_ray.training.hours import Hours, Rates
from gt_ray.training.machines import machines
from gt_ray.training.planner import TrainingPlan
from gt_ray.updates.store import unit_key

OF_CELL = ("training, Eq. 10", "training on behaviour", "baselines", "evaluation")
"""Stages of a plan that a cell does; the others are fine-tunes, of which it may share some."""


@dataclass(frozen=True)
class Line:
    """A node of a study's graph.

    Attributes:
        fine_tunes: that are missing, and all of it; none of a cell.
        gpu_hours: by the planner; none where the training does not fit these GPUs.
        wall_hours: with all of them at work for it.
        measured: device-hours by fine-tunes of the same kind that the store has, or by finished cells.
    """

    name: str
    fine_tunes: tuple[int, int] | None
    after: str
    gpu_hours: float | None
    wall_hours: float | None
    measured: float | None = None


@dataclass(frozen=True)
class FineTune:
    """What a plan has to know of one.

    Attributes:
        kind: those of one kind take equally long.
    """

    model: ModelSettings
    kind: str = ""


def plan_sweep(sweep: Sweep, gpus: str) -> list[Line]:
    """A line for each node that is left, in order.

    Raises:
        UserError: GPUs that are not known, a model that is known by no config.
    """
    fine_tunes, missing = {}, set()
    for study, jobs in zip(sweep.studies, sweep.jobs, strict=True):
        for key, job in jobs.items():
            kind = json.dumps([job.made_by["root"], job.made_by["fine_tune"]], sort_keys=True)
            fine_tunes[key] = FineTune(model_settings(study.config, job.side), kind)
    left = sweep.left()
    for node in left:
        missing |= set(sweep.studies[node.cell].store.missing(list(node.keys)))
    known = unit_device_s(sweep.studies[0].store, list(fine_tunes))
    found: dict[str, list[float]] = {}
    for key, seconds in known.items():
        if seconds is not None:
            found.setdefault(fine_tunes[key].kind, []).append(seconds)
    seen = {kind: sum(seconds) / len(seconds) for kind, seconds in found.items()}
    cells = [
        sum(seconds for stage, seconds in report.get("device_s", {}).items() if stage not in OF_UNITS)
        for report in sweep.reports.values()
    ]
    return _lines(left, fine_tunes, missing, gpus, seen, sum(cells) / len(cells) if cells else None)


def plan_configs(configs: Sequence[Config], gpus: str) -> list[Line]:
    """The same from configs alone, where models or rows are not at hand: all is to be done.

    Raises:
        UserError: GPUs that are not known, a model that is known by no config.
    """
    jobs = [_counted(config) for config in configs]
    fine_tunes = {key: fine_tune for own in jobs for key, fine_tune in own.items()}
    return _lines(graph_of(configs, jobs), fine_tunes, fine_tunes, gpus, {}, None)


def _counted(config: Config) -> dict[str, FineTune]:
    """As many fine-tunes as a cell has, under keys that two cells share where they would share the units."""
    curation, clients, data = (
        getattr(config, name).model_dump(mode="json") for name in ("curation", "clients", "data")
    )
    found: dict[str, FineTune] = {}

    def add(side: Side, n: int, **content: object) -> None:
        model = model_settings(config, side)
        known = {"model": model.model_dump(mode="json"), "data": data, "seed": config.seed, **content}
        found.update((unit_key({**known, "number": number}), FineTune(model)) for number in range(n))

    for name in ("shadows", "tinylm_shadows", "workers", "adapters_at_once"):
        del curation[name]
    most = config.curation.shadows + config.curation.tinylm_shadows
    per_task = config.clients.per_task * len(config.clients.populations)
    for side in SIDES:
        add(side, most if side == "tinylm" else config.curation.shadows, curation=curation)
        mechanisms = max(1, len(config.clients.mechanisms)) if side == "tinylm" else 1
        add(side, per_task * mechanisms * len(config.data.tasks), clients=clients)
    if config.clients.joint != "none":
        add("llm", len(config.data.tasks) * len(config.clients.populations), unions=clients)
    if config.evaluation.controls:
        add("llm", len(config.data.tasks), public=True)
    return found


def _lines(
    graph: Sequence[Node],
    fine_tunes: Mapping[str, FineTune],
    missing: Collection[str],
    gpus: str,
    seen: Mapping[str, float],
    cell_s: float | None,
) -> list[Line]:
    """
    Args:
        seen: device-seconds of a fine-tune by kind.
        cell_s: device-seconds of a cell.
    """
    hours_of, lines = _planner(gpus), []
    with bar("plan", len(graph)) as progress:
        for node in graph:
            hours, after = hours_of(node.config), ", ".join(node.needs)
            if node.keys:
                wanted = [fine_tunes[key] for key in node.keys if key in missing]
                gpu_hours = wall_hours = measured = None
                if hours:
                    counts = Counter(one.model for one in wanted)
                    gpu_hours = sum(n * hours.fine_tune_s(model) for model, n in counts.items()) / 3600
                    wall_hours = gpu_hours / hours.plan.machines.count
                if all(one.kind in seen for one in wanted):
                    measured = sum(seen[one.kind] for one in wanted) / 3600
                lines.append(Line(node.name, (len(wanted), len(node.keys)), after, gpu_hours, wall_hours, measured))
            else:
                stages = [stage for name, stage in hours.stages().items() if name in OF_CELL] if hours else []
                gpu_hours = sum(stage.gpu_hours for stage in stages) if hours else None
                wall_hours = sum(stage.wall_hours for stage in stages) if hours else None
                measured = None if cell_s is None else cell_s / 3600
                lines.append(Line(node.name, None, after, gpu_hours, wall_hours, measured))
            progress.advance()
    return lines


def _planner(gpus: str) -> Callable[[Config], Hours | None]:
    """The hours of a config's stages on these GPUs; none where its training does not fit them."""
    planned = machines(gpus)

    @cache
    def of(plain: str) -> Hours | None:
        plan = TrainingPlan(Config.model_validate_json(plain), planned, lambda _: None)
        way = plan.best()
        return Hours(plan, way, Rates()) if way else None

    # Cells that differ in what a plan does not depend on share one.
    without: dict[str, Any] = {"seed": 0, "name": None, "cells": (), "grid": {}}
    return lambda config: of(config.model_copy(update=without).model_dump_json())
