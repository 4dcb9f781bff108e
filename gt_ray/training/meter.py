"""How fast a worker trains, what share of its device's peak that is, and what share of the time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar

import torch

from gt_ray.grad_transformer.network import GradTransformer

Batch = TypeVar("Batch")
PRODUCT = {"cuda": 8192, "cpu": 512}
"""Size of the matrix product that tells the peak of a device."""


def operations(model: GradTransformer) -> float:
    """Of a forward and backward pass of one tuple under teacher forcing: 6 for every weight and token that meet it.

    What attention does between tokens is left out; it is below 2 % at the lengths of updates.
    """
    if model.phi is None:
        return 0.0

    def weights(*modules: torch.nn.Module) -> int:
        return sum(getattr(one, "ds_numel", one.numel()) for module in modules for one in module.parameters())

    tokens_S, tokens_T = model.embed_S.tokens, model.embed_T.tokens
    reads_S = [
        projection
        for block in model.phi.decoder.block
        for projection in (block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v)
    ]
    of_S = weights(model.phi.encoder, model.embed_S, *reads_S)
    of_T = weights(model.phi.decoder, model.embed_T, model.out) - weights(*reads_S)
    return 6.0 * (of_S * tokens_S + of_T * tokens_T)


def matrix_peak(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product on this device."""
    n = PRODUCT[device.type]
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    return float(2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(5)))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, to the end of what it has a GPU do."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


class Meter:
    """Times one worker's steps; what is measured between two readings.

    Args:
        workers: that do as much.
    """

    def __init__(self, device: torch.device, precision: str, workers: int = 1) -> None:
        self._workers = workers
        self._device, self._peak = device, matrix_peak(device, precision)
        self._of_a_tuple = cache(operations)
        self._start()

    def _start(self) -> None:
        self._started, self._waited_s, self._tokens, self._operations = time.perf_counter(), 0.0, 0, 0.0
        self._first_batch_s = 0.0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, and the time until each is there counted as waiting; until the first one, as starting."""
        first = True
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            waited_s = time.perf_counter() - asked
            if first:  # Ray Data starts its workers meanwhile, once, however long the training is
                self._first_batch_s += waited_s
            else:
                self._waited_s += waited_s
            first = False
            yield batch

    def count(self, model: GradTransformer, tuples: int) -> None:
        """A step of so many tuples, or generated updates, has been done."""
        if model.phi is not None:
            self._tokens += tuples * (model.embed_S.tokens + model.embed_T.tokens)
            self._operations += tuples * self._of_a_tuple(model)

    def read(self) -> dict[str, float]:
        """Measures since the last reading: tokens of all workers, shares of this one; the next begins with `resume`.

        Rates and shares are of `train_s`, which begins with the first batch; `first_batch_s` is the time until then.
        """
        _wait(self._device)
        wall_s = time.perf_counter() - self._started - self._first_batch_s
        return {
            "train_s": wall_s,
            "first_batch_s": self._first_batch_s,
            "tokens_per_s": self._workers * self._tokens / wall_s,
            "peak_share": self._operations / wall_s / self._peak,
            "data_wait_share": self._waited_s / wall_s,
        }

    def resume(self) -> None:
        """Count anew, after what is not training."""
        self._start()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
