"""The jobs as a user runs them: by hand, interrupted, and submitted to a running cluster."""

from __future__ import annotations

import os
import runpy
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gt_ray.curation.study import Study
from tests.conftest import tiny_config
from tests.nodes import free_port

ROOT = Path(__file__).parents[1]
VERBS = ("curate", "train", "generate", "baselines", "evaluate", "pipeline", "study")


@pytest.mark.parametrize("verb", VERBS)
def test_a_job_file_runs_its_verb(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs/{verb}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "jobs" / f"{verb}.py"), run_name="__main__")
    assert end.value.code == 0 and f"gt-ray {verb} --preset embedded" in " ".join(capsys.readouterr().out.split())


def test_bad_input_exits_with_2_before_any_work(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "jobs" / "pipeline.py", "curation.shadow=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "error: unknown config key 'curation.shadow'; did you mean 'curation.shadows'?"
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_keeps_finished_units(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny_config(tiny_pair, tmp_path, "curation.shadows=200", "curation.overlap=true")
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    command = [sys.executable, str(ROOT / "jobs" / "curate.py"), "--preset", str(tmp_path / "tiny.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    study = Study.load(config)
    keys = [job.key for job in study.shadow_jobs("llm")]
    deadline = time.monotonic() + 200
    while len(study.store.missing(keys)) == len(keys) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted; finished units are kept" in error
    assert 0 < len(study.store.missing(keys)) < len(keys)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster started with `ray start --head`, as a user would; the environment in which to talk to it."""
    (tmp_path / "token").write_text(secrets.token_hex(32))
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    ports = [free_port() for _ in range(3)]
    ray = str(Path(sys.executable).with_name("ray"))
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={ports[0]}", f"--dashboard-port={ports[1]}",
         f"--ray-client-server-port={ports[2]}", f"--temp-dir={_short(tmp_path)}"],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports[1]}"
    try:
        deadline = time.monotonic() + 60
        while subprocess.run([ray, "job", "list"], env=environment, capture_output=True).returncode:
            assert head.poll() is None and time.monotonic() < deadline
            time.sleep(1)
        yield environment
    finally:
        head.terminate()
        head.wait(60)


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_curates_and_running_it_again_does_nothing(
    cluster: dict[str, str], tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    config = tiny_config(tiny_pair, tmp_path)
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    ray = str(Path(sys.executable).with_name("ray"))
    job = [sys.executable, "jobs/curate.py", "--preset", str(tmp_path / "tiny.yaml")]
    outputs = []
    for _ in range(2):
        done = subprocess.run([ray, "job", "submit", "--", *job], env=cluster, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout + done.stderr)
    assert "curate: 24 of 24 units to fine-tune" in outputs[0]
    assert "curate: nothing to do, all 24 units are in" in outputs[1]


def _short(tmp_path: Path) -> str:
    """Ray's sockets need a short path."""
    import tempfile

    return tempfile.mkdtemp(prefix="ray", dir="/tmp")
