"""The privacy audit on a tiny pair."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gt_ray import cli
from gt_ray.cli_audit import _print
from gt_ray.config import Config, DpSgdSettings, load_config
from gt_ray.errors import UserError
from gt_ray.studies import audit as module
from gt_ray.studies.audit import AuditPlan, _canary, _study, run_audit
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows
from gt_ray.updates.store import UpdateStore
from tests.conftest import tiny_config

PLAN = AuditPlan("gsm8k", models=6, rows=16, canaries=0.25)


@pytest.fixture(scope="module")
def config(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(
        tiny_pair,
        tmp_path_factory.mktemp("audit"),
        "pair.tinylm.lora={rank: 4, target_modules: [q_proj, v_proj, up_proj, down_proj]}",
        "pair.tinylm.fine_tune.steps=60",
        "pair.tinylm.fine_tune.learning_rate=0.02",
        "clients.mechanisms=[sft, {name: dp_sgd, epsilon: 1, steps: 4}]",
        "clients.seed=12023",  # by which all six models have eight rows: the accountant takes seconds for each number
    )


@pytest.fixture(scope="module")
def report(config: Config, ray_cluster: None) -> dict[str, Any]:
    return run_audit(config, PLAN)


@pytest.mark.slow
@pytest.mark.ray
def test_plain_fine_tuning_is_found_out_and_dp_sgd_keeps_its_promise(report: dict[str, Any], config: Config) -> None:
    sft, private = report["mechanisms"]
    assert sft["label"] == "sft" and sft["stated"] == {"name": "sft"}
    assert sft["attacks"]["likelihood_ratio"]["auc"] > 0.6 and sft["attacks"]["calibrated"]["auc"] > 0.6
    assert sft["likelihood_ratio_of"].keys() == {"canaries", "others"}
    assert private["stated"]["epsilon"] == 1 and private["stated"]["sample_rate"] == 0.5
    assert 0 <= private["epsilon_at_least"] <= 1
    assert private["attacks"]["likelihood_ratio"]["auc"] < sft["attacks"]["likelihood_ratio"]["auc"] - 0.1
    assert json.loads((config.run_folder / "audit.json").read_text()) == report
    assert (report["task"], report["models"], report["rows"], report["canaries"]) == ("gsm8k", 6, 16, 0.25)
    assert Config.model_validate(report["config"]).pair.tinylm == config.pair.tinylm


@pytest.mark.slow
@pytest.mark.ray
def test_again_takes_the_models_from_the_store(
    report: dict[str, Any], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(UpdateStore(config.store).keys()) == 12
    again = run_audit(config, PLAN)
    assert "audit: nothing to do" in capsys.readouterr().err
    assert {**again, "wall_s": 0} == {**report, "wall_s": 0}


@pytest.mark.slow
@pytest.mark.ray
def test_the_table_has_a_row_for_each_mechanism(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    loud = {**report["mechanisms"][1], "label": "a broken one", "epsilon_at_least": 1.5}
    _print({**report, "mechanisms": [*report["mechanisms"], loud]})
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "gsm8k, domain north-day: 6 models, 16 rows" in out and "│ sft │ none │" in out and "│ epsilon 1 │ 1 │" in out
    )
    assert "a broken one: more was leaked than is stated" in out and "epsilon 1: more" not in out


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_canary_has_its_own_prompt_and_the_target_of_another_row(task: str) -> None:
    pool = rows(task, "public-train", "north-day", 0, 20)
    targets = {TASKS[task].target(row) for row in pool}
    for row in pool:
        canary = _canary(TASKS[task], row, pool, random.Random(0))
        assert TASKS[task].prompt(canary) == TASKS[task].prompt(row)
        assert TASKS[task].target(canary) != TASKS[task].target(row) and TASKS[task].target(canary) in targets


def test_rows_of_one_target_have_no_canaries() -> None:
    row = rows("gsm8k", "public-train", "north-day", 0, 1)[0]
    with pytest.raises(UserError, match=r"all rows of gsm8k have one target.*--canaries 0"):
        _canary(TASKS["gsm8k"], row, [row, row], random.Random(0))


def test_the_pool_is_of_one_domain_and_partly_canaries(config: Config) -> None:
    study, canary_R = _study(config, PLAN)
    pool = study.data.pools["gsm8k", "audited"]
    public = {
        TASKS["gsm8k"].prompt(row): TASKS["gsm8k"].target(row) for row in study.data.pools["gsm8k", "public-train"]
    }
    wrong = [public[TASKS["gsm8k"].prompt(row)] != TASKS["gsm8k"].target(row) for row in pool]
    assert len(pool) == 16 and {row["domain"] for row in pool} == {"north-day"}
    assert np.array_equal(wrong, canary_R) and canary_R.sum() == 4


def test_mechanisms_are_those_that_are_asked_for_or_the_clients_or_two_epsilons(config: Config) -> None:
    def epsilons(plan: AuditPlan, config: Config) -> list[tuple[float, int | None]]:
        first, *others = plan.mechanisms(config)
        assert first == "sft" and all(isinstance(one, DpSgdSettings) for one in others)
        return [(one.epsilon, one.steps) for one in others if isinstance(one, DpSgdSettings)]

    asked = AuditPlan("gsm8k", epsilons=(2.0, 8.0))
    assert epsilons(PLAN, config) == [(1.0, 4)]
    assert epsilons(asked, config) == [(2.0, 4), (8.0, 4)]
    assert epsilons(asked, load_config("embedded")) == [(2.0, None), (8.0, None)]
    assert epsilons(PLAN, load_config("embedded")) == [(1.0, None), (4.0, None)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "dorp"], "unknown task 'dorp'; known: aqua_rat"),
        (["--task", "drop", "--models", "3"], "ask for at least 4"),
        (["--task", "drop", "--rows", "15"], "ask for at least 16"),
        (["--task", "drop", "--rows", "2000"], "has 1024 public rows, 2000 are asked for; use --rows 1024"),
        (["--task", "drop", "--canaries", "2"], "from 0 to 1"),
        (["--task", "drop", "--epsilon", "0"], "epsilon=0 is not above 0"),
        (["--task", "drop", "--rows", "16"], "lower batch_size to at most"),
        (["--task", "drop", "pair.tinylm.fine_tune={steps: 400, stop: {when: plateau}}"], "stop.when=steps"),
    ],
)
def test_bad_input_says_what_would_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["audit", *arguments, f"runs={tmp_path / 'runs'}", f"store={tmp_path / 'store'}"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_json_is_the_report_for_the_options_that_were_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Config, AuditPlan]] = []
    monkeypatch.setattr(module, "run_audit", lambda config, plan: seen.append((config, plan)) or {"task": plan.task})
    options = ["--models", "8", "--rows", "64", "--canaries", "0", "--epsilon", "1", "--epsilon", "0.5", "--json"]
    assert cli.run(lambda: cli.app(["audit", "--task", "drop", *options, "seed=3"])) == 0
    assert json.loads(capsys.readouterr().out) == {"task": "drop"}
    ((config, plan),) = seen
    assert plan == AuditPlan("drop", 8, 64, 0.0, (1.0, 0.5)) and config.seed == 3
