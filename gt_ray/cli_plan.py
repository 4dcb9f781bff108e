"""`gt-ray plan`: what a study takes on given GPUs, before any are rented."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from rich.console import Console
from rich.table import Column, Table

from gt_ray.config import Config
from gt_ray.curation.planner import plan_rows
from gt_ray.progress import say
from gt_ray.training.hours import Hours, Rates
from gt_ray.training.machines import GIB, machines
from gt_ray.training.planner import TrainingPlan, Way

MARK = {True: "fits", False: "no"}


def show_plan(config: Config, gpus: str, rates: Rates, as_json: bool) -> None:
    """Print a study's plan as tables, or as JSON.

    Raises:
        UserError: GPUs that are not known or too few, a model that is known by no config.
    """
    planned = machines(gpus)
    curation = plan_rows(config, planned.gpu.memory, planned.per_node)
    plan = TrainingPlan(config, planned, say)
    ways, best = plan.table(), plan.best()
    found = {
        "preset": config.preset,
        "gpus": {"count": planned.count, "kind": planned.gpu.name, "memory_bytes": planned.gpu.memory},
        "parameters": {**plan.shape.parts, "total": plan.shape.P},
        "curation": curation,
        "trainers": plan.placement.trainers,
        "llm_actors": plan.placement.llm_actors,
        "ways": [_of_way(way) for way in ways],
        "recommended": _of_way(best) if best else None,
        "overrides": _overrides(plan, best) if best else [],
        "cluster": planned.node_types(),
    }
    if best:
        hours = Hours(plan, best, rates)
        found |= {
            "stages": {name: vars(stage) for name, stage in hours.stages().items()},
            "sizes_bytes": hours.sizes(),
            "generation_s": hours.generation_s(graphed=True),
        }
    if as_json:
        print(json.dumps(found))
    else:
        _print(found, ways, best)


def _of_way(way: Way) -> dict[str, Any]:
    return {**vars(way), "total": way.total}


def _overrides(plan: TrainingPlan, way: Way) -> list[str]:
    """The config keys of a way, as the command line takes them."""
    placement = plan.placement
    values: dict[str, Any] = {
        "strategy": way.strategy,
        "accumulation": way.accumulation,
        "activation_checkpointing": way.checkpointing,
        "offload": way.offload,
        "workers": placement.trainers,
        "num_gpus": 1,
    }
    if placement.llm_actors:
        values["behaviour.workers"] = placement.llm_actors
    return [f"grad_transformer.training.{key}={str(value).lower()}" for key, value in values.items()]


def _print(found: Mapping[str, Any], ways: list[Way], best: Way | None) -> None:
    console = Console()
    gpus = f"{found['gpus']['count']} x {found['gpus']['kind']}"
    console.print(f"[bold]{found['preset']} on {gpus}[/], from configs alone: estimates, but parameters are exact")
    table = Table("part", "parameters", title="the Grad-Transformer")
    for name, count in found["parameters"].items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    rows = found["curation"]
    table = Table("fine-tunes", *(row["model"] for row in rows), title="curation")
    for name in list(rows[0])[1:]:
        table.add_row(name, *(row[name] for row in rows))
    console.print(table)
    console.print(_memory(found, ways))
    if best is None:
        console.print(f"[bold]No way fits {gpus}[/]: more of them, larger ones, or a smaller phi.")
    else:
        console.print(f"[bold]Recommended[/] ({_gib(best.total)} of {_gib(found['gpus']['memory_bytes'])} GiB a GPU):")
        print("  " + " ".join(found["overrides"]))
        _print_hours(console, found)
    print("# node types of cluster.yaml, for `ray up`; fill in node_config, and the keys of your provider")
    print(yaml.safe_dump(found["cluster"], sort_keys=False), end="")


def _memory(found: Mapping[str, Any], ways: list[Way]) -> Table:
    first = ways[0]
    passes = f"{found['trainers']} trainers, passes of {first.tuples} tuples" + (
        ", activation checkpointing" if first.checkpointing else ""
    )
    heads = [way.strategy + (" off" if way.offload else "") for way in ways]
    title, caption = f"training: GiB a GPU, {passes}", "fits: with a tenth of the GPU to spare; off: state offloaded"
    table = Table(Column("", no_wrap=True), *heads, title=title, caption=caption)
    for item in dict.fromkeys(item for way in ways for item in way.items):
        table.add_row(item, *(_gib(way.items[item]) if way.items.get(item) else "-" for way in ways))
    table.add_section()
    table.add_row("in all", *(_gib(way.total) for way in ways))
    table.add_row("in the machine", *(_gib(way.host) if way.host else "-" for way in ways))
    table.add_row("", *(MARK[way.fits] for way in ways))
    return table


def _print_hours(console: Console, found: Mapping[str, Any]) -> None:
    table = Table("stage", "GPU-hours", "hours", "how", title="time")
    for name, stage in found["stages"].items():
        table.add_row(name, f"{stage['gpu_hours']:,.1f}", f"{stage['wall_hours']:,.1f}", stage["how"])
    console.print(table)
    table = Table("what", "GiB", title="disk")
    for name, size in found["sizes_bytes"].items():
        table.add_row(name, _gib(size))
    console.print(table)
    console.print(f"The endpoint generates an adapter in {found['generation_s']:.2f} s on one GPU.")


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
