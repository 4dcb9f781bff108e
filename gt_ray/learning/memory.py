"""What a training step takes, and what running out of it looks like."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
BESIDES = 2
"""Peak of a step on a CPU over that of its tensors: what operators take inside, and fragments (1.4 to 2.6 seen)."""


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made under it and still alive; checkpointing may nest its own hooks.

    Works on real and on fake tensors.

    Attributes:
        now: bytes alive.
        peak: most of them at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(tensor)._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            # A view of what was there before, the weights for instance, is nothing new.
            if isinstance(tensor, Tensor) and (storage := _storage(tensor))._cdata not in given:
                self.add(storage)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, if it is not counted yet, for as long as it lives."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def training_bytes(step: Callable[[], object], *devices: torch.device) -> int:
    """Bytes that a forward and backward pass take above what is held before it: the peak of its tensors; of several
    devices where it is highest."""
    if devices[0].type == "cuda":
        before = {}
        for device in devices:
            torch.cuda.synchronize(device)
            before[device] = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        step()
        for device in devices:
            torch.cuda.synchronize(device)
        return max(torch.cuda.max_memory_allocated(device) - held for device, held in before.items())
    with LiveTensors() as live:
        step()
    peak: int = live.peak
    return BESIDES * peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in OUT_OF_MEMORY)


class Parts:
    """Calls a function on parts of a list of things, fewer at a time after running out of memory.

    Args:
        at_once: things in a part, as long as memory suffices.
    """

    def __init__(self, at_once: int, device: torch.device) -> None:
        self.at_once, self.device = at_once, device

    def __call__(self, n: int, work: Callable[[slice], Result]) -> list[Result]:
        """What `work` returns for each part of n things, in order.

        Raises:
            RuntimeError, MemoryError: what `work` raises; out of memory with a single thing too.
        """
        found: list[Result] = []
        first = 0
        while first < n:
            part = slice(first, min(n, first + self.at_once))
            try:
                found.append(work(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.at_once == 1:
                    raise
                self.at_once //= 2
                release(self.device)
                continue
            first = part.stop
        return found


def release(device: torch.device) -> None:
    """Give back what the last group held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
