"""Pooling the updates of N clients into one (section 4.3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Pooling = Literal["mean", "sum"]


def pool(updates_NLd: Tensor, how: Pooling = "mean", mean_Ld: Tensor | None = None) -> Tensor:
    """Pool N updates [N, L, d] into one [L, d].

    Args:
        how: `mean` is the paper's; `sum` adds up what distinguishes the clients from the mean update: mu + sum(u - mu)
            (decision 7), since a plain sum of N updates would be N times too far from the root.
        mean_Ld: mu, the mean S update of the training tuples; needed for `sum`.
    """
    if how == "mean":
        return updates_NLd.mean(0)
    if mean_Ld is None:
        raise ValueError("pooling by sum needs the mean update")
    return mean_Ld + (updates_NLd - mean_Ld).sum(0)
