"""Stacked adapters: G adapters of one frozen model trained in one forward and backward pass.

A batch holds the tokens of each adapter one after the other, equally many of each. The frozen weights see one large
batch; only the low-rank products are per adapter: y = W x + scaling * B_g A_g x. The loss is a sum of per-adapter
losses, so every adapter's gradient is that of a run of its own. The kinds of adapters are those of pairs/root.py.
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


class Stacked(nn.Module):
    """A frozen module with G adapters.

    Args:
        initial: the parameters of one adapter at the root, by name; G copies of each are trained, float32.
        fixed: further tensors of every adapter.
    """

    def __init__(
        self, base: nn.Module, initial: Mapping[str, Tensor], fixed: Mapping[str, Tensor], G: int, scaling: float
    ) -> None:
        super().__init__()
        device = next(base.parameters()).device
        self.base = base
        self.scaling = scaling
        for name, tensor in initial.items():
            self.register_parameter(name, nn.Parameter(tensor.to(device).expand(G, *tensor.shape).clone()))
        for name, tensor in fixed.items():
            self.register_buffer(name, tensor.to(device))

    def _plus(self, y: Tensor, delta_GNo: Tensor) -> Tensor:
        """The base module's output plus the adapters', summed in float32, as in PEFT."""
        return (y.reshape(delta_GNo.shape) + delta_GNo).to(y.dtype).view_as(y)


class StackedLora(Stacked):
    """A Linear with `lora_A` [G, r, in] and `lora_B` [G, out, r]."""

    lora_A: Tensor
    lora_B: Tensor

    def forward(self, x_RTd: Tensor) -> Tensor:
        """[R, T, in] -> [R, T, out], R * T tokens of which each adapter has an equal share."""
        G = self.lora_A.shape[0]
        x_GNd = x_RTd.reshape(G, -1, x_RTd.shape[-1]).to(self.lora_A.dtype)
        low_rank_GNr = torch.bmm(x_GNd, self.lora_A.transpose(1, 2))
        y_RTo: Tensor = self.base(x_RTd)
        y_GNo = y_RTo.reshape(G, -1, y_RTo.shape[-1])
        if y_GNo.dtype == low_rank_GNr.dtype:
            return torch.baddbmm(y_GNo, low_rank_GNr, self.lora_B.transpose(1, 2), alpha=self.scaling).view_as(y_RTo)
        return self._plus(y_RTo, torch.bmm(low_rank_GNr, self.lora_B.transpose(1, 2) * self.scaling))


class StackedXs(Stacked):
    """A Linear with `lora_R` [G, r, r] between fixed `lora_A` [r, in] and `lora_B` [out, r]."""

    lora_A: Tensor
    lora_B: Tensor
    lora_R: Tensor

    def forward(self, x_RTd: Tensor) -> Tensor:
        """[R, T, in] -> [R, T, out]."""
        G = self.lora_R.shape[0]
        low_rank_GNr = (x_RTd.to(self.lora_A.dtype) @ self.lora_A.T).reshape(G, -1, self.lora_A.shape[0])
        delta_GNo = torch.bmm(low_rank_GNr, self.lora_R.transpose(1, 2)) @ (self.lora_B.T * self.scaling)
        return self._plus(self.base(x_RTd), delta_GNo)


class StackedWeight(Stacked):
    """A Linear with differences of its weights, `weight` [G, out, in]."""

    weight: Tensor

    def forward(self, x_RTd: Tensor) -> Tensor:
        """[R, T, in] -> [R, T, out]."""
        x_GNd = x_RTd.reshape(len(self.weight), -1, x_RTd.shape[-1]).to(self.weight.dtype)
        return self._plus(self.base(x_RTd), torch.bmm(x_GNd, self.weight.transpose(1, 2)))


class StackedEmbedding(Stacked):
    """An embedding with `lora_embedding_A` [G, r, V] and `lora_embedding_B` [G, d, r]."""

    lora_embedding_A: Tensor
    lora_embedding_B: Tensor

    def forward(self, ids_RT: Tensor) -> Tensor:
        """[R, T] -> [R, T, d]."""
        G, r, _ = self.lora_embedding_A.shape
        ids_GrN = ids_RT.reshape(G, 1, -1).expand(-1, r, -1)
        low_rank_GrN = self.lora_embedding_A.gather(2, ids_GrN)
        delta_GNd = torch.bmm(low_rank_GrN.transpose(1, 2), self.lora_embedding_B.transpose(1, 2) * self.scaling)
        return self._plus(self.base(ids_RT), delta_GNd)


KINDS: dict[str, type[Stacked]] = {
    "lora_A": StackedLora,
    "lora_R": StackedXs,
    "weight": StackedWeight,
    "lora_embedding_A": StackedEmbedding,
}
"""By the first of their parameters."""


@contextmanager
def stacked(model: PreTrainedModel, root: Root, G: int) -> Iterator[dict[str, nn.Parameter]]:
    """Put G copies of the root's adapter into a model; take them out again on leaving.

    Yields:
        The stacked parameters by name: `<module>.lora_A` [G, r, in], `<module>.lora_B` [G, out, r] ...
    """
    initial, fixed = _by_module(root.initial), _by_module(root.fixed)
    replaced = {}
    try:
        for name in root.modules:
            base = model.get_submodule(name)
            replaced[name] = base
            layer = KINDS[min(initial[name])](base, initial[name], fixed.get(name, {}), G, root.scaling)
            model.set_submodule(name, layer)
        yield {
            f"{name}.{part}": model.get_submodule(name).get_parameter(part)
            for name in root.modules
            for part in initial[name]
        }
    finally:
        for name, base in replaced.items():
            model.set_submodule(name, base)


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


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
