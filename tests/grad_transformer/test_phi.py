"""phi: a T5 from scratch, of a folder, or by the name of its family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from gt_ray.config import PhiSettings
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi, phi_config, pretrained_name
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A T5 as transformers saves it."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    return tmp_path


def test_phi_may_be_a_pretrained_t5(folder: Path) -> None:
    phi = make_phi(PhiSettings(pretrained=str(folder)))
    expected = dict(T5ForConditionalGeneration.from_pretrained(folder).named_parameters())
    for name, weight in phi.named_parameters():
        assert torch.equal(weight, expected[name])
    model = GradTransformer(LAYOUT_S, LAYOUT_T, phi, {})
    updates = torch.randn(1, LAYOUT_S.L, LAYOUT_S.d, generator=torch.Generator().manual_seed(0))
    assert model.generate(updates).shape == (1, LAYOUT_T.L, LAYOUT_T.d)
    assert not any("shared" in name or "embed_tokens" in name for name in model.state_dict())


def test_a_t5_that_is_none_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"phi\.pretrained"):
        make_phi(PhiSettings(pretrained=str(folder / "nowhere")))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"phi\.pretrained=.* is no T5"):
        make_phi(PhiSettings(pretrained=str(folder)))


def test_a_config_by_name_needs_no_weights(folder: Path) -> None:
    assert phi_config(PhiSettings(pretrained="google/flan-t5-xl"), by_name=True).d_model == 2048
    (folder / "model.safetensors").unlink()
    settings = PhiSettings(pretrained=str(folder))
    assert phi_config(settings, by_name=True).d_ff == 24
    with pytest.raises(UserError, match="has no weights"):
        phi_config(settings)


def test_a_t5_from_scratch_has_the_sizes_asked_for() -> None:
    config = phi_config(PhiSettings(d_model=32, layers=3, heads=4, d_ff=48, dropout=0.2))
    assert (config.d_model, config.num_layers, config.num_decoder_layers, config.d_kv) == (32, 3, 3, 8)
    phi = make_phi(PhiSettings(d_model=32, layers=3, heads=4, d_ff=48))
    assert phi.shared is phi.encoder.embed_tokens is phi.decoder.embed_tokens is None


def test_names_of_phi_are_those_of_its_files() -> None:
    assert pretrained_name("models.0.phi.encoder.block.0.layer.0.SelfAttention.q.weight") == (
        "encoder.block.0.layer.0.SelfAttention.q.weight"
    )
    assert pretrained_name("models.0.out.maps.0.weight") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_position_bias_is_contiguous_and_changes_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, strides = torch.nn.functional.scaled_dot_product_attention, []

    def seen(*args: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: object) -> torch.Tensor:
        strides.append(attn_mask.stride(-1) if attn_mask is not None else 1)
        return attention(*args, attn_mask=attn_mask, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    phi = make_phi(PhiSettings(d_model=32, layers=2, heads=4, d_ff=48))
    generator = torch.Generator().manual_seed(0)
    inputs = {"inputs_embeds": torch.randn(3, 9, 32, generator=generator)}
    inputs["decoder_inputs_embeds"] = torch.randn(3, 7, 32, generator=generator)
    found = []
    for contiguous in (True, False):
        if not contiguous:
            for module in phi.modules():
                module._forward_hooks.clear()
        strides.clear()
        phi.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            said = phi(**inputs, use_cache=False).last_hidden_state
        said.float().square().mean().backward()
        assert all(stride == 1 for stride in strides) == contiguous
        found.append([said, *(weight.grad for weight in phi.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
