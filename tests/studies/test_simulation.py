"""The model of the schedule, against cases whose answer is known without it."""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from gt_ray.errors import UserError
from gt_ray.studies.simulated_study import predict
from gt_ray.studies.simulation import CAUSES, Block, Conditions, Node, Pool, Run, Stage, simulate

PLAIN = Conditions(
    node_gpus=1,
    node_start_s=0,
    actor_start_s=0,
    model_start_s=0,
    driver_block_s=0,
    between_s=0,
    notice_s=0,
    straggler_sigma=0,
)
"""Nodes of one GPU, on which nothing but work takes time."""


def blocks_of(*seconds: float, size_bytes: float = 0, model: str = "llm") -> tuple[Block, ...]:
    return tuple(Block(model, (one,), (size_bytes,)) for one in seconds)


def stage(*seconds: float, gpus: float = 1, size_bytes: float = 0, weight_bytes: float = 0) -> list[Stage]:
    return [Stage("curation", (Pool(gpus, blocks_of(*seconds, size_bytes=size_bytes), {"llm": weight_bytes}),))]


def assert_whole(run: Run, gpus: float) -> None:
    """Every GPU-second has one cause."""
    assert set(run.gpu_s) == set(CAUSES) and min(run.gpu_s.values()) > -1e-6
    assert sum(run.gpu_s.values()) == pytest.approx(gpus * run.makespan_s)
    assert run.gpu_s["away"] == pytest.approx(gpus * run.makespan_s - run.paid_gpu_s)


@pytest.mark.parametrize(("tasks", "machines"), [(12, 3), (13, 3), (7, 8), (1, 1)])
def test_equal_tasks_take_as_many_rounds_as_they_have_to(tasks: int, machines: int) -> None:
    run = simulate(stage(*[10.0] * tasks), machines, PLAIN)
    assert run.makespan_s == pytest.approx(10 * math.ceil(tasks / machines))
    assert run.gpu_s["computing"] == pytest.approx(10 * tasks)
    assert_whole(run, machines)


def test_one_long_task_bounds_the_makespan() -> None:
    run = simulate(stage(50.0, *[10.0] * 4), 3, PLAIN)
    assert run.makespan_s == 50 and run.gpu_s["last block"] == pytest.approx(3 * 50 - 90)
    assert simulate(stage(50.0, *[10.0] * 4), 100, PLAIN).makespan_s == 50


def optimum(seconds: Sequence[float], machines: int) -> float:
    """Of all assignments."""
    return min(
        max(sum(s for s, place in zip(seconds, places, strict=True) if place == m) for m in range(machines))
        for places in product(range(machines), repeat=len(seconds))
    )


def test_longest_first_is_within_four_thirds_of_the_optimum() -> None:
    rng = random.Random(0)
    worst = simulate(stage(5.0, 5, 4, 4, 3, 3, 3), 3, PLAIN)  # Graham's own example for three machines
    assert worst.makespan_s == 11 and optimum((5, 5, 4, 4, 3, 3, 3), 3) == 9
    for machines in (2, 3):
        for _ in range(10):
            seconds = sorted((rng.uniform(1, 9) for _ in range(7)), reverse=True)
            best = optimum(seconds, machines)
            found = simulate(stage(*seconds), machines, PLAIN).makespan_s
            assert best - 1e-9 <= found <= (4 / 3 - 1 / (3 * machines)) * best + 1e-9


def test_storage_limits_by_bytes_over_bandwidth() -> None:
    slow = replace(PLAIN, storage_bytes_per_s=1e9)
    run = simulate(stage(*[1.0] * 8, size_bytes=1e9), 8, slow)
    assert run.makespan_s == pytest.approx(1 + 8)  # all write at once, and share
    assert run.gpu_s["storage"] == pytest.approx(8 * 8)
    assert_whole(run, 8)
    assert simulate(stage(1.0, size_bytes=5e9), 8, PLAIN).makespan_s == pytest.approx(1 + 5)  # a stream's own 1 GB/s
    # A transfer that comes later gets its share of what is left: 1.5 s alone, then half each.
    two = [
        Stage("a", (Pool(1, blocks_of(0.0, size_bytes=2e9)),)),
        Stage("b", (Pool(1, blocks_of(1.5, size_bytes=2e9)),)),
    ]
    assert simulate(two, 2, slow).makespan_s == pytest.approx(4)
    assert simulate(two, 2, slow).stages["a"][1] == pytest.approx(2.5)


