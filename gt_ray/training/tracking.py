"""Where the measures of a training go: TensorBoard, MLflow or Weights & Biases, written by the first worker alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gt_ray.errors import require

Log = Callable[[Mapping[str, float], int], None]
"""Writes measures by name, of an optimizer step."""


@contextmanager
def tracked(kind: str, folder: Path, name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    """A run of a tracker.

    Args:
        kind: tensorboard; mlflow, by its environment (MLFLOW_TRACKING_URI), else into `folder`; wandb, by its
            environment (WANDB_MODE, WANDB_PROJECT), with files in `folder`.
        name: of the run; one of the same name goes on.
        settings: what the run is recorded with.

    Raises:
        UserError: the tracker is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "mlflow":
        mlflow: Any = require("mlflow", "track")
        if not mlflow.environment_variables.MLFLOW_TRACKING_URI.get():
            mlflow.set_tracking_uri(f"sqlite:///{folder.resolve()}/mlflow.db")
        mlflow.set_experiment("gt-ray")
        known = mlflow.search_runs(filter_string=f"tags.`mlflow.runName` = '{name}'", output_format="list")
        with mlflow.start_run(run_id=known[0].info.run_id if known else None, run_name=name):
            if not known:
                mlflow.log_params(dict(settings))
            yield lambda metrics, step: mlflow.log_metrics(_finite(metrics), step=step)
    elif kind == "wandb":
        wandb: Any = require("wandb", "track")
        known_as = hashlib.sha256(name.encode()).hexdigest()[:16]
        kept = {"dir": str(folder), "config": dict(settings), "id": known_as, "resume": "allow"}
        with wandb.init(project="gt-ray", name=name, **kept) as run:
            yield lambda metrics, step: run.log(dict(metrics), step=step)
    else:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as writer:

            def log(metrics: Mapping[str, float], step: int) -> None:
                for metric, value in metrics.items():
                    writer.add_scalar(f"train/{metric}", value, step)

            yield log


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
