"""Generation by CUDA graphs is generation."""

from __future__ import annotations

import pytest
import torch

from gt_ray.config import LoraSettings, PhiSettings
from gt_ray.grad_transformer.graphs import GraphedGeneration
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.pairs.families import layout_of


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [None, 96])
def test_graphs_generate_what_the_model_does(chunk: int | None) -> None:
    torch.manual_seed(0)
    layouts = [layout_of(f"embedded:{side}", LoraSettings()) for side in ("tinylm", "llm")]
    phi = make_phi(PhiSettings(d_model=64, layers=2, heads=4, d_ff=128))
    model = GradTransformer(*layouts, phi, {"tinylm": "", "llm": ""}, linear_rank=4, chunk=chunk).eval().cuda()
    for parameter in (*model.out.parameters(), *model.linear.parameters()):  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter, std=0.02)
    generation = GraphedGeneration(model)
    kept = []
    for N in (1, 5, 32, 5, 1, 3):
        update_NLd = torch.randn(N, layouts[0].L, layouts[0].d, device="cuda")
        kept.append((generation(update_NLd), model.generate(update_NLd)))
    for graphed, direct in kept:
        torch.testing.assert_close(graphed, direct, rtol=1e-3, atol=1e-4)
        assert graphed.std() > 0.01
