"""Losses of rows under many updates of one model, several updates in a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.samples import Sample
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.pairs.root import Root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UPDATES_AT_ONCE = 8
TOKENS_AT_ONCE = {"cpu": 16384, "cuda": 131072}
"""Tokens of a pass, one row of each update at least."""


@torch.no_grad()
def row_losses(
    model: PreTrainedModel,
    root: Root,
    updates_MLd: Tensor,
    samples: Sequence[Sample],
    on_pass: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Mean loss a target token [M, R] of each row under each update; the root's own where the update is zero.

    Args:
        on_pass: called with how many of the M * R losses a pass computed.
    """
    losses = TargetLosses(model, root)
    tokens = TOKENS_AT_ONCE.get(losses.device.type, TOKENS_AT_ONCE["cuda"])
    size = max(1, tokens // (UPDATES_AT_ONCE * max(map(len, samples))))
    losses_MR = torch.empty(len(updates_MLd), len(samples))
    for first in range(0, len(updates_MLd), UPDATES_AT_ONCE):
        update_GLd = updates_MLd[first : first + UPDATES_AT_ONCE]
        with losses.short_cuts(), stacked(model, root, len(update_GLd)) as parameters:
            add_updates(parameters, root.layout, update_GLd)
            for start in range(0, len(samples), size):
                part = samples[start : start + size]
                groups = [part] * len(update_GLd)
                found_GB = by_row(losses(losses.batch(groups)), groups)
                losses_MR[first : first + len(update_GLd), start : start + size] = found_GB
                on_pass(len(part) * len(update_GLd))
    return losses_MR


def by_row(loss_n: Tensor, groups: Sequence[Sequence[Sample]]) -> Tensor:
    """Mean loss a target token [G, B] of each of B rows of each adapter, from the losses of all targets of a batch, in
    the order of its samples."""
    count_N = torch.tensor([len(sample.target) for group in groups for sample in group])
    row_n = torch.arange(len(count_N)).repeat_interleave(count_N)
    return (torch.zeros(len(count_N)).index_add(0, row_n, loss_n.cpu()) / count_N).view(len(groups), -1)
