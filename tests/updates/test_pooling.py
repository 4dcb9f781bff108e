"""Pooling the updates of several clients."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gt_ray.config import LoraSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.root import Root, make_root
from gt_ray.updates.pooling import pool, pool_products

UPDATES_NLD = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
MEAN_LD = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_the_mean_equals_a_loop() -> None:
    expected = torch.zeros(3, 4)
    for update_Ld in UPDATES_NLD:
        expected += update_Ld / 5
    torch.testing.assert_close(pool(UPDATES_NLD), expected)
    torch.testing.assert_close(pool(UPDATES_NLD, "mean", MEAN_LD), expected)


def test_the_sum_adds_up_what_distinguishes_the_clients_from_the_mean_update() -> None:
    expected = MEAN_LD.clone()
    for update_Ld in UPDATES_NLD:
        expected += update_Ld - MEAN_LD
    torch.testing.assert_close(pool(UPDATES_NLD, "sum", MEAN_LD), expected)


@pytest.mark.parametrize("how", ["mean", "sum", "clip", "median", "trimmed_mean"])
def test_the_pool_of_one_update_is_that_update(how: str) -> None:
    torch.testing.assert_close(pool(UPDATES_NLD[:1], how, MEAN_LD), UPDATES_NLD[0])  # type: ignore[arg-type]


def test_clients_without_news_sum_to_the_mean_update() -> None:
    torch.testing.assert_close(pool(MEAN_LD.expand(7, 3, 4), "sum", MEAN_LD), MEAN_LD)


def test_the_sum_needs_the_mean_update() -> None:
    with pytest.raises(ValueError, match="needs the mean update"):
        pool(UPDATES_NLD, "sum")


@pytest.mark.parametrize("how", ["clip", "median", "trimmed_mean"])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_robust_pooling_equals_a_loop_over_coordinates(how: str, n: int) -> None:
    updates_NLd = UPDATES_NLD[:n]
    expected = torch.zeros(3, 4)
    if how == "clip":
        norms = [float((update - MEAN_LD).square().sum()) ** 0.5 for update in updates_NLd]
        for update, norm in zip(updates_NLd, norms, strict=True):
            expected += (update - MEAN_LD) * min(1.0, statistics.median(norms) / norm) / n
        expected += MEAN_LD
    else:
        for i, j in itertools.product(range(3), range(4)):
            values = sorted(updates_NLd[:, i, j].tolist())
            kept = values[1:-1] if how == "trimmed_mean" and n == 5 else values
            expected[i, j] = statistics.median(values) if how == "median" else statistics.mean(kept)
    torch.testing.assert_close(pool(updates_NLd, how, MEAN_LD), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("how", "bad"), [("median", 2), ("trimmed_mean", 1), ("clip", 1)])
def test_bad_clients_cannot_steer_a_robust_pool(how: str, bad: int) -> None:
    good_NLd = 1 + 0.01 * UPDATES_NLD
    attacked_NLd = good_NLd.clone()
    attacked_NLd[:bad] = 1e6
    moved = (pool(attacked_NLd, how, torch.zeros(3, 4)) - 1).abs().max()  # type: ignore[arg-type]
    assert moved < (0.5 if how == "clip" else 0.05) < (pool(attacked_NLd) - 1).abs().max()


@pytest.fixture(scope="module")
def lora_root(tiny_pair: tuple[Path, Path]) -> Root:
    return make_root(ModelSettings(model=str(tiny_pair[1]), dtype="float32"))


def _products(update_Ld: Tensor, root: Root) -> dict[str, Tensor]:
    """B A of every module."""
    tensors = root.layout.to_tensors(update_Ld)
    whole = {name: root.initial[name] + tensors[name] for name in root.initial}
    return {module: whole[f"{module}.lora_B"] @ whole[f"{module}.lora_A"] for module in root.modules}


def test_products_are_averaged_and_cut_to_the_best_of_the_rank(lora_root: Root) -> None:
    updates_NLd = 0.1 * torch.randn(
        3, lora_root.layout.L, lora_root.layout.d, generator=torch.Generator().manual_seed(0)
    )
    found = _products(pool_products(updates_NLd, lora_root), lora_root)
    clients = [_products(update_Ld, lora_root) for update_Ld in updates_NLd]
    for module, product in found.items():
        mean = sum(one[module] for one in clients) / 3
        u, s, vh = torch.linalg.svd(mean)
        rank = lora_root.lora.rank
        torch.testing.assert_close(product, u[:, :rank] * s[:rank] @ vh[:rank], rtol=1e-3, atol=1e-6)


def test_products_of_one_client_or_of_equal_ones_come_out_as_they_went_in(lora_root: Root) -> None:
    update_Ld = 0.1 * torch.randn(lora_root.layout.L, lora_root.layout.d, generator=torch.Generator().manual_seed(1))
    for n in (1, 3):
        torch.testing.assert_close(
            pool_products(update_Ld.expand(n, -1, -1), lora_root), update_Ld, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["xs", "full"])
def test_products_need_factors(tiny_pair: tuple[Path, Path], kind: str) -> None:
    lora = LoraSettings.model_validate({"kind": kind, "target_modules": ["q_proj"]})
    root = make_root(ModelSettings(model=str(tiny_pair[0]), dtype="float32", lora=lora))
    with pytest.raises(UserError, match="of LoRA's factors only"):
        pool_products(torch.zeros(2, root.layout.L, root.layout.d), root)
