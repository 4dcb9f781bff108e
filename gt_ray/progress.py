"""Progress bars: stage, rate and time left; quiet where the output is no terminal."""

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

console = Console(stderr=True, soft_wrap=True)


def quiet(on: bool) -> None:
    """Silence `say` and the bars."""
    console.quiet = on


def say(message: str) -> None:
    """One line for the person at the terminal, or for the log."""
    console.print(message, highlight=False, markup=False)


class _Rate(ProgressColumn):
    """How many a minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{60 * task.speed:.1f}/min" if task.speed else "")


class Bar:
    """A stage of known length."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._task = progress, progress.add_task(stage, total=total)

    def advance(self, n: int = 1) -> None:
        """`n` more are done."""
        self._progress.advance(self._task, n)


@contextmanager
def bar(stage: str, total: int) -> Iterator[Bar]:
    """A progress bar with rate and time left."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty() or console.quiet,
    ) as progress:
        yield Bar(progress, stage, total)
