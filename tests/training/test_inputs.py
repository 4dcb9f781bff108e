"""Inputs of the behaviour loss."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from gt_ray.config import BehaviourSettings
from gt_ray.training.behaviour import Draw
from gt_ray.training.inputs import LARGEST_SCALE, Inputs, noisy
from gt_ray.updates.pooling import pool

TASK = [0] * 6 + [1] * 6
DOMAIN = ["a", "a", "a", "b", "b", "a+b"] * 2


def drawn(inputs: Inputs, G: int, seed: int = 0, **settings: float | str) -> tuple[Tensor, list[Draw]]:
    return inputs.draw(G, BehaviourSettings.model_validate(settings), random.Random(seed))


def one_hot() -> Inputs:
    """Updates that tell the weights of the shadows in what is drawn."""
    return Inputs(torch.eye(12)[:, None], TASK, [(domain, "sft") for domain in DOMAIN], [100 + k for k in range(12)])


def test_inputs_are_weights_of_shadows_of_one_task_that_sum_to_one_and_rows_are_of_them() -> None:
    updates, draws = drawn(one_hot(), 300, rows=4)
    assert updates.shape == (300, 1, 12) and all(len(draw) == 4 for draw in draws)
    for weights, draw in zip(updates[:, 0], draws, strict=True):
        assert 1 - 1e-5 < float(weights.sum()) < LARGEST_SCALE + 1e-5
        (task,) = {TASK[int(k)] for k in weights.nonzero()[:, 0]}
        assert all(TASK[shadow - 100] == task and row >= 0 for shadow, row in draw)
    domains = Counter(DOMAIN[shadow - 100] for draw in draws for shadow, _ in draw)
    assert domains.keys() == {"a", "b", "a+b"}


def test_a_new_shadow_of_a_kind_has_its_mean_and_the_noise_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(400, 1, 50, generator=generator) + 3
    inputs = Inputs(known, [0] * 400, [("a", "sft")] * 400, list(range(400)))
    updates, _ = drawn(inputs, 2000, rows=1, mix=0)
    as_they_are = updates[updates.mean((1, 2)) < 3.5]
    assert 1200 < len(as_they_are) < 1700  # the others were made larger
    assert abs(float(as_they_are.mean()) - 3) < 0.1 and abs(float(as_they_are.std()) - 1) < 0.1
    assert not any(torch.equal(update, shadow) for update in updates[:20] for shadow in known)


def test_few_shadows_without_mixtures_are_taken_as_they_are() -> None:
    updates, draws = drawn(Inputs(torch.eye(2)[:, None], [0, 1], [("", "sft")] * 2, [0, 1]), 20, rows=2, mix=0)
    for update, draw in zip(updates[:, 0], draws, strict=True):
        assert (update > 0).sum() == 1 and {k for k, _ in draw} == {int(update.argmax())}


def test_the_order_of_batches_does_not_matter() -> None:
    parts = [
        {"S": torch.eye(12)[k : k + 1, None], "task": torch.tensor([TASK[k]]), "shadow": torch.tensor([k])}
        for k in range(12)
    ]
    kinds = [(domain, "sft") for domain in DOMAIN]
    first, other = (drawn(Inputs.of(batches, kinds), 9, seed=1, rows=3) for batches in (parts, parts[::-1]))
    assert torch.equal(first[0], other[0]) and first[1] == other[1]


def test_shadows_of_different_mechanisms_are_different_kinds() -> None:
    """Their noise differs, so that an update made of both would be like neither."""
    kinds = [("a", "sft")] * 3 + [("a", "epsilon 1")] * 3
    updates, _ = drawn(Inputs(torch.eye(6)[:, None], [0] * 6, kinds, list(range(6))), 60, mix=0)
    assert all((weights[:3] == 0).all() or (weights[3:] == 0).all() for weights in updates[:, 0])


def test_half_of_the_inputs_get_noise_as_means_of_private_clients_have_it() -> None:
    known = torch.ones(2, 4, 2000)
    known[:, ::2] = -1
    inputs = Inputs(5 * known, [0, 0], [("", "sft")] * 2, [0, 1])
    drawn_GLd, _ = drawn(inputs, 400, rows=1, mix=0, noise=3, noise_shrinks=False)
    noise_GLd = drawn_GLd - (drawn_GLd * known[0]).mean((1, 2), keepdim=True) * known[0]
    deviation_G = noise_GLd.square().mean((1, 2)).sqrt() / 5  # evenly up to 3, over the root of 1 to 5 clients
    assert 0.4 < float((deviation_G > 1e-3).float().mean()) < 0.6 and 2.0 < float(deviation_G.max()) < 3.1
    expected = 1.5 * sum(n**-0.5 for n in range(1, 6)) / 5
    assert float(deviation_G[deviation_G > 1e-3].mean()) == pytest.approx(expected, rel=0.15)
    shrunk_Ld = noisy(5 * known[0], 3.0, 2.0, 1, True, seed=0)
    torch.testing.assert_close(shrunk_Ld, noisy(5 * known[0], 3.0, 2.0, 1, False, seed=0) / (1 + 25) ** 0.5)


def test_means_over_tasks_have_rows_of_all_of_them() -> None:
    updates, draws = drawn(one_hot(), 100, rows=12, across=1.0)
    for weights, rows in zip(updates[:, 0], draws, strict=True):
        of_tasks = weights[:6].sum(), weights[6:].sum()
        torch.testing.assert_close(of_tasks[0], of_tasks[1])
        assert len({TASK[shadow - 100] for shadow, _ in rows}) == 2 or len(rows) < 12


def test_sums_over_tasks_are_what_pooling_by_sum_makes_of_clients() -> None:
    inputs = one_hot()
    means, draws = drawn(inputs, 50, across=1.0)
    sums, same = drawn(inputs, 50, across=1.0, across_pooling="sum")
    assert draws == same
    for mean_Ld, sum_Ld in zip(means, sums, strict=True):  # of two tasks: mu + (a - mu) + (b - mu)
        scale = mean_Ld.sum()  # of inputs that are made larger, as their weights sum up to it
        pooled_Ld = pool(torch.stack([2 * mean_Ld / scale, torch.zeros_like(mean_Ld)]), "sum", inputs.mean_Ld)
        assert torch.allclose(sum_Ld, scale * pooled_Ld, atol=1e-6)
