"""Plans: what fits, how long, and what is wrong with the question."""

from __future__ import annotations

import math

import pytest

from gt_ray.config import load_config
from gt_ray.errors import UserError
from gt_ray.training.fake_step import FakeStep
from gt_ray.training.hours import TEST_ROWS, Hours, Rates, Stage, operations, tuples_of
from gt_ray.training.machines import GIB, machines
from gt_ray.training.planner import STEP, TrainingPlan
from gt_ray.training.sizes import STRATEGIES

LARGE = "qwen2.5-0.5b-to-32b"


class Instant(TrainingPlan):
    """A plan whose steps take a GiB a tuple, a quarter of that with checkpointing."""

    def _fake(self, checkpointing: bool) -> FakeStep:
        tuple_bytes = GIB // 4 if checkpointing else GIB
        return FakeStep(((2 * tuple_bytes, 3 * tuple_bytes),), (0,), 1.5e11)


def plan_of(gpus: str = "8xH100", *overrides: str, preset: str = LARGE) -> TrainingPlan:
    training = ["precision=bf16", *overrides]
    config = load_config(preset, [f"grad_transformer.training.{one}" for one in training])
    return Instant(config, machines(gpus))


def phi_xxl(gpus: str, *overrides: str) -> TrainingPlan:
    config = load_config(
        LARGE,
        [
            "grad_transformer.phi.pretrained=google/flan-t5-xxl",
            *(f"grad_transformer.training.{one}" for one in ("precision=bf16", *overrides)),
        ],
    )
    return Instant(config, machines(gpus))


def test_trainers_and_llm_actors_share_the_gpus() -> None:
    placement = plan_of().placement
    assert (placement.trainers, placement.llm_actors, placement.llm_gpus) == (4, 4, 1.0)
    assert plan_of("16xH100").placement.trainers == 8
    assert plan_of("8xH100", "behaviour.steps=0").placement.trainers == 8
    assert plan_of("8xH100", "workers=2").placement.trainers == 2
    with pytest.raises(UserError, match="1 GPUs are too few"):
        plan_of("1xH100")


def test_an_llm_larger_than_a_gpu_takes_several_of_a_node() -> None:
    def plan(gpus: str, *overrides: str) -> TrainingPlan:
        return Instant(load_config(LARGE, overrides), machines(gpus))

    found = plan("8xL40S")  # 48 GB: 32B in 16 bit with checkpointing takes two
    assert (found.placement.trainers, found.placement.llm_actors, found.placement.llm_gpus) == (4, 2, 2)
    larger = "pair.llm.model=Qwen/Qwen2.5-72B-Instruct"
    found = plan("16xH100", larger)
    assert (found.placement.trainers, found.placement.llm_actors, found.placement.llm_gpus) == (8, 2, 4)
    # Three of each node for one actor, two of these on a node: more GPUs make no room for a fifth.
    three = plan("16xH100", "pair.llm.num_gpus=3", "grad_transformer.training.workers=1")
    assert three.placement.llm_gpus == 3 and three.placement.llm_actors <= 4
    with pytest.raises(UserError, match=r"8 GPUs are too few: a trainer takes one, an LLM actor .* 8"):
        plan("8xA100-40GB", larger)
    with pytest.raises(UserError, match=r"72B-Instruct needs .* spread over 2, the fullest holds"):
        plan("2xH100", larger)
    with pytest.raises(UserError, match=r"num_gpus=16 for .*, but a node has 8 GPUs"):
        plan("16xH100", "pair.llm.num_gpus=16")


def test_gpus_that_work_in_turns_are_all_paid_for() -> None:
    def curation(gpus: str) -> Stage:
        plan = Instant(load_config(LARGE), machines(gpus))
        way = plan.best()
        assert way is not None
        return Hours(plan, way, Rates(curation=0.5)).stages()["curation of Qwen/Qwen2.5-32B-Instruct"]

    one, two = curation("8xH100"), curation("8xL40S")
    assert two.gpu_hours / one.gpu_hours == pytest.approx(2 * 989 / 362)
    assert "each on 2 GPUs in turns" in two.how and "in turns" not in one.how


def test_the_cheapest_way_that_fits() -> None:
    best = plan_of().best()
    assert best is not None and (best.strategy, best.accumulation, best.checkpointing) == ("ddp", 1, False)
    # 64 GiB of activations fit in two passes, before anything is shared out.
    best = plan_of("8xH100", "batch_size=256").best()
    assert best is not None and (best.strategy, best.tuples, best.accumulation) == ("ddp", 32, 2)
    best = phi_xxl("8xH100").best()
    assert best is not None and best.strategy == "zero3" and not best.offload and best.fits
    best = phi_xxl("8xL40S", "behaviour.steps=0").best()
    assert best is not None and best.strategy in ("zero2", "zero3")
    assert phi_xxl("1xA100-40GB", "behaviour.steps=0").best() is None


