"""Refinement of generated updates on Ray: groups of clients on actors with both models, results in the store."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gt_ray.baselines.proxy_tuning import require_shared_vocabulary
from gt_ray.cluster import Nodes, connect, nodes, room, total
from gt_ray.curation.jobs import model_settings
from gt_ray.curation.planner import gpus_of_an_actor
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.learning.memory import Parts, is_out_of_memory
from gt_ray.learning.refinement import refine
from gt_ray.progress import bar
from gt_ray.tasks.data import fingerprint
from gt_ray.training.behaviour import load_behaviour
from gt_ray.updates.store import unit_key
from gt_ray.updates.unit import UnitMeta

SPLIT = "public-train"
VERSION = 2
"""Of what refinement does; results of another one are not taken from the store."""


@dataclass(frozen=True)
class Proxy:
    """What teaches on public rows of one task.

    Attributes:
        update_S_Ld: that the TinyLM wears.
        share: of proxy-tuning in the teacher.
    """

    task: str
    update_S_Ld: Tensor
    share: float


@dataclass(frozen=True)
class Generated:
    """An update as it was generated, and what it was generated from.

    Attributes:
        generator: fingerprint of the Grad-Transformer.
        proxies: one for each task of its clients; optimizer steps take turns. An update that was pooled over tasks is
            no use to the TinyLM, so each task has that of its own clients.
    """

    generator: str
    update_Ld: Tensor
    update_S_Ld: Tensor
    proxies: tuple[Proxy, ...]

    def proxy(self, step: int) -> Proxy:
        """Of an optimizer step."""
        return self.proxies[step % len(self.proxies)]


def refine_all(study: Study, wanted: Sequence[Generated]) -> list[Tensor]:
    """The refined updates [L, d] in the order of `wanted`; those that the store has are not computed again.

    Raises:
        UserError: the models have different vocabularies, or fit no GPU of the cluster.
    """
    settings = study.config.grad_transformer.refinement
    require_shared_vocabulary(study.config.pair, f"refinement.steps={settings.steps}")
    made_by = _made_by(study, wanted)
    keys = [unit_key(content) for content in made_by]
    missing = [i for i, key in enumerate(keys) if not study.store.is_complete(key)]
    if missing:
        ray = connect()
        num_gpus, most = _room(study, nodes())
        kind = ray.remote(num_cpus=0 if num_gpus else 1, num_gpus=num_gpus, max_restarts=3, max_task_retries=3)(_Actor)
        shared = ray.put(study)
        groups = [missing[first : first + settings.adapters] for first in range(0, len(missing), settings.adapters)]
        actors = [kind.remote(shared) for _ in range(min(settings.workers, most, len(groups)))]
        pool = ray.util.ActorPool(actors)
        try:
            for group in groups:
                pool.submit(lambda actor, one: actor.refine.remote(*one), (group, [wanted[i] for i in group]))
            with bar("refine", len(missing)) as progress:
                while pool.has_next():
                    group, refined = pool.get_next_unordered()
                    for i, update_Ld in zip(group, refined, strict=True):
                        meta = UnitMeta(study.roots["llm"].hash, made_by[i], [0], samples=settings.rows)
                        study.store.write(keys[i], torch.from_numpy(update_Ld.copy())[None], meta)
                        progress.advance()
        finally:
            for actor in actors:
                ray.kill(actor)
    return [study.store.read(key)[0][-1] for key in keys]


def are_refined(study: Study, wanted: Sequence[Generated]) -> bool:
    """Whether the store has all of the refined updates."""
    return all(study.store.is_complete(unit_key(content)) for content in _made_by(study, wanted))


def _room(study: Study, nodes: Nodes) -> tuple[float, int]:
    """GPUs of an actor, and how many actors the cluster has room for: a pool waits for ever for one that has none."""
    num_gpus = gpus_of_an_actor(model_settings(study.config, "llm"), nodes)
    found = room(0 if num_gpus else 1, num_gpus, nodes)
    if not found:
        raise UserError(
            f"refinement needs actors of {num_gpus:g} GPUs, but this Ray cluster has {total(nodes, 'GPU'):g}; "
            "lower pair.llm.num_gpus, or set refinement.steps=0"
        )
    return num_gpus, found


def _made_by(study: Study, wanted: Sequence[Generated]) -> list[dict[str, Any]]:
    """All that refined updates depend on. What was generated is named by what it was generated from: its own bits may
    differ from machine to machine."""
    refinement = study.config.grad_transformer.refinement.model_dump(mode="json", exclude={"adapters", "workers"})
    common = {
        "refinement": refinement,
        "version": VERSION,
        "roots": {side: root.hash for side, root in study.roots.items()},
        "dtypes": {side: model_settings(study.config, side).dtype for side in study.roots},
    }
    prompts = {
        task: fingerprint(task, study.data.rows(task, SPLIT, _positions(study, task)))
        for task in {proxy.task for one in wanted for proxy in one.proxies}
    }
    found = []
    for one in wanted:
        of_tasks = [prompts[proxy.task] for proxy in one.proxies]
        content = {**common, "generator": one.generator, "update_S": _hash(one.update_S_Ld)}
        if len(of_tasks) == 1:
            found.append({**content, "prompts": of_tasks[0]})
        else:
            found.append({**content, "prompts": of_tasks, "proxies": [_hash(p.update_S_Ld) for p in one.proxies]})
    return found


def _hash(update_Ld: Tensor) -> str:
    return hashlib.sha256(update_Ld.numpy().tobytes()).hexdigest()


def _positions(study: Study, task: str) -> list[int]:
    """Rows for all steps, of every domain that public rows have; the same for every client of a task."""
    settings = study.config.grad_transformer.refinement
    rng = random.Random(f"refinement/{task}/{study.config.seed}")
    return rng.choices(study.data.positions(task, SPLIT), k=settings.steps * settings.rows)


class _Actor:
    """Keeps both models loaded."""

    def __init__(self, study: Study) -> None:
        from gt_ray.pairs.models import load_tokenizer

        self.study = study
        self.tokenizer = load_tokenizer(study.config.pair.llm.model)
        self.behaviour = load_behaviour(study, weight=1.0)
        self.parts = Parts(study.config.grad_transformer.refinement.adapters, self.behaviour.losses.device)

    def refine(self, group: list[int], wanted: list[Generated]) -> tuple[list[int], Any]:
        """The group as it was given, and its refined updates [G, L, d] as a numpy array."""
        settings = self.study.config.grad_transformer.refinement
        samples = [self._samples([proxy.task for proxy in one.proxies]) for one in wanted]

        def work(part: slice) -> Tensor:
            def teacher(step: int) -> tuple[Tensor, Tensor]:
                proxies = [one.proxy(step) for one in wanted[part]]
                update_S_GLd = torch.stack([proxy.update_S_Ld for proxy in proxies])
                return update_S_GLd, torch.tensor([proxy.share for proxy in proxies])

            return refine(
                self.behaviour,
                torch.stack([one.update_Ld for one in wanted[part]]),
                teacher,
                lambda step: [found[step * settings.rows : (step + 1) * settings.rows] for found in samples[part]],
                settings,
            )

        try:
            return group, torch.cat(self.parts(len(wanted), work)).numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"one adapter on refinement.rows={settings.rows} rows does not fit into memory; lower refinement.rows, "
                "or set pair.llm.gradient_checkpointing=true"
            ) from error

    def _samples(self, tasks: Sequence[str]) -> list[Any]:
        """Rows for all steps; steps of several tasks take turns, as their proxies do."""
        from gt_ray.learning.samples import encode
        from gt_ray.tasks import TASKS

        length = model_settings(self.study.config, "llm").fine_tune.max_length
        found = []
        for task in tasks:
            rows = self.study.data.rows(task, SPLIT, _positions(self.study, task))
            found.append(encode(self.tokenizer, TASKS[task], rows, length, f"public rows of {task}"))
        size = self.study.config.grad_transformer.refinement.rows
        return [found[i // size % len(found)][i] for i in range(len(found[0]))]
