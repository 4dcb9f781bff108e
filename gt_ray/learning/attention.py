"""Causal attention over packed sequences, as an attention function of transformers.

Many samples stand one behind the other in one row of tokens, so that linear layers and norms see no padding. Only here
are they laid side by side, padded, for a batched causal attention; then they go back into the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gt_ray_packed"


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a row [P] stand in a padded batch of samples [N, T], and back.

    Attributes:
        token_NT: for each slot of the batch its token in the row; slots behind a sample's end repeat its first token.
        slot_P: for each token of the row its slot in the flattened batch; tokens that pad the row have some slot of
            the same adapter, so that nothing passes between adapters.
        empty_NT: which slots hold no token of their own.
        padding_P: which tokens of the row are padding.
    """

    token_NT: Tensor
    slot_P: Tensor
    empty_NT: Tensor
    padding_P: Tensor

    def to(self, device: torch.device) -> Packing:
        """The same on a device."""
        return Packing(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class _Move(torch.autograd.Function):
    """x[..., index, :]; each entry has at most one place of its own, so the gradient is a gather too, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(back, unused)
        return x.index_select(-2, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back, unused = ctx.saved_tensors
        gradient = gradients[0].index_select(-2, back)
        return gradient.masked_fill_(unused[:, None], 0.0), None, None, None


def _move(x: Tensor, index: Tensor, back: Tensor, unused: Tensor) -> Tensor:
    moved: Tensor = _Move.apply(x, index, back, unused)  # type: ignore[no-untyped-call]
    return moved


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: every sample attends causally to itself alone.

    Query, key and value are [1, H, P, d], one packed row; without a packing [N, H, T, d], samples padded on the right.

    Raises:
        NotImplementedError: the model wants soft-capped scores, sinks or a position bias.
    """
    if softcap is not None or s_aux is not None or position_bias is not None:
        raise NotImplementedError("packed attention knows no softcap, sinks or position bias")
    if packing is not None:
        N, T = packing.token_NT.shape
        slots, empty = packing.token_NT.flatten(), packing.empty_NT.flatten()
        query, key, value = (
            _move(x[0], slots, packing.slot_P, packing.padding_P).unflatten(1, (N, T)).transpose(0, 1)
            for x in (query, key, value)
        )
    near, T = None, query.shape[2]
    if sliding_window is not None and sliding_window < T:
        near = torch.ones(T, T, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
    out_NHTd = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=near,
        is_causal=near is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if packing is None:
        return out_NHTd.transpose(1, 2), None
    flat = out_NHTd.transpose(1, 2).reshape(N * T, -1)
    out_PD = _move(flat, packing.slot_P, slots, empty)
    return out_PD.unflatten(1, (out_NHTd.shape[1], -1))[None], None


@contextmanager
def packed_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend by `packed_attention` for a while."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
