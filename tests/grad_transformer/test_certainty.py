"""Distances from the shadows, and the errors that they bode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gt_ray.grad_transformer.certainty import NEIGHBOURS, Certainty
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI


@pytest.fixture
def certainty() -> Certainty:
    found = Certainty(K=2, V=3, P=2)
    found.fit(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[1.0, 0.0], [10.0, 2.0], [6.0, 3.0]]))
    found.set_errors(torch.tensor([0.1, 0.2, 0.6]), of_behaviour=False)
    return found


def test_the_distance_is_in_units_of_the_usual_one(certainty: Certainty) -> None:
    # Both shadows are 10 apart, so that is the unit of both, and the median of the validation shadows is 2 / 10.
    assert certainty.usual_K.tolist() == [10, 10]
    assert certainty.distance_V.tolist() == pytest.approx([0.1, 0.2, 0.5])
    estimate = certainty(torch.tensor([7.0, 4.0]))
    assert (estimate.distance, estimate.range) == (pytest.approx(2.5), pytest.approx(2.5))
    estimate = certainty(torch.tensor([7.0, 3.9]))
    assert estimate.error == pytest.approx(0.3) and estimate.error_high == pytest.approx(0.52)
    assert "2.46 (1 is usual" in estimate.text and "mean update's: 0.30 on average" in estimate.text
    certainty.set_errors(torch.tensor([torch.nan, 0.2, 0.4]), of_behaviour=True)
    estimate = certainty(torch.tensor([7.0, 3.9]))
    assert "fine-tuning the LLM gains" in estimate.text and estimate.error == pytest.approx(0.3)
    certainty.set_errors(torch.full((3,), torch.nan), of_behaviour=True)
    assert "not known" in certainty(torch.tensor([7.0, 3.9])).text


def test_the_distance_is_local() -> None:
    """Against a slow calculation, on two clusters of which one is ten times as wide."""
    generator = torch.Generator().manual_seed(0)
    narrow, wide = torch.randn(6, 4, generator=generator), 10 * torch.randn(6, 4, generator=generator) + 200
    known, new = torch.cat([narrow, wide]).half().float(), torch.randn(3, 4, generator=generator)
    new[1] = 10 * new[1] + 200
    new[2] *= 10  # as far from the narrow cluster as is usual in the wide one
    certainty = Certainty(K=12, V=3, P=4)
    certainty.fit(known, new)

    def nearest(point: torch.Tensor, others: list[int]) -> list[tuple[float, int]]:
        return sorted((float((point - known[i]).norm()), i) for i in others)[:NEIGHBOURS]

    slow = []
    for point in new:
        around = nearest(point, list(range(12)))
        own = [sum(d for d, _ in nearest(known[i], [j for j in range(12) if j != i])) for _, i in around]
        slow.append(NEIGHBOURS * sum(d for d, _ in around) / sum(own))
    assert certainty.distance_V.tolist() == pytest.approx(slow, rel=1e-4)
    assert slow[2] > 3 * max(slow[:2])


def test_shadows_that_are_alike_or_alone_have_a_distance() -> None:
    for K in (1, 4):
        certainty = Certainty(K=K, V=1, P=2)
        certainty.fit(torch.ones(K, 2), torch.zeros(1, 2))
        assert certainty(torch.zeros(2)).distance == pytest.approx(1.0)


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
