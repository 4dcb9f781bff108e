"""DP-SGD: rows are drawn, clipped and covered with noise as the accountant is told."""

from __future__ import annotations

from pathlib import Path

import opacus
import peft
import pytest
import torch

from gt_ray.config import DpSgdSettings, FineTuneSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.learning.engine import Engine, FineTuned
from gt_ray.learning.mechanisms.base import Step
from gt_ray.learning.mechanisms.dp_sgd import DpSgd, clipped_sums
from gt_ray.learning.samples import Sample, TrainingSet
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import Root, make_root
from tests.learning.test_engine import sets

SMALL = 1e-3
"""Bound of a row's norm that every row of these tests exceeds."""


def dp(epsilon: float = 2.0, row_norm: float = 0.1, **changes: object) -> FineTuneSettings:
    mechanism = DpSgdSettings(epsilon=epsilon, row_norm=row_norm)
    return FineTuneSettings.model_validate(
        {"steps": 5, "learning_rate": 5e-3, "batch_size": 4, "mechanism": mechanism, **changes}
    )


@pytest.fixture(scope="module")
def settings(tiny_pair: tuple[Path, Path]) -> ModelSettings:
    return ModelSettings(model=str(tiny_pair[0]), dtype="float32")


@pytest.fixture(scope="module")
def root(settings: ModelSettings) -> Root:
    return make_root(settings)


@pytest.mark.parametrize("pieces", [1, 100, 10**6])
def test_clipped_sums_equal_a_loop_over_rows(pieces: int, settings: ModelSettings, root: Root) -> None:
    """Also of adapters with different numbers of rows, and of none; in one pass, in several, and row by row."""
    engine = Engine(load_model(settings), root)
    rows = sets(1, rows=5)[0].samples
    batch = [rows[:3], rows[3:], []]
    with engine.losses.short_cuts(), stacked(engine.model, root, 3) as parameters:
        trained = list(parameters.values())
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        loss_G = clipped_sums(engine.losses, trained, batch, SMALL, pieces)
        found = [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
        before = [parameter.detach().clone() for parameter in trained]
    expected = [torch.zeros_like(data) for data in before]
    for g, samples in enumerate(batch):
        for sample in samples:
            with engine.losses.short_cuts(), stacked(engine.model, root, 1) as parameters:
                for parameter, data in zip(parameters.values(), before, strict=True):
                    parameter.data.copy_(data[g : g + 1])
                total, count = engine.losses.by_adapter(engine.losses.batch([[sample]]), 1)
                (total / count).sum().backward()
                gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
                norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
                for one, gradient in zip(expected, gradients, strict=True):
                    one[g] += gradient[0] * min(1.0, SMALL / float(norm))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-4, atol=1e-8)
    assert loss_G[2] == 0 and (loss_G[:2] > 0).all()


def test_the_gradients_of_rows_are_those_of_opacus(settings: ModelSettings, root: Root) -> None:
    lora = root.lora
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    model = peft.get_peft_model(load_model(settings), config)
    state = {f"base_model.model.{name}.weight": tensor for name, tensor in root.initial.items()}
    peft.set_peft_model_state_dict(model, state)
    rows = [Sample([5, 6, 7, 8 + i], [3, 4]) for i in range(4)]
    hooked = opacus.GradSampleModule(model.train(), loss_reduction="sum")
    ids = torch.tensor([sample.prompt + sample.target for sample in rows])
    logits = hooked(input_ids=ids).logits[:, 3:5]
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 4:], reduction="none").mean(1).sum().backward()
    by_name = {
        name.removeprefix("_module.base_model.model.").replace(".default.weight", ""): parameter.grad_sample
        for name, parameter in hooked.named_parameters()
        if parameter.requires_grad
    }
    norm_B = torch.stack([sample.flatten(1).norm(dim=1) for sample in by_name.values()]).norm(dim=0)
    factor_B = (SMALL / norm_B).clamp(max=1)
    engine = Engine(load_model(settings), root)
    with engine.losses.short_cuts(), stacked(engine.model, root, 1) as parameters:
        clipped_sums(engine.losses, list(parameters.values()), [rows], SMALL)
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            expected = torch.einsum("b,b...->...", factor_B, by_name[name])
            torch.testing.assert_close(parameter.grad[0], expected, rtol=1e-4, atol=1e-9)


def test_noise_has_the_deviation_that_is_accounted_for(settings: ModelSettings, root: Root) -> None:
    """Over steps without any row: what is left is the noise, and its deviation is noise multiplier times bound."""
    tune = dp(epsilon=1.0, row_norm=0.5)
    data = sets(2, rows=12)
    mechanism = DpSgd(tune, data)
    engine = Engine(load_model(settings), root)
    drawn = []
    with stacked(engine.model, root, 2) as parameters:
        trained = list(parameters.values())
        for step in range(200):
            mechanism.gradients(engine.losses, Step(step, trained, [0, 1], [[], []], 1, [1.0, 1.0]))
            drawn.append(
                torch.cat([parameter.grad.flatten(1) for parameter in trained if parameter.grad is not None], 1)
            )
    noise_TGP = torch.stack(drawn) * tune.batch_size
    expected = mechanism.statement(tune, 12)["noise_multiplier"] * 0.5
    assert noise_TGP.std(dim=(0, 2)) == pytest.approx([expected] * 2, rel=0.02)
    assert float(noise_TGP.mean()) == pytest.approx(0, abs=0.02 * expected)
    correlated = torch.corrcoef(torch.stack([noise_TGP[0, 0], noise_TGP[1, 0], noise_TGP[0, 1]]))
    assert correlated.fill_diagonal_(0).abs().max() < 0.3  # neither steps nor clients share noise


