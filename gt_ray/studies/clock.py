"""What a run takes: wall time and device time of every stage, what a client saves, what the provider spends.

Device time is that of GPUs held, or without GPUs of cores. Fine-tunes count with what their units say, whichever run
made them: a study that finds its shadows in the store reports what they cost, too.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gt_ray.config import OF_STUDY, Config
from gt_ray.curation.jobs import SIDES, FineTuneJob, model_settings
from gt_ray.curation.planner import gpus_of_an_actor
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.events import during, recording
from gt_ray.updates.files import write_atomically
from gt_ray.updates.store import UnitMeta, unit_key

WALL = "wall.json"


@contextmanager
def timed(study: Study, stage: str, devices: Callable[[Config], float] = lambda _: 1.0) -> Iterator[None]:
    """Add a stage's wall and device time to what earlier, interrupted runs of the same study took.

    Args:
        devices: that the stage holds; asked at its end, when Ray is connected if it was needed.
    """
    start = time.perf_counter()
    try:
        with recording(study.config.run_folder), during(stage, settings_key(study.config)):
            yield
    finally:
        wall_s = time.perf_counter() - start
        record = recorded(study.config)
        for kind, seconds in (("wall_s", wall_s), ("device_s", wall_s * devices(study.config))):
            record[kind][stage] = record[kind].get(stage, 0.0) + seconds
        content = json.dumps({"config": settings_key(study.config), **record})
        write_atomically(study.config.run_folder / WALL, content.encode())


def recorded(config: Config) -> dict[str, dict[str, float]]:
    """`wall_s` and `device_s` by stage, of runs with the same settings."""
    try:
        found = json.loads((config.run_folder / WALL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    same = found.get("config") == settings_key(config)
    return {kind: dict(found.get(kind, {})) if same else {} for kind in ("wall_s", "device_s")}


def devices_of_training(config: Config) -> float:
    """GPUs of trainers and LLM actors; without GPUs the cores of those who are more, for they work in turns."""
    training = config.grad_transformer.training
    actors = training.behaviour.workers if training.behaviour.steps else 0
    if not training.num_gpus:
        return _cores(max(training.workers, actors))
    return training.workers * training.num_gpus + actors * _gpus(config)


def devices_of_refinement(config: Config) -> float:
    """GPUs of the actors that refine, or cores."""
    refinement = config.grad_transformer.refinement
    actors = refinement.workers if refinement.steps else 1
    return actors * _gpus(config) or _cores(actors)


def devices_of_engines(config: Config) -> float:
    """GPUs of the engines that score, or cores."""
    settings = config.evaluation
    if settings.num_gpus == "auto":
        each = float(settings.vllm.tensor_parallel) if _gpus(config) else 0.0
    else:
        each = settings.num_gpus
    return settings.workers * each or _cores(settings.workers)


def _cores(processes: int) -> float:
    return float(min(processes, os.cpu_count() or 1))


def _gpus(config: Config) -> float:
    """GPUs of an actor with the LLM; 0 without GPUs, and where nothing had to be done, so that Ray is not there. One
    where it cannot be told."""
    import ray

    if not ray.is_initialized():
        return 0.0
    from gt_ray.cluster import nodes

    try:
        return gpus_of_an_actor(model_settings(config, "llm"), nodes())
    except UserError:  # others hold all GPUs, so that none could be looked at: a stage that is done stays so
        return 1.0


def times(study: Study, ceilings: Sequence[FineTuneJob]) -> dict[str, Any]:
    """`wall_s`, `device_s` and `times` of a report.

    `times` has the seconds behind Tables 7 and 8 and Figure 4: of a client the fine-tunes of both models on its own
    rows and the generation of its adapter, of the provider all shadows and the training of the Grad-Transformer without
    its controls. Fine-tunes share a device, each group's time is divided among its members: alone one takes longer.

    Args:
        ceilings: the fine-tunes of stage `ceilings`.
    """
    shadows = {side: study.shadow_jobs(side) for side in SIDES}
    clients = {side: study.client_jobs(side) for side in SIDES}
    metas: dict[str, UnitMeta] = {}

    def of(jobs: Sequence[FineTuneJob]) -> list[float]:
        keys = list(dict.fromkeys(job.key for job in jobs))
        metas.update((key, found.meta) for key, found in study.store.each(study.store.header, keys) if key not in metas)
        return [metas[key].device_s for key in keys]

    curated = {f"curate_{side}_s": sum(of(jobs)) for side, jobs in shadows.items()}
    alone = {side: of(jobs) for side, jobs in clients.items()}
    stages = recorded(study.config)
    stages["device_s"] |= {
        "curate": sum(curated.values()),
        "clients": sum(alone["tinylm"]),
        "ceilings": sum(of(ceilings)),
    }
    client = {f"{side}_fine_tune_s": sum(seconds) / len(seconds) for side, seconds in alone.items()}
    if "generate" in stages["device_s"]:
        client["generate_s"] = stages["device_s"]["generate"] / len(study.groups())
    provider = dict(curated)
    if "train" in stages["device_s"]:
        provider["train_s"] = stages["device_s"]["train"]
    names = Counter(meta.device for meta in metas.values() if meta.device)
    return {
        **stages,
        "times": {
            **({"device": names.most_common(1)[0][0]} if names else {}),
            "client": client,
            "provider": provider,
            "units": {side: len({job.key for job in jobs}) for side, jobs in shadows.items()},
        },
    }


def settings_key(config: Config) -> str:
    """Of what a run's times and events are of."""
    return unit_key(config.model_dump(mode="json", exclude=set(OF_STUDY)))
