"""How a study and a run stand, from folders as they are while something runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gt_ray.errors import UserError
from gt_ray.events import events_file
from gt_ray.studies.stages import GONE_S
from gt_ray.studies.status import SAID, SHARED, SHARED_RUN, STAGES, Run, Status, read_status
from tests.studies.watched import (
    ELSEWHERE,
    GONE,
    ME,
    STAGE_S,
    T0,
    entry,
    finished,
    make_cell,
    make_run,
    make_study,
    progress,
    started,
    write_events,
    write_study,
)


def by_name(status: Status) -> dict[str, Run]:
    return {run.name: run for run in status.runs}


@pytest.fixture
def study(tmp_path: Path) -> Status:
    return read_status(make_study(tmp_path / "runs" / "sizes"), T0 + 200)


def test_a_study_has_a_run_for_each_cell(study: Status) -> None:
    assert [(run.name, run.state) for run in study.runs] == [
        ("seed=1", "done"),
        ("seed=2", "failed"),
        ("seed=3", "running"),
        ("seed=4", "waiting"),
    ]
    assert (study.kind, study.name, study.state, study.ended) == ("study", "sizes", "running", False)
    assert (study.started, study.elapsed_s) == (T0, 200.0)
    runs = by_name(study)
    assert runs["seed=1"].overrides == ("seed=1",) and str(runs["seed=1"].folder).startswith("cell-")
    assert runs["seed=2"].failures == ("curate: no <b>memory</b>",)  # study.json says the same: once is enough
    assert runs["seed=4"] == Run("seed=4", "waiting", overrides=("seed=4",))


def test_the_stages_of_a_cell_are_those_of_the_main_job(study: Status) -> None:
    stages = by_name(study)["seed=3"].stages
    assert [stage.name for stage in stages] == [stage for stage in STAGES if stage != "baselines"]
    assert [stage.state for stage in stages] == ["done", "running", *["waiting"] * 5]
    assert (stages[1].done, stages[1].queue) == (60, 40) and stages[1].rate_per_min == pytest.approx(120)


def test_baselines_are_a_stage_where_the_config_asks_for_some(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", overrides=("evaluation.baselines=[w2s]",))
    assert [stage.name for stage in read_status(run).runs[0].stages] == list(STAGES)


def test_time_left_of_a_study_is_what_finished_cells_tell(study: Status) -> None:
    # Of the one that trains: 40 steps at 2 a second, then what these stages took in the finished cell.
    rest = 20 + sum(STAGE_S[stage] for stage in list(STAGE_S)[2:])
    assert by_name(study)["seed=3"].left_s == pytest.approx(rest)
    # One runs at a time, and another cell waits.
    assert study.left_s == pytest.approx(rest + sum(STAGE_S.values()))


def test_cells_at_once_share_what_waits_and_none_ends_before_itself(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "runs" / "sizes")
    make_cell(folder, ("seed=5",), started(195, "curate"), progress(195, "curate", 0, 9))
    tree = json.loads((folder / "study.json").read_text())
    write_study(folder, **{**tree, "waiting": [["seed=3"], ["seed=4"], ["seed=5"]]})
    found = read_status(folder, T0 + 200)
    whole = sum(STAGE_S.values())
    assert by_name(found)["seed=5"].left_s == pytest.approx(whole - 5)  # no rate yet: by the finished cell
    assert found.left_s == pytest.approx((80 + (whole - 5) + whole) / 2)
    write_study(folder, **{**tree, "waiting": [["seed=3"], ["seed=5"]]})
    assert read_status(folder, T0 + 200).left_s == pytest.approx(whole - 5)


def test_without_a_finished_cell_time_left_is_not_known(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "runs" / "sizes")
    tree = json.loads((folder / "study.json").read_text())
    write_study(folder, **{**tree, "cells": []})
    found = read_status(folder, T0 + 200)
    assert found.left_s is None and by_name(found)["seed=3"].left_s is None
    assert by_name(found)["seed=3"].stages[1].left_s == pytest.approx(20)  # the stage's own is


def test_of_a_study_that_nobody_runs_time_left_is_not_known(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sizes"
    done = make_cell(folder, ("seed=1",), *finished(0, STAGE_S))
    write_study(folder, cells=[entry(done, ("seed=1",))], waiting=[["seed=2"]])
    end = sum(STAGE_S.values())
    found = read_status(folder, T0 + end + 60)
    assert (found.state, found.left_s, found.elapsed_s) == ("waiting", None, end)
    found = read_status(folder, T0 + end + 1000)
    assert (found.state, found.ended) == ("interrupted", True)


def test_cells_that_study_json_does_not_name_yet(tmp_path: Path) -> None:
    """A study that writes a cell down when it is finished, at its first cell."""
    folder = tmp_path / "runs" / "sizes"
    cell = make_cell(folder, ("seed=1",), started(0, "curate"))
    found = read_status(folder, T0 + 5)
    assert found.kind == "study" and [(run.name, run.state) for run in found.runs] == [(cell.name, "running")]
    assert found.runs[0].overrides is None


def test_folders_of_an_earlier_study_of_the_name_are_left_out_once_all_cells_are_named(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "runs" / "sizes")
    make_cell(folder, ("seed=9",), *finished(0, STAGE_S, GONE))
    assert "seed=4" in by_name(read_status(folder, T0 + 200))
    assert len(read_status(folder, T0 + 200).runs) == 4
    make_cell(folder, ("seed=10",), started(190, "curate"))  # but one that runs is shown whatever the file says
    assert len(read_status(folder, T0 + 200).runs) == 5


def test_a_failed_cell_that_is_tried_again_runs(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "runs" / "sizes")
    (cell,) = (path for path in folder.glob("cell-*") if "no <b>" in events_file(path).read_text())
    write_events(cell, started(190, "curate"))
    assert by_name(read_status(folder, T0 + 200))["seed=2"].state == "running"


def test_the_error_of_a_cell_that_failed_before_its_first_stage(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "runs" / "sizes", failed=[{"overrides": [], "error": "no rows of drop"}])
    found = read_status(folder)
    assert (found.runs[0].name, found.runs[0].failures) == ("the preset as it is", ("no rows of drop",))
    assert found.state == "failed" and found.ended


def test_what_an_earlier_form_of_a_finished_study_left_is_no_cell_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sizes"
    done = make_cell(folder, ("seed=1",), *finished(0, STAGE_S, GONE))
    make_cell(folder, ("seed=2",), started(0, "curate", GONE), (5, "curate", "failed", {"note": "no"}))
    write_study(folder, cells=[{"overrides": ["seed=1"], "report": f"{done.name}/report.json"}])
    found = read_status(folder, T0 + 10_000)
    assert found.state == "done" and [run.name for run in found.runs] == ["seed=1"]


@pytest.mark.parametrize("walls", [{"wall_s": None}, {"wall_s": []}, {"wall_s": {"curate": "x"}}])
def test_damaged_times_are_passed_over(tmp_path: Path, walls: object) -> None:
    run = make_run(tmp_path / "run")
    (run / "wall.json").write_text(json.dumps(walls))
    assert all(stage.elapsed_s is None for stage in read_status(run).runs[0].stages)


def test_shared_work_of_a_study_comes_first(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "runs" / "sizes")
    cell = next(run.folder for run in read_status(folder, T0 + 200).runs if run.name == "seed=2")
    write_events(folder / f"{SHARED_RUN}-{cell}", started(150, "evaluate"), progress(151, "evaluate", 3, 9))
    first = read_status(folder, T0 + 200).runs[0]
    assert (first.name, first.state, first.stages[0].queue) == (f"{SHARED} of seed=2", "running", 6)
    assert first.is_shared


def test_a_cell_whose_fine_tunes_are_done_waits_while_those_of_others_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sizes"
    make_cell(folder, ("seed=1",), *finished(0, {"curate": 60.0}))
    make_cell(folder, ("seed=2",), started(60, "curate"))
    write_study(folder, waiting=[["seed=1"], ["seed=2"]])
    found = by_name(read_status(folder, T0 + 70))
    assert (found["seed=1"].state, found["seed=2"].state) == ("waiting", "running")
    assert found["seed=1"].stages[0].state == "done"


def test_a_killed_study_is_interrupted(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sizes"
    done = make_cell(folder, ("seed=1",), *finished(0, STAGE_S, GONE))
    make_cell(folder, ("seed=2",), started(150, "curate", GONE))
    write_study(folder, cells=[entry(done, ("seed=1",))], waiting=[["seed=2"], ["seed=3"]])
    assert read_status(folder, T0 + 150 + GONE_S - 1).state == "running"
    found = read_status(folder, T0 + 150 + GONE_S + 1)
    assert (found.state, found.ended, found.left_s, found.elapsed_s) == ("interrupted", True, None, 150.0)


@pytest.mark.parametrize(
    ("process", "now", "state"),
    [(ME, 1000, "running"), (GONE, 62, "waiting"), (ELSEWHERE, 62, "running"), (ELSEWHERE, 1000, "waiting")],
)
def test_between_two_stages_a_run_goes_on_while_its_process_lives(
    process: dict[str, object], now: float, state: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", *finished(0, {"curate": 60.0}, process))
    assert read_status(run, T0 + now).state == state


def test_a_run_alone(tmp_path: Path) -> None:
    told = [(1.0 + i, "curate", "say", {"note": f"line {i}"}) for i in range(9)]
    run = make_run(tmp_path / "embedded-seed0", started(0, "curate"), *told)
    found = read_status(run, T0 + 20)
    assert (found.kind, found.name, found.state, found.left_s) == ("run", "embedded-seed0", "running", None)
    assert found.runs[0].said == tuple(f"line {i}" for i in range(9))[-SAID:]
    write_events(
        run, (21, "curate", "end"), *finished(21, {name: wall for name, wall in STAGE_S.items() if name != "curate"})
    )
    again = read_status(run, T0 + 500)
    assert (again.state, again.elapsed_s) == ("done", pytest.approx(21 + 80))


def test_a_run_from_before_there_were_events_has_its_wall_times(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert read_status(run).state == "waiting"
    (run / "wall.json").write_text(json.dumps({"config": "key", "wall_s": STAGE_S}))
    found = read_status(run)
    assert (found.state, found.runs[0].elapsed_s, found.started) == ("done", sum(STAGE_S.values()), None)


def test_what_is_not_known_is_absent_for_machines(study: Status) -> None:
    told = study.as_json()
    assert json.loads(json.dumps(told)) == told and "null" not in json.dumps(told)
    waiting = told["runs"][3]
    assert waiting == {
        "name": "seed=4",
        "state": "waiting",
        "overrides": ["seed=4"],
        "stages": [],
        "failures": [],
        "said": [],
    }
    assert told["runs"][2]["stages"][6] == {"name": "evaluate", "state": "waiting", "failures": []}


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is neither a run nor a study.*name one of the folders under `runs`"):
        read_status(tmp_path / "nowhere")
    make_run(tmp_path / "runs" / "embedded-seed0")
    with pytest.raises(UserError, match="in it are embedded-seed0; name one"):
        read_status(tmp_path / "runs")


@pytest.mark.parametrize("content", ["{", "[]", '{"cells": [3]}', '{"waiting": 3}'])
def test_a_damaged_study_json_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(UserError, match=r"study\.json is damaged"):
        read_status(tmp_path)
