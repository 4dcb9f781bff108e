"""The optimizer steps' rates."""

from __future__ import annotations

import pytest

from gt_ray.config import BehaviourSettings, TrainingSettings
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.grad_transformer.several import SeveralPairs
from gt_ray.training.worker import learning_rate, optimizer_of
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI

SETTINGS = TrainingSettings(
    learning_rate=1e-2,
    warmup_share=0.2,
    behaviour=BehaviourSettings(steps=10, learning_rate=1e-3, linear_learning_rate=2e-3),
)


def test_each_phase_warms_up_and_decays_and_the_linear_path_rests_in_the_first() -> None:
    rates = [learning_rate(step, 30, SETTINGS) for step in range(31)]
    assert max(rates[:20]) == rates[4] == 1e-2 and max(rates[20:]) == pytest.approx(1e-3)
    assert rates[0] < rates[1] and rates[19] < 1e-3 and rates[20] < rates[21] and rates[30] == 0
    resting = [learning_rate(step, 30, SETTINGS, linear=True) for step in range(31)]
    assert resting[:20] == [0] * 20 and resting[20:] == pytest.approx([2 * rate for rate in rates[20:]])
    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {"tinylm": "s", "llm": "t"}, linear_rank=2)
    optimizer, _ = optimizer_of(SeveralPairs([model]), 30, SETTINGS)
    assert [group["lr"] > 0 for group in optimizer.param_groups] == [True, False]
    assert len(optimizer.param_groups[1]["params"]) == 3
