"""Workers of a training that died are told where its events are, from a process of Ray Train's own."""

from __future__ import annotations

from pathlib import Path

from ray import cloudpickle
from ray.train import RunConfig

from gt_ray.errors import UserError
from gt_ray.events import during, events_file, here, recording
from gt_ray.studies.stages import read_events
from gt_ray.training.failures import WorkerFailures


def test_failures_of_workers_are_recorded_with_their_rank(tmp_path: Path) -> None:
    with recording(tmp_path), during("train"):
        place = here()
    assert place is not None
    (callback,) = RunConfig(callbacks=[WorkerFailures(*place)]).callbacks
    there = cloudpickle.loads(cloudpickle.dumps(callback))
    there.after_exception(None, {0: RuntimeError("the actor died\nits node is gone"), 2: UserError("no rows")})
    told = [event for event in read_events(events_file(tmp_path)) if event["event"] == "progress"]
    assert [(event["stage"], event["note"]) for event in told] == [
        ("train", "worker 0 failed: RuntimeError: the actor died"),
        ("train", "worker 2 failed: no rows"),
    ]
