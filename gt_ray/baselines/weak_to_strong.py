"""The baselines of appendix C.2 by name: what each is made of. They read private data, the prompts of clients.

    w2s       the weak model's outputs as targets                          w2s.py
    conf      its distributions, and the LLM's own hardened predictions    conf.py, distributions.py
    vissup    the same, each token with a share of its own                 vissup.py, distributions.py

Their losses are the LLM's alone and need a weak model's distributions, so they are no learning mechanisms of a config:
the engine gets them with the fine-tune.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from gt_ray.baselines.conf import TEMPERATURE, Conf
from gt_ray.baselines.vissup import VisSup
from gt_ray.config import Config, WeakToStrongSettings
from gt_ray.learning.engine import MechanismMaker

WEAK_TO_STRONG = ("w2s", "conf", "vissup")
LOSSES = {"conf": Conf, "vissup": VisSup}


def asked_for(config: Config) -> list[str]:
    """Those of them that a config asks for, in their order."""
    return [name for name in WEAK_TO_STRONG if name in config.evaluation.baselines]


def made_of(baseline: str, settings: WeakToStrongSettings) -> dict[str, Any]:
    """What the key of a baseline's fine-tune says of it besides labels and `fine_tune`: `loss`, the loss and its
    parameters, and `distributions`, how those of the weak model are kept; nothing where targets are all there is."""
    losses = {
        "conf": ({"alpha": settings.alpha, "warmup": settings.warmup}, TEMPERATURE),
        "vissup": ({"temperature": settings.temperature}, settings.temperature),
    }
    if baseline not in losses:
        return {}
    parameters, temperature = losses[baseline]
    return {
        "loss": {"name": baseline, **parameters},
        "distributions": {"top_k": settings.top_k, "temperature": temperature},
    }


def mechanism_of_loss(made_by: Mapping[str, Any]) -> MechanismMaker | None:
    """The mechanism that the key of a fine-tune asks for in place of that of its settings, if it does."""
    if "loss" not in made_by:
        return None
    parameters = {name: value for name, value in made_by["loss"].items() if name != "name"}
    return partial(LOSSES[made_by["loss"]["name"]], **parameters)
