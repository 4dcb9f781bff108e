"""Weak distributions against the whole softmax, token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gt_ray.baselines.distributions import (
    distributions_of,
    likeliest,
    read_distributions,
    weak_cross_entropy,
    write_distributions,
)
from gt_ray.config import ModelSettings
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.samples import Sample
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import make_root

TINYLM = ModelSettings(model="embedded:tinylm", dtype="float32")
n, V = 6, 11


def random_logits(seed: int, rows: int = n) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def test_with_all_tokens_it_is_the_whole_cross_entropy() -> None:
    strong, weak = random_logits(0), random_logits(1)
    for temperature in (1.0, 2.0):
        found_n = weak_cross_entropy(strong, *likeliest(weak, V, temperature), temperature)
        for i in range(n):
            f, f_w = ((logits[i] / temperature).softmax(-1) for logits in (strong, weak))
            expected = -sum(float(f_w[v]) * float(f[v].log()) for v in range(V))
            assert abs(float(found_n[i]) - expected) < 1e-5


def test_with_fewer_the_others_are_one_class() -> None:
    strong, weak = random_logits(0), random_logits(1)
    found_n = weak_cross_entropy(strong, *likeliest(weak, 3, 1.0))
    for i in range(n):
        f, f_w = strong[i].softmax(-1), weak[i].softmax(-1)
        kept = sorted(range(V), key=lambda v: -float(f_w[v]))[:3]
        rest, rest_w = (1 - sum(float(one[v]) for v in kept) for one in (f, f_w))
        expected = -sum(float(f_w[v]) * float(f[v].log()) for v in kept) - rest_w * float(np.log(rest))
        assert abs(float(found_n[i]) - expected) < 1e-5


def test_its_gradient_spreads_the_rest_as_the_strong_model_does() -> None:
    strong, (ids, log_p) = random_logits(0).requires_grad_(), likeliest(random_logits(1), 3, 1.0)
    (found,) = torch.autograd.grad(weak_cross_entropy(strong, ids, log_p).sum(), strong)
    others = strong.detach().scatter(1, ids, -torch.inf).softmax(-1)
    target = (others * (1 - log_p.exp().sum(-1, keepdim=True))).scatter(1, ids, log_p.exp())
    (expected,) = torch.autograd.grad(-(target * strong.log_softmax(-1)).sum(), strong)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_strong_model_that_is_sure_of_a_kept_token_has_finite_gradients() -> None:
    strong = torch.zeros(1, V)
    strong[0, 0] = 200.0
    strong.requires_grad_()
    loss = weak_cross_entropy(strong, *likeliest(torch.zeros(1, V), 2, 1.0)).sum()
    loss.backward()
    assert torch.isfinite(loss) and strong.grad is not None and torch.isfinite(strong.grad).all()


def test_distributions_are_the_models_own_row_by_row(tmp_path: Path) -> None:
    root, model = make_root(TINYLM), load_model(TINYLM)
    generator = torch.Generator().manual_seed(0)
    update_Ld = 0.1 * torch.randn(root.layout.L, root.layout.d, generator=generator)
    samples = [Sample(list(range(10, 10 + length)), [20, 30, 40][: 1 + length % 3]) for length in (9, 3, 4)]
    found = distributions_of(TargetLosses(model, root), root, update_Ld, samples, 5, 2.0, 700)
    with stacked(model, root, G=1) as parameters, torch.no_grad():
        add_updates(parameters, root.layout, update_Ld[None])
        for sample, one in zip(samples, found, strict=True):
            assert one.target_n.tolist() == sample.target
            logits = model(torch.tensor([sample.prompt + sample.target])).logits[0, len(sample.prompt) - 1 : -1, :700]
            log_p, ids = (logits / 2).log_softmax(-1).sort(descending=True)
            assert np.array_equal(one.ids_nk, ids[:, :5])
            np.testing.assert_allclose(one.log_p_nk, log_p[:, :5], atol=1e-4)
    file = tmp_path / "one.safetensors"
    write_distributions(file, found)
    again = read_distributions(file)
    assert again is not None
    for one, other in zip(found, again, strict=True):
        for name in ("target_n", "ids_nk", "log_p_nk"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert read_distributions(file) is None and read_distributions(tmp_path / "none") is None
