"""Stacked adapters: G LoRA adapters of one frozen model trained in one forward and backward pass.

A batch holds the tokens of each adapter one after the other, equally many of each. The frozen weights see one large
batch; only the low-rank products are per adapter: y = W x + scaling * B_g A_g x. The loss is a sum of per-adapter
losses, so every adapter's gradient is that of a run of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gt_ray.pairs.root import Root
from gt_ray.updates.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StackedLora(nn.Module):
    """A frozen Linear with G adapters: A [G, r, in], B [G, out, r], float32."""

    def __init__(self, base: nn.Module, a0: Tensor, b0: Tensor, G: int, scaling: float) -> None:
        super().__init__()
        device = next(base.parameters()).device
        self.base = base
        self.scaling = scaling
        self.lora_A = nn.Parameter(a0.to(device).expand(G, *a0.shape).clone())
        self.lora_B = nn.Parameter(b0.to(device).expand(G, *b0.shape).clone())

    def forward(self, x_RTd: Tensor) -> Tensor:
        """[R, T, in] -> [R, T, out], R * T tokens of which each adapter has an equal share."""
        G = self.lora_A.shape[0]
        x_GNd = x_RTd.reshape(G, -1, x_RTd.shape[-1]).to(self.lora_A.dtype)
        low_rank_GNr = torch.bmm(x_GNd, self.lora_A.transpose(1, 2))
        y_RTo: Tensor = self.base(x_RTd)
        y_GNo = y_RTo.reshape(G, -1, y_RTo.shape[-1])
        if y_GNo.dtype == low_rank_GNr.dtype:
            return torch.baddbmm(y_GNo, low_rank_GNr, self.lora_B.transpose(1, 2), alpha=self.scaling).view_as(y_RTo)
        delta_GNo = torch.bmm(low_rank_GNr, self.lora_B.transpose(1, 2) * self.scaling)
        return (y_GNo + delta_GNo).to(y_RTo.dtype).view_as(y_RTo)  # a sum in float32, as in PEFT


@contextmanager
def stacked(model: PreTrainedModel, root: Root, G: int) -> Iterator[dict[str, nn.Parameter]]:
    """Put G copies of the root's adapter into a model; take them out again on leaving.

    Yields:
        The stacked parameters by name: `<module>.lora_A` [G, r, in], `<module>.lora_B` [G, out, r].
    """
    replaced = {}
    try:
        for name in root.modules:
            base = model.get_submodule(name)
            replaced[name] = base
            layer = StackedLora(base, root.initial[f"{name}.lora_A"], root.initial[f"{name}.lora_B"], G, root.scaling)
            model.set_submodule(name, layer)
        yield {
            f"{name}.{part}": model.get_submodule(name).get_parameter(part)
            for name in root.modules
            for part in ("lora_A", "lora_B")
        }
    finally:
        for name, base in replaced.items():
            model.set_submodule(name, base)


@torch.no_grad()
def add_updates(parameters: Mapping[str, nn.Parameter], layout: Layout, update_GLd: Tensor) -> None:
    """Let the stacked adapters be the root's plus these updates."""
    for name, delta in layout.to_tensors(update_GLd).items():
        parameters[name].add_(delta.to(parameters[name].device))


def keep_adapters(optimizer: torch.optim.Optimizer, rows: Sequence[int]) -> None:
    """Drop all but some adapters of a stack, with their optimizer state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name, value in state.items():
                if value.shape == parameter.shape:  # not the common step counter
                    state[name] = value[list(rows)]
            parameter.data, parameter.grad = parameter.data[list(rows)], None
