"""`gt-ray evaluate adapters/*`: adapters of PEFT's own making, from folders to a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gt_ray import cli
from gt_ray.config import load_config
from gt_ray.errors import UserError
from gt_ray.evaluation.adapters import AdapterScores, table, task_rows
from gt_ray.evaluation.results import RowScore
from gt_ray.pairs.models import EMBEDDED
from gt_ray.tasks import Row
from gt_ray.tasks.embedded import rows
from gt_ray.updates.adapters import inspect_adapter
from tests.conftest import change_adapter, make_adapter

CONFIG = load_config("embedded", ["evaluation.engine=transformers", "evaluation.vllm.max_lora_rank=4"])
ROWS: list[Row] = rows("drop", "test", "north-day", 0, 5)


@pytest.fixture
def scores(tmp_path: Path) -> AdapterScores:
    return AdapterScores(CONFIG, "drop", ROWS, tmp_path / "scores")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapters" / "one")


def test_two_adapters_of_one_name_are_refused(scores: AdapterScores, folder: Path, tmp_path: Path) -> None:
    twin = make_adapter(tmp_path / "others" / "one")
    with pytest.raises(UserError, match=r"two adapters are named 'one': .*adapters/one and .*others/one; rename one"):
        scores.check([inspect_adapter(folder), inspect_adapter(twin)])
    base = make_adapter(tmp_path / "base")
    with pytest.raises(UserError, match="two adapters are named 'base'"):
        scores.check([inspect_adapter(base)])


def test_an_adapter_of_another_base_model_is_refused(scores: AdapterScores, folder: Path) -> None:
    change_adapter(folder, base_model_name_or_path="elsewhere/model")
    with pytest.raises(UserError, match="is an adapter of base model 'elsewhere/model', not of 'embedded:llm'"):
        scores.check([inspect_adapter(folder)])


def test_modules_that_the_model_lacks_are_refused(scores: AdapterScores, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=r"changes .*query of .* has no Linear module of that name"):
        scores.check([inspect_adapter(folder)])
    narrow = {name: tensor[:, :48].clone() if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(narrow, file)
    with pytest.raises(UserError, match=r"of \[in, out\] \[48, 96\], but 'embedded:llm' has \[96, 96\] there"):
        scores.check([inspect_adapter(folder)])


def test_a_rank_over_the_limit_is_refused(scores: AdapterScores, tmp_path: Path) -> None:
    large = make_adapter(tmp_path / "large", rank=5)
    with pytest.raises(UserError, match=r"large has rank 5, over evaluation\.vllm\.max_lora_rank=4 .*raise the limit"):
        scores.check([inspect_adapter(large)])


def test_rows_come_from_a_file_or_from_the_test_rows_of_all_clients(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert task_rows(CONFIG, "drop", file) == ROWS
    few = load_config("embedded", ["evaluation.test_rows=4", "clients.per_task=2", "clients.samples=2"])
    assert len(task_rows(few, "drop", file)) == 4
    assert len(task_rows(few, "drop", None)) == 8
    with pytest.raises(UserError, match="unknown task 'dorp'; known: aqua_rat"):
        task_rows(CONFIG, "dorp", None)
    file.write_text('{"passage": "a"}\n')
    with pytest.raises(UserError, match="column 'question' is missing"):
        task_rows(CONFIG, "drop", file)


def test_the_table_is_sorted_by_score_with_intervals() -> None:
    def scored(*right: int) -> list[RowScore]:
        return [RowScore("", "", 100.0 * one, 100.0, -2.0, 4, "stop") for one in right]

    shown = table({"base": scored(0, 0, 1, 0), "good": scored(1, 1, 1, 0), "as bad": scored(0, 1, 0, 0)}, "drop")
    columns = {column.header: list(column.cells) for column in shown.columns}
    assert columns["adapter"] == ["good", "as bad", "base"]
    assert columns["score"] == ["75.0", "25.0", "25.0"]
    assert columns["interval"][0] == "26.0 to 100.0"  # 75 +- 1.96 x 25
    assert columns["normalised"] == ["100.0"] * 3 and columns["log-likelihood"] == ["-2.00"] * 3
    summaries = table({"base": scored(1)}, "samsum")
    assert {column.header: list(column.cells) for column in summaries.columns}["normalised"] == ["-"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *arguments])
    return int(str(stop.value.code))


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.usefixtures("ray_cluster")
def test_adapters_of_any_making_are_scored_by_the_command_and_not_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters of unequal rank, on modules that the embedded preset does not adapt."""
    second = make_adapter(tmp_path / "adapters" / "two", rank=9, seed=1)
    twin = tmp_path / "adapters" / "twin"  # equal content under another name, as of a trainer's last checkpoint
    shutil.copytree(folder, twin)
    out, data = tmp_path / "scores", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = ["--task", "drop", "--data", str(data), "--out", str(out), "evaluation.workers=1"]
    assert run(str(folder), str(second), str(twin), *common) == 0
    printed = capsys.readouterr()
    assert "by vllm" in printed.err
    assert all(name in printed.out for name in ("base", "one", "two", "twin", "drop, 5 test rows"))
    times = {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert len(times) == 4
    assert run(str(folder), str(second), str(twin), *common) == 0
    assert {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")} == times
    assert capsys.readouterr().out == printed.out
    # The same by transformers and PEFT: other files, the same numbers.
    assert run(str(folder), str(second), str(twin), *common, "evaluation.engine=transformers") == 0
    assert capsys.readouterr().out == printed.out
    assert len(list(out.glob("*.parquet"))) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--task", "drop"], "nowhere is no PEFT adapter"),
        (["nowhere"], "which task"),
        (["--task", "drop"], "no adapters to score on drop"),
        (["--watch", "somewhere", "--task", "drop"], "which base model"),
        (["nowhere=1"], "unknown config key"),
    ],
)
def test_what_cannot_be_scored_is_an_error_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder), "--task", "drop", "--model", str(EMBEDDED)) == 2
    assert "has no config.json" in capsys.readouterr().err
