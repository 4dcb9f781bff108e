"""The optimizer steps' rates, and what validation looks at."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gt_ray.config import BehaviourSettings, TrainingSettings
from gt_ray.grad_transformer.network import GradTransformer, make_phi
from gt_ray.training.behaviour import Draw
from gt_ray.training.worker import Tuples, halves, learning_rate, optimizer_of, validate
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
    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {}, linear_rank=2)
    optimizer, _ = optimizer_of(model, 30, SETTINGS)
    assert [group["lr"] > 0 for group in optimizer.param_groups] == [True, False]
    assert len(optimizer.param_groups[1]["params"]) == 3


def test_halves_are_of_two_neighbours_of_one_task() -> None:
    assert halves(torch.tensor([0, 1, 0, 2])).tolist() == [
        [0.5, 0, 0.5, 0],
        [0, 1, 0, 0],
        [0.5, 0, 0.5, 0],
        [0, 0, 0, 1],
    ]


class Llm:
    """Stands for the LLM actors: the loss is the distance from each update to a wanted one."""

    def __init__(self, wanted_Ld: torch.Tensor) -> None:
        self.wanted_Ld, self.draws = wanted_Ld, []  # type: ignore[var-annotated]

    def __call__(self, update_GLd: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, None]:
        self.draws += draws
        return (update_GLd - self.wanted_Ld).flatten(1).norm(dim=1), None


def test_validation_tells_the_share_of_the_gain_that_generated_updates_lose() -> None:
    model = GradTransformer(LAYOUT_S, LAYOUT_T, None, {}, linear_rank=2, shadows=(3, 2))
    S, T = torch.randn(2, LAYOUT_S.L, LAYOUT_S.d), torch.zeros(2, LAYOUT_T.L, LAYOUT_T.d)
    T[0, 0, 0], T[1, 0, 0] = 2.0, -2.0
    llm = Llm(T[0])  # fine-tuning helps the first shadow alone
    assert model.linear is not None
    model.linear.bias.data[0] = 1.0  # every generated update is half of the first
    tuples = Tuples(S, T, torch.tensor([0, 0]), torch.tensor([7, 9]))
    found = validate(model, tuples, llm)  # type: ignore[arg-type]
    assert found["validation_behaviour"] == pytest.approx(1.0)
    assert model.certainty is not None
    error_V = model.certainty.error_V
    assert float(error_V[0]) == pytest.approx(0.5) and error_V[1].isnan()
    rows = [row for draw in llm.draws[:1] for _, row in draw]
    assert {k for k, _ in llm.draws[0]} == {7} and {k for k, _ in llm.draws[2]} == {7, 9}
    assert {row % 2 for row in rows} == {0, 1} and max(rows) > 256  # spread over all rows of the shadow
