"""Supervised fine-tuning of several adapters at once."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from gt_ray.config import FineTuneSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.learning.samples import Sample
from gt_ray.learning.sft import IGNORE, _order, clip_per_adapter, collate, fine_tune
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import Root, make_root

SETTINGS = FineTuneSettings(steps=5, learning_rate=5e-3, batch_size=3, clip_norm=0.1)


def _datasets(G: int) -> list[list[Sample]]:
    generator = torch.Generator().manual_seed(G)

    def tokens(n: int) -> list[int]:
        return torch.randint(10, 800, (n,), generator=generator).tolist()

    return [[Sample(tokens(2 + i % 5), tokens(1 + (i + g) % 4)) for i in range(7)] for g in range(G)]


def _peft_run(
    settings: ModelSettings, root: Root, samples: list[Sample], seed: int, tune: FineTuneSettings
) -> torch.Tensor:
    """The same fine-tune as a user of PEFT would write it: one adapter, one optimizer."""
    lora = root.lora
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    model = peft.get_peft_model(load_model(settings), config)
    state = {f"base_model.model.{name}.weight": tensor for name, tensor in root.initial.items()}
    peft.set_peft_model_state_dict(model, state)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=tune.learning_rate, weight_decay=tune.weight_decay)
    order = _order(len(samples), seed, tune.steps * tune.batch_size)
    for step in range(tune.steps):
        optimizer.param_groups[0]["lr"] = tune.learning_rate * (1 - step / tune.steps)
        batch = [samples[i] for i in order[step * tune.batch_size : (step + 1) * tune.batch_size]]
        ids, labels = collate(batch, 0)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([len(sample) for sample in batch])[:, None]
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, tune.clip_norm)
        optimizer.step()
    tuned = peft.get_peft_model_state_dict(model)
    named = {name.removeprefix("base_model.model.").removesuffix(".weight"): tensor for name, tensor in tuned.items()}
    return root.layout.to_array(named) - root.layout.to_array(root.initial)


@pytest.mark.parametrize("G", [1, 3])
def test_a_group_equals_separate_runs_of_peft(tiny_pair: tuple[Path, Path], G: int) -> None:
    settings = ModelSettings(model=str(tiny_pair[1]), dtype="float32")
    root, datasets = make_root(settings), _datasets(G)
    together = fine_tune(load_model(settings), root, datasets, list(range(G)), SETTINGS)
    for g in range(G):
        alone = _peft_run(settings, root, datasets[g], g, SETTINGS)
        assert (together[g].snapshots_JLd[-1] - alone).norm() / alone.norm() < 1e-4
        assert len(together[g].losses) == SETTINGS.steps


def test_snapshots_count_steps_from_the_end(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[0]), dtype="float32")
    root, model = make_root(settings), load_model(settings)
    run = fine_tune(model, root, _datasets(1), [0], SETTINGS, snapshot_steps=(3, 1, 0))[0]
    assert run.snapshots_JLd.shape == (3, root.layout.L, root.layout.d)
    last = fine_tune(model, root, _datasets(1), [0], SETTINGS)[0]
    assert torch.equal(run.snapshots_JLd[-1], last.snapshots_JLd[-1])
    assert not torch.equal(run.snapshots_JLd[0], run.snapshots_JLd[1])


def test_fewer_steps_than_snapshots_is_an_error(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[0]), dtype="float32")
    with pytest.raises(UserError, match="fewer than the snapshots"):
        fine_tune(load_model(settings), make_root(settings), _datasets(1), [0], SETTINGS, snapshot_steps=(5, 0))


def test_an_empty_data_set_is_an_error(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[0]), dtype="float32")
    with pytest.raises(UserError, match="data set 1 of the group is empty"):
        fine_tune(load_model(settings), make_root(settings), [*_datasets(1), []], [0, 1], SETTINGS)


def test_a_diverged_run_is_an_error(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[0]), dtype="float32")
    wild = SETTINGS.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(UserError, match="diverged"):
        fine_tune(load_model(settings), make_root(settings), _datasets(1), [0], wild)


def test_clipping_is_per_adapter() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2, 2, 2))]
    gradients = [torch.tensor([[3.0, 0, 0], [0.01, 0, 0]]), torch.zeros(2, 2, 2)]
    gradients[1][0, 0, 0] = 4.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    clip_per_adapter(parameters, 1.0)
    assert parameters[0].grad is not None and parameters[1].grad is not None
    assert torch.allclose(parameters[0].grad[0], gradients[0][0] / 5, atol=1e-5)
    assert torch.allclose(parameters[1].grad[0], gradients[1][0] / 5, atol=1e-5)
    assert torch.equal(parameters[0].grad[1], gradients[0][1])


def test_collate_marks_only_targets() -> None:
    ids, labels = collate([Sample([1, 2], [3]), Sample([4], [5, 6, 7])], pad=0)
    assert ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert labels.tolist() == [[IGNORE, IGNORE, 3, IGNORE], [IGNORE, 5, 6, 7]]
