"""Standardisation."""

from __future__ import annotations

import torch

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


def test_inputs_are_projected_to_what_differs_between_the_shadows() -> None:
    generator = torch.Generator().manual_seed(4)
    parts = torch.randn(2, LAYOUT.L, LAYOUT.d, generator=generator)
    updates = torch.einsum("kr,rld->kld", torch.randn(9, 2, generator=generator), parts) + 1
    standard = Standardiser(LAYOUT.L, LAYOUT.d, rank=2)
    standard.fit([updates], LAYOUT, floor=0.0)
    standard.fit_directions(updates)
    plain = (updates - standard.mean) / standard.scale
    torch.testing.assert_close(standard(updates), plain, rtol=1e-3, atol=1e-4)  # nothing of the shadows is lost
    noise = torch.randn(500, LAYOUT.L, LAYOUT.d, generator=generator)
    read = standard(updates[:1] + standard.scale * noise) - standard(updates[:1])
    share = float(read.square().sum() / noise.square().sum())
    assert abs(share - 2 / (LAYOUT.L * LAYOUT.d)) < 0.02
