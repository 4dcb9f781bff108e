"""`gt-ray simulate`: its table, its JSON, and what is wrong with the question."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gt_ray import cli

SMALL = ("--preset", "embedded", "--seeds", "2", "--quiet")


def run(*arguments: str) -> int:
    return cli.run(lambda: cli.app(["simulate", *arguments]))


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("--gpus", "0xH100"): "at least one GPU",
        ("--gpus", "12xH100"): "whole nodes of 8",
        ("--gpus", "8xFOO"): "known: A100-40GB",
        ("--price", "-1"): "greater than or equal to 0",
        ("--seeds", "0"): "greater than or equal to 1",
        ("--preempt-hours", "0"): "preempt-hours",
        ("--measured", "nowhere"): "--measured nowhere: no finished run",
        ("--gpus", "2xL40S", "pair.llm.model=Qwen/Qwen2.5-72B-Instruct"): "a model is not spread over nodes",
        ("--gpus", "1xH100", "grad_transformer.training.behaviour.steps=5"): "1 GPUs are too few",
    }.items():
        assert run(*SMALL, *arguments) == 2, arguments
        text = " ".join(capsys.readouterr().err.replace("│", " ").split())  # typer draws a box, and wraps
        assert message in text and "Traceback" not in text


def test_a_table_with_a_line_for_each_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--gpus", "2xL40S", "--gpus", "16xH100", "--price", "3") == 0
    text = capsys.readouterr().out
    for word in ("2 x L40S", "16 x H100", "GPU-hours", "limit", "3 a GPU-hour", "ceilings"):
        assert word in text


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--gpus", "8xH100", "--spot", "--json", "curation.shadows=24") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert found["preset"] == "embedded" and found["price"] == 1.25 and row["kind"] == "H100"
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert list(row["stage_hours"]) == ["curation", "training", "clients", "generation", "ceilings", "evaluation"]
    assert row["makespan_hours"]["low"] <= row["makespan_hours"]["median"] <= row["makespan_hours"]["high"]


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "Example" in text and "--preempt-hours" in text
