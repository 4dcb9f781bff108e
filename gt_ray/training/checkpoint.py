"""Checkpoints of a training phase: the shards of every worker, and all that is needed to go on exactly. No pickle.

checkpoint/
  shards-<n>.safetensors    weights, moments and averages that worker n keeps (shards.py)
  rest-<pair>.safetensors   standardisers and certainty of each pair
  config-<pair>.json        of each pair's model
  training.json, history.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.several import SeveralPairs
from gt_ray.pairs.models import weight_files
from gt_ray.training.shards import AVERAGE, WEIGHT, ShardFiles, restore_shards, save_shards
from gt_ray.training.strategies import Strategy

STATE, HISTORY = "training.json", "history.json"


def save(folder: Path, strategy: Strategy, rank: int, progress: Mapping[str, Any], history: Sequence[Any]) -> None:
    """One worker's part of a checkpoint; the first one also writes what all of them have.

    Args:
        progress: numbers that `restore` returns.
    """
    if strategy.shared_out or not rank:
        save_shards(folder / f"shards-{rank}.safetensors", strategy.shards)
    if rank:
        return
    for i, pair in enumerate(strategy.model.pairs):
        kept = pair.state_dict().keys()  # of buffers those that are not made anew
        rest = {name: tensor.contiguous() for name, tensor in pair.named_buffers() if name in kept}
        save_file(rest, folder / f"rest-{i}.safetensors")
        (folder / f"config-{i}.json").write_text(json.dumps(pair.to_json()), encoding="utf-8")
    (folder / HISTORY).write_text(json.dumps(list(history)), encoding="utf-8")
    (folder / STATE).write_text(json.dumps(dict(progress)), encoding="utf-8")


def shard_files(folder: Path) -> ShardFiles:
    """The shards of a checkpoint."""
    return ShardFiles(sorted(folder.glob("shards-*.safetensors")))


def restore(folder: Path, strategy: Strategy) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Set everything as it was when `save` wrote it; returns progress and history."""
    with shard_files(folder) as files:
        restore_shards(strategy.shards, files)
    strategy.publish()
    for i, pair in enumerate(strategy.model.pairs):
        _set_buffers(pair, folder, i)
    progress = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return progress, json.loads((folder / HISTORY).read_text(encoding="utf-8"))


@torch.no_grad()
def load_weights(
    model: SeveralPairs,
    sources: Sequence[ShardFiles],
    rank: int = 0,
    kinds: Sequence[str] = (WEIGHT,),
) -> None:
    """Fill a model from the first source that has a parameter; with zero3 a worker reads its own part of it alone.

    Raises:
        ValueError: a parameter is in none of them.
    """
    parameter: Any  # DeepSpeed adds to it
    for name, parameter in model.named_parameters():
        own, start = parameter.data, 0
        if hasattr(parameter, "ds_tensor"):
            own = parameter.ds_tensor
            start = min(rank * own.ds_numel, parameter.ds_numel)
        n = min(own.numel(), getattr(parameter, "ds_numel", own.numel()) - start)
        tried = (source.read(name, start, n, kind) for source in sources for kind in kinds)
        found = next((part for part in tried if part is not None), None) if n else own.new_zeros(0)
        if found is None:
            raise ValueError(f"the weights of {name} are nowhere")
        own.view(-1)[:n].copy_(found)


def shaped(configs: Sequence[dict[str, Any]]) -> SeveralPairs:
    """Models with random weights, by their configs."""
    return SeveralPairs([GradTransformer.shaped(config) for config in configs])


def load_buffers(model: SeveralPairs, starts: Sequence[Path]) -> None:
    """Standardisers and certainty of each pair, as `GradTransformer.save` wrote them."""
    for pair, start in zip(model.pairs, starts, strict=True):
        buffers = dict(pair.named_buffers())
        for path in weight_files(start):
            with safe_open(path, framework="pt") as file:
                for name in buffers.keys() & set(file.keys()):
                    buffers[name].copy_(file.get_tensor(name))


def start_files(starts: Sequence[Path]) -> list[ShardFiles]:
    """The weights of the models in folders, by the names that they have together."""

    def rename(name: str, pair: int) -> str | None:
        mine = f"models.{pair}."
        return name.removeprefix(mine) if name.startswith(mine) else None

    return [ShardFiles(weight_files(start), partial(rename, pair=i)) for i, start in enumerate(starts)]


def whole_models(checkpoint: Path, starts: Sequence[Path]) -> list[GradTransformer]:
    """The model of every pair, whole: the averaged weights where there are.

    Args:
        starts: the models of all pairs before this phase, for what rested in it.
    """
    configs = [json.loads((checkpoint / f"config-{i}.json").read_text(encoding="utf-8")) for i in range(len(starts))]
    model = shaped(configs)
    with ExitStack() as opened:
        sources = [opened.enter_context(files) for files in (shard_files(checkpoint), *start_files(starts))]
        load_weights(model, sources, kinds=(AVERAGE, WEIGHT))
    for i, pair in enumerate(model.pairs):
        _set_buffers(pair, checkpoint, i)
    return list(model.pairs)


def is_finished(folder: Path, trained_by: str | None = None) -> bool:
    """Whether a phase, or the training of a key, has ended with this model; a damaged one is made again."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        GradTransformer.load(folder)
    except (OSError, ValueError):  # UserError is a ValueError
        return False
    return trained_by is None or state.get("trained_by") == trained_by


def _set_buffers(pair: GradTransformer, checkpoint: Path, number: int) -> None:
    for name, tensor in load_file(checkpoint / f"rest-{number}.safetensors").items():
        pair.get_buffer(name).copy_(tensor)
