"""Six procedural tasks that mirror the six benchmarks, for the embedded pair.

`rows(task, split, domain, seed, n)` yields distinct rows. Which split a scenario belongs to follows from a hash of its
prompt, so pretraining, public, private and test rows are disjoint by content whatever the seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

from gt_ray.errors import UserError
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded.problems import AXES, DOMAINS, GENERATORS

SPLITS = {"pretrain": 35, "public-train": 30, "public-validation": 7, "private": 16, "test": 12}
"""Share of scenarios in percent."""
MOST_MISSES = 2000
"""Draws in a row without a new scenario after which a split counts as exhausted."""

__all__ = ["AXES", "DOMAINS", "GENERATORS", "SPLITS", "rows", "scenarios", "split_of"]


def split_of(prompt: str) -> str:
    """The split that a scenario belongs to."""
    point = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    for split, share in SPLITS.items():
        if point < share:
            return split
        point -= share
    raise AssertionError("the shares of SPLITS sum to 100")


def scenarios(task: str, split: str, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Distinct scenarios of one split; each is the rows of all `DOMAINS` under one prompt.

    Raises:
        UserError: the task's little world has no further scenario for this split.
    """
    rng = random.Random(f"{task}/{split}/{seed}")
    seen: set[str] = set()
    misses = 0
    while misses < MOST_MISSES:
        by_domain = GENERATORS[task](rng)
        prompt = TASKS[task].prompt(by_domain[0])
        if prompt in seen or split_of(prompt) != split:
            misses += 1
            continue
        misses = 0
        seen.add(prompt)
        yield by_domain
    raise UserError(f"embedded task {task}, split {split}: only {len(seen)} distinct scenarios; ask for fewer rows")


def rows(task: str, split: str, domain: str, seed: int, n: int) -> list[dict[str, Any]]:
    """`n` distinct rows of one domain, with the columns of the task's Hub data set and `domain`."""
    index = DOMAINS.index(domain)
    return [{**by_domain[index], "domain": domain} for by_domain in itertools.islice(scenarios(task, split, seed), n)]
