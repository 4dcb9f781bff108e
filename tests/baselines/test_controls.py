"""Each control against an independent, slow calculation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gt_ray.baselines.controls import CONTROLS, LAMBDAS, DomainClassifier, Ridge, Shadows, ShadowSet, oracle_domain

TASKS = ["drop", "drop", "samsum", "drop", "samsum", "drop", "samsum", "drop"]
DOMAINS = ["north", "south", "north", "north", "south", "south", "north", "south"]
L_S, D_S, L_T, D_T = 2, 3, 3, 4


def shadow_set(K: int, seed: int, noise: float = 0.1) -> ShadowSet:
    """Shadows whose T update is a fixed linear map of their S update, and noise."""
    generator = torch.Generator().manual_seed(seed)
    S_KLd = torch.randn(K, L_S, D_S, generator=generator)
    linear_PQ = torch.randn(L_S * D_S, L_T * D_T, generator=torch.Generator().manual_seed(99))
    T_KQ = S_KLd.flatten(1) @ linear_PQ + 5 + noise * torch.randn(K, L_T * D_T, generator=generator)
    return ShadowSet(T_KQ.view(K, L_T, D_T), 2 * S_KLd.flatten(1), TASKS[:K], DOMAINS[:K])


ROOT_P = torch.zeros(L_S * D_S)
SHADOWS = Shadows(shadow_set(8, seed=0), shadow_set(5, seed=1), shadow_set(8, seed=0), ROOT_P)
CLIENT_P = torch.randn(L_S * D_S, generator=torch.Generator().manual_seed(2))


def distance(first: Tensor, second: Tensor) -> float:
    return math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(first, second, strict=True)))


def average(members: list[int]) -> Tensor:
    total = torch.zeros(L_T, D_T)
    for k in members:
        total += SHADOWS.training.T_KLd[k]
    return total / len(members)


def primal_ridge(shadows: ShadowSet, penalty: float, z_S_NP: Tensor) -> Tensor:
    """(X'X + lambda I) W = X'Y of centred data, in double precision; lambda in percent of the mean of diag(X X')."""
    x_KP, y_KQ = shadows.z_S_KP.double(), shadows.T_KLd.flatten(1).double()
    x_mean, y_mean = x_KP.mean(0), y_KQ.mean(0)
    x_KP, y_KQ = x_KP - x_mean, y_KQ - y_mean
    strength = penalty / 100 * float(sum(row @ row for row in x_KP)) / len(x_KP)
    W_PQ = torch.linalg.inv(x_KP.T @ x_KP + strength * torch.eye(x_KP.shape[1])) @ x_KP.T @ y_KQ
    predicted: Tensor = y_mean + (z_S_NP.double() - x_mean) @ W_PQ
    return predicted


@pytest.mark.parametrize(("task", "members"), [("drop", [0, 1, 3, 5, 7]), ("samsum", [2, 4, 6])])
def test_mean_update_is_the_mean_of_the_shadows_of_the_clients_task(task: str, members: list[int]) -> None:
    torch.testing.assert_close(CONTROLS["mean_update"](SHADOWS, CLIENT_P, task), average(members))


@pytest.mark.parametrize("task", ["drop", "samsum"])
@pytest.mark.parametrize("like", range(8))
def test_domain_mean_is_that_of_the_domain_of_the_task_whose_mean_s_update_is_nearest(task: str, like: int) -> None:
    client_P = SHADOWS.training.z_S_KP[like] + 0.1 * CLIENT_P
    members = {
        domain: [k for k in range(8) if TASKS[k] == task and DOMAINS[k] == domain] for domain in ("north", "south")
    }
    distances = {
        domain: distance(sum(SHADOWS.training.z_S_KP[k] for k in ks) / len(ks), client_P)  # type: ignore[arg-type]
        for domain, ks in members.items()
    }
    nearest = min(distances, key=lambda domain: distances[domain])
    torch.testing.assert_close(CONTROLS["domain_mean"](SHADOWS, client_P, task), average(members[nearest]))


def test_nearest_shadow_is_the_t_update_of_the_closest_s_update_of_any_task() -> None:
    distances = [distance(z_S_P, CLIENT_P) for z_S_P in SHADOWS.training.z_S_KP]
    nearest = min(range(8), key=lambda k: distances[k])
    for task in ("drop", "samsum"):
        assert torch.equal(CONTROLS["nearest_shadow"](SHADOWS, CLIENT_P, task), SHADOWS.training.T_KLd[nearest])
    for k in range(8):
        found = CONTROLS["nearest_shadow"](SHADOWS, SHADOWS.training.z_S_KP[k], "drop")
        assert torch.equal(found, SHADOWS.training.T_KLd[k])


@pytest.mark.parametrize("penalty", LAMBDAS)
@pytest.mark.parametrize("K", [3, 8])
def test_dual_ridge_equals_the_primal_closed_form(K: int, penalty: float) -> None:
    """K = 3 has fewer shadows than coordinates, K = 8 more."""
    shadows = shadow_set(K, seed=0)
    clients_NP = torch.stack([CLIENT_P, -CLIENT_P, shadows.z_S_KP[0]])
    found_NQ = Ridge(shadows, penalty)(clients_NP)
    torch.testing.assert_close(found_NQ.double(), primal_ridge(shadows, penalty, clients_NP), rtol=2e-3, atol=2e-3)


def test_ridge_takes_the_penalty_that_predicts_the_validation_shadows_best() -> None:
    errors = {}
    for penalty in LAMBDAS:
        predicted = primal_ridge(SHADOWS.training, penalty, SHADOWS.validation.z_S_KP)
        errors[penalty] = float((predicted - SHADOWS.validation.T_KLd.flatten(1)).square().mean())
    best = min(errors, key=lambda penalty: errors[penalty])
    assert SHADOWS.ridge.penalty == best
    expected = primal_ridge(SHADOWS.training, best, CLIENT_P[None]).view(L_T, D_T)
    torch.testing.assert_close(CONTROLS["ridge"](SHADOWS, CLIENT_P, "drop").double(), expected, rtol=2e-3, atol=2e-3)


def test_ridge_finds_a_linear_map_and_shrinks_to_the_mean_where_there_is_none() -> None:
    exact = shadow_set(8, seed=0, noise=0.0)
    linear = Shadows(exact, shadow_set(5, seed=1, noise=0.0), exact, ROOT_P)
    assert linear.ridge.penalty == min(LAMBDAS)
    torch.testing.assert_close(linear.ridge(exact.z_S_KP), exact.T_KLd.flatten(1), rtol=1e-2, atol=1e-2)
    generator = torch.Generator().manual_seed(3)
    unrelated = [shadow_set(K, seed=K) for K in (8, 5)]
    for shadows in unrelated:
        shadows.z_S_KP = torch.randn(shadows.z_S_KP.shape, generator=generator)
    assert Shadows(*unrelated, unrelated[0], ROOT_P).ridge.penalty > 1


def test_equal_or_single_shadows_predict_their_mean() -> None:
    for K in (1, 4):
        shadows = shadow_set(K, seed=0)
        shadows.z_S_KP = shadows.z_S_KP[:1].expand(K, -1)
        torch.testing.assert_close(Ridge(shadows, 1.0)(CLIENT_P[None])[0], shadows.T_KLd.flatten(1).mean(0))


def test_where_rows_name_no_domain_those_of_domains_are_the_mean_of_the_task() -> None:
    sets = [shadow_set(K, seed) for K, seed in ((8, 0), (5, 1), (8, 0))]
    for one in sets:
        one.domains = [""] * len(one.domains)
    for name in ("mean_update", "domain_mean", "domain_classifier"):
        predicted = CONTROLS[name](Shadows(*sets, ROOT_P), CLIENT_P, "samsum")
        torch.testing.assert_close(predicted, average([2, 4, 6]))


def test_a_task_that_no_shadow_has_falls_back_on_all_shadows() -> None:
    torch.testing.assert_close(CONTROLS["mean_update"](SHADOWS, CLIENT_P, "gsm8k"), average(list(range(8))))


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_predicts_a_t_update(name: str) -> None:
    found = CONTROLS[name](SHADOWS, CLIENT_P, "drop")
    assert found.shape == (L_T, D_T) and found.dtype == torch.float32 and bool(torch.isfinite(found).all())


def noisy_domains(K: int, seed: int) -> ShadowSet:
    """Shadows of two domains that differ a little in the first coordinate and vary a lot in the second."""
    generator = torch.Generator().manual_seed(seed)
    z_KP = torch.randn(K, 5, generator=generator) * torch.tensor([0.1, 10.0, 1.0, 1.0, 1.0])
    domains = ["north", "south"] * (K // 2)
    z_KP[::2, 0] += 1
    return ShadowSet(torch.arange(K)[:, None, None].float(), z_KP, ["drop"] * K, domains)


def test_the_classifier_is_linear_discriminant_analysis() -> None:
    shadows, new = noisy_domains(60, 0), noisy_domains(40, 1)
    root_P = torch.tensor([0.0, 0, 0, -30, 0])
    classifier = DomainClassifier(shadows, 1.0, root_P)
    means = {
        domain: shadows.z_S_KP[[k for k in range(60) if shadows.domains[k] == domain]].double().mean(0)
        for domain in ("north", "south")
    }
    within = torch.zeros(5, 5, dtype=torch.float64)
    for z_P, domain in zip(shadows.z_S_KP.double(), shadows.domains, strict=True):
        within += torch.outer(z_P - means[domain], z_P - means[domain]) / 60
    precision = torch.linalg.inv(within + 0.01 * within.diagonal().mean() * torch.eye(5))
    right = 0
    for z_P, domain in zip(new.z_S_KP, new.domains, strict=True):
        away_P, errors = (z_P - root_P).double(), {}
        for name, mean in means.items():
            lengths = [n / 1000 for n in range(4000)]
            rests = [away_P - length * (mean - root_P) for length in lengths]
            errors[name] = min(float(rest @ precision @ rest) for rest in rests)
        expected = min(errors, key=errors.__getitem__)
        assert classifier(z_P, "drop") == expected
        right += expected == domain
    assert right > 35


def test_domain_classifier_takes_the_mean_of_the_domain_that_it_names() -> None:
    training, validation = noisy_domains(60, 0), noisy_domains(40, 1)
    shadows = Shadows(training, validation, training, torch.tensor([0.0, 0, 0, -30, 0]))
    client_P = torch.tensor([1.0, 20.0, 0, 0, 0])  # of north, though nearer to any shadow with as large a second number
    found = CONTROLS["domain_classifier"](shadows, client_P, "drop")
    torch.testing.assert_close(found, training.T_KLd[::2].mean(0))
    torch.testing.assert_close(oracle_domain(shadows, "drop", "south"), training.T_KLd[1::2].mean(0))
    assert oracle_domain(shadows, "drop", "west") is None
