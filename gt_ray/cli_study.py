"""`gt-ray study`: the main job once per cell of a sweep; `gt-ray table`: what it gives, as the paper prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gt_ray import progress
from gt_ray.cli_options import Quiet
from gt_ray.config import load_config, preset_names, split_overrides
from gt_ray.errors import UserError


def study(
    preset: Annotated[
        str,
        typer.Option(
            "--preset", "-p", help=f"Preset, or a YAML file (`base`, `cells`, `grid`): {', '.join(preset_names())}"
        ),
    ] = "embedded",
    cell: Annotated[
        list[str] | None,
        typer.Option(help="Overrides of one cell, separated by spaces; repeat it for every cell. None: the preset's."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...", help="Config overrides of all cells; `grid={seed: [0, 1]}` is a sweep."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Study folder under `runs`; none: `study`, or a paper table's preset."),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(help="Most cells that run at a time; none: as many as the cluster has room for.", min=1),
    ] = None,
    max_gpu_hours: Annotated[
        float | None,
        typer.Option(help="Start no further work when so many are spent (without GPUs: core-hours).", min=0.0),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is left to do and what it takes.")] = False,
    gpus: Annotated[str, typer.Option(help="GPUs that --dry-run counts with.")] = "8xH100",
    quiet: Quiet = False,
) -> None:
    """Run the main job once per cell, a list of overrides over a base preset.

    What several cells need is done once; finished cells are skipped. Rerun to go on.
    """
    from gt_ray.studies.study import run_study

    progress.quiet(quiet)
    config = load_config(preset, overrides or [])
    name = name or (config.preset if config.table else "study")
    cells = [split_overrides(text) for text in cell or []]
    if dry_run:
        _print_plan(preset, overrides or [], cells, name, gpus, max_gpu_hours)
        return
    tree = run_study(preset, overrides or [], cells, name, parallel, max_gpu_hours)
    progress.say(f"report: {config.runs / name / 'report.html'}")
    if "table" in tree:
        table(config.runs / name)
    if "populations" in tree:
        from gt_ray.studies.report import print_populations

        print_populations(tree["populations"])


def _print_plan(
    preset: str, overrides: list[str], cells: list[list[str]], name: str, gpus: str, budget: float | None
) -> None:
    from gt_ray.studies.study import Sweep, cell_configs
    from gt_ray.studies.study_plan import plan_configs, plan_sweep

    cells = load_config(preset, overrides).sweep(cells)
    configs = cell_configs(preset, overrides, cells, name)
    spent = 0.0
    try:
        sweep = Sweep(preset, overrides, cells, name)
        lines, spent = plan_sweep(sweep, gpus), sweep.device_s() / 3600
    except UserError as error:
        progress.say(f"from configs alone, as if nothing were done: {error}")
        lines = plan_configs(configs, gpus)
    console = Console()
    title = f"study {name}: what is left, on {gpus}"
    grid = Table("", "to do", "after", "GPU-hours", "hours", "as measured", title=title)
    for line in lines:
        to_do = "{} of {}".format(*line.fine_tunes) if line.fine_tunes else "train, generate, score"
        hours = map(_hours, (line.gpu_hours, line.wall_hours, line.measured))
        grid.add_row(line.name, to_do, line.after, *hours)
    known = [line.gpu_hours for line in lines if line.gpu_hours is not None]
    measured = [line.measured for line in lines if line.measured is not None]
    grid.add_section()
    least = ["at least " * (len(found) < len(lines)) for found in (known, measured)]
    totals = [text + _hours(sum(found)) if found else "-" for text, found in zip(least, (known, measured), strict=True)]
    grid.add_row("in all", "", "", totals[0], "", totals[1])
    console.print(grid)
    console.print(
        "GPU-hours and hours are those of `gt-ray plan`, a dash where training does not fit; as measured: device-hours "
        "by fine-tunes of the same kind in the store, or by finished cells. Starts are not counted."
    )
    for n, cell in enumerate(cells):
        console.print(f"cell {n + 1}: {' '.join(cell) or 'the preset as it is'}", highlight=False, markup=False)
    if budget is not None and spent + sum(known) > budget:
        console.print(
            f"The budget of {budget:g} GPU-hours, of which {_hours(spent)} are spent, will not last; the study goes on "
            "with a larger one."
        )


def _hours(hours: float | None) -> str:
    if hours is None:
        return "-"
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def table(
    folder: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of a study, such as `runs/table1`.")],
) -> None:
    """Print a study as the table of the paper that its preset names, as far as its cells are finished."""
    from gt_ray.studies.paper import paper_table
    from gt_ray.studies.sheets import print_sheets

    found = paper_table(folder)
    print_sheets(found.title, found.sheets, found.notes)
