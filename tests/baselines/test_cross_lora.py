"""cross_lora against dense matrices in numpy, and on models whose relation is known."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gt_ray.baselines import cross_lora
from gt_ray.baselines.cross_lora import CrossLora, Reader, partners, shared_tokens
from gt_ray.config import LoraSettings, ModelSettings, PairSettings
from gt_ray.errors import UserError
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import Root, make_root

PART = "self_attn.q_proj"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(layers: int, out: int, inner: int, seed: int = 0, part: str = PART) -> dict[str, Tensor]:
    """Weights of random directions, whose singular values lie far enough apart to be told."""
    found = {}
    for layer in range(layers):
        U, _, Vt = torch.linalg.svd(normal(out, inner, seed=seed + layer), full_matrices=False)
        found[f"model.layers.{layer}.{part}.weight"] = U * torch.linspace(3, 1, min(out, inner)) @ Vt
    return found


def reader(tensors: dict[str, Tensor]) -> Reader:
    def read(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensors[name]) for name in names)

    return read


def root_of(tensors: dict[str, Tensor], rank: int = 2, alpha: int = 4, B0: float = 0.0, seed: int = 7) -> Root:
    initial = {}
    for n, (name, weight) in enumerate(tensors.items()):
        out, inner = weight.shape
        initial[name.replace("weight", "lora_A")] = normal(rank, inner, seed=seed + n)
        initial[name.replace("weight", "lora_B")] = B0 * normal(out, rank, seed=seed + 50 + n)
    return Root("0" * 64, "model", LoraSettings(rank=rank, alpha=alpha), initial)


def update_of(root: Root, seed: int = 3) -> Tensor:
    array: Tensor = 0.3 * normal(root.layout.L, root.layout.d, seed=seed)
    return array


def changes(update_Ld: Tensor, root: Root) -> dict[str, Tensor]:
    """What an update adds to the weights of every module, float64."""
    found = {}
    for module in root.modules:
        A0, B0 = (root.initial[f"{module}.{factor}"].double() for factor in ("lora_A", "lora_B"))
        A, B = (
            root.layout.to_tensors(update_Ld)[f"{module}.{factor}"].double() + start
            for factor, start in (("lora_A", A0), ("lora_B", B0))
        )
        found[module] = root.scaling * (B @ A - B0 @ A0)
    return found


def slowly(W_S: Any, W_T: Any, change_S: Any, e_S: Any, e_T: Any, rank: int) -> Any:
    """Eq. 1-7 for one module: eigenvectors of W Wᵀ and Wᵀ W, dense maps by least squares."""

    def basis(W: Any) -> tuple[Any, Any]:
        values, V = np.linalg.eigh(W.T @ W)
        V = V[:, np.argsort(-values)[:rank]]
        U = W @ V
        return U / np.linalg.norm(U, axis=0), V

    (U_S, V_S), (U_T, V_T) = basis(W_S), basis(W_T)
    for i in range(rank):
        if sum((e_S[t] @ V_S[:, i]) * (e_T[t] @ V_T[:, i]) for t in range(len(e_S))) < 0:
            U_T[:, i], V_T[:, i] = -U_T[:, i], -V_T[:, i]
    P_U, P_V = (np.linalg.lstsq(S.T, T.T, rcond=None)[0].T for S, T in ((U_S, U_T), (V_S, V_T)))
    np.testing.assert_allclose(P_U @ U_S, U_T, atol=1e-8)
    return P_U @ change_S @ P_V.T


@pytest.mark.parametrize(("rank", "rank_T", "B0"), [(320, 4, 0.0), (320, 2, 0.5), (5, 3, 0.0)])
def test_it_equals_dense_matrices_for_other_widths_depths_and_scalings(rank: int, rank_T: int, B0: float) -> None:
    W_S, W_T = weights(2, 10, 8), weights(3, 14, 12, seed=20)
    e_S, e_T = normal(30, 8, seed=1), normal(30, 12, seed=2)
    root_S, root_T = root_of(W_S, B0=B0), root_of(W_T, rank=rank_T, alpha=3, B0=B0, seed=9)
    update_Ld = update_of(root_S)
    found = changes(CrossLora(root_S, root_T, reader(W_S), reader(W_T), e_S.T @ e_T, rank)(update_Ld), root_T)
    of_S = changes(update_Ld, root_S)
    for layer, partner in ((0, 0), (1, 0), (2, 1)):
        name_S, name_T = f"model.layers.{partner}.{PART}", f"model.layers.{layer}.{PART}"
        arrays = [one.double().numpy() for one in (W_S[f"{name_S}.weight"], W_T[f"{name_T}.weight"], of_S[name_S])]
        change = slowly(*arrays, e_S.double().numpy(), e_T.double().numpy(), min(rank, 8))
        start = root_T.scaling * (root_T.initial[f"{name_T}.lora_B"] @ root_T.initial[f"{name_T}.lora_A"]).numpy()
        u, s, vh = np.linalg.svd(change + start)
        expected = u[:, :rank_T] * s[:rank_T] @ vh[:rank_T] - start
        np.testing.assert_allclose(found[name_T].numpy(), expected, atol=2e-4 * np.abs(change).max())


def test_between_equal_models_the_change_of_the_weights_comes_back() -> None:
    W = weights(2, 8, 8)
    root, other = root_of(W, B0=0.0), root_of(W, alpha=7, seed=70)
    tokens = normal(30, 8, seed=1)
    update_Ld = update_of(root)
    whole, cut = (
        changes(CrossLora(root, other, reader(W), reader(W), tokens.T @ tokens, rank)(update_Ld), other)
        for rank in (320, 3)
    )
    for module, change in changes(update_Ld, root).items():
        torch.testing.assert_close(whole[module], change, rtol=1e-3, atol=1e-4)
        U, _, Vt = torch.linalg.svd(W[f"{module}.weight"].double())
        projected = U[:, :3] @ U[:, :3].T @ change @ Vt[:3].T @ Vt[:3]
        torch.testing.assert_close(cut[module], projected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", [PART, "self_attn.o_proj", "mlp.down_proj"])
def test_to_a_turned_model_of_other_widths_the_change_is_turned_with_it(part: str) -> None:
    W_S, tokens = weights(2, 8, 8, part=part), normal(30, 8, seed=1)
    out, inner = (torch.linalg.qr(normal(n, 8, seed=n)).Q for n in (13, 11))
    W_T = {name: out @ weight @ inner.T for name, weight in W_S.items()}
    root_S, root_T = root_of(W_S), root_of(W_T, seed=9)
    residual = inner if part == PART else out
    update_Ld = update_of(root_S)
    carry = CrossLora(root_S, root_T, reader(W_S), reader(W_T), tokens.T @ (tokens @ residual.T))
    found = changes(carry(update_Ld), root_T)
    for module, change in changes(update_Ld, root_S).items():
        torch.testing.assert_close(found[module], out.double() @ change @ inner.double().T, rtol=1e-3, atol=1e-4)


def test_no_update_stays_none_and_modules_that_the_tinylm_lacks_stay_as_they_are() -> None:
    W_S = weights(2, 8, 8)
    W_T = weights(2, 12, 12, seed=20) | weights(2, 6, 12, seed=30, part="self_attn.v_proj")
    root_S, root_T = root_of(W_S), root_of(W_T)
    carry = CrossLora(root_S, root_T, reader(W_S), reader(W_T), torch.zeros(8, 12))
    assert carry(torch.zeros(root_S.layout.L, root_S.layout.d)).abs().max() < 1e-6
    tensors = root_T.layout.to_tensors(carry(update_of(root_S)))
    assert all((tensor.abs().max() > 1e-3) == ("q_proj" in name) for name, tensor in tensors.items())


def test_layers_have_partners_at_the_same_share_of_the_depth() -> None:
    def modules(layers: int, prefix: str = "model.layers") -> list[str]:
        return [f"{prefix}.{layer}.{PART}" for layer in range(layers)]

    def numbers(layers_S: int, layers_T: int) -> list[int]:
        found = partners(sorted(modules(layers_S)), sorted(modules(layers_T, "transformer.h")))
        return [int(found[name].split(".")[2]) for name in modules(layers_T, "transformer.h")]

    assert numbers(12, 12) == list(range(12))
    assert numbers(2, 4) == [0, 0, 1, 1]
    assert numbers(12, 4) == [0, 4, 7, 11]
    assert numbers(3, 1) == [0] and numbers(1, 3) == [0, 0, 0]
    assert partners(["a.0.k_proj"], ["a.0.k_proj", "a.0.v_proj", "head"]) == {"a.0.k_proj": "a.0.k_proj"}


def test_the_embedded_pair_has_its_weights_and_tokens() -> None:
    pair = PairSettings.model_validate({side: {"model": f"embedded:{side}"} for side in ("tinylm", "llm")})
    root_S, root_T = make_root(pair.tinylm), make_root(pair.llm)
    carry = CrossLora.of(pair, root_S, root_T)
    update_T_Ld = carry(update_of(root_S))
    assert update_T_Ld.shape == (root_T.layout.L, root_T.layout.d) and update_T_Ld.isfinite().all()
    models = [load_model(side.model_copy(update={"dtype": "float32"})) for side in (pair.tinylm, pair.llm)]
    e_S, e_T = (model.get_input_embeddings().weight for model in models)
    tokens_ST = shared_tokens("embedded:tinylm", "embedded:llm")
    torch.testing.assert_close(tokens_ST, e_S.T @ e_T, rtol=1e-3, atol=1e-3)
    by_hand = [
        reader({f"{name}.weight": module.weight for name, module in model.named_modules() if name.endswith("_proj")})
        for model in models
    ]
    expected = CrossLora(root_S, root_T, *by_hand, tokens_ST)(update_of(root_S))
    torch.testing.assert_close(update_T_Ld, expected)


def test_tokens_are_compared_by_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabularies = {"embedded:tinylm": {"a": 5, "b": 2, "c": 1}, "embedded:llm": {"c": 3, "x": 1, "b": 9}}
    tokenizers = {name: SimpleNamespace(get_vocab=lambda v=found: v) for name, found in vocabularies.items()}
    monkeypatch.setattr(cross_lora, "load_tokenizer", tokenizers.__getitem__)
    e_S, e_T = (
        load_model(ModelSettings(model=name, dtype="float32")).get_input_embeddings().weight for name in vocabularies
    )
    expected = torch.outer(e_S[2], e_T[9]) + torch.outer(e_S[1], e_T[3])
    torch.testing.assert_close(shared_tokens(*vocabularies), expected)
    monkeypatch.setattr(cross_lora, "TOKENS", 1)
    torch.testing.assert_close(shared_tokens(*vocabularies), torch.outer(e_S[2], e_T[9]))
    vocabularies["embedded:llm"].clear()
    assert not shared_tokens(*vocabularies).any()


@pytest.mark.parametrize("lora", [{"kind": "xs"}, {"kind": "full"}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_other_kinds_of_adapters_are_refused(lora: dict[str, Any]) -> None:
    W = weights(2, 8, 8)
    other = make_root(ModelSettings.model_validate({"model": "embedded:llm", "lora": lora}))
    for roots in ((root_of(W), other), (other, root_of(W))):
        with pytest.raises(UserError, match=f"root {other.hash[:8]} of embedded:llm is of lora.kind={other.lora.kind}"):
            CrossLora(*roots, reader(W), reader(W), torch.zeros(8, 8))


def test_other_modules_and_other_updates_are_refused() -> None:
    W_S, W_T = weights(1, 8, 8), weights(1, 8, 8, part="self_attn.v_proj")
    with pytest.raises(UserError, match=r"none in common \(pair\.\*\.lora\.target_modules\)"):
        CrossLora(root_of(W_S), root_of(W_T), reader(W_S), reader(W_T), torch.zeros(8, 8))
    carry = CrossLora(root_of(W_S), root_of(W_S), reader(W_S), reader(W_S), torch.zeros(8, 8))
    with pytest.raises(UserError, match=r"update array of shape \(2, 3\), but the layout is"):
        carry(torch.zeros(2, 3))
