"""Batches of several adapters: packed and padded hold the same tokens and targets."""

from __future__ import annotations

import pytest
import torch

from gt_ray.learning.batches import Batch, packed, padded, padding_share
from gt_ray.learning.samples import Sample

GROUPS = [[Sample([1, 2], [3]), Sample([4], [5, 6, 7])], [Sample([8, 9, 10], [11, 12]), Sample([13], [14])]]


def test_padded_by_hand() -> None:
    batch = padded(GROUPS, pad=0)
    assert batch.ids_RT.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 0], [8, 9, 10, 11, 12], [13, 14, 0, 0, 0]]
    assert batch.due_n.tolist() == [1, 5, 6, 7, 12, 13, 15]
    assert batch.target_n.tolist() == [3, 5, 6, 7, 11, 12, 14] and batch.adapter_n.tolist() == [0] * 4 + [1] * 3
    assert batch.packing is None and padding_share(GROUPS) == pytest.approx(1 - 14 / 20)


def test_packed_by_hand() -> None:
    batch = packed(GROUPS, pad=0)
    assert batch.ids_RT.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert batch.positions_RT is not None and batch.packing is not None
    assert batch.positions_RT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]]
    assert batch.due_n.tolist() == [1, 3, 4, 5, 9, 10, 12]
    assert batch.packing.token_NT[0].tolist() == [0, 1, 2, 0, 0]
    assert batch.packing.slot_P.tolist() == [0, 1, 2, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16]


@pytest.mark.parametrize("collate", [padded, packed])
def test_what_is_due_is_the_token_before_each_target(collate: object) -> None:
    batch: Batch = collate(GROUPS, 0)  # type: ignore[operator]
    flat = batch.ids_RT.flatten()
    assert torch.equal(flat[batch.due_n + 1], batch.target_n)


def test_an_adapter_with_fewer_tokens_is_padded_from_its_own() -> None:
    batch = packed([[Sample([1, 2, 3], [4])], [Sample([5], [6])]], pad=0)
    assert batch.packing is not None
    assert batch.ids_RT.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0]]
    assert batch.packing.padding_P.tolist() == [False] * 6 + [True] * 2
    N, T = batch.packing.token_NT.shape
    assert (N, T) == (2, 4) and batch.packing.slot_P[6:].tolist() == [T, T]  # slots of the same adapter
    assert batch.packing.empty_NT.tolist() == [[False] * 4, [False, False, True, True]]
