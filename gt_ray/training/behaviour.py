"""LLM actors: the narrow door through which the frozen LLM takes part in training (decision 9).

They take generated adapters and say which rows they are tried on; they return losses and gradients of a few megabytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gt_ray.cluster import connect
from gt_ray.curation.jobs import model_settings
from gt_ray.curation.planner import gpus_of_an_actor
from gt_ray.curation.study import Study

Draw = list[tuple[int, int]]
"""The rows that one adapter is tried on: number of the shadow, number of the row, counted round among the shadow's."""


class LlmActor:
    """Keeps the LLM loaded; rows are encoded when they are first asked for."""

    def __init__(self, shared: dict[str, Any]) -> None:
        import ray

        from gt_ray.learning.behaviour import Behaviour
        from gt_ray.pairs.models import load_model, load_tokenizer

        torch.set_num_threads(1)
        self.study: Study = ray.get(shared["study"])
        config, roots, device = self.study.config, self.study.roots, "cuda" if ray.get_gpu_ids() else "cpu"
        self.tokenizer = load_tokenizer(config.pair.llm.model)
        weight = config.grad_transformer.training.behaviour.teacher
        proxy = (load_model(config.pair.tinylm, device), roots["tinylm"]) if weight else None
        self.behaviour = Behaviour(load_model(config.pair.llm, device), roots["llm"], proxy, weight)
        self.samples: dict[int, list[Any]] = {}

    def losses(self, update_GLd: Any, draws: list[Draw], update_S_GLd: Any) -> tuple[Any, Any]:
        """Loss [G] of each update on its rows, and gradients [G, L, d], as numpy arrays.

        Args:
            update_S_GLd: what the updates were generated from; none: the task's loss alone, without gradients.
        """
        groups = [[(rows := self._rows(k))[row % len(rows)] for k, row in draw] for draw in draws]
        inputs = None if update_S_GLd is None else torch.from_numpy(update_S_GLd.copy())
        loss_G, gradient_GLd = self.behaviour(
            torch.from_numpy(update_GLd.copy()), groups, update_S_GLd is not None, inputs
        )
        return loss_G.numpy(), None if gradient_GLd is None else gradient_GLd.numpy()

    def _rows(self, k: int) -> list[Any]:
        if k not in self.samples:
            from gt_ray.learning.samples import encode
            from gt_ray.tasks import TASKS

            shadow = self.study.shadows[k]
            rows = self.study.data.rows(shadow.task, shadow.split, shadow.positions)
            length = model_settings(self.study.config, "llm").fine_tune.max_length
            self.samples[k] = encode(self.tokenizer, TASKS[shadow.task], rows, length, f"shadow {k}")
        return self.samples[k]


class LlmActors:
    """The actors as one function. Travels to the trainers, who share them."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = actors

    @classmethod
    def start(cls, study: Study, workers: int) -> LlmActors:
        """Start actors, each on the GPUs that a fine-tune of the LLM takes.

        Without a GPU they work while the trainers wait for them, so they take no CPU of their own.
        """
        ray = connect()
        num_gpus = gpus_of_an_actor(model_settings(study.config, "llm"), ray.cluster_resources())
        kind = ray.remote(num_cpus=0, num_gpus=num_gpus, max_restarts=3, max_task_retries=3)(LlmActor)
        shared = {"study": ray.put(study)}
        return cls([kind.remote(shared) for _ in range(workers)])

    def __call__(
        self, update_GLd: Tensor, draws: Sequence[Draw], update_S_GLd: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Loss a target token of each update [G], and its gradient [G, L, d], on the update's device.

        Args:
            update_S_GLd: what the updates were generated from; none: the task's loss alone, without gradients.
        """
        import ray

        size = -(-len(draws) // len(self.actors))
        array = update_GLd.detach().float().cpu().numpy()
        inputs = None if update_S_GLd is None else update_S_GLd.float().cpu().numpy()
        parts = ray.get(
            [
                actor.losses.remote(
                    array[first : first + size],
                    list(draws[first : first + size]),
                    None if inputs is None else inputs[first : first + size],
                )
                for actor, first in zip(self.actors, range(0, len(draws), size), strict=False)
            ]
        )
        loss_G = torch.cat([torch.from_numpy(loss.copy()) for loss, _ in parts]).to(update_GLd.device)
        if inputs is None:
            return loss_G, None
        return loss_G, torch.cat([torch.from_numpy(part.copy()) for _, part in parts]).to(update_GLd.device)

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
