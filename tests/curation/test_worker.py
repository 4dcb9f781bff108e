"""The actor of curation with an LLM over several GPUs. This machine has none: Ray counts some, the CPU stands in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from tests.conftest import tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def cpus_for_gpus(log: Path) -> Callable[[], None]:
    """Workers that take the CPU for each GPU that Ray gives them; logs how many."""

    def setup() -> None:
        import ray

        from gt_ray.curation import worker

        def own_devices() -> list[str]:
            devices = ["cpu"] * max(1, len(ray.get_gpu_ids()))
            with log.open("a") as file:
                file.write(f"{len(devices)}\n")
            return devices

        worker.own_devices = own_devices

    return setup


def test_an_llm_over_two_gpus_is_fine_tuned_as_on_one(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    import ray

    ray.shutdown()
    environment = {"worker_process_setup_hook": cpus_for_gpus(tmp_path / "devices")}
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    found = []
    try:
        for num_gpus in (1, 2):
            folder = tmp_path / str(num_gpus)
            folder.mkdir()
            overrides = (f"pair.llm.num_gpus={num_gpus}", "curation.adapters_at_once=2", "curation.workers=1")
            study = Study.load(tiny_config(tiny_pair, folder, *overrides, "curation.shadows=4"))
            jobs = study.shadow_jobs("llm")
            assert run_fine_tunes(study, jobs, "curate") == 4
            found.append([study.store.read(job.key)[0] for job in jobs])
    finally:
        ray.shutdown()
    assert (tmp_path / "devices").read_text().split() == ["1", "2"]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
