"""CommonsenseQA: a question and five choices (Figure 12, which leaves out the choices; they follow as in Figure 9)."""

from __future__ import annotations

from gt_ray.tasks.base import ANSWER_MARK, Row, Task
from gt_ray.tasks.normalise import letters


class CommonsenseQA(Task):
    name = "commonsense_qa"
    columns = ("question", "choices", "answerKey")
    metric = "accuracy"
    hub = ("tau/commonsense_qa",)

    def prompt(self, row: Row) -> str:
        choices = row["choices"]
        lines = "\n".join(f"{label}) {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
        return (
            "Answer only the choice letter in capital letter in the format: '#### {answer}'.\n"
            f"{row['question']}\n{lines}"
        )

    def target(self, row: Row) -> str:
        return f"{ANSWER_MARK} {row['answerKey']}"

    def references(self, row: Row) -> list[str]:
        return [row["answerKey"]]

    def readings(self, text: str) -> list[str]:
        return letters(text)
