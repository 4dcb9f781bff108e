"""Steps that workers write to a file, as a bar and as events."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gt_ray import events
from gt_ray.events import during, events_file, recording
from gt_ray.progress import Bar
from gt_ray.studies.stages import Stage, read_events, stages_of
from gt_ray.training.phases import _followed


@pytest.mark.parametrize(
    ("steps", "skipped"),
    [
        ([0, 11, 22], 0),
        ([900, 911, 950], 900),  # an earlier run did 900
        ([0, 30, 20, 40], 0),  # a worker died after a checkpoint at 20
        ([], None),  # all phases were trained
    ],
)
def test_a_bar_follows_the_workers_steps(
    steps: Sequence[int], skipped: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "TICK_S", 0.01)

    def stage() -> Stage:
        (found,) = stages_of(read_events(events_file(tmp_path)), (), time.time())
        return found

    looked, skip = threading.Event(), Bar.skip

    def told_first(self: Bar, n: int) -> None:
        skip(self, n)
        looked.set()

    monkeypatch.setattr(Bar, "skip", told_first)
    with recording(tmp_path), during("train"), _followed(tmp_path / "step", 1000):
        for step in steps:
            (tmp_path / "step").write_text(str(step))
            looked.wait()
            while stage().done != step:
                time.sleep(0.01)
    assert (stage().state, stage().done, stage().total) == ("done", steps[-1] if steps else 0, 1000)
    told = [event for event in read_events(events_file(tmp_path)) if event["event"] == "progress"]
    assert told[-1].get("skipped") == (skipped or None)


def test_the_last_step_is_told_even_when_it_comes_just_before_the_end(tmp_path: Path) -> None:
    with recording(tmp_path), during("train"), _followed(tmp_path / "step", 12):
        (tmp_path / "step").write_text("12")
    last = [event for event in read_events(events_file(tmp_path)) if event["event"] == "progress"][-1]
    assert (last["done"], last["total"]) == (12, 12)
