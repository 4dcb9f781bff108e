"""Per-coordinate standardisation, so that a network output of zero is exactly the mean update (decision 7)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from gt_ray.errors import UserError
from gt_ray.updates.layout import Layout


class Standardiser(nn.Module):
    """z = (update - mean) / scale, for arrays [..., L, d]; kept in the checkpoint as buffers.

    With a rank, z is projected to so many directions in which kinds of training updates differ, each weighted so that
    they differ as much in all of them: the domains of a task may be a hundredth of what tasks are apart. Noise in all
    other directions, which private clients add, is not seen.

    Args:
        rank: R; 0: no projection.
    """

    mean: Tensor
    scale: Tensor
    directions_RP: Tensor
    gain_R: Tensor

    def __init__(self, L: int, d: int, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("mean", torch.zeros(L, d))
        self.register_buffer("scale", torch.ones(L, d))
        if rank:
            self.register_buffer("directions_RP", torch.zeros(rank, L * d))
            self.register_buffer("gain_R", torch.zeros(rank))

    def fit(self, updates: Iterable[Tensor], layout: Layout, floor: float) -> None:
        """Set mean and scale from training updates, given one [N, L, d] chunk at a time.

        Args:
            floor: least scale, as a share of the RMS scale of the coordinate's module, or near-constant coordinates
                would amplify noise (decision 7).
        """
        n = 0
        mean = torch.zeros(layout.L, layout.d, dtype=torch.float64)
        m2 = torch.zeros(layout.L, layout.d, dtype=torch.float64)
        for chunk_NLd in updates:  # Chan's parallel update of mean and sum of squared differences
            chunk_NLd = chunk_NLd.double()
            count, chunk_mean = len(chunk_NLd), chunk_NLd.mean(0)
            difference = chunk_mean - mean
            m2 = m2 + ((chunk_NLd - chunk_mean) ** 2).sum(0) + difference**2 * (n * count / (n + count))
            mean = mean + difference * (count / (n + count))
            n += count
        scale = (m2 / n).sqrt()
        for row, columns in layout.module_slices:
            rms = scale[row, columns].square().mean().sqrt()
            scale[row, columns] = scale[row, columns].clamp(min=float(rms) * floor)
        scale[scale == 0] = 1.0  # padding, and modules that never moved
        self.mean.copy_(mean.float())
        self.scale.copy_(scale.float())

    def fit_directions(self, updates_KLd: Tensor, kinds: Sequence[Hashable]) -> None:
        """Set directions and weights from training updates and the kind of each, after `fit`.

        The directions are principal components of the kinds' means; z has mean square 1 over these and coordinates.

        Raises:
            UserError: there are no kinds that differ.
        """
        z_KP = ((updates_KLd - self.mean) / self.scale).flatten(1)
        known = list(dict.fromkeys(kinds))
        of_kind_CK = torch.tensor([[float(kind == one) for kind in kinds] for one in known])
        means_CP = of_kind_CK @ z_KP / of_kind_CK.sum(1, keepdim=True)
        _, size_R, right_RP = torch.linalg.svd(means_CP - means_CP.mean(0), full_matrices=False)
        R = min(self.rank, int((size_R > 1e-6 * z_KP.norm() / len(z_KP) ** 0.5).sum()))
        if not R:
            raise UserError("input_rank needs shadows of several tasks, domains or learning mechanisms; set it to 0")
        self.directions_RP[:R] = right_RP[:R]
        rms_R = size_R[:R] / len(known) ** 0.5
        self.gain_R[:R] = (z_KP.shape[1] / R) ** 0.5 / rms_R

    def forward(self, update: Tensor) -> Tensor:
        """Update to z."""
        z: Tensor = (update - self.mean) / self.scale
        if self.rank:
            z = ((z.flatten(-2) @ self.directions_RP.T * self.gain_R) @ self.directions_RP).view_as(z)
        return z

    def inverse(self, z: Tensor) -> Tensor:
        """z to update, as far as z was not projected."""
        if self.rank:
            y = torch.where(self.gain_R > 0, z.flatten(-2) @ self.directions_RP.T / self.gain_R, 0.0)
            z = (y @ self.directions_RP).view_as(z)
        return self.mean + self.scale * z
