"""What the two dialogue summarisation benchmarks share (Figures 13 and 14)."""

from __future__ import annotations

from gt_ray.tasks.base import Row, Task


class DialogueSummary(Task):
    columns = ("dialogue", "summary")
    metric = "rouge1"

    def prompt(self, row: Row) -> str:
        return f"Summarize the following dialogue.\n{row['dialogue']}"

    def target(self, row: Row) -> str:
        summary: str = row["summary"]
        return summary

    def references(self, row: Row) -> list[str]:
        return [row["summary"]]
