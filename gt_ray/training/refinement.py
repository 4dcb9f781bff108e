"""Refinement of generated updates on Ray: groups of clients on actors with both models, results in the store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gt_ray.cluster import connect
from gt_ray.curation.jobs import model_settings
from gt_ray.curation.planner import gpus_of_an_actor
from gt_ray.curation.study import Study
from gt_ray.learning.memory import Parts
from gt_ray.learning.refinement import refine
from gt_ray.progress import bar
from gt_ray.training.behaviour import load_behaviour
from gt_ray.updates.store import unit_key
from gt_ray.updates.unit import UnitMeta

SPLIT = "public-train"


@dataclass(frozen=True)
class Generated:
    """An update as it was generated, and what it was generated from.

    Attributes:
        task: whose public rows are the prompts.
        share: of proxy-tuning in its teacher.
    """

    task: str
    update_Ld: Tensor
    update_S_Ld: Tensor
    share: float


def refine_all(study: Study, wanted: Sequence[Generated]) -> list[Tensor]:
    """The refined updates [L, d] in the order of `wanted`; those that the store has are not computed again.

    Raises:
        UserError: the models fit no GPU of the cluster.
    """
    settings = study.config.grad_transformer.refinement
    made_by = [_made_by(study, one) for one in wanted]
    keys = [unit_key(content) for content in made_by]
    missing = [i for i, key in enumerate(keys) if not study.store.is_complete(key)]
    if missing:
        ray = connect()
        num_gpus = gpus_of_an_actor(model_settings(study.config, "llm"), ray.cluster_resources())
        kind = ray.remote(num_cpus=0 if num_gpus else 1, num_gpus=num_gpus, max_restarts=3, max_task_retries=3)(_Actor)
        shared = ray.put(study)
        groups = [missing[first : first + settings.adapters] for first in range(0, len(missing), settings.adapters)]
        actors = [kind.remote(shared) for _ in range(min(settings.workers, len(groups)))]
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


def _made_by(study: Study, one: Generated) -> dict[str, Any]:
    """All that a refined update depends on."""
    settings = study.config.grad_transformer.refinement.model_dump(
        mode="json", include={"steps", "rows", "learning_rate"}
    )
    digests = [hashlib.sha256(array.numpy().tobytes()).hexdigest() for array in (one.update_Ld, one.update_S_Ld)]
    data = study.config.data.model_dump(mode="json")
    roots = {side: root.hash for side, root in study.roots.items()}
    content = {"task": one.task, "updates": digests, "share": round(one.share, 4), "data": data, "roots": roots}
    return {"refinement": settings, "seed": study.config.seed, **content}


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
        samples = [self._samples(one.task) for one in wanted]

        def work(part: slice) -> Tensor:
            return refine(
                self.behaviour,
                torch.stack([one.update_Ld for one in wanted[part]]),
                torch.stack([one.update_S_Ld for one in wanted[part]]),
                torch.tensor([one.share for one in wanted[part]]),
                lambda step: [found[step * settings.rows : (step + 1) * settings.rows] for found in samples[part]],
                settings,
            )

        return group, torch.cat(self.parts(len(wanted), work)).numpy()

    def _samples(self, task: str) -> list[Any]:
        """Rows for all steps, of every domain that public rows have; the same for every client of a task."""
        import random

        from gt_ray.learning.samples import encode
        from gt_ray.tasks import TASKS

        settings, data = self.study.config.grad_transformer.refinement, self.study.data
        rng = random.Random(f"refinement/{task}/{self.study.config.seed}")
        positions = rng.choices(data.positions(task, SPLIT), k=settings.steps * settings.rows)
        length = model_settings(self.study.config, "llm").fine_tune.max_length
        return encode(self.tokenizer, TASKS[task], data.rows(task, SPLIT, positions), length, f"public rows of {task}")
