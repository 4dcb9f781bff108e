"""The CPU's LoRA layers against one product a token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gt_ray.evaluation.vllm_cpu import HEAD_SIZES, add_lora_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_gets_the_product_of_its_own_adapter(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    slots, r, d, sizes, index_n = 3, 4, 6, (5, 7, 2), [2, 0, 0, -1, 1, 2, -1]
    x_nd, y_no = draw(len(index_n), d), draw(len(index_n), sum(sizes))
    a = tuple(draw(slots, 1, r, d) for _ in sizes)
    b = [draw(slots, 1, size, r) for size in sizes]
    b[1].zero_()  # a slice that no adapter changes
    expected_no = y_no.double()
    for n, slot in enumerate(index_n):
        start = 0
        for a_s, b_s, size in zip(a, b, sizes, strict=True):
            if slot >= 0:  # a token without an adapter is left alone
                expected_no[n, start : start + size] += (
                    0.5 * b_s[slot, 0].double() @ (a_s[slot, 0].double() @ x_nd[n].double())
                )
            start += size
    wrapper = SimpleNamespace(no_lora=False, token_lora_indices=torch.tensor(index_n))
    before_no = y_no.clone()
    add_lora_linear(wrapper, y_no, x_nd, a, tuple(b), 0.5, sizes)
    assert torch.allclose(y_no.double(), expected_no, atol=1e-5 if dtype == torch.float32 else 0.1)
    assert torch.equal(y_no[3], before_no[3]) and torch.equal(y_no[:, 5:12], before_no[:, 5:12])
    add_lora_linear(SimpleNamespace(no_lora=True), y_no, x_nd, a, tuple(b), 0.5, sizes)


@pytest.mark.vllm
def test_the_sizes_of_heads_are_those_of_the_installed_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
