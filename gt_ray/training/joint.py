"""Which pairs train together, and under which keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gt_ray.config import GradTransformerSettings
from gt_ray.curation.study import Study
from gt_ray.training.tuples import input_keys, shadow_keys
from gt_ray.updates.store import unit_key

HOW: dict[str, Any] = {
    **dict.fromkeys(("tracking", "workers", "min_workers", "num_gpus", "num_cpus", "strategy"), True),
    **dict.fromkeys(("accumulation", "activation_checkpointing", "compile", "offload"), True),
    "behaviour": {"workers"},
}
"""Settings of a training that change where and how fast it runs, not what it is: it goes on when they change."""


def trained_together(study: Study, settings: GradTransformerSettings) -> list[Study]:
    """A study for each pair of a training, in the order of their turns; the linear path alone has nothing to share."""
    return study.pairs if settings.phi is not None else [study]


def pair_key(study: Study, settings: GradTransformerSettings) -> str:
    """Hash of all that a training of the study's own pair depends on."""
    units = [row for validation in (False, True) for row in shadow_keys(study, validation)]
    units += input_keys(study)
    trained = settings.model_dump(mode="json", exclude={"refinement": True, "training": HOW})
    return unit_key({"settings": trained, "units": units, "seed": study.config.seed})


def joint_key(studies: Sequence[Study], settings: GradTransformerSettings) -> str:
    """Hash of all that a training of these studies' pairs depends on; of one pair its `pair_key`."""
    keys = [pair_key(one, settings) for one in studies]
    return keys[0] if len(keys) == 1 else unit_key({"pairs": keys})


def training_key(study: Study, settings: GradTransformerSettings, studies: Sequence[Study] | None = None) -> str:
    """Hash of all that the study's model depends on: its training, and which of the pairs is its own.

    Args:
        studies: all that train together, where the study is one of `Study.further` and does not know the others.
    """
    studies = studies or trained_together(study, settings)
    key = joint_key(studies, settings)
    return key if len(studies) == 1 else unit_key({"joint": key, "pair": pair_key(study, settings)})
