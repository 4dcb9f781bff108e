"""The shadow plan: which rows, in which order, with which seed each fine-tune gets (decisions 1, 2 and 5).

Everything of shadow k follows from the plan and k alone, not from the model, so TinyLM and LLM fine-tunes of one shadow
are independent. From 40 shadows on it does not depend on their number either: raising `curation.shadows` keeps the
units that are there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from gt_ray.config import Config
from gt_ray.errors import UserError
from gt_ray.tasks.data import TaskData, fingerprint

PLAN_VERSION = 1
VALIDATION_EVERY = 5
LEAST_VALIDATION = 8


@dataclass(frozen=True)
class Shadow:
    """One public subset.

    Attributes:
        k: number of the shadow.
        domain: empty under plan=iid, or where the data names none.
        validation: whether it is held out from Grad-Transformer training.
        seed: order of its rows in a fine-tune.
        positions: its rows, as positions in the pool (task, split).
        rows: fingerprint of these rows.
    """

    k: int
    task: str
    domain: str
    validation: bool
    seed: int
    positions: list[int]
    rows: str

    @property
    def split(self) -> str:
        """The public split that its rows come from."""
        return "public-validation" if self.validation else "public-train"


def plan_shadows(config: Config, data: TaskData) -> list[Shadow]:
    """All shadows of a study.

    Every fifth shadow validates (of fewer than 40 more, for 8 of them, at most every second); tasks and domains take
    turns, in training and in validation shadows alike.

    Raises:
        UserError: a shadow needs more rows than there are, alone or, where the plan forbids overlap, with the others.
    """
    settings = config.curation
    every = min(VALIDATION_EVERY, max(2, settings.shadows // LEAST_VALIDATION))
    kinds = data.kinds() if settings.plan == "domains" else [(task, "") for task in config.data.tasks]
    available: dict[tuple[str, str, str], list[int]] = {}
    shadows = []
    for k in range(settings.shadows):
        validation = k % every == every - 1
        number = k // every if validation else k - k // every
        turn, kind = divmod(number, len(kinds))
        task, domain = kinds[kind]
        split = "public-validation" if validation else "public-train"
        place = (task, split, domain)
        if place not in available:
            available[place] = data.positions(*place)
            if not settings.overlap:
                random.Random(f"{place}/{settings.seed + config.seed}").shuffle(available[place])
        seed = (settings.seed + config.seed) * 1_000_003 + k
        first = 0 if settings.overlap else turn * settings.samples
        if first + settings.samples > len(available[place]):
            raise UserError(
                f"shadow {k} needs {first + settings.samples} {split} rows of {task} {domain}".rstrip()
                + f", but there are {len(available[place])}; lower curation.shadows or curation.samples"
                + ("" if settings.overlap else ", or allow curation.overlap")
            )
        if settings.overlap:
            positions = random.Random(f"shadow/{seed}").sample(available[place], settings.samples)
        else:
            positions = available[place][first : first + settings.samples]
        rows = fingerprint(task, data.rows(task, split, positions))
        shadows.append(Shadow(k, task, domain, validation, seed, positions, rows))
    return shadows


def plan_content(config: Config, shadow: Shadow) -> dict[str, Any]:
    """What the key of a unit says of the plan."""
    return {
        "plan": PLAN_VERSION,
        "kind": config.curation.plan,
        "overlap": config.curation.overlap,
        "samples": config.curation.samples,
        "k": shadow.k,
        "seed": shadow.seed,
        "task": shadow.task,
        "domain": shadow.domain,
        "split": shadow.split,
        "rows": shadow.rows,
    }
