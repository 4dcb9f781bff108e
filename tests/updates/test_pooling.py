"""Pooling the updates of several clients."""

from __future__ import annotations

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


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_the_pool_of_one_update_is_that_update(how: str) -> None:
    torch.testing.assert_close(pool(UPDATES_NLD[:1], how, MEAN_LD), UPDATES_NLD[0])  # type: ignore[arg-type]


def test_clients_without_news_sum_to_the_mean_update() -> None:
    torch.testing.assert_close(pool(MEAN_LD.expand(7, 3, 4), "sum", MEAN_LD), MEAN_LD)


def test_the_sum_needs_the_mean_update() -> None:
    with pytest.raises(ValueError, match="needs the mean update"):
        pool(UPDATES_NLD, "sum")
