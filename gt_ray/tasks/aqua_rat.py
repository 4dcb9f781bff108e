"""AQuA-RAT: algebraic word problems with five options (Figure 9)."""

from __future__ import annotations

from gt_ray.tasks.base import ANSWER_MARK, Row, Task
from gt_ray.tasks.normalise import letters


class AquaRat(Task):
    name = "aqua_rat"
    columns = ("question", "options", "rationale", "correct")
    metric = "accuracy"
    hub = ("deepmind/aqua_rat", "raw")

    def prompt(self, row: Row) -> str:
        options = "\n".join(option.replace(")", ") ", 1) for option in row["options"])
        return (
            "Let's think step by step and write only the choice letter in the format '#### {answer}'\n"
            f"{row['question']}\nWhich of the following options is correct?\n{options}"
        )

    def target(self, row: Row) -> str:
        return f"{row['rationale']}\n{ANSWER_MARK} {row['correct']}"

    def references(self, row: Row) -> list[str]:
        return [row["correct"]]

    def readings(self, text: str) -> list[str]:
        return letters(text)
