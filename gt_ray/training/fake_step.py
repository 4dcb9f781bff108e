"""The memory and the operations of a full-size training step, from one that runs on fake tensors: no weights, no GPU.

A fake tensor has a shape and a type, but no values. The step is the trainers' own code; only where a GPU's kernels keep
other tensors for the backward pass than a CPU's do, `GpuKernels` keeps what a GPU keeps. Two runs, with 2 and 3 tuples,
allocate the same tensors in the same order, so each moment of a step of N tuples follows by a straight line:

    live_t(N) = live_t(2) + (N - 2) (live_t(3) - live_t(2))        peak(N) = max_t live_t(N)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.learning.memory import LiveTensors

Precision = Literal["fp32", "bf16"]
"""Of matrix products; weights are float32."""
IN_FLOAT32 = (torch.pow, torch.Tensor.pow, torch.rsqrt, torch.Tensor.rsqrt)
"""What autocast computes in float32 on a GPU, and not on a CPU, as far as T5 uses it."""
Kernels = Callable[[], AbstractContextManager[Any]]
SMALLEST = 2
"""Tuples of the smaller run; with one, operators skip copies that they make of more."""


@dataclass(frozen=True)
class FakeStep:
    """What forward and backward pass of a step take besides the weights, while it lasts.

    Attributes:
        live: bytes alive after each allocation, in a step of 2 tuples and in one of 3; gradients of weights that are
            complete do not count.
        gradients: bytes of complete gradients of weights at the same moments.
        flops: operations of matrix products, forward and backward, of one tuple.
    """

    live: tuple[tuple[int, int], ...]
    gradients: tuple[int, ...]
    flops: float

    def peak(self, N: int, keep_gradients: bool) -> int:
        """Bytes of a step of N tuples at its worst moment.

        Args:
            keep_gradients: whether gradients are kept one by one as they come; otherwise they are not counted.
        """
        return max(
            two + (N - SMALLEST) * (three - two) + (kept if keep_gradients else 0)
            for (two, three), kept in zip(self.live, self.gradients, strict=True)
        )


def fake_step(
    build: Callable[[], GradTransformer], precision: Precision, checkpointing: bool, gpu: bool = True
) -> FakeStep:
    """Run Eq. 10 forward and backward twice on fake tensors.

    Args:
        build: makes the Grad-Transformer; it is called under fake tensors.
        gpu: keep what a GPU's kernels keep; otherwise what a CPU's do.
    """
    kernels = GpuKernels if gpu else nullcontext
    with FakeTensorMode():
        model = build().train()
        if checkpointing and model.phi is not None:
            # Backward passes run outside of function modes, but what they compute again is a GPU's too.
            again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), kernels())}
            model.phi.gradient_checkpointing_enable(again)
        # Counting operations changes what is allocated, for it takes some of them apart.
        with FlopCounterMode(display=False) as counter:
            training_step(model, SMALLEST, precision, kernels)
        two, three = (_traced(model, N, precision, kernels) for N in (SMALLEST, SMALLEST + 1))
    live = tuple(zip(two.live, three.live, strict=True))
    return FakeStep(live, tuple(two.gradients), counter.get_total_flops() / SMALLEST)


class _Trace(LiveTensors):
    """Remembers every moment at which something was allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[int] = []
        self.gradients: list[int] = []
        self.complete = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        before = self.now
        super().add(storage)
        if self.now != before:
            self.live.append(self.now)
            self.gradients.append(self.complete)


def _traced(model: GradTransformer, N: int, precision: Precision, kernels: Kernels) -> _Trace:
    trace = _Trace()

    def complete(weight: Tensor) -> None:
        assert weight.grad is not None
        trace.complete += weight.grad.untyped_storage().nbytes()
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(complete) for weight in model.parameters()]
    with trace:
        training_step(model, N, precision, kernels)
    for hook in hooks:
        hook.remove()
    return trace


def training_step(model: GradTransformer, N: int, precision: Precision, kernels: Kernels = nullcontext) -> None:
    """Forward and backward pass of Eq. 10 on N random tuples."""
    updates = (torch.randn(N, one.L, one.d) for one in (model.layout_S, model.layout_T))
    with kernels():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss(*updates)
        loss.backward()


class GpuKernels(TorchFunctionMode):
    """Keeps for the backward pass what PyTorch's kernels for NVIDIA GPUs keep, where its CPU kernels differ.

    - Dropout keeps a mask of a byte, not of the input's type.
    - Autocast computes powers and inverse roots in float32.
    - Attention with a bias whose last dimension is contiguous is the memory-efficient kernel; with another (as T5 lays
      out its own; phi.py does not) PyTorch falls back to plain products in float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (one.bfloat16() for one in (query, key, value))
        attn_mask = attn_mask if attn_mask is None else attn_mask.bfloat16()
    dtype = query.dtype
    if attn_mask is not None and attn_mask.stride(-1) != 1:
        with torch.autocast("cpu", enabled=False):
            root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
            scores = (query.float() * root) @ (key.float().transpose(-1, -2) * root) + attn_mask.float()
            return (_dropout(scores.softmax(-1), dropout_p) @ value.float()).to(dtype)
    if attn_mask is not None:
        columns = attn_mask.shape[-1]
        if fill := -columns % 8:  # the kernel wants rows that start at multiples of 16 bytes
            attn_mask = F.pad(attn_mask, (0, fill))[..., :columns]
        attn_mask = attn_mask.expand(*query.shape[:-1], columns)
    found: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return found
