"""The linear path against ridge regression in closed form."""

from __future__ import annotations

import pytest
import torch

from gt_ray.grad_transformer import linear
from gt_ray.grad_transformer.linear import PENALTIES, LinearPath


def shadows(K: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(K, 30, generator=generator) + 0.3
    weights = torch.randn(30, 12, generator=torch.Generator().manual_seed(9))
    return S, S @ weights + 0.5 * torch.randn(K, 12, generator=generator) + 1


def closed_form(S: torch.Tensor, T: torch.Tensor, inputs: torch.Tensor, penalty: float) -> torch.Tensor:
    """Ridge regression in its primal form with an intercept, in float64."""
    x, y, new = S.double(), T.double(), inputs.double()
    centred = x - x.mean(0)
    ridge = penalty / 100 * (centred @ centred.T).diagonal().mean() * torch.eye(x.shape[1])
    weights = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - y.mean(0)))
    return y.mean(0) + (new - x.mean(0)) @ weights


@pytest.mark.parametrize("columns", [5, 65_536])
def test_it_starts_as_ridge_regression_with_the_penalty_that_validates_best(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "COLUMNS", columns)
    (S, T), validation, (new, _) = shadows(12, 0), shadows(8, 1), shadows(5, 2)
    path = LinearPath(30, 12, rank=11)
    penalty = path.fit(S, T, validation)
    errors = {p: float((closed_form(S, T, validation[0], p) - validation[1]).square().mean()) for p in PENALTIES}
    assert penalty == min(errors, key=errors.__getitem__)
    torch.testing.assert_close(path(new).double(), closed_form(S, T, new, penalty), rtol=1e-3, atol=1e-3)


def test_a_lower_rank_keeps_the_leading_components_and_more_than_there_are_changes_nothing() -> None:
    (S, T), validation = shadows(12, 0), shadows(8, 1)
    low, full, more = (LinearPath(30, 12, rank) for rank in (2, 11, 20))
    for path in (low, full, more):
        path.fit(S, T, validation)
    assert torch.linalg.matrix_rank(low(S) - low(S).mean(0)) == 2
    torch.testing.assert_close(full(S), more(S), rtol=1e-4, atol=1e-4)


def test_shadows_that_are_all_alike_give_the_mean() -> None:
    S, T = torch.ones(4, 30), torch.full((4, 12), 2.0)
    path = LinearPath(30, 12, rank=3)
    path.fit(S, T, (S, T))
    torch.testing.assert_close(path(S), T)
