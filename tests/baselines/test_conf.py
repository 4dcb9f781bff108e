"""Conf against Eq. 47 written out, and in the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gt_ray.baselines.conf import Conf, conf_loss, confident_half, own_cross_entropy, share
from gt_ray.baselines.distributions import Distributions, SoftSample, likeliest, weak_cross_entropy
from gt_ray.baselines.vissup import VisSup
from gt_ray.config import FineTuneSettings, ModelSettings
from gt_ray.learning.engine import Engine, FineTuned, MechanismMaker
from gt_ray.learning.mechanisms.base import Step
from gt_ray.learning.samples import TrainingSet
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import make_root

SETTINGS = ModelSettings(model="embedded:llm", dtype="float32")
TUNE = FineTuneSettings(steps=5, learning_rate=5e-3, batch_size=3)
n, V = 9, 11


def logits_of(seed: int, rows: int = n) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def soft_sets(G: int, rows: int = 5) -> list[TrainingSet]:
    """Ragged samples with random weak distributions of 4 tokens."""
    generator = torch.Generator().manual_seed(G)

    def sample() -> SoftSample:
        prompt, target = (int(length) for length in torch.randint(1, 9, (2,), generator=generator))
        tokens = torch.randint(10, 700, (prompt + target,), generator=generator)
        ids, log_p = likeliest(2 * torch.randn(target, 700, generator=generator), 4, 1.0)
        weak = Distributions(tokens[prompt:].numpy(), ids.numpy().astype(np.int32), log_p.numpy())
        return SoftSample(tokens[:prompt].tolist(), tokens[prompt:].tolist(), weak)

    return [TrainingSet([sample() for _ in range(rows)], g, name=f"client {g}") for g in range(G)]


def updates(engine: Engine, sets: list[TrainingSet], make: MechanismMaker) -> list[torch.Tensor]:
    found = dict(engine.fine_tune(sets, TUNE, mechanism=make))
    kept = []
    for g in range(len(sets)):
        one = found[g]
        assert isinstance(one, FineTuned), one
        kept.append(one.snapshots_JLd[-1])
    return kept


def test_the_loss_is_eq_47_token_by_token() -> None:
    strong, weak, a = logits_of(0), logits_of(1), 0.3
    weak_n = weak_cross_entropy(strong, *likeliest(weak, V, 1.0))
    own_n = own_cross_entropy(strong)
    exceeds_n = confident_half(own_n, torch.zeros(n, dtype=torch.long), 1)
    found_n = conf_loss(weak_n, own_n, exceeds_n, a)
    confidences = sorted((float(strong[i].softmax(-1).max()) for i in range(n)), reverse=True)
    t = confidences[n // 2]  # n // 2 tokens exceed it
    for i in range(n):
        f, f_w = strong[i].softmax(-1), weak[i].softmax(-1)
        cross = -sum(float(f_w[v]) * float(f[v].log()) for v in range(V))
        best = max(range(V), key=lambda v, f=f: float(f[v]))  # type: ignore[misc]
        hardened = [float(v == best and float(f[v]) > t) for v in range(V)]
        own = -sum(hardened[v] * float(f[v].log()) for v in range(V))
        assert abs(float(found_n[i]) - ((1 - a) * cross + a * own)) < 1e-5


def test_exactly_half_of_an_adapters_tokens_exceed_the_threshold() -> None:
    own_n = own_cross_entropy(logits_of(0, 21))
    own_n[3] = own_n[4] = own_n[5] = 0.0  # ties
    adapter_n = torch.tensor([0] * 6 + [1] * 15)
    exceeds_n = confident_half(own_n, adapter_n, 2)
    assert exceeds_n[:6].sum() == 3 and exceeds_n[6:].sum() == 7
    for part in (slice(0, 6), slice(6, 21)):
        assert own_n[part][exceeds_n[part]].max() <= own_n[part][~exceeds_n[part]].min()
    equal_n = torch.ones(8)
    assert confident_half(equal_n, torch.zeros(8, dtype=torch.long), 1).tolist() == [True] * 4 + [False] * 4


def test_the_share_grows_from_nothing_over_a_fifth_of_the_steps() -> None:
    found = [share(0.5, 0.2, step, 100) for step in (0, 5, 10, 20, 21, 99)]
    assert found == pytest.approx([0, 0.125, 0.25, 0.5, 0.5, 0.5])
    assert share(0.5, 0.0, 0, 100) == 0.5


def test_no_gradient_goes_through_hard_labels() -> None:
    strong = logits_of(0).requires_grad_()
    (found,) = torch.autograd.grad(own_cross_entropy(strong).sum(), strong)
    one_hot = torch.nn.functional.one_hot(strong.argmax(-1), V)
    torch.testing.assert_close(found, strong.softmax(-1).detach() - one_hot)


@pytest.mark.parametrize("make", [Conf, VisSup])
def test_stacked_adapters_give_what_each_gives_alone(make: MechanismMaker) -> None:
    engine = Engine(load_model(SETTINGS), make_root(SETTINGS), 2)
    sets = soft_sets(2)
    together = updates(engine, sets, make)
    alone = [updates(engine, [one], make)[0] for one in sets]
    for one, other in zip(together, alone, strict=True):
        assert one.norm() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [Conf, VisSup])
def test_a_batch_in_pieces_gives_the_same_loss_and_gradients(make: MechanismMaker) -> None:
    root = make_root(SETTINGS)
    engine, sets = Engine(load_model(SETTINGS), root), soft_sets(2, rows=6)
    mechanism, found = make(TUNE.model_copy(update={"clip_norm": 1e6}), sets), []
    for pieces in (1, 3):
        with engine.losses.short_cuts(), stacked(engine.model, root, G=2) as parameters:
            batch, trained = [one.samples for one in sets], list(parameters.values())
            loss_G = mechanism.gradients(engine.losses, Step(4, trained, [0, 1], batch, pieces, [1.0, 1.0]))
            gradients = [one.grad.flatten() for one in trained if one.grad is not None]
            found.append((loss_G, torch.cat(gradients)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_batch_of_the_engine_has_the_loss_of_the_whole_model() -> None:
    root, model = make_root(SETTINGS), load_model(SETTINGS)
    engine, (one,) = Engine(model, root), soft_sets(1)
    with engine.losses.short_cuts(), stacked(model, root, G=1) as parameters:
        trained = list(parameters.values())
        mechanism = Conf(TUNE, [one], alpha=0.4, warmup=0.0)
        (loss,) = mechanism.gradients(engine.losses, Step(0, trained, [0], [one.samples], 1, [1.0]))
    weak, own = [], []
    with torch.no_grad():
        for sample in one.samples:
            assert isinstance(sample, SoftSample)
            logits = model(torch.tensor([sample.prompt + sample.target])).logits[0, len(sample.prompt) - 1 : -1]
            ids, log_p = torch.from_numpy(sample.weak.ids_nk).long(), torch.from_numpy(sample.weak.log_p_nk)
            weak.append(weak_cross_entropy(logits, ids, log_p))
            own.append(own_cross_entropy(logits))
    own_n = torch.cat(own)
    exceeds_n = confident_half(own_n, torch.zeros(len(own_n), dtype=torch.long), 1)
    expected_n = conf_loss(torch.cat(weak), own_n, exceeds_n, 0.4)
    assert float(loss) == pytest.approx(float(expected_n.mean()), rel=1e-4)
