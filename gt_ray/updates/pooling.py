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

import torch
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.pairs.root import Root

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


def pool_products(updates_NLd: Tensor, root: Root) -> Tensor:
    """Pool N updates of LoRA [N, L, d] by the products that they stand for, mean of B_i A_i, instead of by factors.

    The mean has rank N r at most; its best approximation of rank r is factored anew so that its A is as near as can be
    to the mean of the clients' A: they have left the root's A0 together, and one client alone comes out as it went in.

    Raises:
        UserError: the updates are not of LoRA.
    """
    if not root.has_factors:
        raise UserError("products are pooled of LoRA's factors only (pair.tinylm.lora.kind=lora)")
    layout, initial = root.layout, root.initial
    clients = [layout.to_tensors(update_Ld) for update_Ld in updates_NLd]
    pooled = {}
    for module in root.modules:
        a_name, b_name = f"{module}.lora_A", f"{module}.lora_B"
        a_Nri = torch.stack([initial[a_name] + one[a_name] for one in clients]).double()
        b_Nor = torch.stack([initial[b_name] + one[b_name] for one in clients]).double()
        b_oR, a_Ri = b_Nor.permute(1, 0, 2).flatten(1) / len(clients), a_Nri.flatten(0, 1)
        a_ri, b_or = factors(b_oR, a_Ri, a_Nri.mean(0))
        pooled[a_name], pooled[b_name] = (a_ri - initial[a_name]).float(), (b_or - initial[b_name]).float()
    return layout.to_array(pooled)


def factors(b_oR: Tensor, a_Ri: Tensor, near_ri: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [o, r] whose product is the best approximation of b_oR @ a_Ri of rank r, which may be below R; of
    all such pairs the one whose A is the projection of `near_ri` onto the product's rows. All float64."""
    rank = len(near_ri)
    # By QR of both, so that only the small core is decomposed.
    q_oR, upper = torch.linalg.qr(b_oR)
    q_iR, lower = torch.linalg.qr(a_Ri.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)
    left_or, right_ri = q_oR @ (u[:, :rank] * s[:rank]), vh[:rank] @ q_iR.T
    gauge_rr = near_ri @ right_ri.T
    return gauge_rr @ right_ri, left_or @ torch.linalg.pinv(gauge_rr)
