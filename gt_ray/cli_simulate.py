"""`gt-ray simulate`: how long a study takes and what it costs on 1 to 1,000 GPUs, and what limits it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from gt_ray import progress
from gt_ray.cli_options import AsJson, Overrides, Preset, Quiet
from gt_ray.config import load_config

if TYPE_CHECKING:
    from gt_ray.studies.simulated_study import Interval, Prediction

PRICE, SPOT_PRICE = 2.5, 1.25
"""Of a GPU-hour on demand and on spot: made up, so that the table has a column; state your own."""
PREEMPT_HOURS = 12.0
"""Mean life of a spot node where none is stated; made up as well."""
WIDEST = 200
"""Columns of an output that is no terminal."""


def simulate(
    preset: Preset = "qwen2.5-0.5b-to-32b",
    overrides: Overrides = None,
    gpus: Annotated[
        list[str] | None, typer.Option(help="How many GPUs of which kind; repeat it. None: 8 to 1,000 H100.")
    ] = None,
    spot: Annotated[
        bool, typer.Option("--spot", help=f"All nodes on spot: preempted after {PREEMPT_HOURS:g} h on average.")
    ] = False,
    preempt_hours: Annotated[
        float | None, typer.Option(help="Mean life of a node by preemption; implies --spot.", min=0.01)
    ] = None,
    failure_hours: Annotated[float | None, typer.Option(help="Mean life of a node by failures.", min=0.01)] = 2000.0,
    price: Annotated[
        float | None,
        typer.Option(help=f"Of a GPU-hour, yours to state; assumed: {PRICE}, on spot {SPOT_PRICE}.", min=0.0),
    ] = None,
    autoscale: Annotated[
        bool, typer.Option("--autoscale", help="Nodes without work for 5 minutes go, and come back for more.")
    ] = False,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Clients' and public fine-tunes beside curation, as `gt-ray study` does.")
    ] = False,
    broadcast: Annotated[
        bool, typer.Option("--broadcast", help="Weights go from node to node; else each actor reads storage.")
    ] = False,
    storage: Annotated[float, typer.Option(help="GB a second of the store, over all actors.", min=1e-3)] = 10.0,
    measured: Annotated[
        Path | None, typer.Option(help="Run folder whose units' times count in place of the plan's.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of the model; intervals are over them.", min=1)] = 5,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict makespan and cost of a study by a model of its schedule, for each number of GPUs.

    Seconds of fine-tunes, training and scoring are the estimates of `gt-ray plan`; prices are yours. `limit` is what
    most GPU-time goes to: `computing` (more GPUs help), `last block` (none is left to give out), `training` (of the
    Grad-Transformer, on a few GPUs), `storage`, `scheduling`, `starting`, `lost` (to deaths), `away`.
    """
    from gt_ray.studies.simulated_study import SimulatedStudy, predict
    from gt_ray.studies.simulated_study import measured as measured_of
    from gt_ray.studies.simulation import Conditions
    from gt_ray.training.machines import machines

    progress.quiet(quiet or as_json)
    preempt_hours = preempt_hours or (PREEMPT_HOURS if spot else None)
    rate = price if price is not None else (SPOT_PRICE if preempt_hours else PRICE)
    config = load_config(preset, overrides or [])
    times = measured_of(measured) if measured else None
    found = []
    for planned in [machines(text) for text in gpus or [f"{n}xH100" for n in (8, 16, 32, 64, 128, 256, 512, 1000)]]:
        progress.say(f"simulate: {planned.count} x {planned.gpu.name}")
        conditions = Conditions(
            node_gpus=planned.per_node,
            storage_bytes_per_s=storage * 1e9,
            broadcast=broadcast,
            node_hours=failure_hours,
            preempt_hours=preempt_hours,
            idle_timeout_s=300.0 if autoscale else None,
            **({"straggler_sigma": times.sigma} if times else {}),
        )
        stages = SimulatedStudy(config, planned, times=times).stages(overlap)
        found.append((planned.gpu.name, predict(stages, planned.count, conditions, rate, seeds)))
    if as_json:
        print(json.dumps({"preset": config.preset, "price": rate, "rows": [_row(*one) for one in found]}))
    else:
        _print(config.preset, rate, found)


def _row(kind: str, one: Prediction) -> dict[str, Any]:
    return {"kind": kind, "limit": one.limit, **asdict(one)}


def _print(preset: str, price: float, found: Sequence[tuple[str, Prediction]]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDEST)
    of_all, of_stages = (
        Table(Column("GPUs", no_wrap=True), *(Column(name, justify="right") for name in names), title=title)
        for names, title in (
            (("hours", "GPU-hours", "lost", "cost", "computing", "idle", "limit"), f"{preset} by its schedule"),
            (list(found[0][1].stage_hours), "hours of each stage"),
        )
    )
    of_all.caption = f"median over seeds (5th to 95th percentile); {price:g} a GPU-hour, stated or assumed"
    for kind, one in found:
        name = f"{one.gpus} x {kind}"
        idle = sum(share for cause, share in one.shares.items() if cause in ("last block", "training", "away"))
        of_all.add_row(
            name,
            _span(one.makespan_hours),
            f"{one.gpu_hours.median:,.0f}",
            f"{one.lost_gpu_hours:,.0f}",
            f"{one.cost.median:,.0f}",
            f"{one.shares['computing']:.0%}",
            f"{idle:.0%}",
            one.limit,
        )
        of_stages.add_row(name, *(f"{hours:,.1f}" for hours in one.stage_hours.values()))
    console.print(of_all, of_stages)


def _span(one: Interval) -> str:
    if f"{one.low:.1f}" == f"{one.high:.1f}":
        return f"{one.median:,.1f}"
    return f"{one.median:,.1f} ({one.low:,.1f} to {one.high:,.1f})"
