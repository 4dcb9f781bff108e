"""Training tuples: the join of S and T units on (shadow, snapshot), streamed by Ray Data epoch after epoch.

The epochs are rows of one data set, so Ray Data reads ahead over their borders instead of starting anew with each.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gt_ray.curation.study import Study
from gt_ray.updates.store import UpdateStore

UNITS_A_TASK = 24
"""Shadows that one Ray Data task reads and shuffles; the window of the shuffle beyond the order of the plan."""


@dataclass
class Tuples:
    """A batch: updates S [N, L_S, d_S] and T [N, L_T, d_T], and task and shadow [N] of each."""

    S_NLd: Tensor
    T_NLd: Tensor
    task_N: Tensor
    shadow_N: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> Tuples:
        """From the columns that `load_tuples` makes."""
        return cls(batch["S"].float(), batch["T"].float(), batch["task"].cpu(), batch["shadow"].cpu())

    def mixed(self, weights_MN: Tensor) -> tuple[Tensor, Tensor]:
        """Mixtures of these tuples."""
        # Few weights are not zero; as a dense product this took a tenth of a step of 1,024 tuples on a GPU.
        sparse_MN = weights_MN.cpu().to_sparse().to(self.S_NLd.device)
        S_MLd, T_MLd = (
            torch.sparse.mm(sparse_MN, one.flatten(1)).unflatten(1, one.shape[1:]) for one in (self.S_NLd, self.T_NLd)
        )
        return S_MLd, T_MLd


def shadow_keys(study: Study, validation: bool) -> list[dict[str, Any]]:
    """Keys of both units of each training or validation shadow, with its task and number."""
    jobs_T = study.shadow_jobs("llm")
    return [
        {**row, "T": jobs_T[row["shadow"]].key} for row in input_keys(study, validation) if row["shadow"] < len(jobs_T)
    ]


def input_keys(study: Study, validation: bool = False) -> list[dict[str, Any]]:
    """Key of the TinyLM's unit of each training or validation shadow, those of the TinyLM alone among them."""
    jobs_S = study.shadow_jobs("tinylm")
    return [
        {"S": jobs_S[i].key, "task": study.config.data.tasks.index(shadow.task), "shadow": i}
        for i, shadow in enumerate(study.shadows)
        if shadow.validation == validation
    ]


def epoch_rows(keys: list[dict[str, Any]], epochs: range, seed: int) -> list[dict[str, Any]]:
    """The shadows of every epoch, in an order that depends on seed and epoch alone."""
    return [row for epoch in epochs for row in random.Random(f"{seed}/{epoch}").sample(keys, len(keys))]


def streams(study: Study, keys: dict[bool, list[dict[str, Any]]], seed: int, phase: str) -> dict[str, Any]:
    """The Ray Data data sets of a pair: validation tuples, and those of training, or of the behaviour phase the inputs.

    Args:
        keys: of the training (False) and validation shadows.
    """
    import ray.data

    training = study.config.grad_transformer.training
    load = partial(load_tuples, store=study.store, seed=seed)
    found = {
        "validation": ray.data.from_items(keys[True]).map_batches(load, fn_kwargs={"last_only": True}, num_cpus=0.5)
    }
    if phase == "behaviour":
        found["inputs"] = ray.data.from_items(input_keys(study)).map_batches(
            load_input_batch, fn_kwargs={"store": study.store}, num_cpus=0.5
        )
    else:
        rows = epoch_rows(keys[False], range(training.epochs), seed)
        found["train"] = ray.data.from_items(
            rows, override_num_blocks=max(1, len(rows) // (8 * UNITS_A_TASK))
        ).map_batches(load, fn_kwargs={"last_only": False}, batch_size=UNITS_A_TASK, num_cpus=0.5)
    return found


def load_tuples(batch: dict[str, Any], store: UpdateStore, last_only: bool, seed: int) -> dict[str, Any]:
    """Ray Data task: read shadows' units, join them on the snapshot, mix the tuples of the batch.

    Returns:
        Columns `S` [N, L_S, d_S], `T` [N, L_T, d_T] float32, `task` and `shadow` [N].
    """
    all_S, all_T, tasks, shadows = [], [], [], []
    for key_S, key_T, task, shadow in zip(batch["S"], batch["T"], batch["task"], batch["shadow"], strict=True):
        snapshots_S, snapshots_T = join(store, key_S, key_T)
        if last_only:
            snapshots_S, snapshots_T = snapshots_S[-1:], snapshots_T[-1:]
        all_S.append(snapshots_S)
        all_T.append(snapshots_T)
        tasks += [task] * len(snapshots_S)
        shadows += [shadow] * len(snapshots_S)
    order = list(range(len(tasks)))
    if not last_only:
        random.Random("/".join([str(seed), *batch["S"]])).shuffle(order)
    return {
        "S": torch.cat(all_S)[order].numpy(),
        "T": torch.cat(all_T)[order].numpy(),
        "task": np.asarray(tasks)[order],
        "shadow": np.asarray(shadows)[order],
    }


def load_inputs(keys: Iterable[str], store: UpdateStore) -> Tensor:
    """The last updates [N, L, d] of units."""
    return torch.stack([store.read(key, verify=False)[0][-1] for key in keys])


def load_input_batch(batch: dict[str, Any], store: UpdateStore) -> dict[str, Any]:
    """Ray Data task: the last S updates of shadows; columns `S` [N, L_S, d_S], `task` and `shadow` [N]."""
    return {"S": load_inputs(batch["S"], store).numpy(), "task": batch["task"], "shadow": batch["shadow"]}


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


def last_updates(store: UpdateStore, keys: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The last updates of shadows: S [K, L_S, d_S] and T [K, L_T, d_T]."""
    last = [tuple(snapshots[-1] for snapshots in join(store, row["S"], row["T"])) for row in keys]
    return torch.stack([update_S for update_S, _ in last]), torch.stack([update_T for _, update_T in last])


def side_chunks(store: UpdateStore, keys: list[dict[str, Any]], side: str) -> Iterator[Tensor]:
    """All snapshots of one side, a unit at a time, for fitting the standardiser."""
    for row in keys:
        yield join(store, row["S"], row["T"])[0 if side == "S" else 1]


def mixing_weights(task_N: Tensor, pool_max: int, generator: torch.Generator) -> Tensor:
    """Weights [N, N] that replace each tuple by a mean of 1 to `pool_max` tuples of its task in the batch (decision 7).

    A pooled input has less variance than a single one, and mixtures of domains fill the space between the shadows.
    """
    N = len(task_N)
    if pool_max == 1 or N == 1:
        return torch.eye(N)
    same_NN = (task_N[:, None] == task_N[None, :]).float()
    partners_NP = torch.multinomial(same_NN, pool_max - 1, replacement=True, generator=generator)
    members = torch.randint(1, pool_max + 1, (N, 1), generator=generator)
    weights_NP = torch.cat([torch.ones(N, 1), (torch.arange(1, pool_max)[None] < members).float()], 1)
    weights_NP = weights_NP / weights_NP.sum(1, keepdim=True)
    members_NP = torch.cat([torch.arange(N)[:, None], partners_NP], 1)
    return torch.zeros(N, N).scatter_add_(1, members_NP, weights_NP)