def test_rows_are_drawn_by_poisson_sampling() -> None:
    """Each row by itself: batches differ in size, with a binomial's variance, and no row waits for the others."""
    tune = dp(batch_size=5)
    mechanism = DpSgd(tune, [TrainingSet([Sample([i], [i]) for i in range(20)], 3)])
    batches = [[sample.target[0] for sample in mechanism.draw(0, step)] for step in range(2000)]
    sizes = torch.tensor([float(len(batch)) for batch in batches])
    assert float(sizes.mean()) == pytest.approx(5, rel=0.05)
    assert float(sizes.var()) == pytest.approx(20 * 0.25 * 0.75, rel=0.15)
    first = torch.tensor([0.0 + (0 in batch) for batch in batches])
    second = torch.tensor([0.0 + (1 in batch) for batch in batches])
    assert float(first.mean()) == pytest.approx(0.25, abs=0.04)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.08
    assert all(len(set(batch)) == len(batch) for batch in batches)


def test_the_adapter_moves_and_each_client_is_as_if_it_were_alone(settings: ModelSettings, root: Root) -> None:
    engine = Engine(load_model(settings), root, adapters_at_once=2)
    data = sets(2, rows=9)
    together = dict(engine.fine_tune(data, dp()))
    ((_, alone),) = engine.fine_tune(data[1:], dp())
    assert isinstance(alone, FineTuned) and isinstance(together[1], FineTuned)
    assert float(alone.snapshots_JLd.abs().max()) > 1e-3
    torch.testing.assert_close(alone.snapshots_JLd, together[1].snapshots_JLd, rtol=1e-4, atol=1e-6)


def test_a_secret_seed_draws_other_rows_and_noise(settings: ModelSettings, root: Root) -> None:
    engine = Engine(load_model(settings), root)
    one = sets(1, rows=9)[0]
    results = [
        dict(engine.fine_tune([TrainingSet(one.samples, one.seed, noise_seed=seed)], dp()))[0] for seed in (None, 1, 2)
    ]
    updates = [result.snapshots_JLd for result in results if isinstance(result, FineTuned)]
    assert not any(torch.allclose(updates[i], updates[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_fewer_rows_than_a_batch_are_refused(settings: ModelSettings, root: Root) -> None:
    engine = Engine(load_model(settings), root)
    with pytest.raises(
        UserError, match="batches of 16 rows on average, but there are 7: lower batch_size to at most 7"
    ):
        list(engine.fine_tune(sets(1, rows=7), dp(batch_size=16)))


def test_the_statement_has_all_that_epsilon_follows_from() -> None:
    stated = DpSgd.statement(dp(epsilon=1.0, batch_size=4, steps=8), 16)
    assert stated.pop("noise_multiplier") > 0
    assert stated == {
        "name": "dp_sgd",
        "epsilon": 1.0,
        "delta": 1e-5,
        "sample_rate": 0.25,
        "steps": 8,
        "row_norm": 0.1,
        "accountant": "prv",
        "protects": "row",
    }


def test_a_noise_multiplier_promises_nothing(settings: ModelSettings, root: Root) -> None:
    """Of shadows, whose rows are public; without noise, clients are alike but for the rows that are drawn."""
    tune = FineTuneSettings.model_validate(
        {"steps": 3, "batch_size": 4, "mechanism": {"name": "dp_sgd", "noise_multiplier": 0.0}}
    )
    stated = DpSgd.statement(tune, 16)
    assert "epsilon" not in stated and stated["noise_multiplier"] == 0
    rows = sets(1, rows=4)[0].samples  # all of them are drawn
    data = [TrainingSet(rows, 0, noise_seed=seed) for seed in (1, 2)]
    results = dict(Engine(load_model(settings), root).fine_tune(data, tune))
    one, other = (result.snapshots_JLd for result in results.values() if isinstance(result, FineTuned))
    assert torch.equal(one, other) and float(one.abs().max()) > 0
    with pytest.raises(ValueError, match="give one of them"):
        DpSgdSettings(epsilon=1.0, noise_multiplier=2.0)


def test_plain_steps_add_up_all_noisy_gradients_alike(settings: ModelSettings, root: Root) -> None:
    """With a small rate, the update is the rate times the sum of the gradients at the root."""
    rate, steps, rows = 1e-4, 4, sets(1, rows=6)[0].samples
    mechanism = {"name": "dp_sgd", "noise_multiplier": 0.0, "optimizer": "sgd", "row_norm": SMALL}
    tune = FineTuneSettings.model_validate(
        {"steps": steps, "batch_size": 6, "learning_rate": rate, "weight_decay": 0.0, "mechanism": mechanism}
    )
    engine = Engine(load_model(settings), root)
    ((_, result),) = engine.fine_tune([TrainingSet(rows, 0)], tune)
    assert isinstance(result, FineTuned)
    with engine.losses.short_cuts(), stacked(engine.model, root, 1) as parameters:
        clipped_sums(engine.losses, list(parameters.values()), [rows], SMALL)
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    expected_Ld = root.layout.to_array({name: -rate * steps / 6 * grad[0] for name, grad in gradients.items()})
    torch.testing.assert_close(
        result.snapshots_JLd[-1], expected_Ld, rtol=0.02, atol=1e-3 * float(expected_Ld.abs().max())
    )
