"""GSM8K: grade-school word problems with a free answer (Figure 10)."""

from __future__ import annotations

import re
from decimal import Decimal

from gt_ray.tasks.base import ANSWER_MARK, Row, Task
from gt_ray.tasks.normalise import numbers

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class GSM8K(Task):
    name = "gsm8k"
    columns = ("question", "answer")
    metric = "accuracy"
    hub = ("openai/gsm8k", "main")

    def prompt(self, row: Row) -> str:
        return (
            "Let's think step by step and write your answer at the end in the format '#### {answer}'\n"
            f"{row['question']}"
        )

    def target(self, row: Row) -> str:
        return CALCULATOR_MARK.sub("", row["answer"])

    def references(self, row: Row) -> list[str]:
        return [row["answer"].rpartition(ANSWER_MARK)[2].strip()]

    def readings(self, text: str) -> list[Decimal]:
        return numbers(text.rpartition("=")[2]) or numbers(text)  # of an equation its result
