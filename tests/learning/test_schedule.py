"""When an adapter's rate falls and its fine-tune ends."""

from __future__ import annotations

import pytest

from gt_ray.config import FineTuneSettings, StopSettings
from gt_ray.learning.schedule import Schedule

PLATEAU = FineTuneSettings(
    steps=100, stop=StopSettings(when="plateau", every=10, patience=2, min_improvement=0.1, decay_steps=20)
)


def test_fixed_steps_decay_linearly_to_zero_from_the_first_one() -> None:
    schedule = Schedule(FineTuneSettings(steps=4), G=2)
    assert [schedule.factor(1, step) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert schedule.end(0) == 4 and not schedule.wants_check(0)


def test_a_plateau_starts_the_decay_of_one_adapter() -> None:
    schedule = Schedule(PLATEAU, G=2)
    for step, flat, falling in ((0, 2.0, 2.0), (10, 1.9, 1.7), (20, 1.85, 1.5)):
        assert schedule.wants_check(step) and not schedule.wants_check(step + 1)
        assert schedule.factor(0, step) == 1 and schedule.end(0) is None
        schedule.check(0, step, flat)
        schedule.check(1, step, falling)
    assert schedule.end(0) == 40 and schedule.end(1) is None
    assert schedule.factor(0, 30) == 0.5 and schedule.factor(1, 30) == 1
    schedule.check(0, 30, 0.0)  # too late
    assert schedule.end(0) == 40


def test_the_cap_leaves_room_for_the_decay() -> None:
    schedule = Schedule(PLATEAU, G=1)
    for number, step in enumerate(range(0, 100, 10)):
        schedule.check(0, step, 0.5**number)
    assert schedule.end(0) == 100


def test_a_decay_that_does_not_fit_is_an_error_of_the_config() -> None:
    with pytest.raises(ValueError, match="fewer than one look at the held-out loss"):
        FineTuneSettings(steps=100, stop=StopSettings(when="plateau", every=50, decay_steps=60))
