"""Pooling the updates of several clients."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from gt_ray.updates.pooling import pool

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
