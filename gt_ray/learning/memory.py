"""What a training step takes, and what running out of it looks like."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def training_bytes(step: Callable[[], object], model: torch.nn.Module, device: torch.device) -> int:
    """Bytes that a forward and backward pass take above what is held before it.

    On a GPU the allocator's peak; on a CPU the activations that autograd saves, doubled for what comes and goes beside
    them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return 2 * sum(saved.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in OUT_OF_MEMORY)


def release(device: torch.device) -> None:
    """Give back what the last group held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
