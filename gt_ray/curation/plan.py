"""The shadow plan: which rows, in which order, with which seed each fine-tune gets (decisions 1, 2 and 5).

Everything of shadow k follows from the plan and k alone, not from the model, so TinyLM and LLM fine-tunes of one shadow
are independent. From 40 shadows on it does not depend on their number either: raising `curation.shadows` keeps the
units that are there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gt_ray.config import Config, Mechanism, mechanism_label
from gt_ray.errors import UserError
from gt_ray.tasks.data import TaskData, fingerprint
from gt_ray.tasks.populations import shadow_mixtures

PLAN_VERSION = 1
VALIDATION_EVERY = 5
LEAST_VALIDATION = 8
LEAST_SHARE = 0.2
"""Of a mixture's rows, those of one of its two domains."""
TINYLM_ONLY = 100_000
"""Number of the first shadow of the TinyLM alone, so that raising `curation.shadows` keeps the units that there are."""


@dataclass(frozen=True)
class Shadow:
    """One public subset.

    Attributes:
        k: number of the shadow.
        domain: `a+b` for a mixture; empty under plan=iid, or where the data names none.
        validation: whether it is held out from Grad-Transformer training.
        seed: order of its rows in a fine-tune.
        positions: its rows, as positions in the pool (task, split).
        rows: fingerprint of these rows.
        tinylm_only: whether the LLM is not fine-tuned on it.
        mechanism: of the TinyLM's fine-tune, where those of the shadows take turns.
    """

    k: int
    task: str
    domain: str
    validation: bool
    seed: int
    positions: list[int]
    rows: str
    tinylm_only: bool = False
    mechanism: Mechanism | None = None

    @property
    def kind(self) -> tuple[str, str]:
        """Domain and learning mechanism: shadows of one task and kind differ by noise."""
        return self.domain, mechanism_label(self.mechanism or "sft")

    @property
    def split(self) -> str:
        """The public split that its rows come from."""
        return "public-validation" if self.validation else "public-train"


def validation_every(shadows: int) -> int:
    """Of so many shadows, which one in turn validates."""
    return min(VALIDATION_EVERY, max(2, shadows // LEAST_VALIDATION))


def plan_shadows(config: Config, data: TaskData) -> list[Shadow]:
    """All shadows of a study; those from `curation.shadows` on are of the TinyLM alone.

    Every fifth shadow validates (of fewer than 40 more, for 8 of them, at most every second; none of the TinyLM
    alone); tasks and domains take turns, in training and in validation shadows alike.

    Raises:
        UserError: a shadow needs more rows than there are, alone or, where the plan forbids overlap, with the others.
    """
    settings = config.curation
    every = validation_every(settings.shadows)
    pools = _Pools(config, data)
    kinds = data.kinds() if settings.plan != "iid" else [(task, "") for task in config.data.tasks]
    mixtures = _mixtures(data.kinds()) if settings.plan == "mixtures" else []
    shadows = []
    numbers = [*range(settings.shadows), *range(TINYLM_ONLY, TINYLM_ONLY + settings.tinylm_shadows)]
    for k in numbers:
        tinylm_only = k >= TINYLM_ONLY
        validation = not tinylm_only and k % every == every - 1
        if tinylm_only:
            number = k - TINYLM_ONLY
        else:
            number = k // every if validation else k - k // every
        seed = (settings.seed + config.seed) * 1_000_003 + k
        turn = number
        mixed = bool(mixtures) and number % 2 == 1
        if mixtures:
            number //= 2
        turns = mixtures if mixed else kinds
        task, domain = turns[number % len(turns)]
        split = "public-validation" if validation else "public-train"
        positions = pools.draw(task, split, domain, seed, f"shadow {k}")
        rows = fingerprint(task, data.rows(task, split, positions))
        mechanism = None
        if of_tinylm := settings.tinylm_mechanisms:
            # Shifted with each round of the kinds, so that every kind has every mechanism.
            mechanism = of_tinylm[(turn + turn // len(turns)) % len(of_tinylm)]
        shadows.append(Shadow(k, task, domain, validation, seed, positions, rows, tinylm_only, mechanism))
    return shadows


def _mixtures(kinds: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """All (task, mixture of domains) that shadows may have; the tasks take turns."""
    by_task: dict[str, list[str]] = {}
    for task, domain in kinds:
        by_task.setdefault(task, []).append(domain)
    mixed = [[(task, "+".join(names)) for names in shadow_mixtures(domains)] for task, domains in by_task.items()]
    return [kind for turn in itertools.zip_longest(*mixed) for kind in turn if kind]


class _Pools:
    """The public rows, and which of them are left where shadows must not share any."""

    def __init__(self, config: Config, data: TaskData) -> None:
        self.settings, self.seed, self.data = config.curation, config.curation.seed + config.seed, data
        self.available: dict[tuple[str, str, str], list[int]] = {}
        self.taken: dict[tuple[str, str, str], int] = {}

    def draw(self, task: str, split: str, mixture: str, seed: int, name: str) -> list[int]:
        """Positions of a shadow's rows; of a mixture a random share from each domain, at least a fifth."""
        rng = random.Random(f"shadow/{seed}")
        domains = mixture.split("+") if self.settings.plan == "mixtures" else [mixture]
        n = self.settings.samples
        first = n if len(domains) == 1 else round(n * rng.uniform(LEAST_SHARE, 1 - LEAST_SHARE))
        positions: list[int] = []
        for domain, count in zip(domains, (first, n - first), strict=False):
            positions += self._of_domain((task, split, domain), count, rng, name)
        return positions

    def _of_domain(self, place: tuple[str, str, str], n: int, rng: random.Random, name: str) -> list[int]:
        if place not in self.available:
            self.available[place] = self.data.positions(*place)
            if not self.settings.overlap:
                random.Random(f"{place}/{self.seed}").shuffle(self.available[place])
        first = 0 if self.settings.overlap else self.taken.get(place, 0)
        if first + n > len(self.available[place]):
            task, split, domain = place
            raise UserError(
                f"{name} needs {first + n} {split} rows of {task} {domain}".rstrip()
                + f", but there are {len(self.available[place])}; lower curation.shadows or curation.samples"
                + ("" if self.settings.overlap else ", or allow curation.overlap")
            )
        if self.settings.overlap:
            return rng.sample(self.available[place], n)
        self.taken[place] = first + n
        return self.available[place][first : first + n]


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
