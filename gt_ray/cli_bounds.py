"""`gt-ray bounds`: what section 5 promises of finished runs, beside what they do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gt_ray.config import Config
from gt_ray.studies.facts import bounds_of

WIDEST = 10_000
"""Columns of an output that is no terminal."""


def show_bounds(configs: Sequence[Config], rows: int, loss_bound: float | None, as_json: bool) -> None:
    """Measure runs one after the other and print them in one table, or as JSON, a list where there are several.

    Raises:
        UserError: a run is not there.
    """
    from gt_ray.studies.bounds import run_bounds

    found = [run_bounds(config, rows, loss_bound) for config in configs]
    if as_json:
        print(json.dumps(found[0] if len(found) == 1 else found))
    else:
        _print(found)


def _print(found: Sequence[Mapping[str, Any]]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=WIDEST)
    facts = [bounds_of(one) for one in found]
    several = len(found) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for number, name in enumerate((["run"] if several else []) + facts[0].columns):
        table.add_column(name, justify="left" if number <= several else "right", overflow="fold")
    for i, one in enumerate(facts, 1):
        for cells in one.rows:
            table.add_row(*([str(i)] if several else []), *cells)
        table.add_section()
    console.print(table)
    for i, one in enumerate(facts, 1):
        for note in one.notes:
            console.print(f"({i}) {note}" if several else note)