def test_weights_are_read_by_each_actor_or_passed_on_from_node_to_node() -> None:
    read = replace(PLAIN, storage_bytes_per_s=1e9)
    cold = simulate(stage(*[1.0] * 7, weight_bytes=10e9), 7, read)
    assert cold.makespan_s == pytest.approx(70 + 1)
    # Read once, then 1, 2, 4 copies at a time.
    warm = simulate(stage(*[1.0] * 7, weight_bytes=10e9), 7, replace(read, broadcast=True))
    assert warm.makespan_s == pytest.approx(10 + 3 * 10 + 1)
    one_node = replace(read, broadcast=True, node_gpus=8)
    assert simulate(stage(*[1.0] * 8, weight_bytes=10e9), 1, one_node).makespan_s == pytest.approx(10 + 10 + 1)


def test_one_driver_gives_out_blocks_one_after_the_other() -> None:
    run = simulate(stage(*[1.0] * 100), 100, replace(PLAIN, driver_block_s=0.5))
    assert run.makespan_s == pytest.approx(100 * 0.5 + 1)
    assert max(run.gpu_s, key=lambda cause: run.gpu_s[cause]) in ("scheduling", "last block")


def by_hand(seconds: float, mean_s: float, return_s: float, rng: random.Random) -> float:
    """One task on one node that dies again and again."""
    now = 0.0
    while (life := rng.expovariate(1 / mean_s)) < seconds:
        now += life + return_s
    return now + seconds


def test_preemption_costs_what_it_costs_by_hand() -> None:
    spot = replace(PLAIN, preempt_hours=1.0, return_s=300)
    found = [simulate(stage(3600.0), 1, spot, seed) for seed in range(400)]
    rng = random.Random(1)
    slow = [by_hand(3600, 3600, 300, rng) for _ in range(400)]
    exact = (math.e - 1) * (3600 + 300)  # (e^(t/m) - 1) (m + return)
    for times in ([run.makespan_s for run in found], slow):
        error = statistics.stdev(times) / math.sqrt(len(times))
        assert abs(statistics.mean(times) - exact) < 4 * error
    for run in found:
        assert run.groups_lost == run.deaths
        assert run.gpu_s["lost"] == pytest.approx(run.makespan_s - 3600 - 300 * run.deaths, abs=1e-6)
        assert_whole(run, 1)


def test_a_death_loses_the_group_in_flight_and_keeps_those_before() -> None:
    block = Block("llm", (10.0, 10.0, 10.0), (0.0, 0.0, 0.0))
    script = [Node(down_s=25), Node(up_s=40)]
    run = simulate([Stage("curation", (Pool(1, (block,)),))], script, PLAIN)
    assert run.makespan_s == pytest.approx(50) and run.gpu_s["lost"] == pytest.approx(5)
    assert run.placed == {("curation", 0): [0, 0, 1]}
    assert (run.deaths, run.groups_lost) == (1, 1)


def test_a_dead_actor_keeps_its_block_until_there_is_room() -> None:
    # As in Ray: the other actor goes through what waits, and only then does the dead one's block find a place.
    run = simulate(stage(10.0, 10, 10, 10), [Node(), Node(down_s=5)], PLAIN)
    assert run.placed[("curation", 1)] == [0] and run.makespan_s == pytest.approx(40)
    assert run.stages["curation"] == (0, run.makespan_s)


def test_a_node_that_joins_is_put_to_work() -> None:
    run = simulate(stage(*[10.0] * 6), [Node(), Node(up_s=15)], PLAIN)
    assert sorted(node for nodes in run.placed.values() for node in nodes) == [0, 0, 0, 0, 1, 1]
    assert run.makespan_s == pytest.approx(40)


def test_a_gang_dies_with_any_of_its_nodes() -> None:
    gang = [Stage("training", (Pool(16, blocks_of(100.0)),), idle="training")]
    nodes = replace(PLAIN, node_gpus=8)
    run = simulate(gang, [Node(), Node(), Node(up_s=0, down_s=60), Node(up_s=70)], nodes)
    assert run.makespan_s == pytest.approx(100)  # the first two nodes hold it
    run = simulate(gang, [Node(down_s=60), Node(), Node(up_s=70)], nodes)
    assert run.makespan_s == pytest.approx(170) and run.gpu_s["lost"] == pytest.approx(16 * 60)
    idle = simulate(gang, 4, nodes)
    assert idle.gpu_s["training"] == pytest.approx(16 * 100)


