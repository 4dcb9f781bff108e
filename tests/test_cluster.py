"""The connection to Ray."""

from __future__ import annotations

from typing import Any

import pytest

from gt_ray import cli
from gt_ray.cluster import connect
from gt_ray.errors import UserError


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
