"""Checkpoints of a training: the models that are kept, and all that is needed to go on exactly. No pickle anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from gt_ray.grad_transformer.network import WEIGHTS
from gt_ray.grad_transformer.several import SeveralPairs

STATE, HISTORY = "training.json", "history.json"


def numbered(name: str, pair: int) -> str:
    """A file or folder of a pair: `model`, `model-1`, ... before the suffix."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{pair}{dot}{suffix}" if pair else name


def finished(model: SeveralPairs, averaged: AveragedModel) -> SeveralPairs:
    """The averaged model as soon as there is one, else the model itself."""
    return cast(SeveralPairs, averaged.module) if averaged.n_averaged else model


def save(
    folder: Path,
    model: SeveralPairs,
    averaged: AveragedModel,
    optimizer: Any,
    schedule: Any,
    history: list[dict[str, float]],
) -> None:
    """A checkpoint from which `restore` goes on; its `model`, `model-1`, ... are the averaged ones."""
    for i, (own, kept) in enumerate(zip(model.pairs, finished(model, averaged).pairs, strict=True)):
        kept.save(folder / numbered("model", i))
        weights = {name: value.contiguous() for name, value in own.state_dict().items()}
        save_file(weights, folder / numbered(WEIGHTS, i))
    state = optimizer.state_dict()["state"]
    save_file(
        {f"{i}.{name}": value.contiguous() for i, entry in state.items() for name, value in entry.items()},
        folder / "optimizer.safetensors",
    )
    (folder / HISTORY).write_text(json.dumps(history), encoding="utf-8")
    progress = {"step": schedule.last_epoch, "averaged": int(averaged.n_averaged)}
    (folder / STATE).write_text(json.dumps(progress), encoding="utf-8")


def restore(
    folder: Path, model: SeveralPairs, averaged: AveragedModel, optimizer: Any, schedule: Any
) -> tuple[int, list[dict[str, float]]]:
    """Set everything as it was when `save` wrote it; returns steps done and the history."""
    for i, (own, kept) in enumerate(zip(model.pairs, cast(SeveralPairs, averaged.module).pairs, strict=True)):
        own.load_state_dict(load_file(folder / numbered(WEIGHTS, i)))
        kept.load_state_dict(load_file(folder / numbered("model", i) / WEIGHTS))
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        number, _, part = name.partition(".")
        entries.setdefault(int(number), {})[part] = value
    progress = json.loads((folder / STATE).read_text(encoding="utf-8"))
    step = int(progress["step"])
    averaged.n_averaged.fill_(int(progress["averaged"]))
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.last_epoch = step
    for group, rate, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(step)
    return step, json.loads((folder / HISTORY).read_text(encoding="utf-8"))
