"""Curation on a real cluster of several nodes that breaks: the store ends as if nothing had happened (decision 11)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gt_ray.config import Config
from gt_ray.curation.jobs import FineTuneJob
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.updates.store import PARTIAL
from tests.conftest import tiny_config

pytestmark = pytest.mark.ray

POISON = "~"
"""One token, in no row that is well; the models of these tests have an infinite embedding for it."""
SHADOWS = 8
NO_DASHBOARD = {"include_dashboard": False}
QUICK_HEALTH_CHECKS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
"""A node that is gone is missed after seconds instead of half a minute."""
LIMIT_S = 240


class Nodes:
    """A Ray cluster on this machine: a head without CPUs for the driver, nodes of one CPU each for the work."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "_system_config": QUICK_HEALTH_CHECKS, **NO_DASHBOARD}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    def add(self) -> Any:
        """One more node."""
        return self.cluster.add_node(num_cpus=1)

    def working(self) -> list[Any]:
        """All nodes but the head."""
        return list(self.cluster.worker_nodes)

    def set_size(self, n: int) -> None:
        """Add or remove nodes until there are `n`; a test may have left others."""
        while len(self.working()) > n:
            self.cluster.remove_node(self.working()[0])
        while len(self.working()) < n:
            self.add()

    @contextmanager
    def driver(self, setup: Callable[[], None] | None = None) -> Iterator[None]:
        """This process as a driver of the cluster.

        Args:
            setup: what every worker process calls before it works.
        """
        import ray

        environment = {"worker_process_setup_hook": setup} if setup else None
        ray.init(address=self.cluster.address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """A cluster that no other Ray program on this machine finds, or is found by."""
    folder = tempfile.mkdtemp(prefix="gt-ray-")  # short, since the paths of sockets may not be long
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        nodes = Nodes()
        yield nodes
        nodes.cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two_nodes(cluster: Nodes) -> Nodes:
    cluster.set_size(2)
    return cluster


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny pair with an infinite embedding of `POISON`; an LM head of its own keeps other rows free of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = []
    for source in tiny_pair:
        folder = tmp_path_factory.mktemp("pair") / source.name
        shutil.copytree(source, folder)
        model = AutoModelForCausalLM.from_pretrained(source)
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        (token,) = AutoTokenizer.from_pretrained(source)(POISON, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = float("inf")
        model.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word problems of 50 to 140 tokens, no two alike, as `<folder>/gsm8k/rows.jsonl`."""
    rng = random.Random(0)
    lines = []
    for number in range(400):
        bought = [rng.randint(1, 99) for _ in range(rng.randint(1, 9))]
        question = f"Day {number}: Ann buys {', then '.join(f'{n} pens' for n in bought)}. How many pens are that?"
        answer = f"{' + '.join(map(str, bought))} = {sum(bought)}\n#### {sum(bought)}"
        lines.append(json.dumps({"question": question, "answer": answer}))
    folder = tmp_path_factory.mktemp("rows")
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


Make = Callable[..., Config]


@pytest.fixture(scope="module")
def study_config(pair: tuple[Path, Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Configs of one and the same study, each with a store of its own: few steps, but each of them takes a while."""
    runs = tmp_path_factory.mktemp("runs")

    def make(folder: Path, *overrides: str) -> Config:
        (folder / "store").mkdir()
        return tiny_config(
            pair,
            folder,
            "data.source=files",
            f"data.folder={rows}",
            "data.tasks=[gsm8k]",
            "data.validation_share=0.5",
            f"curation.shadows={SHADOWS}",
            "curation.samples=16",
            "curation.adapters_at_once=2",
            *(f"pair.{side}.fine_tune.steps=5" for side in ("tinylm", "llm")),
            *(f"pair.{side}.fine_tune.batch_size=16" for side in ("tinylm", "llm")),
            f"runs={runs}",
            *overrides,
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(cluster: Nodes, study_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """What every other store is compared with."""
    study = Study.load(study_config(tmp_path_factory.mktemp("undisturbed")))
    cluster.set_size(2)
    with cluster.driver():
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2 * SHADOWS
    assert_same(study, study, killed_writers=False)
    return study


def jobs_of(study: Study) -> list[FineTuneJob]:
    return [*study.shadow_jobs("llm"), *study.shadow_jobs("tinylm")]


def keys_of(study: Study) -> set[str]:
    return {job.key for job in jobs_of(study)}


def assert_same(study: Study, undisturbed: Study, killed_writers: bool) -> None:
    """The study's store is that of the undisturbed study: the same keys, each once, tensors within 1e-5 relative.

    Args:
        killed_writers: whether half a unit may lie beside them.
    """
    units, strays = study.store.contents()
    assert set(units) == keys_of(study) == keys_of(undisturbed)
    assert all(killed_writers and stray.path.startswith(PARTIAL) for stray in strays), strays
    for key in units:
        assert_same_unit(key, study, undisturbed)


def assert_same_unit(key: str, study: Study, undisturbed: Study) -> None:
    found_JLd, found = study.store.read(key)
    expected_JLd, expected = undisturbed.store.read(key)
    assert found.made_by == expected.made_by
    difference_J = (found_JLd - expected_JLd).flatten(1).norm(dim=1) / expected_JLd.flatten(1).norm(dim=1)
    assert difference_J[-1] <= 1e-5, (key, difference_J)
    # In the eight bits that earlier snapshots are kept in, float32's last bit can make a whole step.
    assert difference_J.max() <= 1e-3, (key, difference_J)


@contextmanager
def curation(study: Study) -> Iterator[Future[int]]:
    """A curation that goes on beside the test."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_fine_tunes, study, jobs_of(study), "curate")


def wait_for_units(study: Study, n: int, running: Future[int]) -> None:
    """Return once the store has `n` units, and not yet all."""
    deadline = time.monotonic() + LIMIT_S
    while len(study.store.keys()) < n:
        assert not running.done(), running.result()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert study.store.missing(sorted(keys_of(study))), "the fault came too late"


def workers_of(nodes: list[Any], name: str) -> list[psutil.Process]:
    """The processes on these nodes that Ray has given that name."""
    found = []
    for node in nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children():
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:  # it has ended since
                continue
    return found


def test_killed_workers_are_replaced(two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path) -> None:
    study = Study.load(study_config(tmp_path))
    with two_nodes.driver(), curation(study) as running:
        wait_for_units(study, 1, running)
        workers_of(two_nodes.working(), "FineTuner")[0].kill()
        workers_of([two_nodes.cluster.head_node], "Attempts")[0].kill()
        assert running.result(LIMIT_S) == 2 * SHADOWS
    assert_same(study, undisturbed, killed_writers=True)


def deadly_for_groups(log: Path, deaths: int, name: str = "llm") -> Callable[[], None]:
    """Workers that are killed by a group that they have begun, `deaths` times, where it holds an adapter whose name
    has `name` in it; logs the groups' sizes."""

    def setup() -> None:
        from gt_ray.learning.engine import Engine

        fine_tune = Engine.fine_tune

        def logged(self: Engine, sets: Any, *args: Any) -> Any:
            if any(name in one.name for one in sets):
                with log.open("a") as file:
                    file.write(f"{len(sets)}\n")
                if len(log.read_text().split()) <= deaths:
                    os.kill(os.getpid(), signal.SIGKILL)
            return fine_tune(self, sets, *args)

        Engine.fine_tune = logged  # type: ignore[method-assign]

    return setup


@pytest.mark.slow
def test_a_group_that_kills_its_workers_is_done_in_smaller_ones(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    study = Study.load(study_config(tmp_path, "curation.adapters_at_once=8", "curation.workers=1"))
    with two_nodes.driver(deadly_for_groups(tmp_path / "sizes", deaths=3)):
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2 * SHADOWS
    # One death may be a node that went away; after the second the group is halved each time.
    assert (tmp_path / "sizes").read_text().split() == ["8", "8", "4", *["2"] * 4]
    assert_same(study, undisturbed, killed_writers=False)


@pytest.mark.slow
def test_an_adapter_that_always_kills_its_worker_is_given_up_alone(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    study = Study.load(study_config(tmp_path, "curation.adapters_at_once=4", "curation.workers=1"))
    deadly = next(job for job in jobs_of(study) if job.side == "llm" and job.name == "shadow 3")
    with (
        two_nodes.driver(deadly_for_groups(tmp_path / "sizes", 1000, "shadow 3 (gsm8k, llm)")),
        pytest.raises(
            UserError,
            match=rf"1 of {2 * SHADOWS} fine-tunes failed, .*: shadow 3 \(gsm8k, llm\): its worker died 3 times",
        ),
    ):
        run_fine_tunes(study, jobs_of(study), "curate")
    assert (tmp_path / "sizes").read_text().split() == ["4", "4", "2", "1", "1", "1"]
    units, _ = study.store.contents()
    assert set(units) == keys_of(study) - {deadly.key}
    for key in units:
        assert_same_unit(key, study, undisturbed)


@pytest.mark.slow
def test_a_killed_raylet_takes_no_unit_with_it(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    study = Study.load(study_config(tmp_path))
    with two_nodes.driver(), curation(study) as running:
        wait_for_units(study, 1, running)
        two_nodes.cluster.remove_node(two_nodes.working()[0], allow_graceful=False)
        assert running.result(LIMIT_S) == 2 * SHADOWS
    assert_same(study, undisturbed, killed_writers=True)


@pytest.mark.slow
def test_a_preempted_node_is_replaced_by_one_that_joins_later(
    cluster: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    cluster.set_size(1)
    (node,) = cluster.working()
    study = Study.load(study_config(tmp_path))
    with cluster.driver(), curation(study) as running:
        wait_for_units(study, 1, running)
        accepted, refusal = GcsClient(address=cluster.cluster.address).drain_node(
            node.node_id,
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "spot capacity is taken back",
            int((time.time() + 2) * 1000),
        )
        assert accepted, refusal
        cluster.cluster.remove_node(node)
        assert not running.done() and study.store.missing(sorted(keys_of(study)))
        cluster.add()
        assert running.result(LIMIT_S) == 2 * SHADOWS
    assert_same(study, undisturbed, killed_writers=True)


@pytest.mark.slow
def test_a_node_that_joins_is_put_to_work(cluster: Nodes, study_config: Make, tmp_path: Path) -> None:
    cluster.set_size(1)
    longer = [f"pair.{side}.fine_tune.steps=60" for side in ("tinylm", "llm")]
    study = Study.load(study_config(tmp_path, "curation.shadows=40", "curation.adapters_at_once=1", *longer))
    with cluster.driver(), curation(study) as running:
        wait_for_units(study, 1, running)
        joined = cluster.add()
        while not workers_of([joined], "FineTuner"):
            assert not running.done(), "the new node had nothing to do"
            time.sleep(0.1)
        assert running.result(LIMIT_S) == 80


def change_row(folder: Path, old: str, new: str) -> None:
    file = folder / "gsm8k" / "rows.jsonl"
    text = file.read_text()
    assert text.count(json.dumps(old)) == 1
    file.write_text(text.replace(json.dumps(old), json.dumps(new)))


def test_poisoned_rows_fail_their_shadows_and_no_others(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, rows: Path, tmp_path: Path
) -> None:
    """A row that is too long in shadow 0, one that makes the loss infinite in shadow 1, each in that shadow alone."""
    shutil.copytree(rows, tmp_path / "rows")
    config = study_config(
        tmp_path, f"data.folder={tmp_path / 'rows'}", "curation.adapters_at_once=8", "curation.workers=1"
    )
    uses = Counter((shadow.split, position) for shadow in undisturbed.shadows for position in shadow.positions)
    healthy = []
    for shadow in undisturbed.shadows[:2]:
        alone = [position for position in shadow.positions if uses[shadow.split, position] == 1]
        healthy.append(undisturbed.data.rows("gsm8k", shadow.split, alone[:1])[0]["question"])
    poisoned = [healthy[0] + " And the day after?" * 200, f"{healthy[1]} {POISON}"]
    for good, bad in zip(healthy, poisoned, strict=True):
        change_row(tmp_path / "rows", good, bad)
    too_long = r"shadow 0, gsm8k row \d+ has \d+ tokens, more than max_length 512"
    diverged = r"shadow 1 \(gsm8k, (llm|tinylm)\) diverged: its loss is not finite at optimizer step 1"

    with two_nodes.driver():
        study = Study.load(config)
        affected = {job.key for job in jobs_of(study) if job.name in ("shadow 0", "shadow 1")}
        assert affected == keys_of(study) - keys_of(undisturbed)
        with pytest.raises(
            UserError, match=f"4 of {2 * SHADOWS} fine-tunes failed, the others are kept: {too_long}.*; {diverged}"
        ):
            run_fine_tunes(study, jobs_of(study), "curate")
        done, strays = study.store.contents()
        assert set(done) == keys_of(study) - affected and not strays
        for key in done:
            assert_same_unit(key, study, undisturbed)

        change_row(tmp_path / "rows", poisoned[0], healthy[0])
        study = Study.load(config)
        with pytest.raises(UserError, match=f"2 of 4 fine-tunes failed, the others are kept: {diverged}"):
            run_fine_tunes(study, jobs_of(study), "curate")

        change_row(tmp_path / "rows", poisoned[1], healthy[1])
        study = Study.load(config)
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2
    assert_same(study, undisturbed, killed_writers=False)


def short_of_memory(log: Path, spare_bytes: int) -> Callable[[], None]:
    """Workers whose address space may grow by so much once a model is loaded; logs failed allocations."""

    def setup() -> None:
        import resource

        from gt_ray.learning import engine

        load, is_out_of_memory = engine.Engine.__init__, engine.is_out_of_memory

        def limited(self: Any, *args: Any) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            load(self, *args)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + spare_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

        def logged(error: BaseException) -> bool:
            if found := is_out_of_memory(error):
                with log.open("a") as file:
                    file.write(f"{error}\n")
            return found

        engine.Engine.__init__, engine.is_out_of_memory = limited, logged  # type: ignore[method-assign]

    return setup


@pytest.mark.slow
def test_an_actor_out_of_memory_does_less_at_once(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    """Eight adapters together take over 250 MB in a step, one takes 35."""
    study = Study.load(study_config(tmp_path, "curation.adapters_at_once=8", "curation.workers=1"))
    with two_nodes.driver(short_of_memory(tmp_path / "failures", 120 * 2**20)):
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2 * SHADOWS
    assert "allocate memory" in (tmp_path / "failures").read_text()
    assert_same(study, undisturbed, killed_writers=False)


def full_disk(units: int) -> Callable[[], None]:
    """Workers that can write no unit once the store has so many: files may not grow beyond 1 KB from then on."""

    def setup() -> None:
        import resource

        from gt_ray.updates.store import UpdateStore

        write_file = UpdateStore.write_file

        def limited(self: UpdateStore, key: str, content: bytes) -> None:
            if len(self.keys()) >= units:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            write_file(self, key, content)

        UpdateStore.write_file = limited  # type: ignore[method-assign]

    return setup


@pytest.mark.slow
def test_a_full_disk_ends_the_command_and_keeps_what_is_done(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    study = Study.load(study_config(tmp_path, "curation.workers=1"))
    with (
        two_nodes.driver(full_disk(units=5)),
        pytest.raises(UserError, match="finished units are kept, free some space"),
    ):
        run_fine_tunes(study, jobs_of(study), "curate")
    units, strays = study.store.contents()
    assert len(units) == 5 and not strays
    for key in units:
        assert_same_unit(key, study, undisturbed)
    with two_nodes.driver():
        assert run_fine_tunes(study, jobs_of(study), "curate") == 2 * SHADOWS - 5
    assert_same(study, undisturbed, killed_writers=False)


@pytest.mark.slow
def test_two_curations_into_one_store_make_each_unit_once(
    two_nodes: Nodes, undisturbed: Study, study_config: Make, tmp_path: Path
) -> None:
    config = study_config(tmp_path, "curation.workers=1", f"runs={tmp_path / 'runs'}")
    (tmp_path / "study.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "gt_ray.cli", "curate", "--preset", str(tmp_path / "study.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": two_nodes.cluster.address}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for process in both:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output
        assert "of 16 units to fine-tune" in output
    assert_same(Study.load(config), undisturbed, killed_writers=False)
