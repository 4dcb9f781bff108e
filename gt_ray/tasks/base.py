"""What a task is: columns of its data, prompt, target, answer extraction and metric.

A task is the same for real and for embedded data: embedded rows (`gt_ray.tasks.embedded`) have the Hub columns of the
benchmark they mirror, so one prompt function serves both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from gt_ray.errors import require
from gt_ray.tasks.normalise import phrases

Row = Mapping[str, Any]
"""One row of a task's data: the columns of its Hub data set, and for embedded data a `domain`."""

ANSWER_MARK = "####"


class Task(ABC):
    """One benchmark. Subclasses fill in the class variables, `prompt`, `target` and `references`."""

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    """Columns that a data file must have."""
    metric: ClassVar[Literal["accuracy", "rouge1"]]
    hub: ClassVar[tuple[str, ...]]
    """Arguments of `datasets.load_dataset` for the Hub data set."""

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """The user's turn, before the chat template (Figures 9-14)."""

    @abstractmethod
    def target(self, row: Row) -> str:
        """The assistant's turn that fine-tuning learns (ground truth answer of Figures 9-14)."""

    @abstractmethod
    def references(self, row: Row) -> list[str]:
        """Accepted final answers (accuracy) or the reference summary (ROUGE-1)."""

    def extract(self, output: str) -> str:
        """The final answer in a model's output: what follows the last `####`; a summary is the whole output."""
        if self.metric == "rouge1":
            return output.strip()
        _, mark, tail = output.rpartition(ANSWER_MARK)
        return tail.strip().split("\n", 1)[0].strip() if mark else ""

    def score(self, output: str, row: Row) -> float:
        """Score of one output in percent: exact match of the extracted answer, or ROUGE-1 F-measure (Table 4)."""
        answer = self.extract(output)
        if self.metric == "rouge1":
            return max(rouge1(reference, answer) for reference in self.references(row))
        return 100.0 * (answer in self.references(row))

    def readings(self, text: str) -> Sequence[object]:
        """The answers in a text, freed of how they are written: its lines, where a task has no closer notion."""
        return phrases(text)

    def normalised(self, output: str, row: Row) -> float:
        """`score` of answers freed of how they are written (`gt_ray.tasks.normalise`); never below `score`.

        What counts is the first reading of the marked answer, or else the last of the whole output. ROUGE-1 stays.
        """
        score = self.score(output, row)
        if score == 100.0 or self.metric == "rouge1":
            return score
        found = self.readings(self.extract(output))[:1] or self.readings(output)[-1:]
        return 100.0 * (bool(found) and any(found == self.readings(one)[:1] for one in self.references(row)))


def rouge1(reference: str, summary: str) -> float:
    """ROUGE-1 F-measure in percent by `rouge-score`, with stemming off as in its command line's default."""
    scorer = require("rouge_score.rouge_scorer", "eval")
    score: float = scorer.RougeScorer(["rouge1"]).score(reference, summary)["rouge1"].fmeasure
    return 100.0 * score
