"""Running fine-tunes as a Ray Data pipeline: one row per (model, k), an actor pool that loads each base model once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gt_ray.cluster import connect
from gt_ray.config import Config
from gt_ray.curation.jobs import SIDES, FineTuneJob, Side, client_job, model_settings, public_job, shadow_job
from gt_ray.curation.plan import Shadow, plan_shadows
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import Root, make_root
from gt_ray.progress import bar, say
from gt_ray.tasks import TASKS
from gt_ray.tasks.data import TaskData, load_data
from gt_ray.updates.store import UnitMeta, UpdateStore


@dataclass(frozen=True)
class Study:
    """What every stage of a run starts from: config, rows, roots, shadows, store."""

    config: Config
    data: TaskData
    roots: dict[Side, Root]
    shadows: list[Shadow]
    store: UpdateStore

    @classmethod
    def load(cls, config: Config) -> Study:
        """Check all input before any work starts.

        Raises:
            UserError: models, data or plan are not usable.
        """
        config = config.absolute()
        roots = load_roots(config)
        data = load_data(config)
        return cls(config, data, roots, plan_shadows(config, data), UpdateStore(config.store))

    def shadow_jobs(self, side: Side) -> list[FineTuneJob]:
        """The fine-tunes of all shadows of one model, in the order of the shadows."""
        return [shadow_job(self.config, self.roots[side], side, shadow) for shadow in self.shadows]

    def client_jobs(self, side: Side) -> list[FineTuneJob]:
        """The fine-tunes of all clients, in the order of the clients."""
        return [client_job(self.config, self.data, self.roots[side], side, client) for client in self.data.clients]

    def public_jobs(self) -> list[FineTuneJob]:
        """LLM fine-tunes on each task's public rows (control public_sft)."""
        return [public_job(self.config, self.data, self.roots["llm"], "llm", task) for task in self.config.data.tasks]


def load_roots(config: Config) -> dict[Side, Root]:
    """The pair's roots, cached in the store."""
    return {side: make_root(model_settings(config, side), config.store / "roots") for side in SIDES}


class FineTuner:
    """Ray Data actor: fine-tunes a group of shadows together and writes them to the store."""

    def __init__(self, shared: dict[str, Any]) -> None:
        import ray
        import torch

        torch.set_num_threads(1)
        study: Study = ray.get(shared["study"])
        self.config, self.roots, self.data, self.store = study.config, study.roots, study.data, study.store
        self.device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.loaded: tuple[Side, Any, Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One block of rows: a group of fine-tunes of one model."""
        from gt_ray.learning.samples import encode
        from gt_ray.learning.sft import fine_tune

        jobs = [json.loads(text) for text in batch["job"]]
        side: Side = jobs[0]["side"]
        settings = model_settings(self.config, side).fine_tune
        model, tokenizer = self._load(side)
        datasets = [
            encode(
                tokenizer,
                TASKS[job["task"]],
                self.data.rows(job["task"], job["split"], job["positions"]),
                settings.max_length,
                where=f"{job['name']}, {job['task']}",
            )
            for job in jobs
        ]
        start = time.perf_counter()
        results = fine_tune(
            model,
            self.roots[side],
            datasets,
            [job["seed"] for job in jobs],
            settings,
            jobs[0]["snapshot_steps"],
        )
        wall_s = (time.perf_counter() - start) / len(jobs)
        for job, samples, result in zip(jobs, datasets, results, strict=True):
            meta = UnitMeta(
                self.roots[side].hash,
                job["made_by"],
                job["snapshot_steps"],
                len(samples),
                result.losses,
                wall_s,
            )
            self.store.write(job["key"], result.snapshots_JLd, meta)
        return {"key": [job["key"] for job in jobs], "wall_s": [wall_s] * len(jobs)}

    def _load(self, side: Side) -> tuple[Any, Any]:
        if self.loaded is None or self.loaded[0] != side:
            self.loaded = None  # frees the other model first
            settings = model_settings(self.config, side)
            self.loaded = (side, load_model(settings, self.device), load_tokenizer(settings.model))
        return self.loaded[1], self.loaded[2]


def run_fine_tunes(study: Study, jobs: Sequence[FineTuneJob], stage: str) -> int:
    """Run those jobs whose unit the store lacks; finished units are kept whatever happens.

    Returns:
        How many were run.
    """
    study.store.sweep()
    keys = set(study.store.missing([job.key for job in jobs]))
    if not keys:
        say(f"{stage}: nothing to do, all {len(jobs)} units are in {study.config.store}")
        return 0
    say(f"{stage}: {len(keys)} of {len(jobs)} units to fine-tune")
    ray = connect()
    import pyarrow as pa

    # Inside a dictionary a reference stays one, so that every actor does not carry all rows in its arguments.
    shared = {"study": ray.put(study)}
    done = 0
    with bar(stage, len(keys)) as progress:
        for num_gpus in sorted({model_settings(study.config, job.side).num_gpus for job in jobs}):
            group = [job for job in jobs if model_settings(study.config, job.side).num_gpus == num_gpus]
            # A block is a group of one model and task: lengths are alike, and the actor trains the block at once.
            # Groups do not depend on what is missing, so a unit that is redone has the neighbours that it had before.
            wanted = [members for members in _groups(study, group) if any(job.key in keys for job in members)]
            if not wanted:
                continue
            blocks = [pa.table({"job": [json.dumps(job.as_row()) for job in members]}) for members in wanted]
            dataset = ray.data.from_arrow(blocks).map_batches(
                FineTuner,
                fn_constructor_args=(shared,),
                batch_size=None,
                num_gpus=num_gpus or None,
                num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=min(study.config.curation.workers, len(blocks))),
            )
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                finished = len(keys.intersection(batch["key"]))
                done += finished
                progress.advance(finished)
    return done


def _groups(study: Study, jobs: Sequence[FineTuneJob]) -> list[list[FineTuneJob]]:
    """Jobs that one actor trains together: same model, snapshots and task, up to `adapters_at_once`."""
    by_kind: dict[tuple[Any, ...], list[FineTuneJob]] = {}
    for job in jobs:
        by_kind.setdefault((SIDES.index(job.side), tuple(job.snapshot_steps), job.task), []).append(job)
    groups = []
    for kind in sorted(by_kind, key=lambda kind: -kind[0]):
        size = model_settings(study.config, by_kind[kind][0].side).adapters_at_once
        groups += [by_kind[kind][i : i + size] for i in range(0, len(by_kind[kind]), size)]
    return groups
