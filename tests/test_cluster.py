"""The connection to Ray."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gt_ray import cli
from gt_ray.cluster import WANTED_GPUS, connect, nodes, own_devices, room, total
from gt_ray.errors import UserError
from tests.nodes import private_cluster


@pytest.mark.ray
def test_a_user_error_in_an_actor_ends_the_command_with_one_line_and_exit_2(
    ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    class Actor:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            raise UserError("row 3 has 900 tokens; raise fine_tune.max_length")

    def work() -> None:
        data = connect().data
        pool = data.ActorPoolStrategy(size=1)
        data.from_items([1]).map_batches(Actor, batch_size=None, num_cpus=1, compute=pool).materialize()

    capsys.readouterr()
    assert cli.run(work) == 2
    assert capsys.readouterr().err == "error: row 3 has 900 tokens; raise fine_tune.max_length\n"


def test_the_scarcer_resource_says_how_many_actors_there_is_room_for() -> None:
    assert room(1, 0, [{"CPU": 3.0, "GPU": 1.0}]) == 3 and room(0, 0.5, [{"CPU": 1.0, "GPU": 2.0}]) == 4
    assert room(1, 0.25, [{"CPU": 2.0, "GPU": 1.0}]) == 2 and room(1, 2, [{"CPU": 2.0}]) == 0


def test_an_actor_is_on_one_node() -> None:
    cluster = [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 6.0}, {"CPU": 8.0, "GPU": 3.0}]
    assert total(cluster, "GPU") == 9 and total(cluster, "CPU") == 20
    assert [room(0, num_gpus, cluster) for num_gpus in (1, 2, 4, 8)] == [9, 4, 1, 0]


@pytest.mark.ray
def test_an_actor_has_the_devices_that_it_asked_for() -> None:
    import ray

    ray.shutdown()
    ray.init(num_cpus=1, num_gpus=4, include_dashboard=False, log_to_driver=False)
    try:
        assert [node["GPU"] for node in nodes()] == [4]
        found = [ray.get(ray.remote(num_cpus=0, num_gpus=n)(own_devices).remote()) for n in (0, 0.5, 1, 2)]
        assert found == [["cpu"], ["cuda:0"], ["cuda:0"], ["cuda:0", "cuda:1"]]
    finally:
        ray.shutdown()


def test_a_number_of_gpus_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WANTED_GPUS, "8xH100")
    with pytest.raises(UserError, match=r"GT_RAY_GPUS='8xH100' is not a number of GPUs; say 8"):
        connect()


@pytest.mark.ray
def test_a_job_asks_the_autoscaler_for_its_gpus_and_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import placement_group_table

    def states() -> list[str]:
        return [group["state"] for group in placement_group_table().values()]

    monkeypatch.setenv(WANTED_GPUS, "2")
    with private_cluster() as cluster, cluster.driver(), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connect)
        while states() != ["PENDING"]:
            time.sleep(0.1)
        assert not waiting.done()
        cluster.cluster.add_node(num_cpus=2, num_gpus=2)
        waiting.result(120)
        assert total(nodes(), "GPU") == 2
        assert states() == ["REMOVED"], "what it does not use is left to others"
        connect()
        assert states() == ["REMOVED"], "it asked for what is there"
