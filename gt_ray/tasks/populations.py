"""Populations: kinds of clients, by how their private data differ from the shadows'.

A new population is a line here and its name in `gt_ray.config.PopulationName`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, NamedTuple

from gt_ray.config import PopulationName


class Population(NamedTuple):
    """A kind of client.

    Attributes:
        domains: one that shadows have; a mixture of domains that they have, but no shadow mixes; or one that none has.
        size: private rows, as a share of a shadow's; none: as `clients.samples` says.
        steps: optimizer steps, as a multiple of a shadow's.
    """

    domains: Literal["seen", "mixture", "unseen"]
    size: float | None = None
    steps: int = 1


POPULATIONS: dict[PopulationName, Population] = {
    "seen": Population("seen"),
    "unseen_mixture": Population("mixture"),
    "unseen_composition": Population("unseen"),
    "small_data": Population("seen", size=0.1),
    "large_data": Population("seen", size=10, steps=10),
}


def shadow_mixtures(seen: Sequence[str]) -> list[tuple[str, ...]]:
    """The mixtures of domains that shadows may have: the first domain with each of the others."""
    return [(seen[0], other) for other in seen[1:]]


def domain_choices(population: Population, seen: Sequence[str], unseen: Sequence[str]) -> list[tuple[str, ...]]:
    """The domains that a client's rows may have; the clients of a population take turns.

    Args:
        seen: the domains of a task that public rows have.
        unseen: those that none has.
    """
    if population.domains == "mixture":
        mixtures = [chosen for n in range(2, len(seen) + 1) for chosen in combinations(seen, n)]
        return [mixture for mixture in mixtures if mixture not in shadow_mixtures(seen)]
    return [(domain,) for domain in (seen if population.domains == "seen" else unseen)]


def private_rows(population: Population, samples: int | None, shadow_samples: int) -> int | None:
    """Private rows of a client; none: all it has."""
    return samples if population.size is None else max(1, round(population.size * shadow_samples))
