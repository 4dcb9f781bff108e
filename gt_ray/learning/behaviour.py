"""Behaviour of given adapters: the task loss of a frozen model that wears them, and its gradient (decision 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.samples import Sample
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.root import Root

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Behaviour:
    """Losses of updates of one model, G at a time in one pass.

    Args:
        model: the frozen base model.
        root: of the updates.
    """

    def __init__(self, model: PreTrainedModel, root: Root) -> None:
        self.model, self.root, self.layout = model, root, root.layout
        self.losses = TargetLosses(model, root)

    def __call__(
        self, update_GLd: Tensor, groups: Sequence[Sequence[Sample]], gradient: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Mean loss a target token of each update [G], and its gradient with respect to the update [G, L, d].

        Args:
            groups: the samples of each update, equally many.
        """
        G = len(update_GLd)
        with self.losses.short_cuts(), stacked(self.model, self.root, G) as parameters:
            for name, delta in self.layout.to_tensors(update_GLd).items():
                parameters[name].data.add_(delta.to(self.losses.device))
                parameters[name].requires_grad_(gradient)
            sum_G, count_G = self.losses.by_adapter(self.losses.batch(groups), G)
            loss_G = sum_G / count_G
            if not gradient:
                return loss_G.detach().cpu(), None
            loss_G.sum().backward()
            gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        return loss_G.detach().cpu(), self.layout.to_array(gradients)
