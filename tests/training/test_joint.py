"""What a training's key depends on."""

from __future__ import annotations

from typing import Any

import pytest

from gt_ray.config import Config, TrainingSettings
from gt_ray.curation.study import Study
from gt_ray.training.joint import pair_key


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"workers": 4, "min_workers": 2, "strategy": "zero3", "accumulation": 2, "tracking": "wandb"}, True),
        ({"behaviour": {"steps": 3, "workers": 5}}, True),
        ({"behaviour": {"steps": 4}}, False),
        ({"precision": "bf16"}, False),
        ({"batch_size": 8}, False),
    ],
)
def test_where_and_how_fast_a_training_runs_is_no_part_of_its_key(
    change: dict[str, Any], same: bool, tiny: Config
) -> None:
    study, settings = Study.load(tiny), tiny.grad_transformer
    before, after = (
        settings.model_copy(update={"training": TrainingSettings.model_validate({"behaviour": {"steps": 3}, **one})})
        for one in ({}, change)
    )
    assert (pair_key(study, before) == pair_key(study, after)) == same
