"""Scoring folders of PEFT adapters, made by this project or not, on any model: checks, results, table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from gt_ray.config import Config
from gt_ray.errors import UserError
from gt_ray.evaluation.pool import EngineKind, EnginePool, Item
from gt_ray.evaluation.results import RowScore, read_scores
from gt_ray.evaluation.run import engine_of, item_key, keep
from gt_ray.evaluation.scorer import System
from gt_ray.evaluation.summary import mean_log_likelihood, mean_normalised, standard_error
from gt_ray.pairs.models import resolve, same_model
from gt_ray.pairs.root import model_stats
from gt_ray.tasks import TASKS, Row
from gt_ray.tasks.data import load_data, read_jsonl
from gt_ray.updates.adapters import Adapter
from gt_ray.updates.files import ADAPTER_CONFIG
from gt_ray.updates.store import unit_key

BASE = "base"
"""Name of the model without an adapter, which is scored too."""
Z = 1.96


class AdapterScores:
    """Scores adapters of one model on one task's test rows, as often as there are new ones; close it in the end.

    Args:
        config: `pair.llm` is the model, `evaluation` how it is scored.
        rows: test rows.
        out: folder of the results, a Parquet file each.

    Attributes:
        scores: results so far by name.
    """

    def __init__(self, config: Config, task: str, rows: Sequence[Row], out: Path) -> None:
        self.task, self.rows, self.out = task, rows, out
        self.settings = config.evaluation
        self.name = config.pair.llm.model
        self.engine = engine_of(self.settings, self.name)
        self.model = config.pair.llm.model_copy(update={"model": str(resolve(self.name).resolve())})
        self._linears = linears(Path(self.model.model))
        self.scores: dict[str, list[RowScore]] = {}
        self._pool: EnginePool | None = None
        self._fits: tuple[int, frozenset[str]] = (1, frozenset())

    def __enter__(self) -> AdapterScores:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Refuse what cannot be scored together.

        Raises:
            UserError: two adapters of one name, another base model, modules that it lacks, a rank over the limit.
        """
        by_name: dict[str, Path] = {BASE: Path("the model without an adapter")}
        for adapter in adapters:
            if adapter.name in by_name:
                raise UserError(
                    f"two adapters are named {adapter.name!r}: {by_name[adapter.name]} and {adapter.folder}; rename one"
                )
            by_name[adapter.name] = adapter.folder
            if not any(same_model(adapter.base_model, name) for name in (self.name, self.model.model)):
                raise UserError(
                    f"{adapter.folder} is an adapter of base model {adapter.base_model!r}, not of {self.name!r} "
                    f"({ADAPTER_CONFIG}: base_model_name_or_path)"
                )
            for module, size in adapter.modules.items():
                if (own := self._linears.get(module)) != size:
                    has = f"has {list(own)} there" if own else "has no Linear module of that name"
                    raise UserError(
                        f"{adapter.folder} changes {module} of [in, out] {list(size)}, but {self.name!r} {has}"
                    )
            if adapter.rank > self.settings.vllm.max_lora_rank:
                raise UserError(
                    f"{adapter.folder} has rank {adapter.rank}, over evaluation.vllm.max_lora_rank="
                    f"{self.settings.vllm.max_lora_rank} ({ADAPTER_CONFIG}: r); raise the limit"
                )

    def add(self, adapters: Sequence[Adapter], once: bool = True) -> Iterator[tuple[str, list[RowScore]]]:
        """Score these adapters, and once the model without one; names and results as they are done.

        Results that are in `out` already are not computed again.

        Args:
            once: no more adapters will come than these; else all engines are started at once.
        """
        self.check(adapters)
        systems = {} if BASE in self.scores else {BASE: ("", System(BASE))}
        systems |= {one.name: (one.sha256, System(one.name, folder=one.folder)) for one in adapters}
        items = []
        for name, (sha256, system) in systems.items():
            made_of = {**self._model_key(), "adapter": sha256, "name": name}
            key = item_key(self.settings, self.engine, made_of, self.task, self.rows)
            if (found := read_scores(self.out / f"{key}.parquet")) is not None:
                self.scores[name] = found
                yield name, found
            else:
                items.append(Item(key, system, self.task, self.rows))
        if items:
            for item, rows in keep(self._started(adapters, len(items), once), items, self.out):
                self.scores[item.system.name] = rows
                yield item.system.name, rows

    def _started(self, adapters: Sequence[Adapter], items: int, once: bool) -> EnginePool:
        """The pool of engines; started anew where larger ranks or other modules than before are to be scored."""
        rank = max([self._fits[0], *(adapter.rank for adapter in adapters)])
        modules = self._fits[1].union(*(adapter.target_modules for adapter in adapters))
        if self._pool is None or (rank, modules) != self._fits:
            self.close()
            self._fits = rank, modules
            kind = EngineKind(self.model, None, self.settings, self.engine, rank, tuple(sorted(modules)))
            self._pool = EnginePool(kind, min(self.settings.workers, items) if once else self.settings.workers)
        return self._pool

    def close(self) -> None:
        """Let the engines go."""
        if self._pool:
            self._pool.close()
            self._pool = None

    def _model_key(self) -> Mapping[str, Any]:
        """What tells the base model from others without reading all of it."""
        return {"model": unit_key({"files": model_stats(Path(self.model.model))}), "dtype": self.model.dtype}


def linears(model: Path) -> dict[str, tuple[int, int]]:
    """Names and [in, out] of all Linear modules of a model, which is built without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).named_modules()
    return {name: (m.in_features, m.out_features) for name, m in modules if isinstance(m, torch.nn.Linear)}


def task_rows(config: Config, task: str, data: Path | None) -> list[Row]:
    """The rows of a file, or else the test rows of the config's clients.

    Raises:
        UserError: unknown task, or unreadable rows.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if data is not None:
        return read_jsonl(data, task)[: config.evaluation.test_rows]
    found = load_data(config.model_copy(update={"data": config.data.model_copy(update={"tasks": (task,)})}))
    return [row for client in found.clients for row in found.rows(task, "test", client.test)]


def table(scores: Mapping[str, Sequence[RowScore]], task: str) -> Table:
    """Adapters by score, with 95 % intervals over test rows; normalised scores where answers are compared."""
    n = max(map(len, scores.values()))
    shown = Table(
        title=f"{task}, {n} test rows",
        caption=f"{TASKS[task].metric} in percent, 95 % intervals",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    shown.add_column("adapter")
    for name in ("score", "interval", "normalised", "log-likelihood", "tokens", "cut off", "too long"):
        shown.add_column(name, justify="right")
    means = {name: float(np.mean([row.score for row in rows])) for name, rows in scores.items()}
    for name in sorted(scores, key=lambda name: (-means[name], name)):
        rows, mean = scores[name], means[name]
        half, log_likelihood = Z * standard_error(np.asarray([row.score for row in rows])), mean_log_likelihood(rows)
        normalised = mean_normalised(task, rows)
        shown.add_row(
            name,
            f"{mean:.1f}",
            f"{max(0.0, mean - half):.1f} to {min(100.0, mean + half):.1f}",
            "-" if normalised is None else f"{normalised:.1f}",
            "-" if log_likelihood is None else f"{log_likelihood:.2f}",
            f"{np.mean([row.tokens for row in rows]):.1f}",
            str(sum(row.finish == "length" for row in rows)),
            str(sum(row.finish == "too long" for row in rows)),
        )
    return shown
