"""Pools of engines on Ray: rows come back once, whatever happens to an engine."""

from __future__ import annotations

import os
import re
import signal
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gt_ray.config import EvaluationSettings, VllmSettings, load_config
from gt_ray.errors import UserError
from gt_ray.evaluation import pool as pool_module
from gt_ray.evaluation.pool import EngineKind, EnginePool, Item
from gt_ray.evaluation.scorer import Scored, Scorer, System, TransformersScorer
from gt_ray.pairs.root import make_root
from gt_ray.tasks.embedded import rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

LLM = load_config("embedded").pair.llm
SETTINGS = EvaluationSettings(
    batch_size=8, max_new_tokens=12, max_model_len=256, num_gpus=0, vllm=VllmSettings(max_loras=2)
)


def kind(engine: Any, cls: type[EngineKind] = EngineKind) -> EngineKind:
    root = make_root(LLM)
    return cls(LLM, root, SETTINGS, engine, root.lora.rank, root.lora.target_modules)


def items(n: int, n_rows: int) -> list[Item]:
    layout = make_root(LLM).layout
    test_rows = rows("gsm8k", "test", "north-day", 0, n_rows)
    made = []
    for number in range(n):
        update_Ld = 0.05 * torch.randn(layout.L, layout.d, generator=torch.Generator().manual_seed(number))
        made.append(Item(f"key-{number}", System(f"client-{number}", update_Ld=update_Ld), "gsm8k", test_rows))
    return made


def expected(work: list[Item]) -> dict[str, list[str]]:
    scorer = TransformersScorer(LLM, make_root(LLM), SETTINGS)
    return {item.key: [row.output for row in scorer.score(item.system, item.task, item.rows)] for item in work}


class Counting(EnginePool):
    """Counts the rows that are handed out."""

    handed = 0

    def _call(self, engine: Any, waiting: deque[tuple[str, int]], references: dict[str, Any], size: int) -> None:
        before = len(waiting)
        super()._call(engine, waiting, references, size)
        self.handed += before - len(waiting)


def engine_processes() -> list[psutil.Process]:
    """The actors that hold engines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "EngineActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
@pytest.mark.vllm
def test_an_engine_that_dies_is_replaced_and_only_its_unfinished_rows_are_repeated(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool_module, "CALL_ROWS", 24)
    work = items(6, 16)
    with Counting(kind("vllm"), 1) as pool:
        found = {}
        for item, scores in pool.score(work):
            found[item.key] = [row.output for row in scores]
            if len(found) == 2:
                (process,) = engine_processes()
                process.kill()
        repeated = re.findall(r"an engine died, (\d+) rows are repeated", capfd.readouterr().err)
        assert pool.deaths == len(repeated) == 1 and 0 < int(repeated[0]) <= 6 * 16 - 2 * 16
        assert pool.handed == 6 * 16 + int(repeated[0])
        assert found == expected(work)
        assert 0 <= pool.idle_share < 1
        # The same engines score again.
        assert {item.key for item, _ in pool.score(work[:1])} == {"key-0"}


class Deadly(EngineKind):
    """Engines that die of their first row."""

    def make(self, device: str) -> Scorer:
        class Killed(TransformersScorer):
            def step(self) -> list[Scored]:
                os.kill(os.getpid(), signal.SIGKILL)
                return []

        return Killed(self.model, self.root, self.settings, device)


class Broken(EngineKind):
    """Engines that cannot be started."""

    def make(self, device: str) -> Scorer:
        raise RuntimeError("no room for the weights")


def by_value(cls: type[EngineKind]) -> None:
    """Workers cannot import this file."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[cls.__module__])


@pytest.mark.slow
def test_rows_that_kill_every_engine_end_the_run_with_their_name() -> None:
    by_value(Deadly)
    with (
        EnginePool(kind("transformers", Deadly), 1) as pool,
        pytest.raises(UserError, match=r"3 engines died .* client-0"),
    ):
        list(pool.score(items(2, 4)))


def test_an_engine_that_cannot_start_is_an_error_at_once() -> None:
    by_value(Broken)
    with EnginePool(kind("transformers", Broken), 1) as pool, pytest.raises(UserError, match="no room for the weights"):
        list(pool.score(items(1, 2)))


def test_no_more_engines_than_the_cluster_holds_and_none_is_an_error() -> None:
    with EnginePool(kind("transformers"), 99) as pool:
        assert len(pool.engines) == 2
    on_gpu = replace(kind("transformers"), settings=SETTINGS.model_copy(update={"num_gpus": 1}))
    with pytest.raises(UserError, match=r"no room for an engine, .*: it has 2 CPUs and 0 GPUs"):
        EnginePool(on_gpu, 1)


def test_two_engines_share_the_rows(tmp_path: Path) -> None:
    work = items(5, 9)
    with EnginePool(kind("transformers"), 2) as pool:
        pool.ray.get([engine.ready for engine in pool.engines])  # else the first that is up may do it all
        found = {item.key: [row.output for row in scores] for item, scores in pool.score(work)}
        assert found == expected(work)
        assert all(engine.since_s > 0 for engine in pool.engines)
        empty = Item("none", System("none"), "gsm8k", [])
        assert [(item.key, scores) for item, scores in pool.score([empty])] == [("none", [])]
