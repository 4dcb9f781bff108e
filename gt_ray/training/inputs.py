"""Inputs of the behaviour loss: TinyLM updates that no one has fine-tuned, made of those of the shadows.

- Shadows of one kind (task, domain and learning mechanism) differ by noise: their rows, their order. (2a + 2b - c) / 3
  of three of them has the mean of the kind and the noise of a single shadow (4/9 + 4/9 + 1/9 = 1), and is new each
  time, so that the network cannot learn shadows by heart.
- Shadows of a mixture differ in its shares, so they get the noise of a kind of their task instead: a + t (b - c).
- Convex mixtures of two such updates fill the space between the kinds; their rows are mixed alike. So are inputs
  pooled over all tasks, as clients of different tasks are, where the settings say so.
- Some are made larger, as updates of clients are that fine-tune for longer than a shadow.
- Where the settings say so, they get Gaussian noise, as a private mechanism of the clients adds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gt_ray.config import BehaviourSettings
from gt_ray.training.behaviour import Draw

MIXED_SHADOWS = 0.25
"""Share of the inputs that are made of shadows of a mixture, where there are some."""
MOST_NOISE = 0.7
"""Largest t."""
NOISY = 0.5
"""Share of the inputs that get noise, where the settings say so."""
OF_NOISE = 0.6
"""Size of an update that AdamW makes of noise alone, over one without noise: of 16 steps, measured."""
MOST_POOLED = 5
"""Clients whose mean a noisy input is like."""
SCALED, LARGEST_SCALE = 0.3, 1.75
"""Share of the inputs that are made larger, and up to how much."""


Kind = tuple[str, str]
"""Domain and learning mechanism of a shadow."""


def noisy(update_Ld: Tensor, ratio: float, rms: float, pooled: int, shrinks: bool, seed: int) -> Tensor:
    """An update as the mean of those of so many clients is, each with Gaussian noise.

    Args:
        ratio: of a client's noise to `rms`, the size of numbers of updates.
        shrinks: with the noise its signal becomes smaller, as AdamW's steps are no larger for the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noise_Ld = torch.randn(update_Ld.shape, generator=generator).to(update_Ld.device)
    noisy_Ld = update_Ld + ratio * rms / math.sqrt(pooled) * noise_Ld
    return noisy_Ld / math.sqrt(1 + (ratio / OF_NOISE) ** 2) if shrinks else noisy_Ld


@dataclass(frozen=True)
class _Member:
    """Weights of shadows of one task in an update, and the shadows whose rows belong to it."""

    task: int
    weights: dict[int, float]
    rows_of: list[int]


class Inputs:
    """The last S updates of all training shadows.

    Args:
        S_KLd: updates.
        task_K: number of the task of each.
        kind_K: its domain, `a+b` for a mixture, and its learning mechanism.
        shadow_K: number of the shadow in the plan.
    """

    def __init__(self, S_KLd: Tensor, task_K: Sequence[int], kind_K: Sequence[Kind], shadow_K: Sequence[int]) -> None:
        self.S_KLd, self.shadow_K = S_KLd, list(shadow_K)
        self.rms, self.mean_Ld = float(S_KLd.square().mean().sqrt()), S_KLd.mean(0)
        self.kinds: dict[tuple[int, str, str], list[int]] = {}
        for k, (task, (domain, mechanism)) in enumerate(zip(task_K, kind_K, strict=True)):
            self.kinds.setdefault((task, domain, mechanism), []).append(k)
        self.tasks = sorted({task for task, _, _ in self.kinds})
        self.pure = [kind for kind in self.kinds if "+" not in kind[1]]
        self.mixed = [kind for kind in self.kinds if "+" in kind[1]]

    @classmethod
    def of(cls, batches: Iterable[dict[str, Tensor]], kinds: Sequence[Kind]) -> Inputs:
        """From the batches that `load_input_batch` makes; `kinds` are those of all shadows of the plan."""
        S, task, shadow = ([batch[name] for batch in batches] for name in ("S", "task", "shadow"))
        shadows = torch.cat(shadow).tolist()
        order = sorted(range(len(shadows)), key=shadows.__getitem__)  # whatever order the batches came in
        tasks = torch.cat(task).tolist()
        return cls(
            torch.cat(S).float()[order],
            [tasks[i] for i in order],
            [kinds[shadows[i]] for i in order],
            [shadows[i] for i in order],
        )

    def draw(self, G: int, settings: BehaviourSettings, rng: random.Random) -> tuple[Tensor, list[Draw]]:
        """G inputs [G, L, d], and the rows that each is tried on."""
        updates, draws = [], []
        for _ in range(G):
            first = self._member(rng)
            parts, over = [(1.0, first)], 1
            if settings.across and rng.random() < settings.across:
                others = [task for task in self.tasks if task != first.task]
                members = [first, *(self._member(rng, task) for task in rng.sample(others, len(others)))]
                parts = [(1 / len(members), member) for member in members]
                over = len(members) if settings.across_pooling == "sum" else 1
            elif rng.random() < settings.mix:
                share = rng.random()
                parts = [(share, first), (1 - share, self._member(rng, first.task))]
            update_Ld = torch.zeros_like(self.S_KLd[0])
            for share, member in parts:
                for k, weight in member.weights.items():
                    update_Ld += share * weight * self.S_KLd[k]
            if over > 1:  # the mean becomes mu + sum(u - mu)
                update_Ld = self.mean_Ld + over * (update_Ld - self.mean_Ld)
            if rng.random() < SCALED:
                update_Ld *= math.exp(rng.uniform(0, math.log(LARGEST_SCALE)))
            if settings.noise and rng.random() < NOISY:
                ratio, pooled = rng.uniform(0, settings.noise), rng.randint(1, MOST_POOLED)
                update_Ld = noisy(update_Ld, ratio, self.rms, pooled, settings.noise_shrinks, rng.randrange(2**62))
            updates.append(update_Ld)
            chosen = rng.choices(
                [member.rows_of for _, member in parts], [share for share, _ in parts], k=settings.rows
            )
            draws.append([(self.shadow_K[rng.choice(rows_of)], rng.randrange(2**31)) for rows_of in chosen])
        return torch.stack(updates), draws

    def _member(self, rng: random.Random, task: int | None = None) -> _Member:
        """An update like one of a new shadow, of any task or of one."""
        mixed = [kind for kind in self.mixed if task in (None, kind[0])]
        pure = [kind for kind in self.pure if task in (None, kind[0])]
        kind = rng.choice(mixed if mixed and (not pure or rng.random() < MIXED_SHADOWS) else pure)
        members = self.kinds[kind]
        if "+" not in kind[1] and len(members) >= 3:
            a, b, c = rng.sample(members, 3)
            return _Member(kind[0], {a: 2 / 3, b: 2 / 3, c: -1 / 3}, [a, b])
        a = rng.choice(members)
        weights = {a: 1.0}
        noisy = [other for other in self.pure if other[0] == kind[0] and len(self.kinds[other]) >= 2]
        if noisy:
            t = rng.uniform(0, MOST_NOISE)
            for k, sign in zip(rng.sample(self.kinds[rng.choice(noisy)], 2), (1, -1), strict=True):
                weights[k] = weights.get(k, 0.0) + sign * t
        return _Member(kind[0], weights, [a])
