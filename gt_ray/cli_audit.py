"""`gt-ray audit`: what an attacker can tell of the rows behind an update, beside what its mechanism promises."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from gt_ray import progress
from gt_ray.cli_options import AsJson, Overrides, Preset, Quiet
from gt_ray.config import load_config


def audit(
    task: Annotated[str, typer.Option(help="Task of the rows.")],
    preset: Preset = "embedded",
    overrides: Overrides = None,
    models: Annotated[int, typer.Option(help="Fine-tunes by each mechanism, each on half of the rows.")] = 32,
    rows: Annotated[int, typer.Option(help="Rows that are in or out by a coin for each model.")] = 256,
    canaries: Annotated[float, typer.Option(help="Share of the rows that have the target of another row.")] = 0.5,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="Of DP-SGD to audit; repeat it. None: the preset's `clients.mechanisms`, or else 1 and 4."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Attack TinyLM updates by membership inference, with and without differential privacy.

    Prints how well members are told from other rows, and the epsilon that this proves at least (95 % confidence) beside
    the stated one; writes `audit.json` in the run folder. Rerun to resume.
    """
    from gt_ray.studies.audit import AuditPlan, run_audit

    progress.quiet(quiet or as_json)
    plan = AuditPlan(task, models, rows, canaries, tuple(epsilon or ()))
    report = run_audit(load_config(preset, overrides or []), plan)
    if as_json:
        print(json.dumps(report))
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    domain = f", domain {report['domain']}" if report["domain"] else ""
    table = Table(
        Column("mechanism", no_wrap=True),
        "stated epsilon",
        "loss AUC",
        "LiRA AUC",
        "TPR at 1 % FPR",
        "epsilon at least",
        "by rates",
        title=f"{report['task']}{domain}: {report['models']} models, {report['rows']} rows",
        caption="AUC: 0.5 tells nothing. loss: compared with the base model's. Bounds hold at 95 % confidence; that by "
        "rates takes the rows of a model for independent, which they are not.",
    )
    for one in report["mechanisms"]:
        ratio = one["attacks"]["likelihood_ratio"]
        table.add_row(
            one["label"],
            f"{one['stated']['epsilon']:g}" if "epsilon" in one["stated"] else "none",
            _area(one["attacks"]["calibrated"]),
            _area(ratio),
            f"{100 * ratio['tpr']:.1f} %",
            f"{one['bounds']['guesses']['epsilon']:.2f}",
            f"{one['bounds']['rates']['epsilon']:.2f}",
        )
    console.print(table)
    for one in report["mechanisms"]:
        if one["epsilon_at_least"] > one["stated"].get("epsilon", float("inf")):
            console.print(
                f"[bold red]{one['label']}: more was leaked than is stated[/]; such a bound is wrong in 5 % of audits"
            )


def _area(attack: dict[str, Any]) -> str:
    low, high = attack["auc_interval"]
    return f"{attack['auc']:.2f} ({low:.2f}-{high:.2f})"
