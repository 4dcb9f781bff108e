"""The weak model's distribution of every token of its own output, and the cross-entropy with it (appendix C.2).

Of a distribution the k likeliest tokens are kept, and all others count as one class, the rest:

    CE(f, f_w) = - sum over the k tokens of f_w log f - rest(f_w) log rest(f),    rest = 1 - sum over the k tokens

Its gradient is that of the whole cross-entropy if the weak model's rest were spread over the other tokens as the strong
model's own is: nothing is taught of what was not kept. With k = V it is the whole cross-entropy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.learning.losses import LOGITS_AT_ONCE, TargetLosses
from gt_ray.learning.row_losses import TOKENS_AT_ONCE
from gt_ray.learning.samples import Sample
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.pairs.root import Root
from gt_ray.updates.files import read_tensors, write_atomically

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Distributions:
    """The weak model's distributions of the n tokens of an output; numpy arrays, which Ray's actors share.

    Attributes:
        target_n: the tokens.
        ids_nk: the k likeliest tokens in the place of each, int32.
        log_p_nk: their log-probabilities, float32.
    """

    target_n: Array
    ids_nk: Array
    log_p_nk: Array


@dataclass(frozen=True)
class SoftSample(Sample):
    """A sample whose target is a weak model's output, with its distribution of each target token."""

    weak: Distributions = field(repr=False, compare=False)


def likeliest(logits_nV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids [n, k] and log-probabilities [n, k] of the likeliest tokens of softmax(logits / temperature)."""
    log_p_nk, ids_nk = (logits_nV.float() / temperature).log_softmax(-1).topk(min(k, logits_nV.shape[-1]))
    return ids_nk, log_p_nk


def weak_cross_entropy(logits_nV: Tensor, ids_nk: Tensor, log_p_nk: Tensor, temperature: float = 1.0) -> Tensor:
    """CE(f, f_w) [n] of the module's docstring, f = softmax(logits / temperature).

    Args:
        ids_nk, log_p_nk: of `likeliest`, at the same temperature.
    """
    logits_nV = logits_nV.float() / temperature
    log_sum_n = logits_nV.logsumexp(-1)
    p_nk = log_p_nk.exp()
    cross_n = (p_nk * (log_sum_n[:, None] - logits_nV.gather(1, ids_nk))).sum(-1)
    if ids_nk.shape[1] < logits_nV.shape[1]:
        # Not log(1 - sum), which is all rounding where the rest is small.
        log_rest_n = logits_nV.scatter(1, ids_nk, -torch.inf).logsumexp(-1) - log_sum_n
        cross_n = cross_n - (1 - p_nk.sum(-1)).clamp(min=0) * log_rest_n
    return cross_n


def weak_of(groups: Sequence[Sequence[Sample]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [n, k] of all target tokens of a batch of SoftSamples, in the order of the batch."""
    weak = [sample.weak for samples in groups for sample in samples if isinstance(sample, SoftSample)]
    ids_nk = torch.from_numpy(np.concatenate([one.ids_nk for one in weak]).astype(np.int64))
    log_p_nk = torch.from_numpy(np.concatenate([one.log_p_nk for one in weak]))
    return ids_nk.to(device), log_p_nk.to(device)


@torch.no_grad()
def distributions_of(
    losses: TargetLosses,
    root: Root,
    update_Ld: Tensor,
    samples: Sequence[Sample],
    top_k: int,
    temperature: float,
    vocabulary: int,
) -> list[Distributions]:
    """What a model with an update says in the place of every target token, given the tokens before it.

    Args:
        losses: of the model.
        top_k: tokens that are kept of each distribution.
        vocabulary: number of tokens; models pad their logits to other sizes, and the padding is left out.
    """
    found = []
    tokens = TOKENS_AT_ONCE.get(losses.device.type, TOKENS_AT_ONCE["cuda"])
    longest, most = max(map(len, samples)), max(len(sample.target) for sample in samples)
    size = max(1, min(tokens // longest, LOGITS_AT_ONCE // (vocabulary * most)))
    with losses.short_cuts(), stacked(losses.model, root, G=1) as parameters:
        add_updates(parameters, root.layout, update_Ld[None])
        for first in range(0, len(samples), size):
            part = samples[first : first + size]
            logits_nV = losses.of_logits(lambda logits: logits[:, :vocabulary], losses.batch([part]))
            ids_nk, log_p_nk = (one.cpu().numpy() for one in likeliest(logits_nV, top_k, temperature))
            target_n = np.concatenate([sample.target for sample in part])
            counts = [len(sample.target) for sample in part]
            found += _of_rows(counts, target_n.astype(np.int32), ids_nk.astype(np.int32), log_p_nk)
    return found


def _of_rows(counts: Sequence[int], target_n: Array, ids_nk: Array, log_p_nk: Array) -> list[Distributions]:
    ends = [0, *np.cumsum(counts).tolist()]
    return [Distributions(target_n[a:b], ids_nk[a:b], log_p_nk[a:b]) for a, b in pairwise(ends)]


def write_distributions(path: Path, rows: Sequence[Distributions]) -> None:
    """Write the distributions of some rows as one safetensors file with a checksum.

    Raises:
        UserError: it cannot be written; nothing is left behind.
    """
    tensors = {
        "counts": torch.tensor([len(one.target_n) for one in rows], dtype=torch.int32),
        "target": torch.from_numpy(np.concatenate([one.target_n for one in rows])),
        "ids": torch.from_numpy(np.concatenate([one.ids_nk for one in rows])),
        "log_p": torch.from_numpy(np.concatenate([one.log_p_nk for one in rows])),
    }
    write_atomically(path, save(tensors, {"sha256": _checksum(tensors)}))


def read_distributions(path: Path) -> list[Distributions] | None:
    """What `write_distributions` wrote; none where it is absent or damaged."""
    try:
        tensors, metadata = read_tensors(path)
    except UserError:
        return None
    if metadata.get("sha256") != _checksum(tensors):
        return None
    target, ids, log_p = (tensors[name].numpy() for name in ("target", "ids", "log_p"))
    return _of_rows(tensors["counts"].tolist(), target, ids, log_p)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
