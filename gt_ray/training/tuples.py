"""Training tuples: the join of S and T units on (shadow, snapshot), streamed by Ray Data epoch after epoch.

The epochs are rows of one data set, so Ray Data reads ahead over their borders instead of starting anew with each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gt_ray.curation.jobs import Side
from gt_ray.curation.study import Study
from gt_ray.updates.store import UpdateStore

UNITS_A_TASK = 24
"""Shadows that one Ray Data task reads and shuffles; the window of the shuffle beyond the order of the plan."""


def shadow_keys(study: Study, validation: bool) -> list[dict[str, Any]]:
    """Keys of both units of each training or validation shadow, with its task."""
    sides: tuple[Side, Side] = ("tinylm", "llm")
    jobs = {side: study.shadow_jobs(side) for side in sides}
    rows: list[dict[str, Any]] = [
        {
            "S": jobs["tinylm"][i].key,
            "T": jobs["llm"][i].key,
            "task": study.config.data.tasks.index(shadow.task),
        }
        for i, shadow in enumerate(study.shadows)
        if shadow.validation == validation
    ]
    return rows


def epoch_rows(keys: list[dict[str, Any]], epochs: range, seed: int) -> list[dict[str, Any]]:
    """The shadows of every epoch, in an order that depends on seed and epoch alone."""
    return [row for epoch in epochs for row in random.Random(f"{seed}/{epoch}").sample(keys, len(keys))]


def load_tuples(batch: dict[str, Any], store: UpdateStore, last_only: bool, seed: int) -> dict[str, Any]:
    """Ray Data task: read shadows' units, join them on the snapshot, mix the tuples of the batch.

    Returns:
        Columns `S` [N, L_S, d_S], `T` [N, L_T, d_T] float32 and `task` [N].
    """
    all_S, all_T, tasks = [], [], []
    for key_S, key_T, task in zip(batch["S"], batch["T"], batch["task"], strict=True):
        snapshots_S, snapshots_T = join(store, key_S, key_T)
        if last_only:
            snapshots_S, snapshots_T = snapshots_S[-1:], snapshots_T[-1:]
        all_S.append(snapshots_S)
        all_T.append(snapshots_T)
        tasks += [task] * len(snapshots_S)
    order = list(range(len(tasks)))
    if not last_only:
        random.Random("/".join([str(seed), *batch["S"]])).shuffle(order)
    return {
        "S": torch.cat(all_S)[order].numpy(),
        "T": torch.cat(all_T)[order].numpy(),
        "task": np.asarray(tasks)[order],
    }


def join(store: UpdateStore, key_S: str, key_T: str) -> tuple[Tensor, Tensor]:
    """Snapshots of both units at equal steps from the end: [J, L_S, d_S] and [J, L_T, d_T] (decision 4)."""
    # `train` has compared all checksums once, at its start.
    snapshots_S, meta_S = store.read(key_S, verify=False)
    snapshots_T, meta_T = store.read(key_T, verify=False)
    common = [step for step in meta_S.snapshot_steps if step in meta_T.snapshot_steps]
    return (
        snapshots_S[[meta_S.snapshot_steps.index(step) for step in common]],
        snapshots_T[[meta_T.snapshot_steps.index(step) for step in common]],
    )


def side_chunks(store: UpdateStore, keys: list[dict[str, Any]], side: str) -> Iterator[Tensor]:
    """All snapshots of one side, a unit at a time, for fitting the standardiser."""
    for row in keys:
        yield join(store, row["S"], row["T"])[0 if side == "S" else 1]


def pool_at_random(
    update_S_NLd: Tensor, update_T_NLd: Tensor, task_N: Tensor, pool_max: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replace each tuple by the mean of 1 to `pool_max` tuples of its task in the batch (decision 7).

    A pooled input has less variance than a single one, and mixtures of domains fill the space between the shadows.
    """
    N = len(task_N)
    if pool_max == 1 or N == 1:
        return update_S_NLd, update_T_NLd
    same_NN = (task_N[:, None] == task_N[None, :]).float()
    partners_NP = torch.multinomial(same_NN, pool_max - 1, replacement=True, generator=generator)
    members = torch.randint(1, pool_max + 1, (N, 1), generator=generator)
    weights_NP = torch.cat([torch.ones(N, 1), (torch.arange(1, pool_max)[None] < members).float()], 1)
    weights_NP = weights_NP / weights_NP.sum(1, keepdim=True)
    members_NP = torch.cat([torch.arange(N)[:, None], partners_NP], 1)
    mix_NN = torch.zeros(N, N).scatter_add_(1, members_NP, weights_NP).to(update_S_NLd.device)
    return torch.einsum("nm,mld->nld", mix_NN, update_S_NLd), torch.einsum("nm,mld->nld", mix_NN, update_T_NLd)
