"""Conf (Burns et al., 2024; Eq. 47): the weak model's distribution, and the strong model's own hardened prediction.

    (1 - a) CE(f, f_w) + a CE(f, f_t),    f_t = I[f > t]

The published loss is of two classes and one prediction a sample. Carried over to tokens, each target token is a
prediction over the vocabulary, given the weak model's output before it:

- f_w is the weak model's distribution of the token (distributions.py), at temperature 1.
- The confidence in a token is max f. The threshold t is such that exactly half of the tokens of a batch exceed it: the
  batch of an optimizer step of one adapter, whatever its neighbours, and in whatever pieces memory lets it be computed.
  Of an odd number the smaller half does; of equally confident tokens the earlier ones.
- A token above t has the hard label argmax f. One below has none: no entry of f exceeds t, so f_t and its term are
  zero. (With two classes, "not above" is the other class; among a vocabulary it names no token.)
- Hard labels and the threshold are constants: no gradient goes through them.
- a grows linearly from 0 to `alpha` over the first `warmup` of `fine_tune.steps`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gt_ray.baselines.distributions import weak_cross_entropy, weak_of
from gt_ray.config import FineTuneSettings
from gt_ray.learning.batches import Batch
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.mechanisms.base import Sft, Step, batch_gradients, clip_per_adapter, in_parts
from gt_ray.learning.samples import Sample, TrainingSet

TEMPERATURE = 1.0
"""Of the weak distributions."""


def own_cross_entropy(logits_nV: Tensor) -> Tensor:
    """Cross-entropy [n] with the model's own hard label, argmax f; this is -log of its confidence, max f."""
    logits_nV = logits_nV.float()
    return torch.nn.functional.cross_entropy(logits_nV, logits_nV.argmax(-1), reduction="none")


def confident_half(own_n: Tensor, adapter_n: Tensor, G: int) -> Tensor:
    """Which tokens [n] exceed the threshold of their adapter's batch.

    Args:
        own_n: `own_cross_entropy` of each token.
        adapter_n: its adapter, 0 to G - 1.
    """
    own_n = own_n.to(adapter_n.device)
    order = own_n.argsort(stable=True)
    order = order[adapter_n[order].argsort(stable=True)]  # by adapter, the most confident first
    count_G = torch.zeros(G, dtype=torch.long, device=own_n.device).index_add(0, adapter_n, torch.ones_like(adapter_n))
    first_G = count_G.cumsum(0) - count_G
    rank_n = torch.empty_like(order)
    rank_n[order] = torch.arange(len(order), device=own_n.device) - first_G[adapter_n[order]]
    return rank_n < count_G[adapter_n] // 2


def conf_loss(weak_n: Tensor, own_n: Tensor, exceeds_n: Tensor, a: float) -> Tensor:
    """Eq. 47 of each token [n], from its two cross-entropies and whether its confidence exceeds the threshold."""
    return (1 - a) * weak_n + a * own_n * exceeds_n.to(own_n.device)


def share(alpha: float, warmup: float, step: int, steps: int) -> float:
    """a of optimizer step `step`, counted from 0, of `steps`."""
    return alpha * min(1.0, step / (warmup * steps)) if warmup else alpha


class Conf(Sft):
    """Fine-tunes on SoftSamples with Eq. 47.

    Args:
        alpha: largest share of the hardened prediction.
        warmup: share of the steps in which it grows.
    """

    def __init__(
        self, settings: FineTuneSettings, sets: Sequence[TrainingSet], alpha: float = 0.5, warmup: float = 0.2
    ) -> None:
        super().__init__(settings, sets)
        self.alpha, self.warmup = alpha, warmup

    def gradients(self, losses: TargetLosses, step: Step) -> Tensor:
        """Those of Eq. 47, clipped."""
        a = share(self.alpha, self.warmup, step.number, self.settings.steps)
        parts, G = in_parts(step.batch, step.pieces), len(step.batch)
        known = iter(_exceeds(losses, parts)) if len(parts) > 1 else None

        def token_losses(batch: Batch, groups: Sequence[Sequence[Sample]]) -> Tensor:
            both_n2 = losses.of_logits(_both, batch, *weak_of(groups, losses.device))
            weak_n, own_n = both_n2.unbind(1)
            exceeds_n = confident_half(own_n.detach(), batch.adapter_n, G) if known is None else next(known)
            return conf_loss(weak_n, own_n, exceeds_n, a)

        loss_G = batch_gradients(losses, step.batch, step.pieces, token_losses)
        clip_per_adapter(step.trained, self.settings.clip_norm)
        return loss_G


def _both(logits_nV: Tensor, ids_nk: Tensor, log_p_nk: Tensor) -> Tensor:
    """Cross-entropy with the weak distribution, and with the own hard label [n, 2]."""
    weak_n = weak_cross_entropy(logits_nV, ids_nk.to(logits_nV.device), log_p_nk.to(logits_nV.device), TEMPERATURE)
    return torch.stack([weak_n, own_cross_entropy(logits_nV)], 1)


@torch.no_grad()
def _exceeds(losses: TargetLosses, parts: Sequence[Sequence[Sequence[Sample]]]) -> Sequence[Tensor]:
    """For each part of a batch, which of its tokens exceed the threshold of the whole; a forward pass more."""
    batches = [losses.batch(groups) for groups in parts]
    own = [losses.of_logits(own_cross_entropy, batch) for batch in batches]
    exceeds_n = confident_half(torch.cat(own), torch.cat([batch.adapter_n for batch in batches]), len(parts[0]))
    return list(exceeds_n.split([len(one) for one in own]))
