"""What Ray Train makes good without a word: workers that died, after which all go on from the last checkpoint."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from gt_ray.errors import reason
from gt_ray.events import EventLog


class WorkerFailures(UserCallback):
    """Records failures of a training's workers; called in Ray Train's controller, a process of its own."""

    def __init__(self, log: EventLog, stage: str) -> None:
        self.log, self.stage = log, stage

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls it when workers have failed, by their rank."""
        for rank, error in worker_exceptions.items():
            self.log.write("progress", self.stage, note=f"worker {rank} failed: {reason(error)}")
