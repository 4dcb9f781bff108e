"""A study as a graph: shared work once, cells that fail, budgets, cells side by side, plans."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from gt_ray.cluster import WANTED_GPUS
from gt_ray.config import load_config, split_overrides
from gt_ray.errors import UserError
from gt_ray.studies.graph import Node, Outcome, graph_of, needed, run_graph
from gt_ray.studies.status import read_status
from gt_ray.studies.study import Sweep, _at_once, run_study
from gt_ray.studies.study_plan import plan_configs, plan_sweep
from gt_ray.updates.files import alone
from tests.conftest import TINY_OVERRIDES

CONFIG = load_config("embedded")


@pytest.fixture
def common(tiny_pair: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """Overrides of a study of seconds."""
    pair = [f"pair.tinylm.model={tiny_pair[0]}", f"pair.llm.model={tiny_pair[1]}"]
    places = [f"runs={tmp_path / 'runs'}", f"store={tmp_path / 'store'}"]
    return [*TINY_OVERRIDES, *pair, *places, "evaluation.controls=false", "evaluation.log_likelihood=false"]


def test_what_two_cells_need_is_of_the_first_and_both_wait_for_it() -> None:
    graph = graph_of([CONFIG] * 3, [["a", "b"], ["b", "c"], ["a", "c"]])
    found = {node.name: (node.keys, node.needs) for node in graph}
    assert found == {
        "fine-tunes of cell 1": (("a", "b"), ()),
        "fine-tunes of cell 2": (("c",), ()),
        "cell 1": ((), ("fine-tunes of cell 1",)),
        "cell 2": ((), ("fine-tunes of cell 1", "fine-tunes of cell 2")),
        "cell 3": ((), ("fine-tunes of cell 1", "fine-tunes of cell 2")),
    }
    names = [node.name for node in graph]
    assert all(names.index(need) < names.index(node.name) for node in graph for need in node.needs)


def test_side_by_side_cells_wait_for_scores_that_come_behind_their_fine_tunes() -> None:
    graph = graph_of([CONFIG] * 2, [["a"], ["a", "b"]], [["base"], ["base", "own"]])
    found = {node.name: (node.keys, node.needs) for node in graph}
    assert found["scores of cell 1"] == (("base",), ("fine-tunes of cell 1",))
    assert found["scores of cell 2"] == (("own",), ("fine-tunes of cell 1", "fine-tunes of cell 2"))
    assert set(found["cell 2"][1]) >= {"scores of cell 1", "scores of cell 2"}


def test_of_finished_cells_only_what_others_need_is_left() -> None:
    graph = graph_of([CONFIG] * 3, [["a"], ["a", "b"], ["c"]], [["x"], ["y"], ["z"]])
    left = [node.name for node in needed(graph, {0, 2})]
    assert left == ["fine-tunes of cell 1", "fine-tunes of cell 2", "scores of cell 2", "cell 2"]
    assert needed(graph, {0, 1, 2}) == []


def test_a_grid_is_every_combination_behind_every_cell() -> None:
    config = load_config("embedded", ["grid={curation.shadows: [60, 120], pair.llm.model: [a, b]}"])
    points = [[f"curation.shadows={k}", f"pair.llm.model={llm}"] for k in (60, 120) for llm in "ab"]
    assert config.sweep() == points
    assert config.sweep([["seed=1"], ["seed=2"]]) == [[f"seed={s}", *point] for s in (1, 2) for point in points]
    assert load_config("embedded", [*points[3]]).pair.llm.model == "b"
    assert load_config("embedded").sweep() == [[]]
    odd = load_config("embedded", ['grid={name: ["1", "a: b"], clients.samples: [null]}'])
    assert [load_config("embedded", cell).name for cell in odd.sweep()] == ["1", "a: b"]


def test_a_quote_that_is_not_closed_is_told() -> None:
    assert split_overrides("seed=1 'data.tasks=[drop, gsm8k]'") == ["seed=1", "data.tasks=[drop, gsm8k]"]
    with pytest.raises(UserError, match=r"cell \"name=it's\": No closing quotation; .*quote what has spaces"):
        split_overrides("name=it's")


@pytest.mark.parametrize(
    ("grid", "message"),
    [("{curation.shadow: [1]}", "unknown config key 'curation.shadow'; did you mean"), ("{seed: []}", "has no values")],
)
def test_a_grid_that_is_none_is_refused(grid: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("embedded", [f"grid={grid}"]).sweep()


def test_nothing_is_started_where_no_budget_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gt_ray.studies.graph.run_node", lambda node, left_s: Outcome(1.0))
    left = iter([2.0, 1.0, 0.0])
    ran = [node.name for node, _ in run_graph(graph_of([CONFIG] * 3, [["a"], [], []]), 1, lambda: next(left))]
    assert ran == ["fine-tunes of cell 1", "cell 1"]


def test_a_plan_from_configs_alone_counts_shared_fine_tunes_once() -> None:
    small = ["grad_transformer.phi.layers=1", "curation.shadows=10", "curation.tinylm_shadows=4", "clients.per_task=2"]
    models = ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"]
    llm = "pair.llm.model=Qwen/Qwen2.5-3B-Instruct"
    configs = [load_config("embedded", [*small, llm, f"pair.tinylm.model={one}"]) for one in models]
    first, second, *cells = plan_configs(configs, "8xH100")
    tasks = len(configs[0].data.tasks)
    tinylm, large = 14 + 2 * tasks, 10 + 2 * tasks + tasks
    assert first.fine_tunes == (tinylm + large,) * 2 and second.fine_tunes == (tinylm,) * 2
    assert [line.after for line in cells] == ["fine-tunes of cell 1", "fine-tunes of cell 2, fine-tunes of cell 1"]
    assert first.gpu_hours and second.gpu_hours and first.gpu_hours > second.gpu_hours > 0
    assert first.wall_hours == pytest.approx(first.gpu_hours / 8)
    assert all(line.measured is None for line in (first, second, *cells))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_that_fails_stops_and_goes_on(
    common: list[str], ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One study through a budget that is too small, a cell that fails, and its end."""
    cells = [[], ["grad_transformer.training.batch_size=64"], ["grad_transformer.training.epochs=2"]]

    def run(**options: Any) -> dict[str, Any]:
        return run_study("embedded", common, cells, "sweep", parallel=1, **options)

    folder = Path(Sweep("embedded", common, cells, "sweep").folder)
    with pytest.raises(UserError, match=r"the budget is 1e-09; 3 of 3 cells wait"):
        run(max_device_hours=1e-9)
    tree = json.loads((folder / "study.json").read_text())
    assert not tree["cells"] and tree["waiting"] == cells and tree["device_hours"] > 0
    assert "failed" not in tree
    named = {run.name for run in read_status(folder).runs}
    assert named == {"the preset as it is", *(" ".join(cell) for cell in cells[1:])}  # the one that began among them
    before = Sweep("embedded", common, cells, "sweep")
    (plan, *others) = plan_sweep(before, "8xH100")
    assert plan.fine_tunes and 0 < plan.fine_tunes[0] < plan.fine_tunes[1]
    assert others[0].measured is None

    with pytest.raises(
        UserError, match=r"1 of 3 cells failed, the others are done: cell 2 of 3: .*fewer than one batch"
    ):
        run()
    tree = json.loads((folder / "study.json").read_text())
    assert [cell["overrides"] for cell in tree["cells"]] == [cells[0], cells[2]]
    assert [cell["overrides"] for cell in tree["failed"]] == [cells[1]] and "waiting" not in tree
    reports = [json.loads((folder / cell["report"]).read_text()) for cell in tree["cells"]]
    spent = tree["device_hours"]
    stages = ("train", "generate", "evaluate")
    of_cells = sum(report["device_s"][stage] for report in reports for stage in stages)
    units = reports[0]["device_s"]
    shared = sum(units[stage] for stage in ("curate", "clients", "ceilings"))
    (failed,) = (run.folder for run in read_status(folder).runs if run.state == "failed")
    in_vain = json.loads((folder / str(failed) / "wall.json").read_text())["device_s"]["train"]
    assert math.isclose(3600 * spent, of_cells + shared + in_vain, rel_tol=1e-6)

    capsys.readouterr()
    with pytest.raises(UserError, match="1 of 3 cells failed"):
        run()
    said = capsys.readouterr().err
    assert "cell 1 of 3" not in said and "to score" not in said
    again = json.loads((folder / str(failed) / "wall.json").read_text())["device_s"]["train"] - in_vain
    tree = json.loads((folder / "study.json").read_text())
    assert math.isclose(3600 * tree["device_hours"], 3600 * spent + again, rel_tol=1e-6)
    # The base models were scored by the first cell alone.
    both = [{row["scores"] for row in report["rows"] if row["system"].startswith("base")} for report in reports]
    assert both[0] == both[1]
    with pytest.raises(UserError, match="two cells are the same"):
        run_study("embedded", common, [[], []], "same")


