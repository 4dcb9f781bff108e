"""DP-SGD (Algorithm 1, appendix D): Poisson sampling, gradients of rows clipped, Gaussian noise on their sum.

For the gradient of a row every row gets a copy of its adapter (stacked.py), so that one backward pass gives the
gradients of all rows of all clients, nearly for free: the frozen weights see one large batch as always.

Differential privacy is of rows: of two data sets, one with a row more. The optimizer sees noisy gradients alone, so it
costs nothing. What the noise is drawn from must be secret: `TrainingSet.noise_seed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gt_ray.config import DpSgdSettings, FineTuneSettings
from gt_ray.errors import UserError
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.mechanisms.accounting import noise_multiplier
from gt_ray.learning.mechanisms.base import Sft, Step, add_noise, broadcast, generator, norm_per_adapter
from gt_ray.learning.samples import Sample, TrainingSet

TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 32768}
"""Tokens of a pass, one row at least; a step may have any number of rows."""


class DpSgd(Sft):
    """See the module."""

    def __init__(self, settings: FineTuneSettings, sets: Sequence[TrainingSet]) -> None:
        super().__init__(settings, sets)
        self.noise_G = [self.statement(settings, len(one.samples))["noise_multiplier"] for one in sets]
        self.plain = _mechanism(settings).optimizer == "sgd"
        self.decays = not self.plain

    @staticmethod
    def statement(settings: FineTuneSettings, samples: int) -> dict[str, Any]:
        """Name, (epsilon, delta) where the settings promise them, and what they follow from.

        Raises:
            UserError: fewer rows than a batch, or an epsilon that cannot be reached.
        """
        mechanism = _mechanism(settings)
        if samples < settings.batch_size:
            raise UserError(
                f"dp_sgd draws batches of {settings.batch_size} rows on average, but there are {samples}: lower "
                f"batch_size to at most {samples}, or add rows"
            )
        rate, noise, promised = settings.batch_size / samples, mechanism.noise_multiplier, {}
        if mechanism.epsilon is not None:
            noise = noise_multiplier(mechanism.epsilon, mechanism.delta, rate, settings.steps)
            promised = {"epsilon": mechanism.epsilon, "delta": mechanism.delta, "accountant": "prv", "protects": "row"}
        counted = {"noise_multiplier": noise, "sample_rate": rate, "steps": settings.steps}
        return {"name": mechanism.name, **promised, **counted, "row_norm": mechanism.row_norm}

    def optimizer(self, trained: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW, or plain steps."""
        if self.plain:
            return torch.optim.SGD(trained, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay)
        return super().optimizer(trained)

    def draw(self, g: int, step: int) -> list[Sample]:
        """Each row with probability `sample_rate`, whatever became of it before."""
        one = self.sets[g]
        rate = self.settings.batch_size / len(one.samples)
        chosen = torch.rand(len(one.samples), generator=generator(one.secret_seed, "rows", step)) < rate
        return [one.samples[i] for i in chosen.nonzero().flatten().tolist()]

    def gradients(self, losses: TargetLosses, step: Step) -> Tensor:
        """Sum of the rows' clipped gradients and noise, over the rows of a batch on average."""
        mechanism = _mechanism(self.settings)
        loss_G = clipped_sums(losses, step.trained, step.batch, mechanism.row_norm, step.pieces)
        add_noise(step, [self.noise_G[g] * mechanism.row_norm for g in step.active], self.sets)
        for parameter in step.trained:
            assert parameter.grad is not None
            parameter.grad.div_(self.settings.batch_size)
        return loss_G


def clipped_sums(
    losses: TargetLosses,
    trained: Sequence[torch.nn.Parameter],
    batch: Sequence[Sequence[Sample]],
    row_norm: float,
    pieces: int = 1,
) -> Tensor:
    """Set each adapter's gradient to the sum over its rows of the gradient of the row's mean loss a target token,
    clipped to `row_norm`; returns the mean of these losses [G], 0 of no row.

    Args:
        trained: stacked parameters [G, ...].
        batch: rows of each adapter, any number of them.
    """
    shared = [parameter.data for parameter in trained]
    sums = [torch.zeros_like(data) for data in shared]
    loss_G, rows_G = (torch.zeros(len(batch), device=losses.device) for _ in range(2))
    rows = [(g, sample) for g, samples in enumerate(batch) for sample in samples]
    rows.sort(key=lambda row: len(row[1]))  # those of a pass take as many places each as the longest
    try:
        for part in _passes(rows, TOKENS_AT_ONCE.get(losses.device.type, TOKENS_AT_ONCE["cuda"]) // pieces):
            adapter_B = torch.tensor([g for g, _ in part], device=losses.device)
            for parameter, data in zip(trained, shared, strict=True):
                parameter.data, parameter.grad = data[adapter_B.to(data.device)], None
            sum_B, count_B = losses.by_adapter(losses.batch([[sample] for _, sample in part]), len(part))
            loss_B = sum_B / count_B
            loss_B.sum().backward()
            factor_B = (row_norm / norm_per_adapter(trained).clamp(min=1e-12)).clamp(max=1)
            for parameter, total in zip(trained, sums, strict=True):
                assert parameter.grad is not None
                clipped = parameter.grad * broadcast(factor_B, parameter.grad)
                total.index_add_(0, adapter_B.to(total.device), clipped)
            loss_G.index_add_(0, adapter_B, loss_B.detach())
            rows_G.index_add_(0, adapter_B, torch.ones_like(loss_B.detach()))
            del sum_B, loss_B  # as long as its graph lives, autograd expects gradients of this pass's shape
    finally:
        for parameter, data, total in zip(trained, shared, sums, strict=True):
            parameter.grad = None
            parameter.data, parameter.grad = data, total
    return loss_G / rows_G.clamp(min=1)


def _passes(rows: Sequence[tuple[int, Sample]], tokens: int) -> list[list[tuple[int, Sample]]]:
    """Rows, the shortest first, in parts of so many places for tokens."""
    parts: list[list[tuple[int, Sample]]] = []
    for row in rows:
        if not parts or (len(parts[-1]) + 1) * len(row[1]) > tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def _mechanism(settings: FineTuneSettings) -> DpSgdSettings:
    assert isinstance(settings.mechanism, DpSgdSettings)
    return settings.mechanism
