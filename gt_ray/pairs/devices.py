"""One model over several devices, by layers: each device has some of them, one behind the other.

For models that do not fit one device; the devices work in turns, so nothing gets faster. Weights stay where they are,
and a module's inputs are brought to it. Accelerate's hooks do so too, but they stand in place of each module's
`forward`, which the short cuts of learning/ exchange and put back; these are a module's own hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from gt_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Device = str | torch.device


def pieces(model: PreTrainedModel) -> list[list[str]]:
    """Names of the modules that stay together, in the order of computation: those before the layers, each layer, those
    behind (the last norm, the LM head). A head with the embedding's weights keeps what lies behind beside them.

    Empty where transformers does not say what the model's layers are.
    """
    kinds = set(model._no_split_modules or ())
    layers = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    before: list[str] = []
    inner: list[str] = []
    behind: list[str] = []
    for name, module in model.named_modules():
        holds_layers = not name or any(layer.startswith(f"{name}.") for layer in layers)
        if holds_layers or any(name.startswith(f"{one}.") for one in (*before, *inner, *behind)):
            continue
        if name in layers:
            inner.append(name)
        # Modules without weights are rotary embeddings, which a model computes first, wherever they stand.
        elif not inner or not any(True for _ in module.parameters()):
            before.append(name)
        else:
            behind.append(name)
    if not inner:
        return []
    if _parameters(model, before).keys() & _parameters(model, behind).keys():
        before, behind = before + behind, []
    return [before, *([layer] for layer in inner), *([behind] if behind else [])]


def piece_parameters(model: PreTrainedModel, piece: Sequence[str]) -> int:
    """Parameters of a piece."""
    return sum(parameter.numel() for parameter in _parameters(model, piece).values())


def _parameters(model: nn.Module, modules: Sequence[str]) -> dict[int, nn.Parameter]:
    """The parameters of some modules, each once."""
    return {id(one): one for name in modules for one in model.get_submodule(name).parameters()}


def split(sizes: Sequence[int], n: int) -> list[int]:
    """The device, of n, of each piece: consecutive pieces, and the fullest device as empty as it can be."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if _filled(sizes, middle)[-1] < n:
            high = middle
        else:
            low = middle + 1
    return _filled(sizes, low)


def _filled(sizes: Sequence[int], room: int) -> list[int]:
    """The device of each piece, if each takes as many as it has room for."""
    device, used, found = 0, 0, []
    for size in sizes:
        if used and used + size > room:
            device, used = device + 1, 0
        used += size
        found.append(device)
    return found


def device_map(model: PreTrainedModel, devices: Sequence[Device]) -> dict[str, torch.device]:
    """Where each module of a model is to lie, by name: about equal weights on each device.

    Args:
        model: may be without weights, on the meta device.

    Raises:
        UserError: transformers does not say what the model's layers are.
    """
    found = pieces(model)
    if not found:
        raise UserError(
            f"{type(model).__name__} does not say what its layers are (_no_split_modules), so it cannot be spread over "
            f"{len(devices)} GPUs; use GPUs that hold all of it, with num_gpus=1"
        )
    numbers = split([piece_parameters(model, piece) for piece in found], len(devices))
    return {name: torch.device(devices[number]) for piece, number in zip(found, numbers, strict=True) for name in piece}


def bring_inputs(model: nn.Module, places: Mapping[str, torch.device]) -> None:
    """Let the inputs of these modules be brought to their devices from now on, and not by accelerate's hooks."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for name, device in places.items():
        module = model.get_submodule(name)
        if any(True for _ in module.parameters()):  # what has no weights computes where its inputs are
            module.register_forward_pre_hook(partial(_brought, device), with_kwargs=True)


def _brought(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> Any:
    """Arguments on a device: tensors, and what else can go there."""
    return tree_map(lambda value: value.to(device) if hasattr(value, "to") else value, (args, kwargs))
