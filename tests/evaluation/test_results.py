"""Tables of results: whole or absent."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet
import pytest

from gt_ray.evaluation.results import RowScore, read_scores, write_scores
from gt_ray.tasks import TASKS

SCORES = [
    RowScore("so it is\n#### 7", "7", 100.0, 100.0, -1.25, 6, "stop"),
    RowScore("", "", 0.0, 0.0, None, 0, "too long"),
    RowScore("é 7 ####", "", 0.0, 100.0, -3.5, 24, "length"),
]
PROMPTS = ["a?", "b?", "c?"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_scores(tmp_path / "key.parquet", PROMPTS, SCORES, adapter="ours", task="gsm8k", engine="vllm")
    return tmp_path / "key.parquet"


def test_what_is_written_is_read(file: Path) -> None:
    assert read_scores(file) == SCORES
    assert [path.name for path in file.parent.iterdir()] == ["key.parquet"]


def test_a_folder_of_results_is_one_table_with_a_line_for_each_row(file: Path) -> None:
    write_scores(file.with_name("other.parquet"), PROMPTS, SCORES, adapter="base", task="gsm8k", engine="vllm")
    table = pyarrow.dataset.dataset(file.parent).to_table()
    assert table.num_rows == 6 and set(table["adapter"].to_pylist()) == {"ours", "base"}
    first = table.to_pylist()[0]
    assert first["prompt_sha256"] == hashlib.sha256(b"a?").hexdigest() and first["row"] == 0
    assert first["engine"] == "vllm" and first["answer"] == "7" and first["tokens"] == 6


def test_a_damaged_file_counts_as_absent(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for content in (b"", whole[:-9], whole[: len(whole) // 2], b"x" * 200):
        file.write_bytes(content)
        assert read_scores(file) is None
    flipped = bytearray(whole)
    flipped[whole.index(b"so it is")] ^= 1
    file.write_bytes(flipped)
    assert read_scores(file) is None
    assert read_scores(tmp_path / "nowhere.parquet") is None


def test_a_file_without_a_column_counts_as_absent(file: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).drop_columns("normalised"), file)
    assert read_scores(file) is None


def test_what_was_not_generated_is_not_right() -> None:
    row = {"question": "?", "answer": "\n#### "}
    wrong = RowScore.of(TASKS["gsm8k"], row, "", None, 0, "too long")
    assert (wrong.score, wrong.normalised) == (0.0, 0.0)
    right = RowScore.of(TASKS["gsm8k"], {"question": "?", "answer": "#### 7"}, "#### 7", -1.0, 3, "stop")
    assert (right.answer, right.score, right.normalised) == ("7", 100.0, 100.0)
    otherwise = RowScore.of(TASKS["gsm8k"], {"question": "?", "answer": "#### 7"}, "#### $7.00", -1.0, 3, "stop")
    assert (otherwise.answer, otherwise.score, otherwise.normalised) == ("$7.00", 0.0, 100.0)
