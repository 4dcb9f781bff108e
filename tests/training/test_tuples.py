"""Training tuples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gt_ray.training.tuples import Tuples, epoch_rows, join, last_updates, load_tuples, mixing_weights
from gt_ray.updates.store import UnitMeta, UpdateStore


def _store(folder: Path, units: dict[str, list[int]]) -> UpdateStore:
    """Units whose snapshot at step s from the end is filled with s (plus 100 for S)."""
    store = UpdateStore(folder)
    for key, steps in units.items():
        base = 100.0 if key.startswith("s") else 0.0
        store.write(key, torch.stack([torch.full((1, 2), base + s) for s in steps]), UnitMeta("root", {}, steps, 1))
    return store


def test_tuples_join_on_steps_from_the_end(tmp_path: Path) -> None:
    store = _store(tmp_path, {"s": [4, 2, 0], "t": [2, 1, 0]})
    snapshots_S, snapshots_T = join(store, "s", "t")
    assert snapshots_S[:, 0, 0].tolist() == [102, 100] and snapshots_T[:, 0, 0].tolist() == [2, 0]


def test_a_batch_keeps_tuples_together_and_its_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    store = _store(tmp_path, {f"{side}{k}": [3, 2, 1, 0] for side in "st" for k in range(3)})
    batch = {"S": ["s0", "s1", "s2"], "T": ["t0", "t1", "t2"], "task": np.array([0, 1, 1]), "shadow": np.arange(3)}
    first = load_tuples(batch, store, last_only=False, seed=0)
    again = load_tuples(batch, store, last_only=False, seed=0)
    assert first["S"].shape == (12, 1, 2)
    assert (first["S"] - 100 == first["T"]).all()
    assert (first["S"] == again["S"]).all() and (first["task"] == again["task"]).all()
    assert [first["task"][first["shadow"] == k].tolist() for k in range(3)] == [[0] * 4, [1] * 4, [1] * 4]
    assert (load_tuples(batch, store, last_only=False, seed=1)["T"] != first["T"]).any()
    assert load_tuples(batch, store, last_only=True, seed=0)["T"].max() == 0


def test_the_last_updates_of_shadows_are_those_at_step_0(tmp_path: Path) -> None:
    store = _store(tmp_path, {"s": [4, 2, 0], "t": [2, 0]})
    update_S, update_T = last_updates(store, [{"S": "s", "T": "t"}] * 2)
    assert update_S.shape == update_T.shape == (2, 1, 2) and set(update_S.flatten().tolist()) == {100}
    assert set(update_T.flatten().tolist()) == {0}


def test_every_epoch_has_every_shadow_in_an_order_of_its_own() -> None:
    keys = [{"S": str(k)} for k in range(9)]
    rows = epoch_rows(keys, range(2), seed=0)
    assert sorted(row["S"] for row in rows[:9]) == sorted(row["S"] for row in rows[9:])
    assert rows[:9] != rows[9:] and rows[9:] == epoch_rows(keys, range(1, 2), seed=0)


def test_pooling_averages_tuples_of_one_task() -> None:
    N, tasks = 40, torch.tensor([0, 1] * 20)
    weights = mixing_weights(tasks, 3, torch.Generator().manual_seed(0))
    assert torch.allclose(weights.sum(1), torch.ones(N))
    for n in range(N):
        assert weights[n, n] > 0
        assert all(tasks[m] == tasks[n] for m in weights[n].nonzero()[:, 0])
    sizes = {round(1 / float(row[row > 0].min())) for row in weights}
    assert sizes == {1, 2, 3}


def test_mixtures_are_weighted_sums() -> None:
    S, T = torch.randn(4, 2, 3), torch.randn(4, 5, 7)
    weights = mixing_weights(torch.tensor([0, 1, 0, 1]), 3, torch.Generator().manual_seed(0))
    mixed = Tuples(S, T, torch.zeros(4), torch.zeros(4)).mixed(weights)
    for m in range(4):
        for whole, of_all in zip(mixed, (S, T), strict=True):
            torch.testing.assert_close(whole[m], sum(weights[m, n] * of_all[n] for n in range(4)))


def test_no_pooling_changes_nothing() -> None:
    assert torch.equal(mixing_weights(torch.zeros(3), 1, torch.Generator()), torch.eye(3))
