"""What validation looks at."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gt_ray.config import BehaviourSettings
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.training.behaviour import Draw
from gt_ray.training.tuples import Tuples
from gt_ray.training.validation import Validation, halves, together
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T


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
    validate = Validation(tuples, llm)  # type: ignore[arg-type]
    found = validate(model)
    assert found["validation_behaviour"] == pytest.approx(1.0)
    assert model.certainty is not None
    error_V = model.certainty.error_V
    assert float(error_V[0]) == pytest.approx(0.5) and error_V[1].isnan()
    rows = [row for draw in llm.draws[:1] for _, row in draw]
    assert {k for k, _ in llm.draws[0]} == {7} and {k for k, _ in llm.draws[2]} == {7, 9}
    assert {row % 2 for row in rows} == {0, 1} and max(rows) > 256  # spread over all rows of the shadow
    # Losses of no update and of the shadows' own are the same for every model, so they are computed once.
    asked = len(llm.draws)
    assert validate(model) == found and len(llm.draws) - asked == len(validate.draws)


def test_halves_are_as_noisy_as_inputs_of_training_are() -> None:
    S, T = torch.ones(8, LAYOUT_S.L, LAYOUT_S.d), torch.zeros(8, LAYOUT_T.L, LAYOUT_T.d)
    tuples = Tuples(S, T, torch.zeros(8), torch.arange(8))
    assert torch.equal(Validation(tuples, None).input_MLd, torch.cat([S, S]))
    behaviour = BehaviourSettings(noise=4.0, noise_shrinks=False)
    input_MLd = Validation(tuples, None, behaviour=behaviour).input_MLd
    assert torch.equal(input_MLd[:8], S)
    assert float((input_MLd[-1] - 1).std()) == pytest.approx(4.0 / 3**0.5, rel=0.4)  # the eighth: of three


def test_measures_of_several_pairs_are_averaged_under_the_names_of_one() -> None:
    assert together([{"loss": 2.0}]) == {"loss": 2.0}
    assert together([{"loss": 2.0}, {"loss": 4.0}]) == {"loss": 3.0, "loss_0": 2.0, "loss_1": 4.0}
