"""The optimizer steps' rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gt_ray.config import TrainingSettings
from gt_ray.training.worker import Task, rates, schedule
from tests.training.test_strategies import start_model, task_of

SETTINGS = {
    "learning_rate": 1e-2,
    "warmup_share": 0.2,
    "behaviour": {"steps": 10, "learning_rate": 1e-3, "linear_learning_rate": 2e-3},
}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return replace(task_of(start_model(tmp_path)), settings=TrainingSettings.model_validate(SETTINGS))


def test_each_phase_warms_up_and_decays(task: Task) -> None:
    found = [rates(replace(task, steps=20), step) for step in range(21)]
    assert max(found) == found[4] == found[3] == [1e-2]
    assert found[0] < found[1] and found[19] < [1e-3] and found[20] == [0]
    network, linear = zip(*(rates(replace(task, phase="behaviour", steps=10), step) for step in range(11)), strict=True)
    assert max(network) == pytest.approx(1e-3) and network[0] < network[1] and network[10] == 0
    assert linear == pytest.approx([2 * rate for rate in network])


def test_every_pair_warms_up_and_decays_as_if_it_were_alone(task: Task) -> None:
    alone = [rates(replace(task, steps=10), step) for step in range(10)]
    together = replace(task, steps=40, starts=task.starts * 4)
    for turn in range(4):
        assert [rates(together, step) for step in range(turn, 40, 4)] == alone


def test_the_schedule_of_a_single_step_is_the_peak() -> None:
    assert schedule(0, 1, 0.05) == 1
