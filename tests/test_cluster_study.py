"""A study on a cluster of three nodes that die and join ends with the report of an undisturbed one (decision 11)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from gt_ray.config import Config
from gt_ray.curation.study import Study
from tests.conftest import tiny_config
from tests.curation.conftest import assert_same
from tests.nodes import Nodes, free_port, private_cluster, workers_of

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[1]
LIMIT_S = 1200
EXACT = ("task", "population", "client", "mechanism", "seed", "system", "metric", "score", "n_test")


class Job:
    """A job of `jobs/`, as a process that finds the cluster by RAY_ADDRESS."""

    def __init__(self, nodes: Nodes, config: Config, verb: str) -> None:
        file = config.runs.parent / "study.yaml"
        file.write_text(config.to_yaml())
        self.file = config.runs.parent / f"{verb}.log"
        with self.file.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / f"{verb}.py"), "--preset", str(file)],
                env={**os.environ, "RAY_ADDRESS": nodes.cluster.address},
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self.file.read_text()

    def running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        assert self.process.wait(LIMIT_S) == 0, self.log

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Submitted:
    """A job of `jobs/`, submitted with this folder and `deploy/runtime_env.yaml`, as docs/cluster.md says."""

    def __init__(self, client: JobSubmissionClient, config: Config, verb: str) -> None:
        file = config.runs.parent / "study.yaml"
        file.write_text(config.to_yaml())
        environment = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())
        here = {"GT_RAY_GPUS": "0", "HF_HOME": str(config.runs.parent)}
        environment["env_vars"] |= here
        self.client = client
        self.name = client.submit_job(
            entrypoint=f"{sys.executable} jobs/{verb}.py --preset {file}",
            runtime_env={**environment, "working_dir": str(ROOT)},
        )

    @property
    def log(self) -> str:
        return self.client.get_job_logs(self.name)

    def running(self) -> bool:
        return not self.client.get_job_status(self.name).is_terminal()

    def end(self) -> None:
        wait(self, lambda: not self.running(), ends=True)
        assert self.client.get_job_status(self.name) == JobStatus.SUCCEEDED, self.log


def wait(job: Job | Submitted, what: Callable[[], bool], ends: bool = False) -> None:
    """Return once something is so, while the job runs."""
    deadline = time.monotonic() + LIMIT_S
    while not what():
        assert ends or job.running(), f"it came to its end too soon: {job.log}"
        assert time.monotonic() < deadline, job.log
        time.sleep(0.1)


def kill_in_curation(nodes: Nodes, job: Job | Submitted, config: Config) -> None:
    """Kill a node that fine-tunes, once there is a unit in the store and before all are."""
    study = Study.load(config)
    wait(job, lambda: bool(study.store.keys()) and any(workers_of([node], "FineTuner") for node in nodes.working()))
    node = next(node for node in nodes.working() if workers_of([node], "FineTuner"))
    nodes.kill(node)
    keys = [job.key for side in ("tinylm", "llm") for job in study.shadow_jobs(side)]
    assert study.store.missing(keys), "the node died too late"


def rows_of(config: Config) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((config.run_folder / "report.json").read_text())["rows"]
    return found


def assert_same_study(found: Config, expected: Config) -> None:
    """The same units and the same rows: keys and scores equal, log-likelihoods within what 1e-5 of a weight makes."""
    keys = [json.loads((one.run_folder / "units.json").read_text()) for one in (found, expected)]
    assert keys[0] == keys[1]
    stores = [set(Study.load(one).store.keys()) for one in (found, expected)]
    assert stores[0] == stores[1]
    rows = [{(row["client"], row["system"]): row for row in rows_of(one)} for one in (found, expected)]
    assert rows[0].keys() == rows[1].keys() and rows[0]
    for key, row in rows[0].items():
        assert {name: row[name] for name in EXACT} == {name: rows[1][key][name] for name in EXACT}, key
        assert row["log_likelihood"] == pytest.approx(rows[1][key]["log_likelihood"], rel=1e-4), key


@pytest.mark.timeout(LIMIT_S)
def test_a_node_that_dies_in_curation_and_one_that_joins_change_no_unit(
    tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    small = ["data.tasks=[samsum]", "curation.shadows=8", "curation.adapters_at_once=1"]
    undisturbed, disturbed = (tiny_config(tiny_pair, tmp_path / name, *small) for name in ("undisturbed", "disturbed"))
    with private_cluster() as nodes:
        nodes.set_size(2)
        for config in (undisturbed, disturbed):
            Path(config.store).mkdir(parents=True)
            with closing(Job(nodes, config, "curate")) as job:
                if config is disturbed:
                    kill_in_curation(nodes, job, config)
                    nodes.add()
                job.end()
    assert_same(Study.load(disturbed), Study.load(undisturbed), killed_writers=True)


def kill_in_training(nodes: Nodes, job: Submitted, config: Config) -> None:
    """Kill the node with the trainer, once there is a checkpoint."""
    home = config.run_folder / "training"
    wait(job, lambda: any(home.glob("train-*/checkpoint_*")))
    (node,) = (node for node in nodes.working() if workers_of([node], "RayTrainWorker"))
    nodes.kill(node)
    assert not (config.run_folder / "grad_transformer").exists(), "the node died too late"


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT_S)
def test_nodes_that_die_and_join_change_no_number_of_submitted_jobs(
    tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    # Long enough to be hit: the trainer takes hundreds of steps, with a checkpoint every twenty.
    longer = [f"grad_transformer.training.{override}" for override in ("epochs=300", "checkpoint_epochs=10")]
    longer += ["curation.adapters_at_once=1", "grad_transformer.phi.dropout=0.1"]
    undisturbed, disturbed = (tiny_config(tiny_pair, tmp_path / name, *longer) for name in ("undisturbed", "disturbed"))
    with private_cluster(include_dashboard=True, dashboard_port=free_port()) as nodes:
        client = JobSubmissionClient(f"http://{nodes.cluster.head_node.webui_url}")
        for config in (undisturbed, disturbed):
            Path(config.store).mkdir(parents=True)
        nodes.set_size(3)  # of which two are left at the end, for the trainer and the tasks that read for it
        Submitted(client, undisturbed, "pipeline").end()
        job = Submitted(client, disturbed, "curate")
        kill_in_curation(nodes, job, disturbed)
        nodes.add()
        job.end()
        job = Submitted(client, disturbed, "train")
        kill_in_training(nodes, job, disturbed)
        job.end()
        for verb in ("generate", "evaluate"):
            Submitted(client, disturbed, verb).end()
        assert len(nodes.working()) == 2
    assert_same_study(disturbed, undisturbed)
