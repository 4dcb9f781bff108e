"""A curation into an object store, by workers that find it themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gt_ray.curation.jobs import SIDES
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.training.tuples import shadow_keys, side_chunks
from tests.conftest import tiny_config
from tests.s3 import BUCKET, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_curation_into_s3_resumes_and_is_read_by_training(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    import ray

    with s3_server() as query:  # before Ray starts, so that its workers inherit the credentials
        try:
            study = Study.load(tiny_config(tiny_pair, tmp_path, f"store=s3://{BUCKET}/store?{query}"))
            jobs = [job for side in SIDES for job in study.shadow_jobs(side)]
            assert run_fine_tunes(study, jobs, "curate") == len(jobs)
            assert run_fine_tunes(study, jobs, "curate") == 0
            assert sorted(study.store.keys()) == sorted(job.key for job in jobs)
            chunks = list(side_chunks(study.store, shadow_keys(study, validation=True), "T"))
            assert chunks and all(torch.isfinite(chunk).all() and chunk.abs().sum() > 0 for chunk in chunks)
            assert not (tmp_path / "store").exists()
        finally:
            ray.shutdown()
