"""Distances from the shadows, and the errors that they bode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gt_ray.grad_transformer.certainty import Certainty
from gt_ray.grad_transformer.network import GradTransformer, make_phi
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI


@pytest.fixture
def certainty() -> Certainty:
    found = Certainty(K=2, V=3, P=2)
    found.fit(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[1.0, 0.0], [10.0, 2.0], [6.0, 3.0]]))
    found.set_errors(torch.tensor([0.1, 0.2, 0.6]), of_behaviour=False)
    return found


def test_the_distance_is_that_of_the_nearest_shadow_over_the_usual_one(certainty: Certainty) -> None:
    assert certainty.distance_V.tolist() == [1, 2, 5]
    estimate = certainty(torch.tensor([7.0, 4.0]))
    assert (estimate.distance, estimate.range, estimate.out_of_range) == (2.5, 2.5, False)
    assert estimate.error == pytest.approx(0.3) and estimate.error_high == pytest.approx(0.52)
    assert "2.50 (1 is usual" in estimate.text and "mean update's: 0.30 on average" in estimate.text
    certainty.set_errors(torch.tensor([torch.nan, 0.2, 0.4]), of_behaviour=True)
    estimate = certainty(torch.tensor([7.0, 4.0]))
    assert "fine-tuning the LLM gains" in estimate.text and estimate.error == pytest.approx(0.3)
    certainty.set_errors(torch.full((3,), torch.nan), of_behaviour=True)
    assert "not known" in certainty(torch.tensor([7.0, 4.0])).text


def test_further_away_than_every_validation_shadow_nothing_is_known(certainty: Certainty) -> None:
    estimate = certainty(torch.tensor([0.0, 5.1]))
    assert estimate.out_of_range and estimate.error is None and "OUT OF RANGE" in estimate.text


def test_a_checkpoint_keeps_it_and_needs_none(tmp_path: Path) -> None:
    for shadows in ((3, 2), (0, 0)):
        model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {}, linear_rank=2, shadows=shadows)
        update = torch.randn(LAYOUT_S.L, LAYOUT_S.d)
        if model.certainty:
            model.fit_certainty(torch.randn(3, *update.shape), torch.randn(2, *update.shape))
        model.save(tmp_path / str(shadows[0]))
        assert GradTransformer.load(tmp_path / str(shadows[0])).estimate(update) == model.estimate(update)
        assert (model.estimate(update) is None) == (shadows == (0, 0))
