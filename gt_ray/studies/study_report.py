"""The report of a study: `report.html`, a page that needs nothing beside itself, `report.md`, and `plots/*.png`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gt_ray.studies.plots import Chart
from gt_ray.studies.report import render
from gt_ray.studies.sheets import markdown, plain, print_sheets
from gt_ray.studies.study_view import StudyView, study_view
from gt_ray.updates.files import write_atomically

PLOTS = "plots"
MADE_FROM = "Scores in percent, means over clients; in brackets 95 % intervals."


def write_study_report(folder: Path) -> StudyView:
    """Write the report of a study, finished or not, beside its `study.json`; plots of earlier reports are removed.

    Raises:
        UserError: there is no such study, a file of it is damaged, or matplotlib is not installed.
    """
    view = study_view(folder)
    page = render("study.html.jinja", title=view.title, view=view, charts_of=_drawn, made_from=MADE_FROM)
    names = write_plots(folder / PLOTS, view.charts)
    write_atomically(folder / "report.md", _markdown(view, names).encode())
    write_atomically(folder / "report.html", page.encode())
    return view


def print_study(view: StudyView) -> None:
    """Print the tables of a study."""
    notes = [*view.notes, *view.fit_notes, *view.unfitted, *view.time_notes]
    print_sheets(f"{view.title}: {view.lead}", view.sheets, notes)


def write_plots(folder: Path, charts: Mapping[str, Chart]) -> dict[str, str]:
    """Write charts as PNG files; returns title -> name of the file."""
    names = {title: f"{number:02}-{_slug(title)}.png" for number, title in enumerate(charts, 1)}
    for title, chart in charts.items():
        write_atomically(folder / names[title], chart.png())
    for file in folder.glob("*.png"):
        if file.name not in names.values():
            file.unlink()
    return names


def _drawn(charts: Mapping[str, Chart]) -> dict[str, str]:
    return {title: chart.svg() for title, chart in charts.items()}


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]


def _markdown(view: StudyView, names: Mapping[str, str]) -> str:
    notes = [MADE_FROM, *view.notes, *view.fit_notes, *view.unfitted, *view.time_notes]
    parts = [markdown(view.title, view.sheets, notes)]
    parts[0] = parts[0].replace("\n\n", f"\n\n{plain(view.lead)}\n\n", 1)
    for section, charts in view.sections.items():
        captions = {title: re.sub(r"[][*]", "", plain(title)) for title in charts}
        pictures = [f"**{caption}**\n\n![{caption}]({PLOTS}/{names[title]})" for title, caption in captions.items()]
        parts.append("\n\n".join([f"## {section}", *pictures]) + "\n")
    lines = [f"    {view.command}", ""]
    for number, sources in enumerate(view.sources, 1):
        for source in sources:
            lines.append(f"- Row {number}, seed {source.seed}: [report]({source.page}), [config]({source.config})")
            lines += ["", f"      {source.command}", ""]
    parts.append("\n".join(["## How it was made", "", *lines]).rstrip() + "\n")
    return "\n".join(parts)
