"""The Ray Train loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gt_ray.config import TrainingSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.studies.pipeline import curate_stage
from gt_ray.training import run
from gt_ray.training.run import _initial_model, train
from gt_ray.training.tuples import shadow_keys
from gt_ray.updates.unit import UnitMeta
from tests.conftest import tiny_config


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
    assert history[2]["validation_behaviour"] > 0 and all(0 <= entry["data_wait_share"] < 1 for entry in history)
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


@pytest.mark.parametrize(
    ("cluster", "missing"),
    [
        ([{"CPU": 3.0, "GPU": 1.0}], []),
        ([{"CPU": 2.0}, {"GPU": 0.5}], ["3 CPUs, it has 2", "1 GPUs, it has 0.5: 0.5 for each of 2 trainers"]),
    ],
)
def test_a_training_that_has_to_wait_says_what_for(
    cluster: list[dict[str, float]], missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(run, "nodes", lambda: cluster)
    monkeypatch.setattr(run, "say", said.append)
    run._say_what_is_missing(TrainingSettings(workers=2, num_gpus=0.5))
    assert len(said) == len(missing)
    assert all(f"waits until this Ray cluster has {what}" in text for what, text in zip(missing, said, strict=True))


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
