"""The Ray Train loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from gt_ray.config import BehaviourSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer, make_phi
from gt_ray.grad_transformer.several import SeveralPairs
from gt_ray.studies.pipeline import curate_stage
from gt_ray.training.checkpoint import restore, save
from gt_ray.training.run import _initial_model, train
from gt_ray.training.tuples import shadow_keys
from gt_ray.training.worker import averaged_of
from gt_ray.updates.unit import UnitMeta
from tests.conftest import tiny_config
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI


@pytest.mark.ray
@pytest.mark.slow
def test_training_learns_resumes_and_is_not_repeated(
    tiny_pair: tuple[Path, Path], tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["linear_rank=4", "phi.dropout=0.1", "training.learning_rate=1e-2", "training.batch_size=4"]
    recipe += ["training.behaviour.steps=4", "training.behaviour.adapters=3", "training.behaviour.rows=2"]
    overrides = ["training.behaviour.workers=2", "training.behaviour.learning_rate=1e-2", *recipe]
    overrides.append("training.behaviour.linear_learning_rate=1e-2")
    study = Study.load(tiny_config(tiny_pair, tmp_path, *(f"grad_transformer.{override}" for override in overrides)))
    with pytest.raises(UserError, match=r"24 units are missing .* curate first"):
        train(study)
    curate_stage(study)
    out = train(study)
    history = json.loads((out / "history.json").read_text())
    assert [entry["step"] for entry in history] == [6, 12, 16]
    assert history[1]["validation_loss"] < history[0]["validation_loss"] and "loss" not in history[2]
    assert history[2]["validation_behaviour"] < history[1]["validation_behaviour"]
    model = GradTransformer.load(out)
    assert model.roots == {side: root.hash for side, root in study.roots.items()}
    assert list((study.config.run_folder / "events" / "grad_transformer").glob("events.*"))
    capsys.readouterr()
    train(study)
    assert "train: nothing to do" in capsys.readouterr().err
    # The same seed gives the same weights, dropout included.
    repeated = Study.load(study.config.model_copy(update={"name": "repeated"}))
    assert study.config.grad_transformer.phi.dropout > 0
    _assert_equal(model, GradTransformer.load(train(repeated)))
    # Without the exported result, the training goes on from its last checkpoint, the end: the same weights again.
    (out / "model.safetensors").write_bytes(b"damaged")
    train(study)
    _assert_equal(model, GradTransformer.load(out))


def _assert_equal(first: GradTransformer, second: GradTransformer) -> None:
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_the_start_has_what_the_config_says(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = ("grad_transformer.chunk=8", "grad_transformer.linear_rank=4")
    study = Study.load(tiny_config(tiny_pair, tmp_path, *overrides))
    for side, root in study.roots.items():
        for job in study.shadow_jobs(side):
            snapshots = torch.randn(2, root.layout.L, root.layout.d)
            study.store.write(job.key, root.layout.padded(root.layout.flat(snapshots)), UnitMeta("", {}, [1, 0], 1))
    keys = {validation: shadow_keys(study, validation) for validation in (False, True)}
    model = _initial_model(study, study.config.grad_transformer, keys)
    assert model.chunk == 8 and model.out.map.out_features == 8
    assert model.linear is not None and model.linear.rank == 4


Training = tuple[SeveralPairs, AveragedModel, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]


def _make(pairs: int = 1) -> Training:
    torch.manual_seed(0)
    roots = [{"tinylm": "s", "llm": f"t{i}"} for i in range(pairs)]
    model = SeveralPairs([GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), one) for one in roots])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    averaged = averaged_of(model, BehaviourSettings(average=0.5))
    return model, averaged, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))


def _steps(training: Training, n: int, averages_from: int) -> None:
    model, averaged, optimizer, schedule = training
    for _ in range(n):
        generator = torch.Generator().manual_seed(schedule.last_epoch)
        S = torch.randn(4, LAYOUT_S.L, LAYOUT_S.d, generator=generator)
        T = torch.randn(4, LAYOUT_T.L, LAYOUT_T.d, generator=generator)
        optimizer.zero_grad()
        model.pairs[schedule.last_epoch % len(model.pairs)].loss(S, T).backward()
        optimizer.step()
        schedule.step()
        if schedule.last_epoch > averages_from:
            averaged.update_parameters(model)


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("averages_from", [1, 2])
def test_a_checkpoint_restores_models_average_optimizer_and_schedule(
    tmp_path: Path, averages_from: int, pairs: int
) -> None:
    straight, interrupted, resumed = _make(pairs), _make(pairs), _make(pairs)
    _steps(straight, 4, averages_from)
    _steps(interrupted, 2, averages_from)
    save(tmp_path, *interrupted, [{"step": 2.0}])
    assert restore(tmp_path, *resumed) == (2, [{"step": 2.0}])
    _steps(resumed, 2, averages_from)
    for i in (0, 1):
        for name, tensor in straight[i].state_dict().items():
            assert torch.allclose(tensor, resumed[i].state_dict()[name], atol=1e-6), name
    expected = cast(SeveralPairs, interrupted[1].module) if averages_from < 2 else interrupted[0]
    for name, own in zip(["model", "model-1"], expected.pairs, strict=False):
        kept = GradTransformer.load(tmp_path / name)
        assert kept.roots == own.roots
        assert all(torch.equal(tensor, kept.state_dict()[key]) for key, tensor in own.state_dict().items())
    # The average is the slow calculation's: half of the last weights, and half of the average before.
    if averages_from == 1:
        slow = _make(pairs)
        weights = []
        for _ in range(4):
            _steps(slow, 1, averages_from=9)
            weights.append(slow[0].pairs[0].start.detach().clone())
        average = weights[1]
        for later in weights[2:]:
            average = 0.5 * average + 0.5 * later
        assert torch.allclose(cast(SeveralPairs, straight[1].module).pairs[0].start, average, atol=1e-6)
