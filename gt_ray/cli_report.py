"""`gt-ray report`: a study, or a run, as tables and pages; two studies side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gt_ray import progress
from gt_ray.errors import UserError


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="STUDY", help="Folder of a study or of a run, such as `runs/sizes`.")
    ],
    other: Annotated[
        Path | None, typer.Argument(metavar="STUDY2", help="Folder of another study, to compare the first one with.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No tables, only files.")] = False,
) -> None:
    """Print the tables of a study, finished or not, and write `report.html`, `report.md` and `plots/` into its folder.

    Of a run it writes `report.html` anew. With two studies it compares the cells that have the same settings, and
    writes `compare-<other>.html` and `.md` into the first one's folder.
    """
    progress.quiet(quiet)
    if other is not None:
        from gt_ray.studies.compare import print_comparison, write_comparison

        comparison = write_comparison(folder, other)
        if not quiet:
            print_comparison(comparison)
    elif (folder / "study.json").is_file():
        from gt_ray.studies.study_report import print_study, write_study_report

        view = write_study_report(folder)
        if not quiet:
            print_study(view)
            progress.say(f"report: {folder / 'report.html'}")
    elif (folder / "report.json").is_file():
        from gt_ray.studies.report import print_table, write_html

        write_html(folder)
        if not quiet:
            print_table(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    else:
        raise UserError(
            f"{folder} holds neither study.json nor report.json; name a study's or a run's folder, "
            "or run `gt-ray study` or `gt-ray pipeline` first"
        )
