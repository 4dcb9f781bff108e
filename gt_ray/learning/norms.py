"""RMSNorm with a frozen weight in fewer passes over memory than autograd makes of its formula.

y = w x r,  r = (mean(x^2) + eps)^-1/2;   dx = r (w dy) - x r^3 / d * <w dy, x>
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        r = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        y: Tensor = (x32 * r).to(x.dtype).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        x32 = x.float()
        scaled = (gradients[0] * weight).float()
        along = torch.linalg.vecdot(scaled, x32).unsqueeze(-1)
        gradient = scaled.mul_(r).addcmul_(x32, along * r.pow(3).div_(-x.shape[-1]))
        return gradient.to(x.dtype), None, None


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """What a module of the kind of LlamaRMSNorm computes; no gradient of its weight."""
    normed: Tensor = _RmsNorm.apply(x, module.weight, _eps(module))  # type: ignore[no-untyped-call]
    return normed


@contextmanager
def fast_norms(model: nn.Module) -> Iterator[None]:
    """Let a model's RMSNorms compute by `rms_norm` for a while; whether that is what they compute is for trying."""
    changed = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and _eps(m) is not None]
    for module in changed:
        module.forward = partial(rms_norm, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))