def test_stages_wait_for_each_other_and_small_actors_fill_up() -> None:
    llm, tinylm = Pool(1, blocks_of(*[8.0] * 3)), Pool(1 / 8, blocks_of(*[4.0] * 8, model="tinylm"))
    study = [Stage("curation", (llm, tinylm)), Stage("training", (Pool(1, blocks_of(5.0)),), ("curation",), "training")]
    run = simulate(study, 2, PLAIN)
    assert run.stages == {"curation": (0, 16), "training": (16, 21)}  # two and one; eight in the place of a fourth
    assert run.gpu_s["training"] == pytest.approx(5)
    assert_whole(run, 2)


def test_nodes_without_work_go_and_come_back_for_more() -> None:
    study = [
        Stage("curation", (Pool(1, blocks_of(*[100.0] * 4)),)),
        Stage("training", (Pool(1, blocks_of(1000.0)),), ("curation",)),
        Stage("ceilings", (Pool(1, blocks_of(*[100.0] * 4)),), ("training",)),
    ]
    stay, go = (simulate(study, 4, replace(PLAIN, node_start_s=20, idle_timeout_s=idle)) for idle in (None, 50.0))
    assert stay.paid_gpu_s == pytest.approx(4 * 1220) and go.makespan_s == pytest.approx(1240)
    assert go.paid_gpu_s == pytest.approx(1240 + 3 * (120 + 50 + 120))
    assert_whole(go, 4)


def test_the_same_seed_gives_the_same_run() -> None:
    rough = replace(PLAIN, preempt_hours=0.5, straggler_sigma=0.3)
    runs = [simulate(stage(*[600.0] * 20), 4, rough, seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] and runs[0].makespan_s != runs[2].makespan_s


def test_stragglers_keep_the_mean() -> None:
    run = simulate(stage(*[100.0] * 2000), 1, replace(PLAIN, straggler_sigma=0.5))
    assert run.makespan_s / 2000 == pytest.approx(100, rel=0.05)


def test_busy_gpus_add_up_to_the_work() -> None:
    run = simulate(stage(30.0, 10, 10), 2, PLAIN)
    line = run.busy_gpus(10)
    assert [gpus for _, gpus in line] == pytest.approx([2] * 6 + [4 / 3] + [1] * 3, abs=1)
    assert sum(gpus for _, gpus in line) * run.makespan_s / 10 == pytest.approx(50)


def test_what_would_never_end_or_has_no_place_is_refused() -> None:
    with pytest.raises(UserError, match=r"curation: an actor takes 4 GPUs, the cluster has 2 nodes of 1"):
        simulate(stage(1.0, gpus=4), 2, PLAIN)
    with pytest.raises(UserError, match=r"a group lasts 10\.0 h and its nodes 1\.00 h on average"):
        simulate(stage(36_000.0), 2, replace(PLAIN, preempt_hours=1))


def test_predictions_are_over_seeds() -> None:
    rough = replace(PLAIN, straggler_sigma=0.3)
    found = predict(stage(*[3600.0] * 9), 3, rough, price=2, seeds=8)
    assert found.makespan_hours.low < found.makespan_hours.median < found.makespan_hours.high
    assert found.cost.median == pytest.approx(2 * found.gpu_hours.median)
    assert found.limit == "computing" and sum(found.shares.values()) == pytest.approx(1)
    assert found.busy_gpu_hours + found.idle_gpu_hours == pytest.approx(found.gpu_hours.median, rel=0.1)
    alone = predict(stage(3600.0), 8, PLAIN, price=2, seeds=1)
    assert alone.limit == "last block" and alone.makespan_hours.low == alone.makespan_hours.high == 1


@pytest.mark.ray
@pytest.mark.slow
def test_real_raylets_give_out_blocks_as_the_simulation_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two raylets, twelve groups, of which one lasts as long as all others together many times over."""
    # As benchmarks/simulation.py does: opacus has a package `benchmarks`, too.
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from simulation_check import SHADOWS, predicted, run_sleeping, small_config

    monkeypatch.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="gt-ray-"))
    times = {"llm": [40.0, *[0.1] * (SHADOWS - 1)], "tinylm": [0.1] * SHADOWS}
    found = run_sleeping(small_config(tmp_path), 2, times)
    assert [one[0].split()[0] for one in found.blocks] == ["llm"] * 6 + ["tinylm"] * 6  # the LLM's first
    assert sorted(name for one in found.blocks for name in one) == sorted(f"{s} {k}" for s in times for k in range(12))
    assert found.again == 0 and set(found.placed) == {0, 1}
    run = predicted(found, [Node(), Node()], times, found.between_s)
    simulated = [place for places in run.placed.values() for place in places]
    long = next(i for i, one in enumerate(found.blocks) if "llm 0" in one)
    for placed in (found.placed, simulated):
        assert len(placed) == 12 and placed[long] not in placed[long + 1 :]  # whoever has it begins nothing else
