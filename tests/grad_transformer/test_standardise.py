"""Standardisation."""

from __future__ import annotations

import pytest
import torch

from gt_ray.errors import UserError
from gt_ray.grad_transformer.standardise import Standardiser
from gt_ray.updates.layout import Layout

LAYOUT = Layout.of({"layers.0.q.lora_A": (1, 3), "layers.0.q.lora_B": (2, 1), "layers.1.q.lora_A": (1, 3)})


def test_mean_and_scale_equal_those_of_all_updates_at_once() -> None:
    updates = torch.randn(11, LAYOUT.L, LAYOUT.d, generator=torch.Generator().manual_seed(0)) * 3 + 2
    updates[:, 1, 3:] = 0  # padding of the narrower block
    standard = Standardiser(LAYOUT.L, LAYOUT.d)
    standard.fit([updates[:4], updates[4:5], updates[5:]], LAYOUT, floor=0.0)
    assert torch.allclose(standard.mean, updates.mean(0), atol=1e-5)
    inside = updates.std(0, unbiased=False) > 0
    assert torch.allclose(standard.scale[inside], updates.std(0, unbiased=False)[inside], atol=1e-5)
    assert (standard.scale[~inside] == 1).all()
    assert torch.allclose(standard.inverse(standard(updates)), updates, atol=1e-5)


def test_scales_have_a_floor_of_a_share_of_their_modules_rms() -> None:
    updates = torch.randn(50, LAYOUT.L, LAYOUT.d, generator=torch.Generator().manual_seed(1))
    updates[:, 0, 0] *= 1e-6
    standard = Standardiser(LAYOUT.L, LAYOUT.d)
    standard.fit([updates], LAYOUT, floor=0.1)
    rms = updates[:, 0, :3].std(0, unbiased=False).square().mean().sqrt()
    assert torch.allclose(standard.scale[0, 0], 0.1 * rms, rtol=1e-4)


def test_zero_is_the_mean_update() -> None:
    updates = torch.randn(5, LAYOUT.L, LAYOUT.d)
    standard = Standardiser(LAYOUT.L, LAYOUT.d)
    standard.fit([updates], LAYOUT, floor=0.1)
    assert torch.allclose(standard.inverse(torch.zeros(LAYOUT.L, LAYOUT.d)), standard.mean)


def test_inputs_are_projected_to_what_differs_between_the_kinds() -> None:
    generator = torch.Generator().manual_seed(4)
    parts_2P = torch.linalg.qr(torch.randn(LAYOUT.L * LAYOUT.d, 2, generator=generator)).Q.T
    # Three kinds that differ much in one direction and little in another; members differ by noise.
    means_CP = torch.tensor([[10.0, 0.1], [-10.0, 0.1], [0.0, -0.2]]) @ parts_2P
    kinds = [k % 3 for k in range(60)]
    updates = means_CP[kinds] + 0.001 * torch.randn(60, LAYOUT.L * LAYOUT.d, generator=generator)
    updates = updates.view(60, LAYOUT.L, LAYOUT.d)
    standard = Standardiser(LAYOUT.L, LAYOUT.d, rank=7)
    standard.mean.copy_(updates.mean(0))
    standard.fit_directions(updates, kinds)
    z_CP = torch.stack([standard(updates[k::3]).mean(0).flatten() for k in range(3)])
    assert torch.allclose(z_CP.square().mean(), torch.tensor(1.0), rtol=1e-3)
    read_C2 = z_CP @ parts_2P.T
    assert torch.allclose(read_C2.square().mean(0)[0], read_C2.square().mean(0)[1], rtol=0.01)  # as much in both
    torch.testing.assert_close(standard.inverse(standard(updates)), updates, rtol=0, atol=0.01)
    noise = torch.randn(500, LAYOUT.L, LAYOUT.d, generator=generator)
    seen = standard.inverse(standard(noise)) - standard.mean
    assert abs(float(seen.square().sum() / noise.square().sum()) - 2 / (LAYOUT.L * LAYOUT.d)) < 0.03


def test_without_kinds_there_are_no_directions() -> None:
    standard = Standardiser(LAYOUT.L, LAYOUT.d, rank=7)
    with pytest.raises(UserError, match="input_rank needs shadows of several tasks, domains or learning mechanisms"):
        standard.fit_directions(torch.randn(5, LAYOUT.L, LAYOUT.d), ["a"] * 5)
