"""Noise on the result of plain fine-tuning."""

from __future__ import annotations

import pytest
import torch

from gt_ray.config import FineTuneSettings, NoisyErmSettings
from gt_ray.learning.mechanisms.accounting import gaussian_epsilon
from gt_ray.learning.mechanisms.noisy_erm import NoisyErm
from gt_ray.learning.samples import Sample, TrainingSet

SET = [TrainingSet([Sample([1], [2])], 0)]


def mechanism(noise: float, update_norm: float | None = None) -> NoisyErm:
    return NoisyErm(FineTuneSettings(mechanism=NoisyErmSettings(noise=noise, update_norm=update_norm)), SET)


def test_noise_is_added_to_what_leaves_and_is_another_one_each_step() -> None:
    update_Ld = torch.randn(4, 5000)
    one, other = (mechanism(0.3).released(0, update_Ld, step) - update_Ld for step in (1, 2))
    assert float(one.std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.05


def test_a_bounded_update_states_an_epsilon_of_the_whole_data_set() -> None:
    update_Ld = torch.full((4, 25), 3.0)  # norm 30
    released = mechanism(1e-9, update_norm=0.5).released(0, update_Ld, 1)
    assert float(released.norm()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(mechanism(1e-9, update_norm=100).released(0, update_Ld, 1), update_Ld)
    stated = NoisyErm.statement(mechanism(2.0, 0.5).settings, 100)
    assert stated["protects"] == "data set" and stated["epsilon"] == gaussian_epsilon(2.0, stated["delta"])


def test_without_a_bound_nothing_is_promised() -> None:
    assert NoisyErm.statement(mechanism(2.0).settings, 100) == {"name": "noisy_erm", "noise": 2.0}