def test_the_table_has_each_strategy_and_its_items_add_up() -> None:
    plan = plan_of("8xH100", "accumulation=2", "activation_checkpointing=true")
    ways = plan.table()
    assert [way.strategy for way in ways] == [*STRATEGIES, *STRATEGIES[1:]]
    assert all(way.total == sum(way.items.values()) and way.tuples == 4 and way.checkpointing for way in ways)
    assert ways[3].items[STEP] == max(GIB, math.ceil(plan.shape.P / 4) * 4)
    assert all(way.fits == (way.total <= plan.room) for way in ways)
    assert all(way.host > 0 for way in ways[4:]) and not any(way.host for way in ways[:4])


def test_hours_follow_from_stated_rates() -> None:
    plan = plan_of()
    best = plan.best()
    assert best is not None
    peak = 0.8 * 989e12
    stages = Hours(plan, best, Rates(curation=0.5, training=0.1, tokens=100)).stages()
    llm = plan.config.pair.llm
    expected = 300 * 20_000 * 16 * 100 * operations(llm) / (0.5 * peak) / 3600
    found = stages["curation of Qwen/Qwen2.5-32B-Instruct"]
    assert found.gpu_hours == pytest.approx(expected) and found.wall_hours == pytest.approx(expected / 8)
    assert tuples_of(plan.config) == 240 * 8
    training = stages["training, Eq. 10"]
    assert training.gpu_hours == pytest.approx(4 * training.wall_hours) and "1,800 steps" in training.how
    assert all((stage.wall_hours > 0) == (name != "baselines") for name, stage in stages.items())


def test_baselines_are_a_weak_fine_tune_a_client_and_one_of_the_llm_each() -> None:
    config = load_config("qwen2.5-0.5b-to-7b", ["evaluation.baselines=[w2s, vissup, proxy_tuning]"])
    plan = Instant(config, machines("8xH100"))
    way = plan.best()
    assert way is not None
    hours = Hours(plan, way, Rates())
    small, large = (hours.fine_tune_s(model) / 3600 for model in (config.pair.tinylm, config.pair.llm))
    found, clients = hours.stages()["baselines"], len(config.data.tasks) * config.clients.per_task
    assert found.gpu_hours == pytest.approx(clients * (small + 2 * large)) and "for w2s, vissup;" in found.how
    without = Hours(plan_of(preset="qwen2.5-0.5b-to-7b"), way, Rates())
    assert hours.evaluation()[1] - without.evaluation()[1] == 3 * clients * (config.evaluation.test_rows or TEST_ROWS)


def test_rates_are_the_measured_ones() -> None:
    rates = Rates()
    assert rates.share(494_000_000) == pytest.approx(0.132) and rates.share(7_616_000_000) == pytest.approx(0.342)
    assert 0.132 < rates.share(2_000_000_000) < 0.342 == rates.share(32_000_000_000)
    config = load_config("qwen2.5-3b-to-7b")
    # 10,144 tokens a second of a 7B model at 0.342 of 790 TFLOP/s, 28 blocks in 0.61 s, graphed in 0.091.
    assert 0.342 * 790e12 / operations(config.pair.llm) == pytest.approx(10_144, rel=0.03)
    plan = Instant(config, machines("8xH200"))
    way = plan.best()
    assert way is not None
    hours = Hours(plan, way, rates)
    assert hours.generation_s() == pytest.approx(0.61, rel=0.02)
    assert hours.generation_s(graphed=True) == pytest.approx(0.091, rel=0.02)


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("8xFOO", "FOO is not known; known: A100-40GB, A100, H100, H200, L40S, B200"),
        ("0xH100", "at least one GPU"),
        ("H100", "not of the form 8xH100"),
        ("12xH100", "whole nodes of 8"),
    ],
)
def test_gpus_that_are_none(gpus: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        machines(gpus)


def test_nodes_are_what_ray_up_reads() -> None:
    found = machines("16xh100").node_types()
    assert found["available_node_types"]["8xh100"]["resources"] == {"CPU": 96, "GPU": 8}
    assert found["available_node_types"]["8xh100"]["max_workers"] == found["max_workers"] == 2
    assert found["head_node_type"] in found["available_node_types"]
