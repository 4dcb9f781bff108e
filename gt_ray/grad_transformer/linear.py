"""The linear path: a linear map beside phi, which starts as ridge regression and leaves phi the residual.

    z_T = up^T down^T z_S + b          down [P, R], up [R, Q], b [Q]

`down` starts as the R leading principal components of the training inputs, `up` and `b` as the ridge solution in
them, with the penalty that predicts the validation shadows best. With R = K - 1 this is exactly ridge regression on K
shadows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PENALTIES = tuple(10.0**power for power in range(-3, 5))
"""Ridge penalties that are tried, in percent of the mean diagonal of the kernel matrix."""
COLUMNS = 65_536
"""Outputs that are solved for together."""


class LinearPath(nn.Module):
    """Standardised parameters of S updates [N, P] to those of T updates [N, Q].

    Args:
        rank: R.
    """

    def __init__(self, P: int, Q: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Parameter(torch.zeros(P, rank))
        self.up = nn.Parameter(torch.zeros(rank, Q))
        self.bias = nn.Parameter(torch.zeros(Q))

    def forward(self, z_S_NP: Tensor) -> Tensor:
        """The linear prediction [N, Q]."""
        with torch.autocast(z_S_NP.device.type, enabled=False):  # ridge regression is more exact than bf16
            y_NQ: Tensor = z_S_NP.to(self.down.dtype) @ self.down @ self.up + self.bias
        return y_NQ

    @torch.no_grad()
    def fit(self, z_S_KP: Tensor, y_KQ: Tensor, validation: tuple[Tensor, Tensor]) -> float:
        """Start as ridge regression on K shadows; returns the penalty, chosen by the validation shadows.

        Args:
            validation: standardised S and T updates of the validation shadows.
        """
        x_KP = z_S_KP.double()
        mean_x = x_KP.mean(0)
        left_KR, scale_R, right_RP = torch.linalg.svd(x_KP - mean_x, full_matrices=False)
        total, R = float(scale_R.square().sum()), self.rank
        unit = max(1e-12, total / len(x_KP) / 100)
        left_KR, scale_R, right_RP = left_KR[:, :R], scale_R[:R], right_RP[:R]
        held_out_VR = (validation[0].double() - mean_x) @ right_RP.T
        target_VQ = validation[1]

        def known(columns: slice) -> tuple[Tensor, Tensor]:
            part_KQ = y_KQ[:, columns].double()
            mean_Q = part_KQ.mean(0)
            return left_KR.T @ (part_KQ - mean_Q), mean_Q

        def solve(known_RQ: Tensor, penalty: float) -> Tensor:
            up_RQ: Tensor = (scale_R / (scale_R.square() + penalty * unit))[:, None] * known_RQ
            return up_RQ

        # A part of the outputs at a time, for all of them in double precision would be gigabytes for a large LLM.
        parts = [slice(first, first + COLUMNS) for first in range(0, y_KQ.shape[1], COLUMNS)]
        errors = dict.fromkeys(PENALTIES, 0.0)
        for columns in parts:
            known_RQ, mean_Q = known(columns)
            for penalty in PENALTIES:
                predicted_VQ = held_out_VR @ solve(known_RQ, penalty) + mean_Q
                errors[penalty] += float((predicted_VQ - target_VQ[:, columns]).square().sum())
        best = min(PENALTIES, key=errors.__getitem__)
        r = len(scale_R)
        # Inputs of `up` have mean square 1 over all components, so that the optimizer's steps suit them.
        size = max(1e-12, total / len(x_KP) / r) ** 0.5
        self.down[:, :r] = (right_RP.T / size).float()
        for columns in parts:
            known_RQ, mean_Q = known(columns)
            up_RQ = solve(known_RQ, best)
            self.up[:r, columns] = (up_RQ * size).float()
            self.bias[columns] = (mean_Q - mean_x @ right_RP.T @ up_RQ).float()
        return best
