"""Progress bars: stage, rate and time left; quiet where the output is no terminal.

What bars and `say` tell is recorded, too, where a run's events are (events.py), quiet or not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gt_ray import events

console = Console(stderr=True, soft_wrap=True)


def quiet(on: bool) -> None:
    """Silence `say` and the bars."""
    console.quiet = on


def say(message: str) -> None:
    """One line for the person at the terminal, or for the log."""
    console.print(message, highlight=False, markup=False)
    events.say(message)


class _Rate(ProgressColumn):
    """How many a minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{60 * task.speed:.1f}/min" if task.speed else "")


class Bar:
    """A stage of known length."""

    def __init__(self, progress: Progress, stage: str, total: int, counts: events.Counts) -> None:
        self._progress, self._task = progress, progress.add_task(stage, total=total)
        self._counts = counts

    def advance(self, n: int = 1, error: str = "") -> None:
        """`n` more are done, with an `error` where they failed."""
        self._progress.advance(self._task, n)
        self._counts.advance(n, error)

    def skip(self, n: int) -> None:
        """`n` were done before the bar began: they say nothing about the rate."""
        self._progress.reset(self._task, completed=n)
        self._counts.skip(n)


@contextmanager
def bar(stage: str, total: int) -> Iterator[Bar]:
    """A progress bar with rate and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    hidden = not sys.stderr.isatty() or console.quiet
    with Progress(*columns, console=console, disable=hidden) as progress, events.counting(stage, total) as counts:
        yield Bar(progress, stage, total, counts)
