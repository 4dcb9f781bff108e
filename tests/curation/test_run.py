"""Curation as a Ray Data pipeline: resume, kills, damaged units."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gt_ray.config import Config
from gt_ray.curation.jobs import SIDES
from gt_ray.curation.run import BLOCK, MOST_ROUNDS, _blocks, _even, run_fine_tunes
from gt_ray.curation.study import Study
from tests.conftest import tiny_config

pytestmark = pytest.mark.ray


def _jobs(study: Study) -> list:  # type: ignore[type-arg]
    return [job for side in SIDES for job in study.shadow_jobs(side)]


@pytest.fixture(scope="module")
def undisturbed(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Study:
    study = Study.load(tiny_config(tiny_pair, tmp_path_factory.mktemp("undisturbed")))
    assert run_fine_tunes(study, _jobs(study), "curate") == 24
    return study


def test_both_models_are_fine_tuned_on_every_shadow(undisturbed: Study) -> None:
    for side in SIDES:
        layout = undisturbed.roots[side].layout
        for job in undisturbed.shadow_jobs(side):
            snapshots, meta = undisturbed.store.read(job.key)
            assert snapshots.shape == (2, layout.L, layout.d) and snapshots.abs().sum() > 0
            assert meta.root == undisturbed.roots[side].hash and len(meta.losses) == 3 and meta.samples == 8


def test_running_again_does_nothing_and_says_so(undisturbed: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_fine_tunes(undisturbed, _jobs(undisturbed), "curate") == 0
    assert "curate: nothing to do, all 24 units" in capsys.readouterr().err


def test_a_damaged_unit_is_named_and_redone(undisturbed: Study, caplog: pytest.LogCaptureFixture) -> None:
    jobs = _jobs(undisturbed)
    before, _ = undisturbed.store.read(jobs[0].key)
    tensors = Path(undisturbed.config.store) / jobs[0].key / "updates.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    assert run_fine_tunes(undisturbed, jobs, "curate") == 1
    assert jobs[0].key in caplog.text
    assert torch.allclose(undisturbed.store.read(jobs[0].key)[0], before, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_sigkill_half_way_loses_at_most_the_units_in_flight(
    undisturbed: Study, tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    config = tiny_config(tiny_pair, tmp_path)
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "gt_ray.cli", "curate", "--preset", str(tmp_path / "tiny.yaml")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    study = Study.load(config)
    keys = [job.key for job in _jobs(study)]
    deadline = time.monotonic() + 300
    while not (done := [key for key in keys if (Path(study.config.store) / key / "updates.safetensors").exists()]):
        assert process.poll() is None, process.stdout and process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(keys) - len(study.store.missing(keys))
    assert kept >= len(done)
    redone = run_fine_tunes(study, _jobs(study), "curate")
    assert redone == len(keys) - kept
    assert study.store.missing(keys) == []
    for job in _jobs(undisturbed):
        expected, _ = undisturbed.store.read(job.key)
        assert torch.allclose(study.store.read(job.key)[0], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("sizes", "actors"),
    [([50] * 6, 8), ([50] * 6, 16), ([50] * 6, 32), ([300], 16), ([20] * 6, 2), ([1000] * 6, 16), ([100, 7, 3], 8)],
)
def test_blocks_keep_all_actors_at_work_nearly_to_the_end(sizes: list[int], actors: int) -> None:
    counts = _even(sizes, actors)
    assert all(-(-n // count) <= BLOCK for n, count in zip(sizes, counts, strict=True))
    assert sum(counts) <= MOST_ROUNDS * actors or min(sizes) > BLOCK
    ends = [0] * actors
    for size in sorted(
        (-(-n // count) for n, count in zip(sizes, counts, strict=True) for _ in range(count)), reverse=True
    ):
        ends[ends.index(min(ends))] += size  # whoever is free takes the next one
    assert max(ends) <= 1.15 * sum(sizes) / actors


def test_a_few_jobs_on_many_actors_are_blocks_of_their_own() -> None:
    assert _even([1] * 5, 100) == [1] * 5
    assert _even([50] * 6, 1000) == [50] * 6


def test_a_block_holds_one_model_one_task_and_no_more_than_allowed(tiny: Config) -> None:
    jobs = _jobs(Study.load(tiny))
    # Two tasks of six shadows: each task is cut for its share of the actors.
    for at_once, actors, largest in ((3, 2, 3), ("auto", 1, 6), ("auto", 2, 6), ("auto", 4, 3), ("auto", 12, 1)):
        blocks = _blocks(jobs, at_once, actors)  # type: ignore[arg-type]
        assert sorted(job.key for block in blocks for job in block) == sorted(job.key for job in jobs)
        for block in blocks:
            assert len({(job.side, job.task) for job in block}) == 1
        assert max(map(len, blocks)) == largest
        assert [block[0].side for block in blocks] == sorted(block[0].side for block in blocks)  # the LLM's first
