"""`gt-ray report`: of a study, of a run, of two studies, of neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from gt_ray.cli import main
from tests.studies.made_up import made_up_study, rising


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_of_a_study_a_run_two_studies_and_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = made_up_study(tmp_path / "a", ["curation.samples=32", "curation.samples=64"], rising)
    other = made_up_study(tmp_path / "b", ["curation.samples=64"], rising)
    assert call(study) == 0
    out = capsys.readouterr().out
    assert "Study a" in out and "samples of a shadow" in out and "116 clients" in out
    assert all((study / name).exists() for name in ("report.html", "report.md", "plots"))
    assert call(study, other) == 0
    assert "a against b" in capsys.readouterr().out and (study / "compare-b.html").is_file()
    (study / "cell-0" / "report.html").unlink()
    assert call(study / "cell-0") == 0
    assert "gain recovered" in capsys.readouterr().out and (study / "cell-0" / "report.html").is_file()
    assert call(study, "--quiet") == 0 and not capsys.readouterr().out
    assert call(tmp_path) == 2
    assert "neither study.json nor report.json" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    assert "Example" in capsys.readouterr().out
