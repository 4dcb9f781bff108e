"""The last layer computes only what a loss needs: behind its attention, tokens no longer see each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BEHIND_ATTENTION = ("self_attn.o_proj", "mlp")


@contextmanager
def due_tokens_only(model: PreTrainedModel, adapted: Collection[str], due: Callable[[], Tensor]) -> Iterator[None]:
    """Let the last layer's MLP and output projection see the due tokens alone, and give zeros for others, for a while.

    Args:
        adapted: names of modules with adapters; those want equally many tokens of each adapter, and are left alone.
        due: places [n], each once, in the flattened tokens of the batch that is being computed.

    Raises:
        AttributeError: the model's layers are not found.
    """
    layers = model.base_model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    prefix = next(name for name, module in model.named_modules() if module is layers[-1])
    changed = []
    for name in BEHIND_ATTENTION:
        if not any(module.startswith(f"{prefix}.{name}") for module in adapted):
            changed.append(layers[-1].get_submodule(name))
    for module in changed:
        module.forward = partial(_on_due, module.forward, due)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _on_due(forward: Callable[[Tensor], Tensor], due: Callable[[], Tensor], x: Tensor) -> Tensor:
    flat = x.flatten(0, -2)
    places_n = due().to(x.device)
    part = forward(flat.index_select(0, places_n)[None])[0]
    return flat.new_zeros(len(flat), part.shape[-1]).index_copy(0, places_n, part).view(*x.shape[:-1], -1)
