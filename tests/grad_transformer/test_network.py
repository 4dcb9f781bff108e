"""The network against Eq. 4-11 written out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gt_ray.config import PhiSettings
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer, block_loss
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.updates.layout import Layout

PHI = PhiSettings(d_model=16, layers=2, heads=2, d_ff=24)
ATTENTION = {"lora_A": (2, 6), "lora_B": (5, 2)}
LAYOUT_S = Layout.of({f"layers.{i}.q.{name}": shape for i in range(3) for name, shape in ATTENTION.items()})
LAYOUT_T = Layout.of(
    {f"layers.{i}.q.{name}": shape for i in range(4) for name, shape in ATTENTION.items()} | {"embed.lora_A": (2, 4)}
)
"""Two groups: four attention blocks of width 22 and an embedding block of width 8."""


@pytest.fixture
def model() -> GradTransformer:
    torch.manual_seed(0)
    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {"tinylm": "s", "llm": "t"}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for standard in (model.standard_S, model.standard_T):
        standard.mean += torch.randn_like(standard.mean)
        standard.scale.uniform_(0.5, 2.0)
    return model


def _updates(N: int, layout: Layout) -> Tensor:
    """Random updates whose padding is zero."""
    array = torch.randn(N, layout.L, layout.d, generator=torch.Generator().manual_seed(N))
    return layout.to_array(layout.to_tensors(array))


def _blocks(update_Ld: Tensor, layout: Layout) -> list[Tensor]:
    """Eq. 4-5: one vector a block, of its true width."""
    return [row[: block.width] for row, block in zip(update_Ld, layout.blocks, strict=True)]


def _standard(update_Ld: Tensor, layout: Layout, mean: Tensor, scale: Tensor, clip: float) -> list[Tensor]:
    return [z.clamp(-clip, clip) for z in _blocks((update_Ld - mean) / scale, layout)]


def _group(layout: Layout, j: int) -> int:
    widths: list[int] = []
    for block in layout.blocks:
        if block.width not in widths:
            widths.append(block.width)
    return widths.index(layout.blocks[j].width)


def _phi(model: GradTransformer, h_S: list[Tensor], h_T: list[Tensor]) -> Tensor:
    """Eq. 8: phi on one sequence, without cache or batch; the last decoder state."""
    encoded = model.phi.encoder(inputs_embeds=torch.stack(h_S)[None]).last_hidden_state
    decoded = model.phi.decoder(
        inputs_embeds=torch.stack([model.start, *h_T])[None], encoder_hidden_states=encoded, use_cache=False
    )
    state: Tensor = decoded.last_hidden_state[0, -1]
    return state


def _linear(x: Tensor, linear: torch.nn.Module) -> Tensor:
    weight, bias = linear.weight, linear.bias
    return torch.stack([(weight[i] * x).sum() + bias[i] for i in range(len(bias))])  # type: ignore[index,arg-type]


def _embedded(model: GradTransformer, blocks: list[Tensor], side: str) -> list[Tensor]:
    """Eq. 6-7."""
    embed, layout = (model.embed_S, LAYOUT_S) if side == "S" else (model.embed_T, LAYOUT_T)
    return [_linear(z, embed.maps[_group(layout, j)]) + embed.place[j] for j, z in enumerate(blocks)]


def test_teacher_forcing_is_equations_6_to_9(model: GradTransformer) -> None:
    update_S, update_T = _updates(2, LAYOUT_S), _updates(2, LAYOUT_T)
    with torch.no_grad():
        predicted = model(update_S, update_T)
        for n in range(2):
            z_S = _standard(update_S[n], LAYOUT_S, model.standard_S.mean, model.standard_S.scale, 6.0)
            z_T = _standard(update_T[n], LAYOUT_T, model.standard_T.mean, model.standard_T.scale, 6.0)
            h_S, h_T = _embedded(model, z_S, "S"), _embedded(model, z_T, "T")
            for j in range(LAYOUT_T.L):
                z_hat = _linear(_phi(model, h_S, h_T[:j]), model.out.maps[_group(LAYOUT_T, j)])  # Eq. 8, 9
                assert torch.allclose(predicted[n, j, : len(z_hat)], z_hat, atol=1e-4)
                assert (predicted[n, j, len(z_hat) :] == 0).all()


def test_loss_is_equation_10(model: GradTransformer) -> None:
    update_S, update_T = _updates(3, LAYOUT_S), _updates(3, LAYOUT_T)
    with torch.no_grad():
        predicted = model(update_S, update_T)
        total = 0.0
        for n in range(3):
            truth = _blocks((update_T[n] - model.standard_T.mean) / model.standard_T.scale, LAYOUT_T)
            for j, delta in enumerate(truth):
                total += sum((float(a) - float(b)) ** 2 for a, b in zip(predicted[n, j], delta, strict=False))
        # The padding of standardised T blocks is (0 - mean) / scale; in a fitted standardiser both are neutral.
        model.standard_T.mean[LAYOUT_T.groups.index(0) :][0, 0] += 0
        padded = _pad_neutral(model)
        assert abs(float(padded.loss(update_S, update_T)) - total / (3 * LAYOUT_T.L)) < 1e-2 * total


def _pad_neutral(model: GradTransformer) -> GradTransformer:
    for j, block in enumerate(LAYOUT_T.blocks):
        model.standard_T.mean[j, block.width :] = 0
        model.standard_T.scale[j, block.width :] = 1
    return model


def test_generation_is_equation_11(model: GradTransformer) -> None:
    update_S = _updates(2, LAYOUT_S)
    with torch.no_grad():
        generated = model.generate(update_S)
        for n in range(2):
            z_S = _standard(update_S[n], LAYOUT_S, model.standard_S.mean, model.standard_S.scale, 6.0)
            h_S, h_T = _embedded(model, z_S, "S"), []
            for j in range(LAYOUT_T.L):
                group = _group(LAYOUT_T, j)
                z_hat = _linear(_phi(model, h_S, h_T), model.out.maps[group])
                h_T.append(_linear(z_hat.clamp(-6, 6), model.embed_T.maps[group]) + model.embed_T.place[j])
                delta = model.standard_T.mean[j, : len(z_hat)] + model.standard_T.scale[j, : len(z_hat)] * z_hat
                assert torch.allclose(generated[n, j, : len(z_hat)], delta, atol=1e-4)


def test_cached_generation_equals_uncached(model: GradTransformer) -> None:
    update_S = _updates(3, LAYOUT_S)
    cached = model.generate_standardised(update_S, use_cache=True)
    assert torch.allclose(cached, model.generate_standardised(update_S, use_cache=False), atol=1e-5)


def test_generation_is_differentiable(model: GradTransformer) -> None:
    block_loss(model.generate_standardised(_updates(2, LAYOUT_S)), torch.zeros(2, LAYOUT_T.L, LAYOUT_T.d)).backward()
    assert all(parameter.grad is not None for parameter in model.out.parameters())
    assert model.embed_S.place.grad is not None and model.embed_S.place.grad.abs().sum() > 0


def test_an_untrained_network_generates_the_mean_update() -> None:
    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {}).eval()
    model.standard_T.mean += 1.5
    assert torch.equal(model.generate(_updates(2, LAYOUT_S)), torch.full((2, LAYOUT_T.L, LAYOUT_T.d), 1.5))


def test_a_checkpoint_restores_the_network(model: GradTransformer, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = GradTransformer.load(tmp_path)
    update_S = _updates(2, LAYOUT_S)
    assert torch.equal(loaded.generate(update_S), model.generate(update_S))
    assert loaded.roots == {"tinylm": "s", "llm": "t"}


@pytest.mark.parametrize("damage", ["absent", "truncated", "other format"])
def test_a_damaged_checkpoint_is_an_error(model: GradTransformer, tmp_path: Path, damage: str) -> None:
    model.save(tmp_path)
    if damage == "absent":
        (tmp_path / "model.safetensors").unlink()
    elif damage == "truncated":
        content = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    else:
        (tmp_path / "config.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="Grad-Transformer checkpoint"):
        GradTransformer.load(tmp_path)
