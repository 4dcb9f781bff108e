"""`gt-ray study --dry-run`: what is left of a study, before anything is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gt_ray import cli
from tests.conftest import TINY_OVERRIDES

CELLS = ["--cell", "seed=0", "--cell", "seed=0 grad_transformer.training.epochs=2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(lambda: cli.app(["study", "--dry-run", "--name", "sizes", *arguments]))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_dry_run_shows_the_graph_and_makes_nothing(
    tiny_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [f"pair.tinylm.model={tiny_pair[0]}", f"pair.llm.model={tiny_pair[1]}"]
    places = [f"runs={tmp_path / 'runs'}", f"store={tmp_path / 'store'}"]
    code, out, err = run(capsys, *CELLS, "--max-gpu-hours", "1e-9", *TINY_OVERRIDES, *pair, *places)
    assert code == 0, err
    lines = " ".join(out.split())
    # 12 shadows and 2 clients of both models, public_sft of 2 tasks; the second cell shares them all.
    assert "30 of 30" in lines and "fine-tunes of cell 2" not in lines
    assert "cell 2: seed=0 grad_transformer.training.epochs=2" in lines
    assert "The budget of 1e-09 GPU-hours, of which 0 are spent, will not last" in lines
    assert not (tmp_path / "store").exists() and not list(tmp_path.glob("runs/sizes/study.json"))


def test_without_models_it_counts_from_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = "pair.llm.model=Qwen/Qwen2.5-7B-Instruct"
    code, out, err = run(capsys, *CELLS, *TINY_OVERRIDES, llm, f"runs={tmp_path}")
    assert code == 0, err
    assert "from configs alone, as if nothing were done: model 'Qwen/Qwen2.5-7B-Instruct' is neither" in err
    assert "30 of 30" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cell", "seed=0", "--cell", "seed=0"], "two cells are the same"),
        (["--gpus", "0xH100"], "at least one GPU"),
        (["--cell", "curation.shadow=3"], "unknown config key 'curation.shadow'"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *arguments, *TINY_OVERRIDES, f"runs={tmp_path}")
    assert code == 2 and message in err and "Traceback" not in err
