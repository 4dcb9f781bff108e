"""VisSup (Guo et al., 2024; Eqs. 48-49): as Conf, but each prediction has a share of its own.

    (1 - b) CE(f, f_w) + b CE(f, hard f),    b = exp CE(f, hard f) / (exp CE(f, hard f) + exp CE(f, hard f_w))

Carried over to tokens (see conf.py), x is one target token in its context, so b is of a token:

- hard f is argmax f; hard f_w is the token that the weak model wrote, which is its argmax, for it decodes greedily.
- So b = f(hard f_w) / (f(hard f_w) + max f): one half where both models agree, down to 0 the surer the strong model is
  of another token. Equation and published code have it so, though the text wants the own share to grow with confidence.
- The temperature divides the logits of both models in CE(f, f_w), which is multiplied by its square so that gradients
  keep their size, as in the published code. b and the hard label's term are at temperature 1.
- b and hard labels are constants: no gradient goes through them.

The published code also lets b grow over the first quarter of training and divides the exponents by a threshold; paper
and equations say nothing of that, and it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gt_ray.baselines.conf import own_cross_entropy
from gt_ray.baselines.distributions import weak_cross_entropy, weak_of
from gt_ray.config import FineTuneSettings
from gt_ray.learning.batches import Batch
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.mechanisms.base import Sft, Step, batch_gradients, clip_per_adapter
from gt_ray.learning.samples import Sample, TrainingSet


def own_share(logits_nV: Tensor, target_n: Tensor) -> Tensor:
    """b [n] of Eq. 49.

    Args:
        target_n: tokens that the weak model wrote.
    """
    logits_nV = logits_nV.detach().float()
    weak_n = torch.nn.functional.cross_entropy(logits_nV, target_n, reduction="none")
    return (own_cross_entropy(logits_nV) - weak_n).sigmoid()


def vissup_loss(
    logits_nV: Tensor, target_n: Tensor, ids_nk: Tensor, log_p_nk: Tensor, temperature: float = 2.0
) -> Tensor:
    """Eq. 48 of each token [n].

    Args:
        ids_nk, log_p_nk: the weak model's distribution at that temperature (`distributions.likeliest`).
    """
    target_n, ids_nk, log_p_nk = (one.to(logits_nV.device) for one in (target_n, ids_nk, log_p_nk))
    b_n = own_share(logits_nV, target_n)
    weak_n = temperature**2 * weak_cross_entropy(logits_nV, ids_nk, log_p_nk, temperature)
    return (1 - b_n) * weak_n + b_n * own_cross_entropy(logits_nV)


class VisSup(Sft):
    """Fine-tunes on SoftSamples with Eq. 48.

    Args:
        temperature: of the weak term, and of the samples' distributions.
    """

    def __init__(self, settings: FineTuneSettings, sets: Sequence[TrainingSet], temperature: float = 2.0) -> None:
        super().__init__(settings, sets)
        self.temperature = temperature

    def gradients(self, losses: TargetLosses, step: Step) -> Tensor:
        """Those of Eq. 48, clipped."""

        def token_losses(batch: Batch, groups: Sequence[Sequence[Sample]]) -> Tensor:
            loss = partial(vissup_loss, temperature=self.temperature)
            return losses.of_logits(loss, batch, batch.target_n, *weak_of(groups, losses.device))

        loss_G = batch_gradients(losses, step.batch, step.pieces, token_losses)
        clip_per_adapter(step.trained, self.settings.clip_norm)
        return loss_G
