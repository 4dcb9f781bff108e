"""Results as tables: a Parquet file for each adapter and set of test rows, a line for each test row.

Files appear whole and carry page checksums; one that is damaged counts as absent. Read many of them at once with
`pyarrow.dataset.dataset(folder)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gt_ray.errors import require
from gt_ray.tasks import Row, Task
from gt_ray.updates.files import write_atomically

Finish = Literal["stop", "length", "too long"]


@dataclass(frozen=True)
class RowScore:
    """What a system makes of one test row.

    Attributes:
        output: what was generated, without special tokens.
        answer: the final answer in it.
        score: in percent.
        normalised: the score of the answer freed of how it is written, in percent; `score` where that is ROUGE-1.
        log_likelihood: of the reference (sum over its tokens); none where it does not fit into the model's window.
        tokens: that were generated, the one that ends the turn among them.
        finish: `stop`, `length` (cut at max_new_tokens), or `too long`: the prompt does not fit into the model's
            window, nothing was generated, and the scores are 0.
    """

    output: str
    answer: str
    score: float
    normalised: float
    log_likelihood: float | None
    tokens: int
    finish: Finish

    @classmethod
    def of(
        cls, task: Task, row: Row, output: str, log_likelihood: float | None, tokens: int, finish: Finish
    ) -> RowScore:
        """Extract the answer and score it; nothing that was not generated is right."""
        score = normalised = 0.0
        if finish != "too long":
            score = normalised = task.score(output, row)
            if task.metric == "accuracy":
                normalised = task.normalised(output, row)
        return cls(output, task.extract(output), score, normalised, log_likelihood, tokens, finish)


def write_scores(path: Path, prompts: Sequence[str], scores: Sequence[RowScore], **constant: str) -> None:
    """Write one adapter's results.

    Args:
        prompts: one a row, without the model's chat template.
        constant: columns that are the same in all rows, such as `adapter`, `task`, `engine`.

    Raises:
        UserError: it cannot be written; nothing is left behind.
    """
    pa, parquet = require("pyarrow", "ray"), require("pyarrow.parquet", "ray")
    table: dict[str, Any] = {name: [value] * len(scores) for name, value in constant.items()}
    table["row"] = list(range(len(scores)))
    table["prompt_sha256"] = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
    for name, kind in _columns(pa).items():
        table[name] = pa.array([getattr(score, name) for score in scores], kind)
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(table), sink, write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_scores(path: Path) -> list[RowScore] | None:
    """What `write_scores` wrote; none where it is absent, damaged or without one of the columns."""
    pa, parquet = require("pyarrow", "ray"), require("pyarrow.parquet", "ray")
    columns = list(_columns(pa))
    try:
        with path.open("rb") as file:
            table = parquet.ParquetFile(file, page_checksum_verification=True).read(columns)
        return [RowScore(**row) for row in table.to_pylist()]
    except (OSError, ValueError, TypeError, KeyError):  # pyarrow's errors are among them
        return None


def read_prompts(path: Path) -> list[str] | None:
    """SHA-256 of the prompts of a file of results, row by row; none where it is absent or damaged."""
    parquet = require("pyarrow.parquet", "ray")
    try:
        with path.open("rb") as file:
            table = parquet.ParquetFile(file, page_checksum_verification=True).read(["prompt_sha256"])
        return [str(one) for one in table["prompt_sha256"].to_pylist()]
    except (OSError, ValueError, KeyError):  # pyarrow's errors are among them
        return None


def _columns(pa: Any) -> dict[str, Any]:
    return {
        "output": pa.string(),
        "answer": pa.string(),
        "score": pa.float64(),
        "normalised": pa.float64(),
        "log_likelihood": pa.float64(),
        "tokens": pa.int32(),
        "finish": pa.string(),
    }
