"""The exchanged RMSNorm against the model's own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gt_ray.learning.norms import fast_norms, rms_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    module = LlamaRMSNorm(24).requires_grad_(False).to(dtype)
    module.weight.copy_(torch.randn(24, generator=generator))
    x = (3 * torch.randn(2, 5, 24, generator=generator)).to(dtype)
    weight = torch.randn(2, 5, 24, generator=generator)
    found = []
    for norm in (module, lambda x: rms_norm(module, x)):
        one = x.clone().requires_grad_()
        y = norm(one)
        (y * weight).sum().backward()
        assert one.grad is not None and y.dtype == one.grad.dtype == dtype
        found.append((y.float(), one.grad.float()))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < tolerance


def test_modules_get_their_own_forward_back() -> None:
    model = torch.nn.Sequential(LlamaRMSNorm(4), torch.nn.Linear(4, 4), Gemma2RMSNorm(4))
    x = torch.randn(3, 4)
    before = model(x)
    with fast_norms(model):
        assert "forward" in vars(model[0])
    assert all("forward" not in vars(module) for module in model) and torch.equal(model(x), before)
