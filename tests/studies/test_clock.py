"""What a run takes: stages over interrupted runs, and the seconds of Tables 7 and 8 by what units say."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from gt_ray.config import Config, load_config
from gt_ray.curation.jobs import FineTuneJob
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.studies.clock import devices_of_engines, devices_of_training, recorded, timed, times
from gt_ray.updates.store import UnitMeta


@pytest.fixture
def study(tiny: Config) -> Study:
    return Study.load(tiny)


def _write(study: Study, job: FineTuneJob, wall_s: float, **of_device: Any) -> None:
    root = study.roots[job.side]
    shape = (len(job.snapshot_steps), root.layout.L, root.layout.d)
    meta = UnitMeta(root.hash, job.made_by, job.snapshot_steps, 8, [0.5], wall_s, **of_device)
    study.store.write(job.key, torch.randn(shape), meta)


def test_stages_add_up_over_runs_of_the_same_settings_and_failed_ones_count(study: Study) -> None:
    with timed(study, "train", lambda _: 3.0):
        pass
    with pytest.raises(ValueError), timed(study, "train", lambda _: 3.0):
        raise ValueError
    found = recorded(study.config)
    assert found["device_s"]["train"] == pytest.approx(3 * found["wall_s"]["train"])
    with timed(study, "train"):
        pass
    assert recorded(study.config)["wall_s"]["train"] > found["wall_s"]["train"]
    other = replace(study, config=study.config.model_copy(update={"seed": 7}))
    assert recorded(other.config) == {"wall_s": {}, "device_s": {}}
    shown = replace(study, config=study.config.model_copy(update={"table": "table1", "cells": ("seed=1",)}))
    assert recorded(shown.config) == recorded(study.config)


def test_fine_tunes_count_by_their_units_whoever_made_them(study: Study) -> None:
    for job in [*study.shadow_jobs("tinylm"), *study.client_jobs("tinylm")]:
        _write(study, job, 2.0, device="H100", devices=0.25)
    for job in study.shadow_jobs("llm"):
        _write(study, job, 3.0, device="H100", devices=2)
    for number, job in enumerate(study.client_jobs("llm")):
        _write(study, job, 5.0 + number, device="cpu")
    with timed(study, "train", lambda _: 4.0), timed(study, "generate", lambda _: 3.0):
        pass
    found = times(study, study.client_jobs("llm"))
    stages, seconds = found["device_s"], found["times"]
    K, clients = len(study.shadow_jobs("tinylm")), len(study.data.clients)
    assert (K, clients) == (12, 2)
    assert seconds["provider"]["curate_tinylm_s"] == pytest.approx(12 * 2.0 / 4)
    assert seconds["provider"]["curate_llm_s"] == pytest.approx(12 * 3.0 * 2)
    assert seconds["provider"]["train_s"] == stages["train"] == pytest.approx(4 * found["wall_s"]["train"])
    assert seconds["client"]["tinylm_fine_tune_s"] == pytest.approx(0.5)
    assert seconds["client"]["llm_fine_tune_s"] == pytest.approx((5.0 + 6.0) / 2)
    assert seconds["client"]["generate_s"] == pytest.approx(3 * found["wall_s"]["generate"] / 2)
    assert seconds["units"] == {"tinylm": 12, "llm": 12} and seconds["device"] == "H100"
    assert stages["curate"] == pytest.approx(12 * 0.5 + 12 * 6.0)
    assert stages["clients"] == pytest.approx(2 * 0.5) and stages["ceilings"] == pytest.approx(11.0)


def test_units_that_name_no_device_count_with_one() -> None:
    assert UnitMeta("a", {}, [0], 1, wall_s=3.0).device_s == 3.0
    assert UnitMeta("a", {}, [0], 1, wall_s=3.0, devices=0.5).device_s == 1.5


def test_devices_are_gpus_or_cores() -> None:
    cores = os.cpu_count() or 1
    on_cpus = load_config("embedded", ["grad_transformer.training.workers=1", "evaluation.workers=64"])
    assert devices_of_training(on_cpus) == min(2, cores)  # two LLM actors while the trainer waits
    assert devices_of_engines(on_cpus) == cores
    on_gpus = load_config("embedded", ["grad_transformer.training.num_gpus=1", "evaluation.num_gpus=2"])
    assert devices_of_training(on_gpus) == 1.0 and devices_of_engines(on_gpus) == 4.0


def test_a_gpu_that_cannot_be_looked_at_fails_no_stage_that_is_done(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object) -> float:
        raise UserError("no GPU was free")

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("gt_ray.cluster.nodes", lambda: [{"GPU": 8.0}])
    monkeypatch.setattr("gt_ray.studies.clock.gpus_of_an_actor", taken)
    with timed(study, "evaluate", devices_of_engines):
        pass
    found = recorded(study.config)
    assert found["device_s"]["evaluate"] == found["wall_s"]["evaluate"] * study.config.evaluation.workers
