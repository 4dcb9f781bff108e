"""Supervised fine-tuning of G adapters at once (the paper's learning mechanism; settings of Table 5)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gt_ray.config import FineTuneSettings
from gt_ray.errors import UserError
from gt_ray.learning.samples import Sample
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.root import Root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100


@dataclass(frozen=True)
class FineTuned:
    """One adapter's result.

    Attributes:
        snapshots_JLd: updates [J, L, d] at `snapshot_steps` optimizer steps from the end.
        losses: mean loss a target token of each optimizer step.
    """

    snapshots_JLd: Tensor
    losses: list[float]


def fine_tune(
    model: PreTrainedModel,
    root: Root,
    datasets: Sequence[Sequence[Sample]],
    seeds: Sequence[int],
    settings: FineTuneSettings,
    snapshot_steps: Sequence[int] = (0,),
) -> list[FineTuned]:
    """Fine-tune one adapter on each of G data sets, all from the same root (section 4.1).

    AdamW, linear schedule to zero, per-adapter gradient clipping. The result of an adapter depends on its own data and
    seed, not on its neighbours.

    Args:
        datasets: the samples of each adapter.
        seeds: order of each adapter's samples.
        snapshot_steps: optimizer steps from the end at which the update is kept.

    Raises:
        UserError: an empty data set, fewer steps than snapshots reach back, or a loss that is not finite.
    """
    G = len(datasets)
    if settings.steps <= max(snapshot_steps):
        raise UserError(f"{settings.steps} steps are fewer than the snapshots need ({max(snapshot_steps) + 1})")
    for g, samples in enumerate(datasets):
        if not samples:
            raise UserError(f"data set {g} of the group is empty")
    orders = [
        _order(len(samples), seed, settings.steps * settings.batch_size)
        for samples, seed in zip(datasets, seeds, strict=True)
    ]
    layout = root.layout
    start_Ld = layout.to_array(root.initial)
    pad = model.config.pad_token_id or 0
    device = next(model.parameters()).device
    kept, losses = [], []
    with stacked(model, root, G) as parameters:
        trained = list(parameters.values())
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
        for step in range(settings.steps):
            here = slice(step * settings.batch_size, (step + 1) * settings.batch_size)
            batch = [samples[i] for samples, order in zip(datasets, orders, strict=True) for i in order[here]]
            ids_NT, labels_NT = collate(batch, pad)
            loss_G = adapter_losses(model, ids_NT.to(device), labels_NT.to(device), G)
            optimizer.zero_grad()
            loss_G.sum().backward()
            clip_per_adapter(trained, settings.clip_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss_G.detach().cpu())
            if settings.steps - step - 1 in snapshot_steps:
                kept.append(layout.to_array(parameters) - start_Ld)
    snapshots_GJLd, losses_GS = torch.stack(kept, 1), torch.stack(losses, 1)
    for g in range(G):
        if not bool(torch.isfinite(losses_GS[g]).all() and torch.isfinite(snapshots_GJLd[g]).all()):
            raise UserError(f"fine-tune {g} of the group diverged (loss or update not finite); lower learning_rate")
    return [FineTuned(snapshots_GJLd[g], losses_GS[g].tolist()) for g in range(G)]


def collate(samples: Sequence[Sample], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [N, T] padded on the right and labels [N, T], IGNORE where no loss is due.

    Right padding under a causal mask is never seen by the tokens that count, so no attention mask is needed.
    """
    width = max(map(len, samples))
    ids_NT = torch.full((len(samples), width), pad)
    labels_NT = torch.full((len(samples), width), IGNORE)
    for n, sample in enumerate(samples):
        ids_NT[n, : len(sample)] = torch.tensor(sample.prompt + sample.target)
        labels_NT[n, len(sample.prompt) : len(sample)] = torch.tensor(sample.target)
    return ids_NT, labels_NT


def adapter_losses(model: PreTrainedModel, ids_NT: Tensor, labels_NT: Tensor, G: int) -> Tensor:
    """Mean cross-entropy a target token [G] of each adapter; the LM head runs only where a loss is due."""
    token_loss, row = target_losses(model, ids_NT, labels_NT)
    adapter = row // (ids_NT.shape[0] // G)
    sums_G = torch.zeros(G, device=token_loss.device).index_add(0, adapter, token_loss)
    return sums_G / torch.bincount(adapter, minlength=G)


def target_losses(model: PreTrainedModel, ids_NT: Tensor, labels_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every target token, and the row of the batch that each belongs to."""
    hidden_NTd = model.base_model(input_ids=ids_NT, use_cache=False).last_hidden_state[:, :-1]
    next_NT = labels_NT[:, 1:]
    due_NT = next_NT != IGNORE
    logits = model.get_output_embeddings()(hidden_NTd[due_NT])
    loss = torch.nn.functional.cross_entropy(logits.float(), next_NT[due_NT], reduction="none")
    return loss, due_NT.nonzero()[:, 0]


def clip_per_adapter(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> None:
    """Clip the gradient of each adapter (the first dimension of every parameter) to `max_norm`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm_G = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factor_G = (max_norm / (norm_G + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor_G.view(-1, *[1] * (gradient.dim() - 1)))


def _order(n: int, seed: int, length: int) -> list[int]:
    """Sample indices: a new permutation each epoch."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < length:
        order += rng.sample(range(n), n)
    return order[:length]
