"""Bars and messages: shown at a terminal, recorded with a run, silent where people asked for quiet."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gt_ray import progress
from gt_ray.events import events_file, recording
from gt_ray.progress import bar, say


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal that keeps what is shown."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    return screen


def recorded(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in events_file(run).read_text().splitlines()]


def test_a_bar_shows_its_stage_and_how_many_are_done(terminal: io.StringIO) -> None:
    with bar("curate", 5) as one:
        one.advance()
        one.advance(2, error="no memory")
    assert "curate" in terminal.getvalue() and "3/5" in terminal.getvalue()


def test_what_was_done_before_is_shown_as_done(terminal: io.StringIO) -> None:
    with bar("train", 100) as one:
        one.skip(60)
        one.advance(5)
        one.advance(-3)
    assert "62/100" in terminal.getvalue()


def test_the_bar_and_the_events_come_from_the_same_calls(terminal: io.StringIO, tmp_path: Path) -> None:
    with recording(tmp_path), bar("train", 10) as one:
        one.skip(4)
        one.advance(2, error="no memory")
        one.advance()
    last = [event for event in recorded(tmp_path) if event["event"] == "progress"][-1]
    told = {name: last[name] for name in ("stage", "done", "total", "skipped", "failed")}
    assert told == {"stage": "train", "done": 7, "total": 10, "skipped": 4, "failed": 2}
    assert "7/10" in terminal.getvalue()


def test_quiet_is_for_people_and_not_for_the_record(terminal: io.StringIO, tmp_path: Path) -> None:
    progress.quiet(True)
    with recording(tmp_path), bar("curate", 2) as one:
        one.advance(2)
        say("half done")
    assert terminal.getvalue() == ""
    assert [event["event"] for event in recorded(tmp_path)][-1] == "end"
    assert [event["note"] for event in recorded(tmp_path) if event["event"] == "say"] == ["half done"]


def test_where_there_is_no_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("curate", 2) as one:
        one.advance(2)
    say("[bold]not markup[/bold]")
    assert capsys.readouterr().err == "[bold]not markup[/bold]\n"
