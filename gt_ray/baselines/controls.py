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
    """Last updates of the shadows: T [K, L_T, d_T], flattened standardised S [K, P], and what each shadow is about."""

    T_KLd: Tensor
    z_S_KP: Tensor
    tasks: list[str]
    domains: list[str]

    def of_task(self, task: str) -> list[int]:
        """Positions of the shadows of a task; of all where there is none of it."""
        return [k for k, name in enumerate(self.tasks) if name == task] or list(range(len(self.tasks)))

    def by_domain(self, task: str) -> dict[str, list[int]]:
        """Positions of the shadows of a task by domain."""
        members: dict[str, list[int]] = {}
        for k in self.of_task(task):
            members.setdefault(self.domains[k], []).append(k)
        return members


@dataclass
class Shadows:
    """Training and validation shadows, and what the controls fit on them once.

    Attributes:
        inputs: all training shadows of the TinyLM, those without an LLM update among them; T is empty.
    """

    training: ShadowSet
    validation: ShadowSet
    inputs: ShadowSet

    @cached_property
    def classifier(self) -> DomainClassifier:
        """The domain classifier with the penalty that names the domains of most validation shadows."""

        def errors(classifier: DomainClassifier) -> tuple[int, float]:
            known = self.validation
            found = [classifier(z_P, task) for z_P, task in zip(known.z_S_KP, known.tasks, strict=True)]
            return sum(a != b for a, b in zip(found, known.domains, strict=True)), classifier.penalty

        return min((DomainClassifier(self.inputs, penalty) for penalty in LAMBDAS), key=errors)

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


class DomainClassifier:
    """Linear discriminant analysis: the domain whose mean S update is nearest, in units of how domains vary within.

    Args:
        penalty: what is added to the variance of every direction, in percent of the mean variance of those that vary.
    """

    def __init__(self, shadows: ShadowSet, penalty: float) -> None:
        self.penalty = penalty
        self.means = {
            task: {domain: shadows.z_S_KP[ks].mean(0) for domain, ks in shadows.by_domain(task).items()}
            for task in dict.fromkeys(shadows.tasks)
        }
        centred_KP = torch.stack(
            [
                z_P - self.means[task][domain]
                for z_P, task, domain in zip(shadows.z_S_KP, shadows.tasks, shadows.domains, strict=True)
            ]
        )
        _, values_R, self.directions_RP = torch.linalg.svd(centred_KP, full_matrices=False)
        variance_R = values_R.square() / len(centred_KP)
        self.rest = float(penalty * variance_R.mean().clamp(min=1e-12) / 100)
        self.weight_R = 1 / (variance_R + self.rest) - 1 / self.rest

    def __call__(self, z_S_P: Tensor, task: str) -> str:
        """The most likely domain of a client of a task, or of any where no shadow has the task."""
        known = self.means.get(task) or {name: mean for one in self.means.values() for name, mean in one.items()}

        def distance(mean_P: Tensor) -> float:
            away_P = z_S_P - mean_P
            return float(away_P.square().sum() / self.rest + (self.weight_R * (self.directions_RP @ away_P) ** 2).sum())

        return min(known, key=lambda domain: distance(known[domain]))


Control = Callable[[Shadows, Tensor, str], Tensor]
"""(shadows, standardised flattened S update [P] of the client, its task) -> T update [L_T, d_T]."""


def mean_update(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """The mean T update of the shadows of the client's task."""
    return shadows.training.T_KLd[shadows.training.of_task(task)].mean(0)


def domain_mean(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """The mean T update of the domain of the client's task whose mean S update is nearest to the client's."""
    known = shadows.training
    nearest = min(known.by_domain(task).values(), key=lambda ks: float((known.z_S_KP[ks].mean(0) - z_S_P).norm()))
    return known.T_KLd[nearest].mean(0)


def nearest_shadow(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """The T update of the shadow whose S update is closest to the client's."""
    return shadows.training.T_KLd[int((shadows.training.z_S_KP - z_S_P).norm(dim=1).argmin())]


def ridge(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """Linear ridge regression; the penalty by validation shadows."""
    return shadows.ridge(z_S_P[None])[0].view(shadows.training.T_KLd.shape[1:])


def domain_classifier(shadows: Shadows, z_S_P: Tensor, task: str) -> Tensor:
    """The mean T update of the domain that linear discriminant analysis names."""
    return _of_domain(shadows, task, shadows.classifier(z_S_P, task))


def oracle_domain(shadows: Shadows, task: str, domain: str) -> Tensor | None:
    """The mean T update of a client's true domain, which nobody tells; none where no shadow has it."""
    return _of_domain(shadows, task, domain) if domain in shadows.training.by_domain(task) else None


def _of_domain(shadows: Shadows, task: str, domain: str) -> Tensor:
    known = shadows.training
    return known.T_KLd[known.by_domain(task).get(domain) or known.of_task(task)].mean(0)


CONTROLS: dict[str, Control] = {
    "mean_update": mean_update,
    "domain_mean": domain_mean,
    "domain_classifier": domain_classifier,
    "nearest_shadow": nearest_shadow,
    "ridge": ridge,
}
