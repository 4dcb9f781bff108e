"""A study as stages of the simulation: the same work as `gt-ray plan` says, in the blocks that curation makes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gt_ray.config import Config, load_config
from gt_ray.errors import UserError
from gt_ray.studies.simulated_study import SimulatedStudy, measured
from gt_ray.studies.simulation import Conditions, Stage, simulate
from gt_ray.training.machines import machines
from gt_ray.updates.store import UpdateStore
from gt_ray.updates.unit import UnitMeta
from tests.conftest import further_pair

LARGE = "qwen2.5-0.5b-to-32b"


def study_of(gpus: str, *overrides: str, preset: str = LARGE) -> SimulatedStudy:
    return SimulatedStudy(load_config(preset, overrides), machines(gpus))


def gpu_hours(stage: Stage) -> float:
    return sum(pool.gpus * sum(block.group_s) for pool in stage.pools for block in pool.blocks) / 3600


def test_the_work_is_what_the_plan_says() -> None:
    study = study_of("64xH100")
    stages, planned = {stage.name: stage for stage in study.stages()}, study.hours.stages()
    fine_tunes = sum(stage.gpu_hours for name, stage in planned.items() if name.startswith("curation"))
    assert gpu_hours(stages["curation"]) == pytest.approx(fine_tunes)
    both = gpu_hours(stages["clients"]) + gpu_hours(stages["ceilings"])
    assert both == pytest.approx(planned["clients' and public fine-tunes"].gpu_hours)
    training = planned["training, Eq. 10"].wall_hours + planned["training on behaviour"].wall_hours
    assert sum(stages["training"].pools[0].blocks[0].group_s) == pytest.approx(3600 * training)
    assert gpu_hours(stages["evaluation"]) == pytest.approx(planned["evaluation"].gpu_hours)


def test_operations_by_parameters_are_near_those_of_a_step() -> None:
    from gt_ray.training.fake_step import fake_step
    from gt_ray.training.sizes import build_shape

    config = load_config("embedded", [])
    counted = SimulatedStudy(config, machines("8xH100")).plan.fake(False).flops
    stepped = fake_step(lambda: build_shape(config), "fp32", False).flops
    assert counted == pytest.approx(stepped, rel=0.25)


def test_blocks_and_groups_are_those_of_curation() -> None:
    curation = study_of("8xH100").stages()[0]
    llm, tinylm = curation.pools
    assert (llm.gpus, tinylm.gpus) == (1, 1 / 8)
    # Six tasks of 50 shadows, and three adapters of the LLM in an H100's memory.
    assert Counter(len(block.group_s) for block in llm.blocks) == {4: 12, 5: 12}
    assert sum(block.group_bytes[0] > 0 for block in llm.blocks) == len(llm.blocks)
    single = study_of("8xH100", "curation.adapters_at_once=1").stages()[0]
    assert [len(pool.blocks) for pool in single.pools] == [300, 900]
    assert {block.model for block in single.pools[0].blocks} == {"llm"}
    capped = study_of("64xH100", "curation.workers=4").stages()[0]
    assert [pool.most for pool in capped.pools] == [4, 4]


def test_an_llm_of_several_gpus_holds_them_all() -> None:
    pool = study_of("8xL40S", "curation.adapters_at_once=1").stages()[0].pools[0]
    assert pool.gpus == 2
    assert gpu_hours(Stage("llm", (pool,))) == pytest.approx(300 * study_of("8xL40S").hours.fine_tune_s(LLM) / 3600)


LLM = load_config(LARGE, []).pair.llm


def test_stages_follow_each_other_as_in_the_pipeline() -> None:
    study = study_of("16xH100", "curation.shadows=30", "curation.adapters_at_once=1")
    chain, beside = (simulate(study.stages(overlap), 2, Conditions()) for overlap in (False, True))
    names = ["curation", "training", "clients", "generation", "ceilings", "evaluation"]
    assert list(chain.stages) == names
    assert all(chain.stages[a][1] <= chain.stages[b][0] for a, b in pairwise(names))
    assert beside.stages["ceilings"][0] == 0 and beside.makespan_s < chain.makespan_s


def test_without_controls_or_behaviour_there_is_less() -> None:
    less = ("evaluation.controls=false", "grad_transformer.training.behaviour.steps=0", "curation.adapters_at_once=1")
    stages = {stage.name: stage for stage in study_of("8xH100", *less).stages()}
    assert len(stages["ceilings"].pools[0].blocks) == 30
    assert stages["training"].pools[0].gpus == 8  # no LLM actors


def test_engines_on_cpus_count_as_a_gpu_each() -> None:
    found = {stage.name: stage for stage in study_of("8xH100", "evaluation.num_gpus=0").stages()}
    assert found["evaluation"].pools[0].gpus == 1


def test_further_pairs_are_refused(tiny: Config) -> None:
    two = load_config("embedded", [further_pair(load_config("embedded", []), root_seed=5)])
    with pytest.raises(UserError, match="a simulation is of one pair"):
        SimulatedStudy(two, machines("8xH100"))


def test_times_of_a_finished_run_take_the_place_of_the_plans(tmp_path: Path) -> None:
    store, run = UpdateStore(tmp_path / "store"), tmp_path / "run"
    keys = {"tinylm": ["a" * 40, "b" * 40], "llm": ["c" * 40, "d" * 40]}
    for key, wall_s in zip([*keys["tinylm"], *keys["llm"]], (1.0, 4.0, 10.0, 40.0), strict=True):
        store.write(key, torch.zeros(1, 2, 128), UnitMeta("root", {}, [0], 8, [1.0], wall_s))
    run.mkdir()
    (run / "units.json").write_text(json.dumps(keys))
    config = load_config("embedded", [f"store={tmp_path / 'store'}", "curation.adapters_at_once=1"])
    (run / "config.yaml").write_text(config.to_yaml())
    found = measured(run)
    assert found.unit_s == {"tinylm": 2.5, "llm": 25.0}
    assert found.sigma == pytest.approx(0.6931, abs=1e-3)  # each is half or twice its side's geometric mean
    curation = SimulatedStudy(config, machines("8xH100"), times=found).stages()[0]
    assert {block.group_s for pool in curation.pools for block in pool.blocks} == {(2.5,), (25.0,)}
    store.remove(keys["llm"][0]), store.remove(keys["llm"][1])
    with pytest.raises(UserError, match=r"has no unit of its llm; run gt-ray curate"):
        measured(run)