@pytest.fixture
def room_for_two() -> Iterator[None]:
    """A Ray in which two trainings of two workers have a CPU for each, and one for their data."""
    ray.shutdown()
    ray.init(num_cpus=6, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cells_side_by_side_give_what_they_give_one_after_the_other(
    common: list[str], room_for_two: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [[], ["grad_transformer.training.epochs=2"]]
    one = run_study("embedded", common, cells, "one", parallel=1)
    two = run_study("embedded", [*common, f"store={tmp_path / 'other'}"], cells, "two", parallel=3)
    assert "room for 2 cells at a time; 3 would wait for each other" in capsys.readouterr().err
    assert [cell["summary"] for cell in two["cells"]] == [cell["summary"] for cell in one["cells"]]
    shared = list((tmp_path / "runs" / "two").glob(".shared-cell-*/scores/*.parquet"))
    assert len(shared) == 2 * 4  # of two clients base_S, base_T, P_S, P_T
    assert set(two["wall_s"]) == {"fine-tunes of cell 1", "scores of cell 1", "cell 1", "cell 2"}


@pytest.mark.ray
def test_nodes_side_by_side_share_a_budget(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(node: Node, most_s: float) -> Outcome:
        (tmp_path / uuid.uuid4().hex).write_text(str(min(80.0, most_s)))
        return Outcome(1.0, out_of_budget=most_s < 80)

    def spent() -> float:
        return sum(float(file.read_text() or 0) for file in tmp_path.iterdir())

    monkeypatch.setattr("gt_ray.studies.graph.run_node", run)
    nodes = graph_of([CONFIG] * 3, [["a"], ["b"], ["c"]])[:3]
    done = list(run_graph(nodes, 2, lambda: 170 - spent()))
    assert len(done) >= 2 and sum(not outcome.out_of_budget for _, outcome in done) >= 1
    assert spent() == pytest.approx(170, abs=0.1)


@pytest.mark.ray
def test_nodes_side_by_side_need_not_look_at_a_gpu(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(node: Node, most_s: float | None) -> Outcome:
        return Outcome(1.0, {"seen": os.environ.get("GT_RAY_GPU_BYTES")})

    monkeypatch.setattr("gt_ray.studies.graph.run_node", run)
    monkeypatch.setattr("gt_ray.studies.graph.gpus_as_seen", lambda *_: {"GT_RAY_GPU_BYTES": "7"})
    done = list(run_graph(graph_of([CONFIG], [["a"]]), 2, lambda: None))
    assert [outcome.report for _, outcome in done] == 2 * [{"seen": "7"}]


def test_cells_at_a_time_follow_from_the_cluster_and_may_be_more_where_it_grows(
    common: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gt_ray.studies.study.places", lambda _: 2)
    sweep = Sweep("embedded", common, [["seed=0"], ["seed=1"], ["seed=2"]], "sweep")
    assert _at_once(sweep, None) == 2 and "room for 2 cells at a time, by" in capsys.readouterr().err
    assert _at_once(sweep, 3) == 2 and "3 would wait for each other" in capsys.readouterr().err
    monkeypatch.setenv(WANTED_GPUS, "8")
    assert _at_once(sweep, 3) == 3 and "3 need nodes that have yet to come" in capsys.readouterr().err
    assert _at_once(sweep, 2) == 2 and not capsys.readouterr().err


def test_wall_times_of_earlier_runs_of_the_same_cells_are_kept(common: list[str]) -> None:
    cells = [["seed=0"], ["seed=1"]]
    first = Sweep("embedded", common, cells, "sweep")
    first.done(first.graph[0], Outcome(5.0))
    again = Sweep("embedded", common, cells, "sweep")
    assert again.walls == {first.graph[0].name: 5.0}
    again.done(again.graph[0], Outcome(2.0))
    assert Sweep("embedded", common, cells, "sweep").walls == {first.graph[0].name: 7.0}
    assert Sweep("embedded", common, [["seed=2"], *cells], "sweep").walls == {}
    (first.folder / "study.json").write_text('{"cells": [1]}')
    assert Sweep("embedded", common, cells, "sweep").walls == {}


def test_units_that_others_made_are_not_spent(common: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, float] = {}
    monkeypatch.setattr("gt_ray.studies.study.unit_device_s", lambda _, keys: {key: there.get(key) for key in keys})

    def sweep(*cells: list[str]) -> Sweep:
        return Sweep("embedded", common, list(cells), "sweep")

    first = sweep([])
    shadows = [key for node in first.graph for key in node.keys]
    there[shadows[0]] = 7.0
    assert first.device_s() == 0 and not first.folder.joinpath("found.json").exists()  # asking leaves nothing behind
    first.begin()
    there[shadows[1]] = 5.0
    assert sweep([]).device_s() == 5
    more = sweep([], ["seed=1"])  # a cell that is added later, of whose units another study has made one
    new = [key for node in more.graph for key in node.keys if key not in shadows]
    there[new[0]] = 3.0
    more.begin()
    there[new[1]] = 2.0
    assert sweep([], ["seed=1"]).device_s() == 5 + 2


def test_a_study_that_another_process_runs_is_refused(common: list[str]) -> None:
    folder = Sweep("embedded", common, [[]], "sweep").folder
    with alone(folder, lambda: None), pytest.raises(UserError, match=r"study sweep: another process runs it in"):
        run_study("embedded", common, [[]], "sweep")
