"""Behaviour of given adapters: the task loss of a frozen model that wears them, and its gradient (decision 9).

With a teacher a part of the loss is the divergence from proxy-tuning's distribution of the next token,
softmax(T + S with its update - S), which exists for every update of S: it says how much that update tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.learning.losses import TargetLosses, sums_by_adapter
from gt_ray.learning.samples import Sample
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.pairs.root import Root

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Behaviour:
    """Losses of updates of one model, G at a time in one pass.

    Args:
        model: the frozen base model, T; its layers may lie on several devices (pairs/devices.py).
        root: of the updates.
        proxy: S and its root, for the teacher; both models have one vocabulary. Best on the device of T's LM head,
            which its logits go to.
        weight: share of the teacher in the loss.

    Raises:
        UserError: a teacher is asked for, but one of the models changes its logits behind the LM head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        root: Root,
        proxy: tuple[PreTrainedModel, Root] | None = None,
        weight: float = 0.0,
    ) -> None:
        self.model, self.root, self.layout = model, root, root.layout
        self.losses = TargetLosses(model, root)
        self.proxy, self.weight = proxy, weight if proxy else 0.0
        if proxy:
            self.proxy_losses = TargetLosses(*proxy)
            if not (self.losses.plain_head and self.proxy_losses.plain_head):
                raise UserError(
                    "this pair's logits are more than an LM head's output, which proxy-tuning cannot teach; set "
                    "behaviour.teacher=0 and refinement.steps=0"
                )

    def __call__(
        self,
        update_GLd: Tensor,
        groups: Sequence[Sequence[Sample]],
        gradient: bool = True,
        update_S_GLd: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mean loss a target token of each update [G], and its gradient with respect to the update [G, L, d].

        Args:
            groups: the samples of each update, equally many.
            update_S_GLd: updates of S that teach; without them the loss is the task's alone.
            start: further updates [G, L, d] that teach, and the share [G] of proxy-tuning in what both say: the teacher
                is the geometric mean of the two distributions.
        """
        G = len(update_GLd)
        batch = self.losses.batch(groups)
        teacher = self._teacher(groups, update_S_GLd, start) if update_S_GLd is not None and self.weight else None
        with self.losses.short_cuts(), stacked(self.model, self.root, G) as parameters:
            add_updates(parameters, self.layout, update_GLd)
            for parameter in parameters.values():
                parameter.requires_grad_(gradient)
            if teacher is None:
                loss_n = self.losses(batch)
            else:
                parts = self.losses.due_hidden(batch), batch.target_n, *teacher
                loss_n = self.losses.in_pieces(self._taught_loss, *parts)
            sum_G, count_G = sums_by_adapter(loss_n, batch, G)
            loss_G = sum_G / count_G
            if not gradient:
                return loss_G.detach().cpu(), None
            loss_G.sum().backward()
            gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        return loss_G.detach().cpu(), self.layout.to_array(gradients)

    @torch.no_grad()
    def _teacher(
        self, groups: Sequence[Sequence[Sample]], update_S_GLd: Tensor, start: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...]:
        """What the LM heads see [n, d] of T, of S with its updates, and of S; with `start` also of T with those
        updates, and the share [n] of proxy-tuning."""
        assert self.proxy is not None
        model_S, root_S = self.proxy
        with self.losses.short_cuts(), stacked(self.model, self.root, G=1):
            hidden_T = self.losses.due_hidden(self.losses.batch(groups))
        batch = self.proxy_losses.batch(groups)
        with self.proxy_losses.short_cuts(), stacked(model_S, root_S, G=1):
            hidden_S = self.proxy_losses.due_hidden(batch)
        with self.proxy_losses.short_cuts(), stacked(model_S, root_S, len(update_S_GLd)) as parameters:
            add_updates(parameters, root_S.layout, update_S_GLd)
            tuned_S = self.proxy_losses.due_hidden(batch)
        if start is None:
            return hidden_T, tuned_S, hidden_S
        update_GLd, share_G = start
        batch = self.losses.batch(groups)
        with self.losses.short_cuts(), stacked(self.model, self.root, len(update_GLd)) as parameters:
            add_updates(parameters, self.layout, update_GLd)
            start_T = self.losses.due_hidden(batch)
        return hidden_T, tuned_S, hidden_S, start_T, share_G.to(batch.adapter_n.device)[batch.adapter_n]

    def _taught_loss(
        self,
        hidden: Tensor,
        target: Tensor,
        hidden_T: Tensor,
        tuned_S: Tensor,
        hidden_S: Tensor,
        start_T: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy with the targets, and Kullback-Leibler divergence from the teacher, of each token."""
        assert self.proxy is not None
        head_T, head_S = self.model.get_output_embeddings(), self.proxy[0].get_output_embeddings()
        logits = head_T(hidden).float()
        shift = (head_S(tuned_S).float() - head_S(hidden_S).float()).to(logits.device)
        V = min(logits.shape[-1], shift.shape[-1])  # models pad their vocabularies to other sizes
        log_p = logits.log_softmax(-1)
        said = head_T(hidden_T).float()[:, :V] + shift[:, :V]
        if start_T is not None and share is not None:
            share = share.to(logits.device)
            said = share[:, None] * said + (1 - share[:, None]) * head_T(start_T).float()[:, :V]
        log_teacher = said.log_softmax(-1)
        divergence = (log_teacher.exp() * (log_teacher - log_p[:, :V])).sum(-1)
        task = torch.nn.functional.nll_loss(log_p, target.to(logits.device), reduction="none")
        loss: Tensor = (1 - self.weight) * task + self.weight * divergence
        return loss
