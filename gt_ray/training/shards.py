"""Training state in pieces of parameters: what each worker keeps of it, as files that any number of workers read back.

A shard is a run of coordinates of one flattened parameter, with the optimizer's moments and the moving average of the
same coordinates. What a strategy shares out decides which shards a worker has; the files only name parameter, start
and kind, so a training goes on with another number of workers or another strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHT, AVERAGE, STEP = "weight", "average", "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Shard:
    """Coordinates `start ..` of a parameter.

    Attributes:
        name: of the parameter.
        weight: [n] float32, a view of what the optimizer updates.
        state: the optimizer's, of the tensor that the shard is a part of.
        offset: where in that tensor it begins.
        average: [n] moving average of the weights; none: not kept.
    """

    name: str
    start: int
    weight: Tensor
    state: dict[str, Any] = field(repr=False)
    offset: int = 0
    average: Tensor | None = None

    def moment(self, kind: str) -> Tensor:
        """One of the optimizer's moments [n]; a view."""
        flat: Tensor = self.state[kind].view(-1)
        return flat.narrow(0, self.offset, self.weight.numel())

    def values(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by kind; views."""
        found = {WEIGHT: self.weight, **{kind: self.moment(kind) for kind in MOMENTS}}
        return found if self.average is None else {**found, AVERAGE: self.average}


class ShardFiles:
    """Tensors in safetensors files, whole by name or in shards.

    Args:
        rename: the name in these files of a parameter; none: they do not have it.
    """

    def __init__(self, paths: Iterable[Path], rename: Callable[[str], str | None] = lambda name: name) -> None:
        self._rename = rename
        self._opened = ExitStack()
        self._pieces: dict[str, list[tuple[int, str, Any]]] = {}
        for path in paths:
            file = self._opened.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118
                named, is_shard, start = key.partition("@")
                self._pieces.setdefault(named if is_shard else f"{WEIGHT}/{key}", []).append(
                    (int(start or 0), key, file)
                )

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def read(self, name: str, start: int, n: int, kind: str = WEIGHT) -> Tensor | None:
        """Coordinates [n] from `start` of a flattened parameter, and no more of it than that; none: not in here.

        Raises:
            ValueError: the files have only a part of them.
        """
        own = self._rename(name)
        if own is None or (pieces := self._pieces.get(f"{kind}/{own}")) is None:
            return None
        found = torch.empty(n)
        missing = n
        for first, key, file in pieces:
            part = file.get_slice(key)
            shape = part.get_shape()
            size = torch.Size(shape).numel()
            begin, end = max(start, first), min(start + n, first + size)
            if begin >= end:
                continue
            row = size // shape[0] if shape else 1
            low, high = (begin - first) // row, -(-(end - first) // row)
            rows = part[low:high] if shape else file.get_tensor(key)
            inside = rows.reshape(-1)[begin - first - low * row : end - first - low * row]
            found[begin - start : end - start] = inside
            missing -= end - begin
        if missing:
            raise ValueError(f"{missing} of the coordinates {start} to {start + n} of {kind} {name} are in no shard")
        return found

    def steps(self, name: str) -> float:
        """Optimizer steps that a parameter has taken."""
        _, key, file = self._pieces[f"{STEP}/{self._rename(name)}"][0]
        return float(file.get_tensor(key))


def save_shards(path: Path, shards: Sequence[Shard]) -> None:
    """Write a worker's shards as one file."""
    tensors = {
        f"{kind}/{shard.name}@{shard.start}": value.detach().to("cpu", copy=True)
        for shard in shards
        for kind, value in shard.values().items()
    }
    steps = {f"{STEP}/{shard.name}@{shard.start}": torch.tensor([float(shard.state[STEP])]) for shard in shards}
    save_file(tensors | steps, path)


def restore_shards(shards: Sequence[Shard], files: ShardFiles) -> None:
    """Set shards as they were when `save_shards` wrote them, by as many workers as there were then."""
    for shard in shards:
        for kind, value in shard.values().items():
            kept = files.read(shard.name, shard.start, value.numel(), kind)
            if kept is None and kind == AVERAGE:
                kept = files.read(shard.name, shard.start, value.numel())
            if kept is None:
                raise ValueError(f"the checkpoint has no {kind} of {shard.name}")
            value.copy_(kept)
        step = shard.state[STEP]
        steps = max(float(step), files.steps(shard.name))  # shards share a state, and some parameters may have rested
        shard.state[STEP] = torch.full_like(step, steps) if isinstance(step, Tensor) else int(steps)


@torch.no_grad()
def swap_averages(shards: Sequence[Shard]) -> None:
    """Exchange weights and their averages."""
    for shard in shards:
        if shard.average is not None:
            held = shard.weight.clone()
            shard.weight.copy_(shard.average)
            shard.average.copy_(held)


@torch.no_grad()
def average(shards: Sequence[Shard], decay: float, first: bool) -> None:
    """Let the moving averages follow the weights; the first time they are the weights."""
    averages = [shard.average for shard in shards if shard.average is not None]
    if averages:
        share = 1.0 if first else 1 - decay
        torch._foreach_lerp_(averages, [shard.weight for shard in shards], share)
