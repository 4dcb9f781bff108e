"""How fast the update store reads: float32 delivered a second, against a plain read of a float32 file as large.

    python benchmarks/store.py [--folder F] [--rounds 12] [--threads 1]

Units have the sizes of Qwen2.5-Instruct at LoRA rank 2 on q and k, with 8 snapshots and 20,000 losses. For each size a
set of units larger than the CPU's caches is read, 24 at a time as training does, in turn with `numpy.fromfile` of as
many files that hold the same numbers as float32: first warm (in the page cache), then cold (dropped from it). The ratio
of a round is the time of one set over the other's; what counts is the median over the rounds. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from gt_ray.training.tuples import UNITS_A_TASK
from gt_ray.updates.store import UnitMeta, UpdateStore, unit_key

SIZES = {"0.5B": (8, 24, 5632), "7B": (8, 28, 22528), "32B": (8, 64, 32768)}
SET_BYTES = 512 * 2**20
GOAL = 0.8


def snapshots(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Nearly equal snapshots: a random update and small steps to it."""
    generator = torch.Generator().manual_seed(seed)
    steps_JLd = torch.randn(shape, generator=generator) * 1e-2
    return steps_JLd.cumsum(0) + torch.randn(shape[1:], generator=generator)


def write_set(store: UpdateStore, plain: Path, shape: tuple[int, int, int]) -> tuple[list[str], list[Path]]:
    """Units and plain files of the same delivered bytes."""
    keys, files = [], []
    for unit in range(max(4, SET_BYTES // (4 * int(np.prod(shape))))):
        x_JLd = snapshots(shape, unit % 4)
        made_by = {"unit": unit, "shape": list(shape)}
        meta = UnitMeta("0" * 64, made_by, list(reversed(range(shape[0]))), 1024, np.random.rand(20_000).tolist(), 1.0)
        keys.append(unit_key(made_by))
        store.write(keys[-1], x_JLd, meta)
        files.append(plain / f"{keys[-1]}.f32")
        x_JLd.numpy().tofile(files[-1])
    return keys, files


def drop_from_cache(folder: Path) -> None:
    """Forget the folder's files, so that the next read is the disk's."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def wall_s(read: Callable[[], object]) -> float:
    """Seconds that `read` takes."""
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def batches(read: Callable[..., object], arguments: list[Any]) -> Callable[[], None]:
    """Read one after the other, keeping what a Ray Data task keeps until its batch is whole."""

    def run() -> None:
        for first in range(0, len(arguments), UNITS_A_TASK):
            [read(argument) for argument in arguments[first : first + UNITS_A_TASK]]

    return run


def measure(name: str, shape: tuple[int, int, int], folder: Path, rounds: int) -> dict[str, float]:
    """Ratios of one size."""
    store, plain = UpdateStore(folder / "store"), folder / "plain"
    plain.mkdir()
    keys, files = write_set(store, plain, shape)
    delivered_bytes = 4 * int(np.prod(shape)) * len(keys)
    stored = sum(store.contents()[0].values())
    readers = {
        "plain": batches(lambda file: np.fromfile(file, np.float32), files),
        "read": batches(lambda key: store.read(key, verify=False), keys),
        "verified": batches(lambda key: store.read(key), keys),
    }
    for read in readers.values():
        read()
    warm: dict[str, list[float]] = {reader: [] for reader in readers}
    cold: dict[str, list[float]] = {reader: [] for reader in readers}
    for _ in range(rounds):
        for reader, read in readers.items():
            warm[reader].append(wall_s(read))
    for _ in range(max(3, rounds // 3)):
        for reader, read in readers.items():
            drop_from_cache(folder)
            cold[reader].append(wall_s(read))
    result = {"bytes_of_float32": stored / delivered_bytes}
    for state, walls in (("warm", warm), ("cold", cold)):
        rates = {reader: delivered_bytes / statistics.median(times) / 1e9 for reader, times in walls.items()}
        for reader in ("read", "verified"):
            pairs = zip(walls["plain"], walls[reader], strict=True)
            result[f"{state}_{reader}"] = statistics.median(p / r for p, r in pairs)
        print(
            f"{name} {list(shape)}, {len(keys)} units, {state}: plain {rates['plain']:.2f} GB/s, "
            f"store {rates['read']:.2f} ({result[f'{state}_read']:.2f} of plain), "
            f"with checksum {rates['verified']:.2f} ({result[f'{state}_verified']:.2f})"
        )
    return {key: round(value, 3) for key, value in result.items()}


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the files go meanwhile; default: the temporary one.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Warm rounds; a third as many cold ones.")] = 12,
    threads: Annotated[int, typer.Option(help="Threads of torch; a Ray Data task has one.")] = 1,
) -> None:
    """Read speed of the update store against a plain read of float32 files."""
    torch.set_num_threads(threads)
    ratios = {}
    for name, shape in SIZES.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            ratios[name] = measure(name, shape, Path(place), rounds)
    print(json.dumps({"goal": GOAL, "threads": threads, "ratios": ratios}))


if __name__ == "__main__":
    typer.run(main)
