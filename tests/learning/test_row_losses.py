"""Losses of rows under several updates at once are those of each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gt_ray.config import ModelSettings
from gt_ray.learning import row_losses as module
from gt_ray.learning.behaviour import Behaviour
from gt_ray.learning.row_losses import row_losses
from gt_ray.learning.samples import Sample
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import make_root

SAMPLES = [Sample(list(range(20, 20 + n)), [30 + n, 31, 32][: 1 + n % 3]) for n in (3, 9, 4, 12, 5)]


@pytest.mark.parametrize("tokens", [1, 200, 10_000])
def test_losses_are_those_of_each_update_and_row_by_itself(
    tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    settings = ModelSettings(model=str(tiny_pair[1]), dtype="float32")
    model, root = load_model(settings), make_root(settings)
    monkeypatch.setattr(module, "UPDATES_AT_ONCE", 2)
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", tokens)
    torch.manual_seed(0)
    updates_MLd = 0.3 * torch.randn(3, *root.layout.to_array(root.initial).shape)
    updates_MLd[2] = 0  # the base model
    passes: list[int] = []
    losses_MR = row_losses(model, root, updates_MLd, SAMPLES, passes.append)
    behaviour = Behaviour(model, root)
    expected = [[float(behaviour(one[None], [[s]], gradient=False)[0]) for s in SAMPLES] for one in updates_MLd]
    assert torch.allclose(losses_MR, torch.tensor(expected), rtol=1e-4)
    assert sum(passes) == losses_MR.numel() and losses_MR.std(0).min() > 1e-3
