"""Plain fine-tuning (SFT, Table 5): what every learning mechanism has, and the others change."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gt_ray.config import FineTuneSettings
from gt_ray.learning.batches import Batch
from gt_ray.learning.losses import TargetLosses, sums_by_adapter
from gt_ray.learning.samples import Sample, TrainingSet

TokenLosses = Callable[[Batch, Sequence[Sequence[Sample]]], Tensor]
"""The loss [n] of every target token of a batch, which was made from these samples of each adapter."""


@dataclass(frozen=True)
class Step:
    """An optimizer step of a group.

    Attributes:
        number: from 0.
        trained: stacked parameters [G, ...].
        active: number of each adapter in the group.
        batch: rows of each adapter.
        pieces: parts into which a whole batch is cut, for memory.
        factors: share of the learning rate that each adapter's step will have.
    """

    number: int
    trained: Sequence[torch.nn.Parameter]
    active: Sequence[int]
    batch: Sequence[Sequence[Sample]]
    pieces: int
    factors: Sequence[float]


class Sft:
    """Fine-tunes the adapters of a group: batches in random order, gradients clipped, AdamW.

    Args:
        sets: what each adapter of the group is fine-tuned on.

    Attributes:
        decays: whether the rate falls as the schedule says.

    Raises:
        UserError: a set does not do for the mechanism.
    """

    decays = True

    def __init__(self, settings: FineTuneSettings, sets: Sequence[TrainingSet]) -> None:
        self.settings, self.sets = settings, sets
        self._orders = [_order(len(one.samples), one.seed) for one in sets]

    @staticmethod
    def statement(settings: FineTuneSettings, samples: int) -> dict[str, Any]:
        """What an update file states of the mechanism."""
        return {"name": settings.mechanism_name}

    def optimizer(self, trained: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Of the stacked parameters of the group."""
        settings = self.settings
        return torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)

    def draw(self, g: int, step: int) -> list[Sample]:
        """The rows of a step of an adapter; called once for every step, in order."""
        return [self.sets[g].samples[i] for i in islice(self._orders[g], self.settings.batch_size)]

    def skip(self, g: int, steps: int) -> None:
        """Draw for steps that an earlier process has done."""
        for step in range(steps):
            self.draw(g, step)

    def gradients(self, losses: TargetLosses, step: Step) -> Tensor:
        """Set the gradient of each adapter; returns the loss [G] of its batch."""
        loss_G = batch_gradients(losses, step.batch, step.pieces)
        clip_per_adapter(step.trained, self.settings.clip_norm)
        return loss_G

    def released(self, g: int, update_Ld: Tensor, step: int) -> Tensor:
        """What of an update [L, d] after so many steps may be kept."""
        return update_Ld


def batch_gradients(
    losses: TargetLosses,
    batch: Sequence[Sequence[Sample]],
    pieces: int,
    token_losses: TokenLosses | None = None,
) -> Tensor:
    """Gradients of each adapter's mean loss a target token, of equally many rows each; returns these losses [G].

    Args:
        token_losses: in place of the cross-entropy with the target.
    """
    G = len(batch)
    total_G = torch.tensor([sum(len(sample.target) for sample in samples) for samples in batch])
    total_G = total_G.to(losses.device)
    loss_G = torch.zeros(G, device=losses.device)
    for groups in in_parts(batch, pieces):
        part = losses.batch(groups)
        sums = (
            losses.by_adapter(part, G) if token_losses is None else sums_by_adapter(token_losses(part, groups), part, G)
        )
        part_G = sums[0] / total_G
        part_G.sum().backward()
        loss_G += part_G.detach()
    return loss_G


def in_parts(batch: Sequence[Sequence[Sample]], pieces: int) -> list[list[Sequence[Sample]]]:
    """The batch cut into parts, each of equally many rows of every adapter."""
    size = -(-len(batch[0]) // pieces)
    return [[samples[first : first + size] for samples in batch] for first in range(0, len(batch[0]), size)]


def norm_per_adapter(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Norm [G] of the gradient of each adapter, which is the first dimension of every parameter."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    device = gradients[0].device  # those of a model that is spread over several devices come together here
    norm_G: Tensor = torch.stack([gradient.flatten(1).norm(dim=1).to(device) for gradient in gradients]).norm(dim=0)
    return norm_G


def clip_per_adapter(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> None:
    """Clip the gradient of each adapter (the first dimension of every parameter) to `max_norm`."""
    factor_G = (max_norm / (norm_per_adapter(parameters) + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(broadcast(factor_G, parameter.grad))


def broadcast(values_G: Tensor, like: Tensor) -> Tensor:
    """A value for each adapter, shaped to be multiplied with [G, ...], and on the same device."""
    return values_G.to(like.device).view(-1, *[1] * (like.dim() - 1))


def generator(seed: int, what: str, step: int) -> torch.Generator:
    """Random numbers of one purpose and step: a fine-tune that goes on elsewhere draws what it would have drawn.

    On the CPU, whatever the device, so that results do not depend on it.
    """
    digest = hashlib.sha256(f"{seed}/{what}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def add_noise(step: Step, deviations: Sequence[float], sets: Sequence[TrainingSet]) -> None:
    """Add Gaussian noise to the gradient of each adapter, another one in each step.

    Args:
        deviations: standard deviation of each adapter's noise.
        sets: of all adapters of the group.
    """
    for row, (g, deviation) in enumerate(zip(step.active, deviations, strict=True)):
        numbers = generator(sets[g].secret_seed, "noise", step.number)
        for parameter in step.trained:
            assert parameter.grad is not None
            noise = torch.randn(parameter.grad[row].shape, generator=numbers)
            parameter.grad[row].add_(noise.to(parameter.grad.device), alpha=deviation)


def _order(n: int, seed: int) -> Iterator[int]:
    """Sample indices without end: a new permutation each epoch."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(n), n)
