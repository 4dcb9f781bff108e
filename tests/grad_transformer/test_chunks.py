"""Tokens of a fixed width, against a slow calculation with loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gt_ray.errors import UserError
from gt_ray.grad_transformer.chunks import ChunkEmbedding, ChunkOutput
from gt_ray.grad_transformer.network import GradTransformer, block_loss
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.grad_transformer.several import SeveralPairs, share_ends
from gt_ray.updates.layout import Layout
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI

C, D = 4, PHI.d_model
"""Tensors of 12, 10 and 8 coordinates: three chunks, three of which one has padding, two."""


def _updates(N: int, layout: Layout, seed: int = 0) -> Tensor:
    """Random updates whose padding is zero."""
    array = torch.randn(N, layout.L, layout.d, generator=torch.Generator().manual_seed(seed))
    return layout.padded(layout.flat(array))


def _shuffled(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def _model(linear_rank: int = 0) -> GradTransformer:
    torch.manual_seed(0)
    roots = {"tinylm": "s", "llm": "t"}
    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), roots, linear_rank=linear_rank, chunk=C).eval()
    _shuffled(model)
    return model


@pytest.fixture
def model() -> GradTransformer:
    return _model(linear_rank=2)


def _tokens(update_Ld: Tensor, layout: Layout) -> list[tuple[int, int, int, list[float]]]:
    """Block, chunk, module and coordinates of each token."""
    names = list(
        dict.fromkeys(
            name.removeprefix(block.name) for block in layout.blocks for name in (p.name for p in block.params)
        )
    )
    tokens = []
    for j, block in enumerate(layout.blocks):
        start = 0
        for param in block.params:
            values = update_Ld[j, start : start + param.size].tolist()
            start += param.size
            for k in range(0, len(values), C):
                chunk = values[k : k + C]
                module = names.index(param.name.removeprefix(block.name))
                tokens.append((j, k // C, module, chunk + [0.0] * (C - len(chunk))))
    return tokens


@pytest.mark.parametrize("layout", [LAYOUT_S, LAYOUT_T])
@pytest.mark.parametrize("c", [1, C, 5, 12, 100])
def test_joining_what_was_cut_gives_it_back(layout: Layout, c: int) -> None:
    update = _updates(3, layout)
    embed, out = ChunkEmbedding(layout, D, c), ChunkOutput(layout, D, c)
    chunks = embed.cut(update)
    assert chunks.shape == (3, embed.tokens, c)
    assert embed.tokens == sum(-(-param.size // c) for block in layout.blocks for param in block.params)
    assert torch.equal(out.joined(chunks), update)


def test_a_token_is_its_chunk_and_its_place() -> None:
    torch.manual_seed(0)
    embed = ChunkEmbedding(LAYOUT_T, D, C)
    _shuffled(embed)
    update = _updates(2, LAYOUT_T)
    with torch.no_grad():
        embedded = embed(embed.cut(update))
        for n in range(2):
            slow = _tokens(update[n], LAYOUT_T)
            assert len(slow) == embed.tokens == 26
            for t, (j, k, m, chunk) in enumerate(slow):
                assert embed.cut(update)[n, t].tolist() == chunk
                expected = embed.block.weight[j] + embed.chunk.weight[k] + embed.module.weight[m] + embed.map.bias
                expected = expected + sum(embed.map.weight[:, i] * value for i, value in enumerate(chunk))
                assert torch.allclose(embedded[n, t], expected, atol=1e-6)
        assert torch.allclose(embed(embed.cut(update)[:, 7:9], first=7), embedded[:, 7:9])


def test_a_hidden_state_is_projected_to_the_coordinates_of_its_chunk() -> None:
    torch.manual_seed(0)
    out = ChunkOutput(LAYOUT_T, D, C)
    _shuffled(out)
    places = torch.arange(LAYOUT_T.L * LAYOUT_T.d).view(LAYOUT_T.L, LAYOUT_T.d) + 1.0
    slow = _tokens(places, LAYOUT_T)
    hidden = torch.randn(2, len(slow), D)
    with torch.no_grad():
        chunks = out(hidden)
        joined = out.joined(chunks)
        expected = torch.zeros(2, LAYOUT_T.L * LAYOUT_T.d)
        for n in range(2):
            for t, (*_, chunk) in enumerate(slow):
                for i, place in enumerate(chunk):
                    value = (out.map.weight[i] * hidden[n, t]).sum() + out.map.bias[i] if place else torch.tensor(0.0)
                    assert torch.allclose(chunks[n, t, i], value, atol=1e-6)
                    if place:
                        expected[n, int(place) - 1] = value
        assert torch.allclose(joined.flatten(1), expected, atol=1e-6)
        assert torch.equal(out(hidden[:, 5:8], first=5), chunks[:, 5:8])


def test_under_teacher_forcing_a_token_is_predicted_from_those_before_it(model: GradTransformer) -> None:
    update_S, update_T = _updates(2, LAYOUT_S), _updates(2, LAYOUT_T)
    cut, joined = model.embed_T.cut, model.out.joined
    with torch.no_grad():
        true = cut(model(update_S, update_T))
        for t in range(model.embed_T.tokens):
            changed = cut(update_T)
            changed[:, t] += 1
            now = cut(model(update_S, joined(changed)))
            assert torch.allclose(now[:, : t + 1], true[:, : t + 1], atol=1e-6)
            # The one behind it reads it, the last is read by none.
            assert t + 1 == model.embed_T.tokens or not torch.allclose(now[:, t + 1], true[:, t + 1], atol=1e-4)


def test_teacher_forcing_with_what_was_generated_gives_it_again(model: GradTransformer) -> None:
    """So that both ways agree on places, the linear path, clipping and the shift by a token."""
    update_S = _updates(2, LAYOUT_S)
    generated = model.generate(update_S)
    assert torch.allclose(model.standard_T(generated), model(update_S, generated), atol=1e-4)


def test_cached_generation_equals_uncached(model: GradTransformer) -> None:
    update_S = _updates(3, LAYOUT_S)
    cached = model.generate_standardised(update_S, use_cache=True)
    assert torch.allclose(cached, model.generate_standardised(update_S, use_cache=False), atol=1e-5)


def test_generation_is_differentiable(model: GradTransformer) -> None:
    """Down to what the first tokens were generated from, against finite differences."""
    update_S = _updates(2, LAYOUT_S)

    def loss() -> Tensor:
        return block_loss(model.generate_standardised(update_S), torch.zeros(2, LAYOUT_T.L, LAYOUT_T.d))

    model.double()
    update_S = update_S.double()
    loss().backward()
    for weight in (model.embed_T.map.weight, model.embed_S.map.weight, model.embed_T.block.weight):
        assert weight.grad is not None
        step = 1e-3 * torch.randn_like(weight)
        weight.data += step
        after = loss()
        weight.data -= 2 * step
        difference = (after - loss()).item() / 2
        weight.data += step
        assert difference == pytest.approx(float((weight.grad * step).sum()), rel=1e-3)


def test_an_untrained_network_generates_the_mean_update_or_what_the_linear_path_says() -> None:
    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {}, linear_rank=2, chunk=C).eval()
    model.standard_T.mean += 1.5
    assert torch.equal(model.generate(_updates(2, LAYOUT_S)), torch.full((2, LAYOUT_T.L, LAYOUT_T.d), 1.5))
    assert model.linear is not None
    _shuffled(model.linear)
    linear = model.linear(LAYOUT_S.flat(_updates(2, LAYOUT_S)))
    assert torch.allclose(LAYOUT_T.flat(model.generate_standardised(_updates(2, LAYOUT_S))), linear, atol=1e-6)


def test_a_checkpoint_restores_the_network(model: GradTransformer, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = GradTransformer.load(tmp_path)
    assert loaded.chunk == C and loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.generate(_updates(2, LAYOUT_S)), model.generate(_updates(2, LAYOUT_S)))


def test_a_checkpoint_from_before_there_were_chunks_has_none(tmp_path: Path) -> None:
    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {}).eval()
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("chunk") is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = GradTransformer.load(tmp_path)
    assert loaded.chunk is None
    assert torch.equal(loaded.generate(_updates(2, LAYOUT_S)), model.generate(_updates(2, LAYOUT_S)))


def test_ends_grow_with_the_llm_by_places_of_chunks_alone() -> None:
    def shapes(width: int) -> dict[str, torch.Size]:
        layout = Layout.of({f"layers.{i}.{m}.lora_A": (2, width) for i in range(3) for m in ("q_proj", "k_proj")})
        model = GradTransformer(LAYOUT_S, layout, make_phi(PHI), {}, chunk=8)
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    narrow, wide = shapes(32), shapes(128)
    assert {name for name in narrow if narrow[name] != wide[name]} == {"embed_T.chunk.weight"}
    assert narrow["embed_T.chunk.weight"] == (8, D) and wide["embed_T.chunk.weight"] == (32, D)


def test_pairs_that_train_together_share_ends_and_have_one_chunk(model: GradTransformer) -> None:
    other = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {"tinylm": "s", "llm": "other"}, chunk=C)
    share_ends([model, other])
    assert other.embed_S is model.embed_S and other.embed_T is not model.embed_T
    with pytest.raises(UserError, match="chunk of theirs differ"):
        share_ends([model, GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {"tinylm": "s", "llm": "t"}, chunk=5)])


@pytest.mark.parametrize("forced", [False, True])
def test_every_parameter_has_a_gradient(forced: bool) -> None:
    """Data-parallel training fails at those that have none."""
    several = SeveralPairs([_model()])
    assert not several.some_rest
    several(0, _updates(2, LAYOUT_S), _updates(2, LAYOUT_T, 1) if forced else None).square().sum().backward()
    assert all(parameter.grad is not None for parameter in several.parameters())
