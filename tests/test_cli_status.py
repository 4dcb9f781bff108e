"""`gt-ray status`: a table, a table that follows, JSON, a page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from gt_ray import cli_status
from tests.studies.watched import STAGE_S, T0, finished, make_run, make_study, started, write_events
from tests.test_cli import exit_code


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("time.time", lambda: T0 + 200)
    return make_study(tmp_path / "runs" / "sizes")


def test_the_table_has_a_line_for_each_cell_and_stage(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("status", str(study)) == 0
    out = capsys.readouterr().out
    assert out.startswith("study sizes: running; 1 done, 1 failed, 1 running, 1 waiting of 4 cells; started ")
    words = [line.split() for line in out.splitlines()]
    train = "train running 60 of 100 about 20 s 120.0/min 40 30 s".split()
    assert ["seed=4", "waiting"] in words and train in words
    assert "seed=2: curate: no <b>memory</b>" in out.splitlines()


def test_json_is_one_object_a_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("status", str(study), "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert [run["state"] for run in json.loads(line)["runs"]] == ["done", "failed", "running", "waiting"]


def test_markup_in_names_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", *finished(0, {**STAGE_S, "[red]x[/red]": 1.0}))
    assert exit_code("status", str(run)) == 0
    assert "[red]x[/red]" in capsys.readouterr().out


def test_watching_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", started(0, "curate"))
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        write_events(run, *([(5, "curate", "alive")] if len(looks) < 3 else finished(6, STAGE_S)))

    monkeypatch.setattr(cli_status.time, "sleep", sleep)
    assert exit_code("status", str(run), "--watch", "--every", "0.5") == 0
    assert looks == [0.5] * 3
    assert capsys.readouterr().out.startswith("run run: done")


def test_a_folder_that_is_no_run_exits_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for how in ([], ["--watch"], ["--json"], ["--serve", "0"]):
        assert exit_code("status", str(tmp_path / "nowhere"), *how) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and "neither a run nor a study" in err and err.count("\n") == 1


def test_one_way_at_a_time(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("status", str(study), "--watch", "--json") == 2
    assert "give one of them" in capsys.readouterr().err


def test_the_page_is_served_until_ctrl_c(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", started(0, "curate"))
    command = [sys.executable, "-m", "gt_ray.cli", "status", str(run), "--serve", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[1]
        with urllib.request.urlopen(url) as answer:
            assert "<h1>run</h1>" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == 0
