"""Stochastic gradient Langevin dynamics samples the Gibbs distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gt_ray.config import FineTuneSettings, GibbsSettings, ModelSettings
from gt_ray.learning.engine import Engine, FineTuned
from gt_ray.learning.mechanisms.base import Step
from gt_ray.learning.mechanisms.gibbs import Gibbs
from gt_ray.learning.samples import Sample, TrainingSet
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import make_root
from tests.learning.test_engine import sets


class Quadratic:
    """Stands in for a model's losses: (theta - 1)^2 / 2 of a single number an adapter."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter, self.device = parameter, parameter.device

    def batch(self, groups: Sequence[Sequence[Sample]]) -> Any:
        return groups

    def by_adapter(self, batch: Any, G: int) -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.tensor([sum(len(sample.target) for sample in group) for group in batch])
        return targets * (self.parameter[:, 0] - 1) ** 2 / 2, targets


def test_a_long_chain_has_the_variance_of_its_temperature() -> None:
    """exp(-(theta - 1)^2 / 2 temperature) is a Gaussian around 1 of variance `temperature`."""
    G, temperature = 64, 0.05
    tune = FineTuneSettings(
        steps=100,
        learning_rate=0.05,
        clip_norm=1e6,
        weight_decay=0,
        batch_size=1,
        mechanism=GibbsSettings(temperature=temperature),
    )
    mechanism = Gibbs(tune, [TrainingSet([Sample([1], [2])], g) for g in range(G)])
    parameter = torch.nn.Parameter(torch.zeros(G, 1))
    optimizer, losses = mechanism.optimizer([parameter]), Quadratic(parameter)
    seen = []
    for step in range(600):
        optimizer.zero_grad()
        batch = [mechanism.draw(g, step) for g in range(G)]
        one = Step(step, [parameter], range(G), batch, 1, [1.0] * G)
        mechanism.gradients(losses, one)  # type: ignore[arg-type]
        optimizer.step()
        if step >= 100:
            seen.append(parameter.detach().clone())
    chain = torch.cat(seen)
    assert float(chain.mean()) == pytest.approx(1, abs=0.02)
    assert float(chain.var()) == pytest.approx(temperature, rel=0.1)


def test_the_engine_runs_it(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[0]), dtype="float32")
    engine = Engine(load_model(settings), make_root(settings))
    updates = []
    for temperature in (1e-12, 1e-4):
        tune = FineTuneSettings(
            steps=4, learning_rate=0.1, batch_size=3, mechanism=GibbsSettings(temperature=temperature)
        )
        ((_, result),) = engine.fine_tune(sets(1), tune)
        assert isinstance(result, FineTuned)
        updates.append(result.snapshots_JLd[-1])
    # Over steps of rate 0.1, 0.075, 0.05, 0.025 the noise adds up to a variance of 2 * 0.25 * temperature.
    noise = updates[1] - updates[0]
    assert float(noise[noise != 0].std()) == pytest.approx((2 * 0.25 * 1e-4) ** 0.5, rel=0.1)
