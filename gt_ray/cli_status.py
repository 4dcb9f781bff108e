"""`gt-ray status`: how a study or a run stands, once, as it changes, for machines, or as a page."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gt_ray import progress
from gt_ray.cli_options import AsJson
from gt_ray.errors import UserError

STYLES = {"running": "bold blue", "done": "green", "failed": "bold red", "interrupted": "yellow", "waiting": "dim"}
WIDEST = 10_000
"""Columns of an output that is no terminal."""


def status(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run or a study, such as `runs/embedded-seed0`.")],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again until it ends.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks of --watch.", min=0.1)] = 3.0,
    serve: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            help="Show it as a page on http://127.0.0.1:PORT (0: a free port) until Ctrl-C.",
            min=0,
            max=65535,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a study or a run stands: stages, rates, queue, failures, time left; from its folder alone."""
    from gt_ray.studies.status import read_status

    if watch + as_json + (serve is not None) > 1:
        raise UserError("--watch, --json and --serve each show the status in a way of their own; give one of them")
    if serve is not None:
        _serve(folder, serve)
    elif as_json:
        print(json.dumps(read_status(folder).as_json()))
    elif watch:
        _watch(folder, every)
    else:
        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console = Console(highlight=False, markup=False, emoji=False, width=WIDEST)
        console.print(_shown(folder)[0])


def _shown(folder: Path) -> tuple[Group, bool]:
    """The status for a terminal, and whether nothing more is to come."""
    from gt_ray.studies.status import read_status
    from gt_ray.studies.status_view import failures, headline, lines, said

    found = read_status(folder)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, head in enumerate(("", "state", "done", "left", "rate", "queue", "failed", "took")):
        table.add_column(head, justify="left" if number < 2 else "right", overflow="fold", no_wrap=number > 0)
    for line in lines(found):
        name = Text("  " * line.depth + line.name, style="" if line.depth else "bold")
        cells = (line.done, line.left, line.rate, line.queue, line.failed, line.took)
        table.add_row(name, Text(line.state, style=STYLES[line.state]), *map(Text, cells))
    told = [Text(f"{run}: {text}", style="red") for run, text in failures(found)]
    told += [Text(f"{run}: {text}", style="dim") for run, text in said(found)]
    return Group(Text(headline(found)), Text(), table, *([Text(), *told] if told else [])), found.ended


def _watch(folder: Path, every: float) -> None:
    shown, ended = _shown(folder)
    console = Console(highlight=False, markup=False, emoji=False)
    with suppress(KeyboardInterrupt), Live(shown, console=console, auto_refresh=False) as live:
        while not ended:
            time.sleep(every)
            shown, ended = _shown(folder)
            live.update(shown, refresh=True)


def _serve(folder: Path, port: int) -> None:
    from gt_ray.studies.status_server import serve

    with suppress(KeyboardInterrupt), serve(folder, port) as server:
        progress.say(f"status: http://127.0.0.1:{server.server_port} (and /status.json); Ctrl-C ends it")
        server.serve_forever()
