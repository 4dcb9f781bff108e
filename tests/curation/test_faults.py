"""Workers and nodes that die or go away in a curation: the store ends as if nothing had happened (decision 11)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gt_ray.cluster import nodes
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.curation.worker import start_attempts
from gt_ray.errors import UserError
from tests.curation.conftest import (
    LIMIT_S,
    SHADOWS,
    Make,
    assert_same,
    assert_same_unit,
    curation,
    jobs_of,
    keys_of,
    wait_for_units,
)
from tests.nodes import Nodes, workers_of

pytestmark = pytest.mark.ray


@pytest.mark.slow  # `make test` kills a node that curates, in test_cluster_study.py
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

        def logged(self: Engine, sets: Any, *args: Any, **kwargs: Any) -> Any:
            if any(name in one.name for one in sets):
                with log.open("a") as file:
                    file.write(f"{len(sets)}\n")
                if len(log.read_text().split()) <= deaths:
                    os.kill(os.getpid(), signal.SIGKILL)
            return fine_tune(self, sets, *args, **kwargs)

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
def test_workers_whose_node_went_away_did_not_die_of_what_they_did(two_nodes: Nodes) -> None:
    import ray

    with two_nodes.driver():
        attempts = start_attempts()

        def begin(node: Any) -> int:
            return int(ray.get(attempts.begin.remote("a group", node.node_id)))

        spot, other = two_nodes.working()
        assert [begin(node) for node in (spot, other, spot, spot)] == [0, 1, 2, 3]
        two_nodes.kill(spot)
        while len(nodes()) > 2:
            time.sleep(0.1)
        assert [begin(other), begin(other)] == [1, 2]
        ray.get(attempts.end.remote("a group"))
        assert begin(other) == 2


@pytest.mark.slow
def test_a_store_that_nodes_do_not_share_is_an_error_at_the_first_unit(
    two_nodes: Nodes, study_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere() -> None:
        from gt_ray.updates.store import UpdateStore

        UpdateStore.write_file = lambda *_: None  # type: ignore[method-assign]

    monkeypatch.setattr("gt_ray.updates.store.SEEN_S", 1)
    study = Study.load(study_config(tmp_path))
    with two_nodes.driver(elsewhere), pytest.raises(UserError, match=r"another node has written unit .* name a store="):
        run_fine_tunes(study, jobs_of(study), "curate")


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
