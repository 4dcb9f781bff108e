"""Attention over packed sequences, against a slow calculation sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from gt_ray.learning.attention import packed_attention
from gt_ray.learning.batches import packed
from gt_ray.learning.samples import Sample

LENGTHS = [[3, 5], [2, 4]]
MODULE = torch.nn.Identity()


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Softmax of scores token by token; heads of keys and values are shared by groups of query heads."""
    H, P, d = query.shape
    share = H // key.shape[0]
    out = torch.zeros(P, H, value.shape[-1])
    width = max(map(sum, LENGTHS))  # of an adapter's part of the row
    for g, group in enumerate(LENGTHS):
        start = g * width
        for length in group:
            for t in range(length):
                seen = slice(start + (max(0, t + 1 - window) if window else 0), start + t + 1)
                for h in range(H):
                    scores = key[h // share, seen] @ query[h, start + t] / math.sqrt(d)
                    out[start + t, h] = scores.softmax(0) @ value[h // share, seen]
            start += length
    return out


@pytest.mark.parametrize("window", [None, 2])
def test_packed_attention_and_its_gradients_by_hand(window: int | None) -> None:
    batch = packed([[Sample([1] * (n - 1), [1]) for n in group] for group in LENGTHS], pad=0)
    assert batch.packing is not None
    P = batch.ids_RT.shape[1]
    real = ~batch.packing.padding_P
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(heads, P, 4, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    weight = torch.randn(P, 4, 4, generator=generator) * real[:, None, None]
    found, _ = packed_attention(
        MODULE, *(x[None] for x in inputs), None, packing=batch.packing, scaling=0.5, sliding_window=window
    )
    gradients = torch.autograd.grad((found[0] * weight).sum(), inputs)
    expected = by_hand(*inputs, window)
    assert torch.allclose(found[0][real], expected[real], atol=1e-6)
    for one, other in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_what_it_does_not_know_it_refuses() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="softcap"):
        packed_attention(MODULE, x, x, x, None, softcap=30.0)
