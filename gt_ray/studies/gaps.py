"""The risks of section 5, measured on a finished run: the loss of generated adapters, row by row.

Of every training shadow, the adapter that is generated from its update, on its own rows (R_{D_p}), on fresh public rows
(R_mu~) and on private rows of clients (R_mu of a public update); of every client its adapter on its own rows (R_D).
Fresh and private rows have the domains of the shadow's own wherever there are such. Losses are nats a target token, the
mean over a row's target tokens. Adapters are as the Grad-Transformer generates them, before any refinement.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gt_ray.cluster import connect, nodes, room, total
from gt_ray.curation.jobs import model_settings
from gt_ray.curation.planner import gpus_of_an_actor
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.learning.memory import Parts
from gt_ray.learning.row_losses import by_row
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.progress import bar
from gt_ray.tasks import TASKS
from gt_ray.training.behaviour import load_behaviour

if TYPE_CHECKING:
    from gt_ray.learning.behaviour import Behaviour
    from gt_ray.learning.samples import Sample

Losses = NDArray[np.float64]
ADAPTERS = 8
"""In one pass."""
FRESH = "public-validation"
"""Rows that no shadow of training has; they have chosen the checkpoint, and nothing else."""


@dataclass(frozen=True)
class Draw:
    """An adapter and the rows that it is tried on.

    Attributes:
        adapter: its number; those of the shadows come first, then those of the clients.
        kind: own, fresh or private, or client.
    """

    adapter: int
    kind: str
    task: str
    split: str
    positions: list[int]


@dataclass(frozen=True)
class Gaps:
    """Losses [K, B] of B rows of each of K shadows, [C, B] of each of C clients.

    Attributes:
        shadows: numbers of the training shadows.
        draws: on which rows.
    """

    shadows: list[int]
    own_KB: Losses
    fresh_KB: Losses
    private_KB: Losses
    clients_CB: Losses
    draws: list[Draw]


def measure(study: Study, model: GradTransformer, rows: int) -> Gaps:
    """Losses on `rows` rows of each kind, or as many as the smallest shadow or client has.

    Raises:
        UserError: an earlier stage has not run.
    """
    shadows = training_shadows(study)
    jobs = study.shadow_jobs("tinylm")
    keys = [*(jobs[k].key for k in shadows), *(job.key for job in study.client_jobs("tinylm"))]
    if missing := study.store.missing(keys):
        raise UserError(
            f"{len(missing)} of {len(keys)} updates are missing from {study.config.store}, such as {missing[0]}; run "
            "`gt-ray curate` and `gt-ray generate` with the same preset and overrides first"
        )
    update_S_NLd = torch.stack([study.store.read(key)[0][-1] for key in keys])
    update_NLd = torch.cat([model.generate(part) for part in update_S_NLd.split(ADAPTERS)])
    draws = draw(study, shadows, rows)
    loss_DB = _losses(study, update_NLd, draws)

    def of(kind: str) -> Losses:
        return loss_DB[[i for i, one in enumerate(draws) if one.kind == kind]]

    return Gaps(shadows, of("own"), of("fresh"), of("private"), of("client"), draws)


def training_shadows(study: Study) -> list[int]:
    """Numbers of the shadows whose tuples train the Grad-Transformer."""
    return [i for i, one in enumerate(study.shadows) if not one.validation and not one.tinylm_only]


def draw(study: Study, shadows: Sequence[int], rows: int) -> list[Draw]:
    """What is tried on what, by a seed of its own."""
    data, clients = study.data, study.data.clients
    own = [study.shadows[k].positions for k in shadows]
    B = min([rows, *map(len, own), *(len(client.private) for client in clients)])
    rng = random.Random(f"gaps/{study.config.seed}")
    private: dict[str, list[int]] = {}
    for client in clients:
        private.setdefault(client.task, []).extend(client.private)
    pools = {(task, "private"): sorted(set(positions)) for task, positions in private.items()}
    found = []
    for k, positions in enumerate(own):
        shadow = study.shadows[shadows[k]]
        chosen = rng.sample(positions, B)
        domains = [row.get("domain", "") for row in data.rows(shadow.task, shadow.split, chosen)]
        found.append(Draw(k, "own", shadow.task, shadow.split, chosen))
        for kind, split in (("fresh", FRESH), ("private", "private")):
            pool = pools.setdefault((shadow.task, split), data.positions(shadow.task, split))
            of_pool = data.rows(shadow.task, split, pool)
            by_domain: dict[str, list[int]] = {}
            for position, row in zip(pool, of_pool, strict=True):
                by_domain.setdefault(row.get("domain", ""), []).append(position)
            found.append(
                Draw(k, kind, shadow.task, split, [rng.choice(by_domain.get(domain, pool)) for domain in domains])
            )
    for c, client in enumerate(clients):
        found.append(Draw(len(own) + c, "client", client.task, "private", rng.sample(client.private, B)))
    return found


def _losses(study: Study, update_NLd: Tensor, draws: Sequence[Draw]) -> Losses:
    """Loss [D, B] of every row of every draw, by actors with the LLM."""
    ray = connect()
    there = nodes()
    num_gpus = gpus_of_an_actor(model_settings(study.config, "llm"), there)
    most = room(0 if num_gpus else 1, num_gpus, there)
    if not most:
        raise UserError(f"the LLM needs {num_gpus:g} GPUs, this Ray cluster has {total(there, 'GPU'):g}")
    order = sorted(range(len(draws)), key=lambda i: draws[i].task)  # lengths of a task are alike
    groups = [order[first : first + ADAPTERS] for first in range(0, len(order), ADAPTERS)]
    kind = ray.remote(num_cpus=0 if num_gpus else 1, num_gpus=num_gpus, max_restarts=3, max_task_retries=3)(_Actor)
    shared = ray.put(study)
    actors = [kind.remote(shared) for _ in range(min(study.config.evaluation.workers, most, len(groups)))]
    pool = ray.util.ActorPool(actors)
    loss_DB = np.empty((len(draws), len(draws[0].positions)))
    try:
        for group in groups:
            update = update_NLd[[draws[i].adapter for i in group]].numpy()
            pool.submit(lambda actor, one: actor.losses.remote(*one), (group, update, [draws[i] for i in group]))
        with bar("bounds", len(draws)) as progress:
            while pool.has_next():
                group, found = pool.get_next_unordered()
                loss_DB[group] = found
                progress.advance(len(group))
    finally:
        for actor in actors:
            ray.kill(actor)
    return loss_DB


class _Actor:
    """Keeps the LLM loaded."""

    def __init__(self, study: Study) -> None:
        from gt_ray.pairs.models import load_tokenizer

        self.study = study
        self.tokenizer = load_tokenizer(study.config.pair.llm.model)
        self.behaviour = load_behaviour(study, weight=0.0)
        self.parts = Parts(ADAPTERS, self.behaviour.losses.device)

    def losses(self, group: list[int], update_GLd: Any, draws: list[Draw]) -> tuple[list[int], Any]:
        """The group as it was given, and the loss [G, B] of every row."""
        samples = [self._samples(one) for one in draws]
        updates = torch.from_numpy(update_GLd.copy())
        found = self.parts(len(draws), lambda part: row_losses(self.behaviour, updates[part], samples[part]))
        return group, torch.cat(found).double().numpy()

    def _samples(self, one: Draw) -> list[Sample]:
        from gt_ray.learning.samples import encode

        rows = self.study.data.rows(one.task, one.split, one.positions)
        length = model_settings(self.study.config, "llm").fine_tune.max_length
        return encode(self.tokenizer, TASKS[one.task], rows, length, f"{one.split} rows of {one.task}")


@torch.no_grad()
def row_losses(behaviour: Behaviour, update_GLd: Tensor, groups: Sequence[Sequence[Sample]]) -> Tensor:
    """Mean loss a target token [G, B] of each of B rows of each update."""
    losses = behaviour.losses
    batch = losses.batch(groups)
    with losses.short_cuts(), stacked(behaviour.model, behaviour.root, len(groups)) as parameters:
        add_updates(parameters, behaviour.layout, update_GLd)
        return by_row(losses(batch), groups)
