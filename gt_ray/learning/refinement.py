"""Refinement of generated updates: a few optimizer steps towards what is known of the client without its data.

The teacher of a client is the geometric mean of two distributions of the next token: the LLM's with the update as it
was generated, and proxy-tuning's, T + fine-tuned S - S. Where both agree nothing happens; where the client's domain
occurs in no shadow, the TinyLM's update still shows what the client's rows taught it. Prompts are public rows of the
client's task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gt_ray.config import RefinementSettings
from gt_ray.learning.behaviour import Behaviour
from gt_ray.learning.samples import Sample


def proxy_share(distance: float | None, largest: float, settings: RefinementSettings) -> float:
    """Share of proxy-tuning in a client's teacher: `near` up to the usual distance from the shadows, `far` from the
    largest distance of a validation shadow on, linear between them.

    Args:
        distance: of the client, 1 is usual; none where it is not known: `far`.
        largest: of a validation shadow.
    """
    if distance is None:
        return settings.far
    way = max(0.0, distance - 1) / max(largest - 1, 1e-6)
    return settings.near + (settings.far - settings.near) * min(1.0, way)


def refine(
    behaviour: Behaviour,
    update_GLd: Tensor,
    teacher: Callable[[int], tuple[Tensor, Tensor]],
    rows: Callable[[int], Sequence[Sequence[Sample]]],
    settings: RefinementSettings,
) -> Tensor:
    """Refined updates [G, L, d].

    Args:
        behaviour: of the LLM, with the proxy as its only teacher (weight 1).
        update_GLd: as generated.
        teacher: what the TinyLM wears at a step to teach each of them [G, L, d], and the share [G] of proxy-tuning.
        rows: the samples of each update at a step; of their answers only the tokens before each one are read.
    """
    refined_GLd = update_GLd.clone()
    optimizer = torch.optim.AdamW([refined_GLd], lr=settings.learning_rate, weight_decay=0.0)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min((step + 1) / 3, 1 - step / settings.steps)
        update_S_GLd, share_G = teacher(step)
        _, refined_GLd.grad = behaviour(refined_GLd, rows(step), update_S_GLd=update_S_GLd, start=(update_GLd, share_G))
        optimizer.step()
    return refined_GLd
