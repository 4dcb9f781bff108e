"""Controls: predictors of the T update without a Grad-Transformer, from the same shadows.

A new control is one function with the signature of `Control` and one line in `CONTROLS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LAMBDAS = tuple(10.0**power for power in range(-3, 5))


@dataclass
class ShadowSet:
    """Last updates of the shadows: S [K, L_S, d_S], T [K, L_T, d_T], standardised S, and what each shadow is about."""

    S_KLd: Tensor
    T_KLd: Tensor
    z_S_KP: Tensor
    tasks: list[str]
    domains: list[str]

    def of_task(self, task: str) -> list[int]:
        """Positions of the shadows of a task; of all where there is none of it."""
        return [k for k, name in enumerate(self.tasks) if name == task] or list(range(len(self.tasks)))


@dataclass
class Shadows:
    """Training and validation shadows, and what the controls fit on them once."""

    training: ShadowSet
    validation: ShadowSet

    @cached_property
    def ridge(self) -> Ridge:
        """Ridge regression with the penalty that predicts the validation shadows best."""

        def error(ridge: Ridge) -> float:
            known = self.validation
            return float((ridge(known.z_S_KP) - known.T_KLd.flatten(1)).square().mean())

        return min((Ridge(self.training, penalty) for penalty in LAMBDAS), key=error)


class Ridge:
    """Linear ridge regression from flattened standardised S updates to T updates, in its dual form.

    Args:
        penalty: lambda, in percent of the mean diagonal of the kernel matrix.
    """

    def __init__(self, shadows: ShadowSet, penalty: float) -> None:
        self.penalty = penalty
        self.x_KP = shadows.z_S_KP
        targets_KQ = shadows.T_KLd.flatten(1)
        self.mean_x, self.mean_y = self.x_KP.mean(0), targets_KQ.mean(0)
        centred = self.x_KP - self.mean_x
        kernel_KK = centred @ centred.T
        ridge_KK = penalty * kernel_KK.diagonal().mean().clamp(min=1e-12) / 100 * torch.eye(len(kernel_KK))
        self.weights_KQ = torch.linalg.solve(kernel_KK + ridge_KK, targets_KQ - self.mean_y)

    def __call__(self, z_S_NP: Tensor) -> Tensor:
        """Predicted T updates [N, Q] of standardised S updates [N, P]."""
        predicted: Tensor = self.mean_y + (z_S_NP - self.mean_x) @ (self.x_KP - self.mean_x).T @ self.weights_KQ
        return predicted


Control = Callable[[Shadows, Tensor, str], Tensor]
"""(shadows, standardised flattened S update [P] of the client, its task) -> T update [L_T, d_T]."""


def mean_update(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """The mean T update of the shadows of the client's task."""
    return shadows.training.T_KLd[shadows.training.of_task(task)].mean(0)


def domain_mean(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """The mean T update of the domain of the client's task whose mean S update is nearest to the client's."""
    known = shadows.training
    members: dict[str, list[int]] = {}
    for k in known.of_task(task):
        members.setdefault(known.domains[k], []).append(k)
    nearest = min(members.values(), key=lambda ks: float((known.z_S_KP[ks].mean(0) - z_S_P).norm()))
    return known.T_KLd[nearest].mean(0)


def nearest_shadow(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """The T update of the shadow whose S update is closest to the client's."""
    return shadows.training.T_KLd[int((shadows.training.z_S_KP - z_S_P).norm(dim=1).argmin())]


def ridge(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """Linear ridge regression; the penalty by validation shadows."""
    return shadows.ridge(z_S_P[None])[0].view(shadows.training.T_KLd.shape[1:])


CONTROLS: dict[str, Control] = {
    "mean_update": mean_update,
    "domain_mean": domain_mean,
    "nearest_shadow": nearest_shadow,
    "ridge": ridge,
}
