"""Tasks: one file a benchmark (columns, prompt, target, answer extraction, metric) and the embedded data. No Ray here.

A new task is one file and one line in `TASKS`.
"""

from gt_ray.tasks.aqua_rat import AquaRat
from gt_ray.tasks.base import Row, Task
from gt_ray.tasks.commonsense_qa import CommonsenseQA
from gt_ray.tasks.dialogsum import DialogSum
from gt_ray.tasks.drop import Drop
from gt_ray.tasks.gsm8k import GSM8K
from gt_ray.tasks.samsum import SAMSum

TASKS: dict[str, Task] = {
    task.name: task for task in (AquaRat(), GSM8K(), CommonsenseQA(), Drop(), SAMSum(), DialogSum())
}

__all__ = ["TASKS", "Row", "Task"]
