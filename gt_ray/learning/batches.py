"""The samples of G adapters as one batch of tokens: packed without padding, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gt_ray.learning.attention import Packing
from gt_ray.learning.samples import Sample


@dataclass(frozen=True)
class Batch:
    """Token ids and where a loss is due; the tokens of an adapter stand together, of each adapter equally many.

    Attributes:
        ids_RT: token ids; one row [1, P] if packed, else a row a sample.
        due_n: for each target token the place in the flattened `ids_RT` of the token before it.
        target_n: the target tokens.
        adapter_n: their adapters.
        positions_RT: position of each token in its sample, if packed.
        packing: if packed.
    """

    ids_RT: Tensor
    due_n: Tensor
    target_n: Tensor
    adapter_n: Tensor
    positions_RT: Tensor | None = None
    packing: Packing | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: None if part is None else part.to(device) for name, part in parts.items()}
        return Batch(**moved)


def padded(groups: Sequence[Sequence[Sample]], pad: int) -> Batch:
    """A row a sample, padded on the right: tokens that count never see the padding under a causal mask.

    Args:
        groups: the samples of each adapter, equally many.
    """
    samples = [sample for group in groups for sample in group]
    width = max(map(len, samples))
    ids_NT = np.full((len(samples), width), pad, dtype=np.int64)
    for n, sample in enumerate(samples):
        ids_NT[n, : len(sample)] = sample.prompt + sample.target
    starts = np.arange(len(samples)) * width
    return Batch(torch.from_numpy(ids_NT), *_targets(groups, starts))


def padding_share(groups: Sequence[Sequence[Sample]]) -> float:
    """Share of a padded batch that is padding."""
    lengths = [len(sample) for group in groups for sample in group]
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def packed(groups: Sequence[Sequence[Sample]], pad: int) -> Batch:
    """One row: the samples of each adapter one behind the other, then padding up to the longest adapter."""
    width = max(sum(map(len, group)) for group in groups)
    samples = [sample for group in groups for sample in group]
    N, T, P = len(samples), max(map(len, samples)), width * len(groups)
    ids_P = np.full(P, pad, dtype=np.int64)
    positions_P, slot_P = np.zeros((2, P), dtype=np.int64)
    padding_P = np.ones(P, dtype=bool)
    token_NT = np.empty((N, T), dtype=np.int64)
    starts, n = np.empty(N, dtype=np.int64), 0
    for g, group in enumerate(groups):
        start = g * width
        slot_P[start : start + width] = n * T
        for sample in group:
            end = start + len(sample)
            ids_P[start:end] = sample.prompt + sample.target
            positions_P[start:end] = np.arange(end - start)
            slot_P[start:end] = np.arange(n * T, n * T + end - start)
            padding_P[start:end] = False
            token_NT[n] = start
            token_NT[n, : end - start] = np.arange(start, end)
            starts[n], start, n = start, end, n + 1
    empty_NT = np.arange(T)[None] >= np.array([len(sample) for sample in samples])[:, None]
    return Batch(
        torch.from_numpy(ids_P)[None],
        *_targets(groups, starts),
        positions_RT=torch.from_numpy(positions_P)[None],
        packing=Packing(*map(torch.from_numpy, (token_NT, slot_P, empty_NT, padding_P))),
    )


def _targets(groups: Sequence[Sequence[Sample]], starts: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Place before each target token, the token, its adapter; `starts` is where each sample starts."""
    samples = [sample for group in groups for sample in group]
    counts = np.array([len(sample.target) for sample in samples])
    prompts = np.array([len(sample.prompt) for sample in samples])
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    due_n = np.repeat(starts + prompts - 1, counts) + within
    target_n = np.concatenate([sample.target for sample in samples])
    adapter_n = np.repeat(np.repeat(np.arange(len(groups)), [len(group) for group in groups]), counts)
    return torch.from_numpy(due_n), torch.from_numpy(target_n), torch.from_numpy(adapter_n)
