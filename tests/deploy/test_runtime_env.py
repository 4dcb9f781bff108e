"""What `ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml` sends."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import yaml
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

from gt_ray.cluster import WANTED_GPUS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())


def test_code_goes_along_and_nothing_large(tmp_path: Path) -> None:
    kept = ["gt_ray/presets/embedded.yaml", "jobs/curate.py", "constraints.txt"]
    left = [".git/config", ".venv/bin/ray", "runs/a/report.json", "store/ab/unit", "docs/flow.svg", "tests/conftest.py"]
    for name in (*kept, *left):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text("x")
    shutil.copy(ROOT / ".gitignore", tmp_path / "here")
    create_package(
        str(tmp_path / "here"), tmp_path / "sent.zip", include_gitignore=True, excludes=ENVIRONMENT["excludes"]
    )
    sent = {name for name in zipfile.ZipFile(tmp_path / "sent.zip").namelist() if not name.endswith("/")}
    assert {Path(*Path(name).parts).as_posix() for name in sent} == {*kept, ".gitignore"}


def test_ray_takes_it_and_no_secret_stands_in_it() -> None:
    RuntimeEnv(working_dir="s3://bucket/code.zip", **ENVIRONMENT)
    assert set(ENVIRONMENT["env_vars"]) == {WANTED_GPUS, "HF_HOME", "TOKENIZERS_PARALLELISM"}
