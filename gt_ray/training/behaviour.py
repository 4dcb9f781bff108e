"""LLM actors: the narrow door through which the frozen LLM takes part in training (decision 9).

They take generated adapters and say which rows they are tried on; they return losses and gradients of a few megabytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gt_ray.cluster import connect, nodes, own_devices, room, total
from gt_ray.curation.jobs import model_settings
from gt_ray.curation.planner import gpus_of_an_actor
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.learning.memory import Parts
from gt_ray.learning.samples import Sample, encode
from gt_ray.tasks import TASKS

if TYPE_CHECKING:
    from gt_ray.learning.behaviour import Behaviour

CACHED_ROWS = 2**14
"""Rows that an actor keeps as tokens; all of a large study would be gigabytes."""
Draw = list[tuple[int, int]]
"""The rows that one adapter is tried on: number of the shadow, number of the row, counted round among the shadow's."""


def load_behaviour(study: Study, weight: float) -> Behaviour:
    """The LLM of a study in an actor, on its GPUs if it has some; with the TinyLM where proxy-tuning has a weight."""
    from gt_ray.learning.behaviour import Behaviour
    from gt_ray.learning.engine import checkpoint_layers
    from gt_ray.pairs.models import load_model

    torch.set_num_threads(1)
    pair, roots = study.config.pair, study.roots
    model = load_model(pair.llm, own_devices())
    beside_head = model.get_output_embeddings().weight.device
    proxy = (load_model(pair.tinylm, beside_head), roots["tinylm"]) if weight else None
    if pair.llm.gradient_checkpointing:
        checkpoint_layers(model)
    return Behaviour(model, roots["llm"], proxy, weight)


class LlmActor:
    """Keeps the LLM loaded."""

    def __init__(self, shared: dict[str, Any]) -> None:
        import ray

        from gt_ray.pairs.models import load_tokenizer

        self.study: Study = ray.get(shared["study"])
        training = self.study.config.grad_transformer.training
        self.tokenizer = load_tokenizer(self.study.config.pair.llm.model)
        self.behaviour = load_behaviour(self.study, training.behaviour.teacher)
        self.parts = Parts(training.behaviour.adapters, self.behaviour.losses.device)
        self._encoded = lru_cache(CACHED_ROWS)(self._encode)  # every step draws from the same rows

    def losses(self, update_GLd: Any, draws: list[Draw], update_S_GLd: Any) -> tuple[Any, Any]:
        """Loss [G] of each update on its rows, and gradients [G, L, d], as numpy arrays.

        In parts of as many updates as a training step has, fewer after running out of memory.

        Args:
            update_S_GLd: what the updates were generated from; none: the task's loss alone, without gradients.
        """
        groups = [[self._sample(k, row) for k, row in draw] for draw in draws]
        updates = torch.from_numpy(update_GLd.copy())
        inputs = None if update_S_GLd is None else torch.from_numpy(update_S_GLd.copy())
        parts = self.parts(
            len(groups),
            lambda part: self.behaviour(
                updates[part], groups[part], inputs is not None, None if inputs is None else inputs[part]
            ),
        )
        gradients = [gradient_GLd for _, gradient_GLd in parts if gradient_GLd is not None]
        return torch.cat([loss_G for loss_G, _ in parts]).numpy(), torch.cat(gradients).numpy() if gradients else None

    def _sample(self, k: int, row: int) -> Sample:
        """A row of a shadow."""
        shadow = self.study.shadows[k]
        return self._encoded(shadow.task, shadow.split, shadow.positions[row % len(shadow.positions)])

    def _encode(self, task: str, split: str, position: int) -> Sample:
        rows = self.study.data.rows(task, split, [position])
        length = model_settings(self.study.config, "llm").fine_tune.max_length
        return encode(self.tokenizer, TASKS[task], rows, length, f"{task}, {split}[{position}],")[0]


class LlmActors:
    """The actors as one function. Travels to the trainers, who share them.

    Args:
        shared: what the actors are made from; it has to live as long as one may be made again on another node.
    """

    def __init__(self, actors: Sequence[Any], shared: Any = None) -> None:
        self.actors, self._shared = actors, shared

    @classmethod
    def start(cls, studies: Sequence[Study], workers: int) -> list[LlmActors]:
        """Start actors for each study's pair, each on the GPUs that a fine-tune of its LLM takes.

        Pairs of one LLM share their actors, unless the TinyLM teaches. Without a GPU actors work while the trainers
        wait for them, so they take no CPU of their own.

        Raises:
            UserError: the cluster has too few GPUs for them and the trainers.
        """
        ray = connect()
        found, training = nodes(), studies[0].config.grad_transformer.training
        served = [one.config.pair if training.behaviour.teacher else one.config.pair.llm for one in studies]
        kinds = dict(zip(served, studies, strict=True))
        num_gpus = {kind: gpus_of_an_actor(model_settings(one.config, "llm"), found) for kind, one in kinds.items()}
        wanted = workers * sum(num_gpus.values()) + (training.min_workers or training.workers) * training.num_gpus
        if wanted > (there := total(found, "GPU")):
            each = " and ".join(f"{number:g}" for number in num_gpus.values())
            raise UserError(
                f"{workers} LLM actors of {each} GPUs and {training.workers} trainers of {training.num_gpus:g} "
                f"need {wanted:g} GPUs, but this Ray cluster has {there:g}; lower behaviour.workers, "
                "training.num_gpus or pair.llm.num_gpus"
            )
        for number in num_gpus.values():
            if number > 1 and (places := room(0, number, found)) < workers:
                raise UserError(
                    f"{workers} LLM actors of {number:g} GPUs of one node each, but the nodes of this Ray cluster have "
                    f"room for {places}; lower behaviour.workers"
                )
        started = {}
        for kind, study in kinds.items():
            actor = ray.remote(num_cpus=0, num_gpus=num_gpus[kind], max_restarts=3, max_task_retries=3)(LlmActor)
            shared = {"study": ray.put(study)}
            started[kind] = cls([actor.remote(shared) for _ in range(workers)], shared)
        return [started[kind] for kind in served]

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
