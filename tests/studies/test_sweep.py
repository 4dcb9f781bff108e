"""Cells as points: pooled over seeds, with intervals, in series along each axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gt_ray.studies.facts import essentials
from gt_ray.studies.sheets import read_study
from gt_ray.studies.sweep import SEEDS_APART, Sweep, sweep_of
from tests.studies.made_up import FIGURE_7, MAIN, made_up_study, rising


def sweep(folder: Path) -> Sweep:
    return sweep_of(read_study(folder)[1])


def test_cells_that_differ_in_their_seed_alone_are_a_point(tmp_path: Path) -> None:
    cells = [f"curation.samples={n} seed={seed}" for n in (32, 64) for seed in (0, 1)]
    by_seed = made_up_study(tmp_path / "a", cells, lambda config: MAIN | {"ours": 60.0 + 10 * config.seed}, clients=2)
    found = sweep(by_seed)
    assert [point.seeds for point in found.points] == [[0, 1], [0, 1]] and not found.points[0].note
    entry = found.points[0].entry
    assert entry["ours"] == pytest.approx(65) and entry["P_S"] == pytest.approx(40)
    minus = entry["ours_minus"]["ridge"]
    assert minus["difference"] == pytest.approx(5) and minus["low"] < 5 < minus["high"]
    low, high = found.points[0].interval("ours") or (0, 0)
    assert low < 62 and 68 < high < 75  # seeds differ by more than clients and rows do


def test_without_the_rows_scores_seeds_are_means_of_their_reports(tmp_path: Path) -> None:
    cells = ["seed=0", "seed=1"]
    folder = made_up_study(tmp_path / "a", cells, lambda config: MAIN | {"ours": 60.0 + 10 * config.seed})
    for file in folder.glob("cell-0/scores/*.parquet"):
        file.write_bytes(b"damaged")
    (point,) = sweep(folder).points
    assert point.note == SEEDS_APART
    assert point.entry["ours"] == pytest.approx(65) and point.entry["controls"]["ridge"] == pytest.approx(60)
    assert point.entry["pgr"] == pytest.approx(50) and "pgr_interval" not in point.entry


def test_an_interval_is_that_of_clients_and_rows(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "a", [""], clients=5, rows=80)
    (point,) = sweep(folder).points
    draws_R = point.draws("ours")
    assert draws_R is not None and draws_R.mean() == pytest.approx(70, abs=0.2)
    spread = np.asarray([-4, -2, 0, 2, 4]).std() / np.sqrt(5)
    rows = (40 / np.sqrt(12)) / np.sqrt(5 * 80)
    assert draws_R.std() == pytest.approx(np.hypot(spread, rows), rel=0.12)
    assert point.draws("never_scored") is None and point.interval("never_scored") is None


def test_rows_that_all_score_the_same_have_an_error_all_the_same(tmp_path: Path) -> None:
    _, (cell,) = read_study(made_up_study(tmp_path / "a", [""], rows=80))
    for row in cell.report["rows"]:
        if row["system"] in ("P_T", "base_T"):
            row |= {"score": 100.0 if row["system"] == "P_T" else 0.0, "se": 0.0}
    (point,) = sweep_of([cell]).points
    low, high = point.interval("P_T") or (0, 0)
    assert 97 < low < 100 and high == 100
    low, high = point.interval("base_T") or (0, 0)
    assert low == 0 and 0 < high < 3


def test_an_error_that_is_not_known_makes_no_interval(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "a", [""])
    tree, (cell,) = read_study(folder)
    del cell.report["rows"][0]["se"]
    (point,) = sweep_of([cell]).points
    assert point.interval(cell.report["rows"][0]["system"]) is None and point.interval("ours")
    assert tree["name"] == "a"


def test_a_client_of_several_mechanisms_is_one_client(tmp_path: Path) -> None:
    _, (cell,) = read_study(made_up_study(tmp_path / "a", [""], clients=5))
    (alone,) = sweep_of([cell]).points
    before = alone.interval("P_T")
    rows = [
        row | {"client": f"{row['client']}-dp_sgd-{label}", "label": f"dp_sgd {label}"}
        for row in cell.report["rows"]
        for label in (1, 4, 16)
    ]
    cell.report["rows"] = rows
    assert sweep_of([cell]).points[0].interval("P_T") == pytest.approx(before)
    assert essentials(cell.report).startswith("5 clients, 200 test rows")


def test_several_tasks_weigh_alike(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "a", ["data.tasks=[aqua_rat,drop]"], clients=2)
    (point,) = sweep(folder).points
    assert point.entry is point.summary["average"] and set(point.summary) == {"aqua_rat", "drop", "average"}
    draws_R = point.draws("ours")
    assert draws_R is not None and draws_R.mean() == pytest.approx(70, abs=0.2)


def test_series_hold_all_else_equal(tmp_path: Path) -> None:
    cells = [f"curation.samples={n} curation.shadows={k}" for k in (20, 40) for n in (64, 32)]
    found = sweep(made_up_study(tmp_path / "a", [*cells, "curation.samples=128 curation.shadows=20"], rising))
    titles = {one.title: one.x for one in found.series}
    assert titles == {
        "shadows; samples of a shadow 64": (20, 40),
        "shadows; samples of a shadow 32": (20, 40),
        "samples of a shadow; shadows 20": (32, 64, 128),
        "samples of a shadow; shadows 40": (32, 64),
    }
    assert found.label(found.points[0]) == "shadows 20, samples of a shadow 64"


def test_what_differs_along_a_series_besides_its_axis_is_named(tmp_path: Path) -> None:
    cells = ["curation.samples=32", "curation.samples=64 curation.workers=3"]
    (series,) = sweep(made_up_study(tmp_path / "a", cells)).series
    assert series.also == ("curation.workers",)


def test_tuples_are_swept_over_shadows_and_snapshots(tmp_path: Path) -> None:
    cells = ["curation.shadows=20", "curation.shadows=40", "curation.shadows=40 curation.snapshots=2"]
    found = sweep(made_up_study(tmp_path / "a", cells, common=["curation.snapshots=4"]))
    assert {one.title: one.x for one in found.series} == {
        "shadows; snapshots 4": (20, 40),
        "snapshots; shadows 40": (2, 4),
        "tuples (shadows x snapshots)": (80, 80, 160),
    }
    assert all(not one.also for one in found.series)


def test_private_clients_are_swept_over_their_epsilon(tmp_path: Path) -> None:
    mechanism = "clients.mechanisms='[{{name: dp_sgd, epsilon: {}}}]'"
    cells = [f"{mechanism.format(epsilon)} clients.per_task={n}" for n in (1, 2) for epsilon in (4, 1, 16)]
    found = [one for one in sweep(made_up_study(tmp_path / "a", cells)).series if one.axis.key == "clients.epsilon"]
    assert {one.title: one.x for one in found} == {
        "epsilon of clients; clients of a task 1": (1, 4, 16),
        "epsilon of clients; clients of a task 2": (1, 4, 16),
    }
    assert all(one.axis.is_log and not one.also for one in found)


def test_clients_of_other_mechanisms_are_a_line_of_their_own(tmp_path: Path) -> None:
    cells = [f"clients.mechanisms='[{{name: dp_sgd, epsilon: {e}, row_norm: {n}}}]'" for n in (0.1, 1) for e in (1, 4)]
    found = sweep(made_up_study(tmp_path / "a", ["clients.mechanisms=[sft]", *cells])).series
    lines = [one for one in found if one.axis.key == "clients.epsilon"]
    assert [one.x for one in lines] == [(1, 4), (1, 4)] and len({one.title for one in lines}) == 2
    assert all(not one.also for one in lines)


def test_points_without_a_place_on_the_axis_are_left_out_and_names_come_one_after_the_other(tmp_path: Path) -> None:
    modules = ["[q_proj,k_proj]", "[v_proj]", "[o_proj]"]
    cells = [f"pair.llm.lora.target_modules={one}" for one in modules]
    (series,) = sweep(made_up_study(tmp_path / "a", cells)).series
    assert series.x == (0, 1, 2) and not series.axis.is_log
    assert len(FIGURE_7) == len(sweep(made_up_study(tmp_path / "b", FIGURE_7)).series[0].points)
