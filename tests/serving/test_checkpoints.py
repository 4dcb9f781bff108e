"""What a checkpoint tells clients of how to fine-tune."""

from __future__ import annotations

from gt_ray.config import DpSgdSettings, load_config
from gt_ray.serving.checkpoints import private_fine_tune
from gt_ray.serving.client import _settings


def test_private_clients_are_told_what_private_fine_tunes_of_the_study_did() -> None:
    config = load_config("embedded-dp")
    told = {"fine_tune": config.pair.tinylm.fine_tune.model_dump(mode="json")}
    told["private_fine_tune"] = private_fine_tune(config)
    mechanism = {"name": "dp_sgd", "epsilon": 0.5, "delta": 1e-6}
    settings = _settings(told, {"mechanism": mechanism})
    assert (settings.steps, settings.batch_size) == (16, 256)
    assert settings.mechanism == DpSgdSettings(epsilon=0.5, delta=1e-6, row_norm=0.1)
    own = _settings(told, {"mechanism": mechanism | {"row_norm": 2.0}, "steps": 9})
    assert own.steps == 9 and own.batch_size == 256 and own.mechanism.row_norm == 2.0  # type: ignore[union-attr]
    assert _settings(told, {}).steps == 120 and _settings(told, {}).mechanism == "sft"


def test_a_study_without_private_fine_tunes_recommends_none() -> None:
    config = load_config("embedded")
    assert private_fine_tune(config) is None
    told = {"fine_tune": config.pair.tinylm.fine_tune.model_dump(mode="json"), "private_fine_tune": None}
    assert _settings(told, {"mechanism": {"name": "dp_sgd", "epsilon": 1.0}}).batch_size == 16
