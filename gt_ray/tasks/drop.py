"""DROP: discrete reasoning over a passage (Figure 11)."""

from __future__ import annotations

from gt_ray.tasks.base import ANSWER_MARK, Row, Task


class Drop(Task):
    name = "drop"
    columns = ("passage", "question", "answers_spans")
    metric = "accuracy"
    hub = ("ucinlp/drop",)

    def prompt(self, row: Row) -> str:
        return (
            "Let's think step by step and write the answer in the format '#### {answer}'\n"
            f"{row['passage']}\n{row['question']}"
        )

    def target(self, row: Row) -> str:
        return f"{ANSWER_MARK} {self.references(row)[0]}"

    def references(self, row: Row) -> list[str]:
        # Some spans have blanks around or line breaks inside, which no extracted answer has.
        return [" ".join(span.split()) for span in row["answers_spans"]["spans"]]
