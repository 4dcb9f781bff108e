"""A sample of the Gibbs distribution exp(-loss / temperature) by stochastic gradient Langevin dynamics (section 5).

    theta <- theta - rate * (gradient + weight_decay * theta) + sqrt(2 * rate * temperature) * N(0, 1)

Gradients of batches are clipped to `clip_norm`, which bounds what a step can tell of its rows (theory.py);
`weight_decay` is a Gaussian prior around zero. It states no (epsilon, delta).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gt_ray.config import FineTuneSettings, GibbsSettings
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.mechanisms.base import Sft, Step, add_noise


class Gibbs(Sft):
    """See the module."""

    @staticmethod
    def statement(settings: FineTuneSettings, samples: int) -> dict[str, Any]:
        """Name, temperature, and what bounds the information in it."""
        mechanism = _mechanism(settings)
        return {
            "name": mechanism.name,
            "temperature": mechanism.temperature,
            "learning_rate": settings.learning_rate,
            "clip_norm": settings.clip_norm,
            "steps": settings.steps,
        }

    def optimizer(self, trained: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Plain gradient descent: AdamW's rates would change the noise."""
        return torch.optim.SGD(trained, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay)

    def gradients(self, losses: TargetLosses, step: Step) -> Tensor:
        """The batch's gradients with the noise of a step of this size."""
        loss_G = super().gradients(losses, step)
        temperature = _mechanism(self.settings).temperature
        rate = self.settings.learning_rate
        add_noise(step, [math.sqrt(2 * temperature / (rate * factor)) for factor in step.factors], self.sets)
        return loss_G


def _mechanism(settings: FineTuneSettings) -> GibbsSettings:
    assert isinstance(settings.mechanism, GibbsSettings)
    return settings.mechanism
