"""Stacked adapters."""

from __future__ import annotations

from pathlib import Path

import torch

from gt_ray.config import ModelSettings
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import make_root


def test_each_adapter_sees_its_own_samples_only(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[1]), dtype="float32")
    root, model = make_root(settings), load_model(settings)
    ids = torch.randint(10, 200, (6, 7), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with torch.no_grad(), stacked(model, root, G=3) as parameters:
        for parameter in parameters.values():
            parameter.normal_(std=0.3)
        together = model(ids).logits
        apart = []
        for g in range(3):
            alone = {name: parameter[g].clone() for name, parameter in parameters.items()}
            apart.append(_plain_lora(settings, alone, root.scaling, ids[2 * g : 2 * g + 2]))
    assert torch.allclose(together, torch.cat(apart), atol=1e-4)


def test_leaving_restores_the_base_model(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[0]), dtype="float32")
    root, model = make_root(settings), load_model(settings)
    ids = torch.arange(20, 30)[None]
    before, names = model(ids).logits, [name for name, _ in model.named_modules()]
    with stacked(model, root, G=2) as parameters, torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(1.0)
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_modules()] == names


def _plain_lora(
    settings: ModelSettings, adapter: dict[str, torch.Tensor], scaling: float, ids: torch.Tensor
) -> torch.Tensor:
    """Logits with W + scaling * B A written into the weights."""
    model = load_model(settings)
    for module in {name.rpartition(".")[0] for name in adapter}:
        model.get_submodule(module).weight += scaling * adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
    logits: torch.Tensor = model(ids).logits
    return logits
