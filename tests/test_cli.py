"""Exit codes and messages of the command line."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gt_ray import cli
from gt_ray.errors import UserError

VERBS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
JOBS = Path(__file__).parent.parent / "jobs"


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any) -> None:
        raise error

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(verb, "--help") == 0
    assert f"Example: gt-ray {verb}" in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("verb", ["verify", "stat", "compact"])
def test_help_of_every_store_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("store", verb, "--help") == 0
    assert f"Example: gt-ray store {verb}" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_verbs_are_those_of_the_jobs_and_more(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = {file.stem for file in JOBS.glob("*.py") if "job(" in file.read_text()}
    assert {"curate", "train", "generate", "evaluate", "pipeline", "study"} <= jobs <= set(VERBS)
    assert exit_code("--help") == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


def test_presets_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("presets") == 0
    assert "embedded" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "embeded"], "unknown preset 'embeded'; did you mean 'embedded'?"),
        (["curation.shadow=3"], "unknown config key 'curation.shadow'; did you mean 'curation.shadows'?"),
        (["curation.shadows=few"], "curation.shadows: "),
        (["curation={"], "the value is not YAML"),
        (["pair.llm.model=no/such/folder"], "'no/such/folder' is neither a folder nor to be had from the Hub"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(
    arguments: list[str], message: str, tmp_path: Path, tiny_pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"pair.tinylm.model={tiny_pair[0]}", f"store={tmp_path / 'store'}", f"runs={tmp_path / 'runs'}"]
    assert exit_code("curate", *models, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize("arguments", [["curate", "--bogus"], ["no-such-verb"], []])
def test_wrong_usage_exits_with_2_and_no_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["gt-ray"])
    assert exit_code(*arguments) == 2
    out, err = capsys.readouterr()
    assert "Usage" in out + err and "Traceback" not in out + err


def test_ctrl_c_exits_with_130_and_says_that_finished_units_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_config", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert exit_code("curate") == 130
    assert cli.run(raising(KeyboardInterrupt())) == 130
    err = capsys.readouterr().err
    assert err.count("interrupted; finished units are kept, run the same command again to go on\n") == 2


def test_a_call_that_ends_well_exits_with_0() -> None:
    assert cli.run(lambda: None) == 0


def test_an_error_that_nobody_can_mend_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)
    error = RuntimeError("outer")
    error.__cause__ = error  # a cycle must not hang it
    with pytest.raises(RuntimeError, match="outer"):
        cli.run(raising(error))


def test_a_user_error_is_found_inside_what_ray_wraps_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    trace = "Traceback (most recent call last):\n  File ...\ngt_ray.errors.UserError: row 3 is too long"
    # Ray Data appends its own lines to the message of what an actor raised.
    cause = UserError("row 3 is too long\nFailed to apply UDF transform after 1/1 attempts")
    task_error = exceptions.RayTaskError("f", trace, cause, proctitle="f", pid=1, ip="10.0.0.1")
    chained = RuntimeError("training failed")
    chained.__cause__ = task_error
    group = RuntimeError("workers failed")
    group.worker_failures = {0: ValueError("collateral"), 1: chained}  # type: ignore[attr-defined]
    for error in (task_error, task_error.as_instanceof_cause(), chained, group):
        assert cli.run(raising(error)) == 2
        assert capsys.readouterr().err == "error: row 3 is too long\n"
