"""Learning mechanisms: how an adapter is fine-tuned, and what that says of the privacy of its rows (section 5).

    sft         plain fine-tuning; no guarantee                                    base.py
    dp_sgd      (epsilon, delta)-differential privacy of every row (appendix D)    dp_sgd.py, accounting.py
    noisy_erm   plain fine-tuning, then noise on the update                        noisy_erm.py
    gibbs       stochastic gradient Langevin dynamics                              gibbs.py

A new mechanism is one file, its settings in `gt_ray.fine_tune_settings.Mechanism`, and one line here. The engine asks
nothing of it but what `Sft` has.
"""

from __future__ import annotations

from typing import Any

from gt_ray.config import FineTuneSettings
from gt_ray.learning.mechanisms.base import Sft
from gt_ray.learning.mechanisms.dp_sgd import DpSgd
from gt_ray.learning.mechanisms.gibbs import Gibbs
from gt_ray.learning.mechanisms.noisy_erm import NoisyErm

MECHANISMS: dict[str, type[Sft]] = {"sft": Sft, "dp_sgd": DpSgd, "noisy_erm": NoisyErm, "gibbs": Gibbs}


def mechanism_of(settings: FineTuneSettings) -> type[Sft]:
    """The class of the mechanism that settings name."""
    return MECHANISMS[settings.mechanism_name]


def statement(settings: FineTuneSettings, samples: int) -> dict[str, Any]:
    """What an update file states of its mechanism: name, and for differential privacy (epsilon, delta) and their count.

    Args:
        samples: rows that are fine-tuned on.

    Raises:
        UserError: so many rows do not do, or the wanted epsilon cannot be reached.
    """
    return mechanism_of(settings).statement(settings, samples)
