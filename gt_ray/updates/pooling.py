"""Pooling the updates of N clients into one (section 4.3), and ways that one bad client cannot steer.

    mean            what the paper does
    sum             mu + sum(u - mu)
    clip            mu + mean(clip(u - mu)), norms clipped to the clients' median norm     (arXiv 1911.07963)
    median          of each coordinate                                                     (arXiv 1803.01498)
    trimmed_mean    of each coordinate, without the 20 % largest and smallest values       (arXiv 1803.01498)

mu is the mean S update of the training tuples. `clip` bounds what a client can do, `trimmed_mean` bears a fifth of bad
clients (of fewer than five, none), `median` fewer than half.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Pooling = Literal["mean", "sum", "clip", "median", "trimmed_mean"]
TRIM = 0.2


def pool(updates_NLd: Tensor, how: Pooling = "mean", mean_Ld: Tensor | None = None) -> Tensor:
    """Pool N updates [N, L, d] into one [L, d].

    Args:
        how: `sum` adds up what distinguishes the clients from the mean update (decision 7), since a plain sum of N
            updates would be N times too far from the root.
        mean_Ld: mu; needed for `sum` and `clip`.
    """
    if how == "mean":
        return updates_NLd.mean(0)
    if how == "median":
        return updates_NLd.quantile(0.5, dim=0)  # the mean of the middle two, where torch.median takes the lower
    if how == "trimmed_mean":
        cut = int(TRIM * len(updates_NLd))
        return updates_NLd.sort(0).values[cut : len(updates_NLd) - cut].mean(0)
    if mean_Ld is None:
        raise ValueError(f"pooling by {how} needs the mean update")
    from_mean_NLd = updates_NLd - mean_Ld
    if how == "sum":
        return mean_Ld + from_mean_NLd.sum(0)
    norm_N11 = from_mean_NLd.flatten(1).norm(dim=1)[:, None, None]
    share_N11 = (norm_N11.quantile(0.5) / norm_N11.clamp(min=1e-12)).clamp(max=1)
    clipped_Ld: Tensor = mean_Ld + (share_N11 * from_mean_NLd).mean(0)
    return clipped_Ld
