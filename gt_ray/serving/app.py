"""The delta-generation endpoint on Ray Serve: `serve run serve_configs/local.yaml` (`import_path:
gt_ray.serving.app:build`).

Ingress replicas parse, check and pool what clients send (ingress.py), generator replicas turn it into LLM updates
(generator.py), and where `try_llm` is set, a Trial replica answers prompts with them (trial.py).
"""

# No `from __future__ import annotations`: Serve reads the type of `args`.
from typing import Any

from ray.serve import Application

from gt_ray.serving.generator import Generator
from gt_ray.serving.ingress import Ingress
from gt_ray.serving.settings import ServeSettings
from gt_ray.serving.trial import Trial


def build(args: ServeSettings) -> Application:
    """The application of a Serve config.

    Args:
        args: `args` of the config.
    """
    ingress: Any = Ingress
    generator: Any = Generator
    trial: Any = Trial  # deployments, since Serve's decorators have no types
    return ingress.bind(args, generator.bind(), trial.bind() if args.try_llm else None)
