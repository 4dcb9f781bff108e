"""Noisy empirical risk minimisation (section 5): plain fine-tuning, then Gaussian noise on what leaves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gt_ray.config import FineTuneSettings, NoisyErmSettings
from gt_ray.learning.mechanisms.accounting import gaussian_epsilon
from gt_ray.learning.mechanisms.base import Sft, generator

DELTA = 1e-5


class NoisyErm(Sft):
    """See the module."""

    @staticmethod
    def statement(settings: FineTuneSettings, samples: int) -> dict[str, Any]:
        """Name and noise. A bounded update gives (epsilon, delta) too: two data sets, however different, have updates
        that differ by twice the bound at most. Without the bound there is no guarantee.
        """
        mechanism = _mechanism(settings)
        stated = {"name": mechanism.name, "noise": mechanism.noise}
        if mechanism.update_norm is None:
            return stated
        epsilon = gaussian_epsilon(mechanism.noise / (2 * mechanism.update_norm), DELTA)
        bound = {"update_norm": mechanism.update_norm, "protects": "data set"}
        return {**stated, **bound, "epsilon": epsilon, "delta": DELTA}

    def released(self, g: int, update_Ld: Tensor, step: int) -> Tensor:
        """The update, bounded where the settings say so, with noise."""
        mechanism = _mechanism(self.settings)
        if mechanism.update_norm is not None:
            update_Ld = update_Ld * (mechanism.update_norm / update_Ld.norm().clamp(min=1e-12)).clamp(max=1)
        noise_Ld = torch.randn(update_Ld.shape, generator=generator(self.sets[g].secret_seed, "release", step))
        return update_Ld + mechanism.noise * noise_Ld.to(update_Ld.device)


def _mechanism(settings: FineTuneSettings) -> NoisyErmSettings:
    assert isinstance(settings.mechanism, NoisyErmSettings)
    return settings.mechanism
