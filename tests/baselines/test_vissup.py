"""VisSup against Eqs. 48 and 49 written out; in the engine it is tested with Conf."""

from __future__ import annotations

from math import exp, log

import torch

from gt_ray.baselines.distributions import likeliest
from gt_ray.baselines.vissup import own_share, vissup_loss

n, V, T = 7, 11, 2.0


def logits_of(seed: int) -> torch.Tensor:
    return 3 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_eq_48_token_by_token() -> None:
    strong, weak = logits_of(0), logits_of(1)
    written_n = weak.argmax(-1)
    found_n = vissup_loss(strong, written_n, *likeliest(weak, V, T), T)
    for i in range(n):
        f = [float(p) for p in strong[i].softmax(-1)]
        soft, soft_w = ([float(p) for p in (logits[i] / T).softmax(-1)] for logits in (strong, weak))
        own, of_weak = -log(max(f)), -log(f[int(written_n[i])])
        b = exp(own) / (exp(own) + exp(of_weak))
        cross = -sum(soft_w[v] * log(soft[v]) for v in range(V))
        assert abs(float(found_n[i]) - ((1 - b) * T**2 * cross + b * own)) < 1e-4


def test_the_own_share_is_a_half_where_both_agree_and_falls_as_they_differ() -> None:
    strong = torch.zeros(4, V)
    strong[:, 0] = torch.tensor([5.0, 1.0, 5.0, 20.0])
    b = own_share(strong, torch.tensor([0, 1, 1, 1]))
    assert float(b[0]) == 0.5 and bool((b > 0).all()) and bool((b <= 0.5).all())
    assert b[1] > b[2] > b[3]


def test_no_gradient_goes_through_share_and_hard_labels() -> None:
    strong, (ids, log_p) = logits_of(0).requires_grad_(), likeliest(logits_of(1), V, T)
    written_n = ids[:, 0]
    (found,) = torch.autograd.grad(vissup_loss(strong, written_n, ids, log_p, T).sum(), strong)
    with torch.no_grad():
        b = own_share(strong, written_n)[:, None]
        weak = T * ((strong / T).softmax(-1) - torch.zeros(n, V).scatter(1, ids, log_p.exp()))
        own = strong.softmax(-1) - torch.nn.functional.one_hot(strong.argmax(-1), V)
    torch.testing.assert_close(found, (1 - b) * weak + b * own, rtol=1e-4, atol=1e-5)
