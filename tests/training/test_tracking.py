"""Trackers write what they are given, or say what is missing."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from gt_ray.errors import UserError
from gt_ray.training.tracking import tracked

SETTINGS = {"batch_size": 4, "behaviour": {"steps": 2}}


def test_tensorboard_has_every_measure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracked("tensorboard", tmp_path, "run", SETTINGS) as log:
        log({"loss": 2.0, "block_error/0": 0.5}, 10)
        log({"loss": 1.0}, 20)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.0), (20, 1.0)]
    assert events.Scalars("train/block_error/0")[0].value == 0.5


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs gt-ray[track]")
def test_mlflow_has_measures_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracked("mlflow", tmp_path, "run", SETTINGS) as log:
        log({"loss": 2.0, "validation_behaviour": math.nan}, 10)
    with tracked("mlflow", tmp_path, "run", SETTINGS) as log:  # the next phase, or a restart
        log({"loss": 1.0}, 20)
    [run] = mlflow.search_runs(experiment_names=["gt-ray"], output_format="list")
    assert run.data.metrics == {"loss": 1.0} and run.data.params["batch_size"] == "4"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs gt-ray[track]")
def test_wandb_writes_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracked("wandb", tmp_path, "run", SETTINGS) as log:
        log({"loss": 2.0}, 10)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_missing_tracker_names_its_extra(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, kind, None)
    with pytest.raises(UserError, match=r"gt-ray\[track\]"), tracked(kind, tmp_path, "run", SETTINGS):
        pass
