"""`gt-ray plan`: its tables, its JSON, and what is wrong with the question; tests/training has what it plans."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from gt_ray import cli
from gt_ray.config import Config, load_config


def run(*arguments: str) -> int:
    return cli.run(lambda: cli.app(["plan", *arguments], standalone_mode=False))


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("--gpus", "8xFOO"): "known: A100-40GB",
        ("--gpus", "0xH100"): "at least one GPU",
        ("--preset", "qwen2.5-0.5b-to-33b"): "did you mean 'qwen2.5-0.5b-to-32b'",
        ("pair.llm.model=nobody/knows",): "nobody/knows",
    }.items():
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_the_plan_of_the_embedded_pair_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--preset", "embedded", "--gpus", "2xL40S") == 0
    text = capsys.readouterr().out
    for word in ("phi, decoder", "zero3", "moments", "curation of", "Recommended", "training on behaviour", "fits"):
        assert word in text
    assert "GPUs of a worker" in text and "0.125 of 47.7 GB" in text
    tree = yaml.safe_load(text[text.index("max_workers") :])
    assert tree["available_node_types"]["2xl40s"]["resources"]["GPU"] == 2


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--preset", "embedded", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["recommended"]["strategy"] == "ddp" and found["recommended"]["fits"]
    assert found["parameters"]["total"] == sum(v for name, v in found["parameters"].items() if name != "total")
    overrides = load_config("embedded", found["overrides"]).grad_transformer.training
    assert isinstance(load_config("embedded"), Config) and overrides.workers == found["trainers"]
    assert {"stages", "sizes_bytes", "generation_s", "cluster"} <= found.keys()
