"""Stages from events: states, counts, rates and time left, against slow calculations of their own."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from gt_ray.errors import UserError
from gt_ray.studies.stages import (
    GONE_S,
    LEAST_ADVANCES,
    SILENT_S,
    WINDOW_S,
    Point,
    Process,
    Stage,
    rate_of,
    read_events,
    stages_of,
)
from tests.studies.watched import ELSEWHERE, GONE, ME, T0, events, finished, progress, started


def stage_of(now: float, *told: object, name: str = "train") -> Stage:
    """The stage as of so many seconds after T0."""
    found = {one.name: one for one in stages_of(events(*told), (), T0 + now)}  # type: ignore[arg-type]
    return found[name]


def test_stages_come_in_their_order_and_others_behind() -> None:
    told = [*finished(0, {"attack": 1.0, "train": 2.0}), started(3, "curate")]
    found = stages_of(events(*told), ("curate", "train", "evaluate"), T0 + 4)
    states = [(stage.name, stage.state) for stage in found]
    assert states == [("curate", "running"), ("train", "done"), ("evaluate", "waiting"), ("attack", "done")]
    assert found[2] == Stage("evaluate")  # nothing is known, so nothing is said
    assert (found[1].started, found[1].elapsed_s) == (T0 + 1, 2.0)


def test_counts_and_failures() -> None:
    told = [
        started(0, "curate"),
        progress(1, "curate", 0, 40),
        progress(20, "curate", 12, 40, failed=2, note="no memory"),
        progress(21, "curate", 13, 40, failed=3, note="no memory"),
        (22, "curate", "progress", {"note": "worker 0 failed"}),
    ]
    found = stage_of(25, *told, name="curate")
    assert (found.done, found.total, found.queue, found.failed) == (13, 40, 27, 3)
    assert found.failures == ("no memory", "worker 0 failed") and found.state == "running"


def test_a_stage_that_failed_says_why_and_its_next_attempt_begins_anew() -> None:
    failed = [started(0, "train", ME), progress(1, "train", 3, 9), (5, "train", "failed", {"note": "disk is full"})]
    found = stage_of(6, *failed)
    assert (found.state, found.failures, found.elapsed_s) == ("failed", ("disk is full",), 5.0)
    again = stage_of(60, *failed, started(50, "train", ME))
    assert (again.state, again.failures, again.done, again.elapsed_s) == ("running", (), None, 15.0)


def test_what_failed_waits_once_another_process_works_its_way_there() -> None:
    failed = [*finished(0, {"curate": 1.0}, GONE), started(1, "train", GONE), (5, "train", "failed", {"note": "no"})]
    assert stage_of(60, *failed, started(50, "curate", ME)).state == "waiting"
    # but not if that one was there before it failed: two processes work on the run
    at_once = [failed[0], failed[1], failed[2], started(3, "curate", ME), failed[3]]
    assert stage_of(60, *at_once).state == "failed"


def test_other_settings_begin_anew() -> None:
    told = [*finished(0, {"curate": 9.0, "train": 9.0}), started(50, "curate", config="other")]
    found = stages_of(events(*told), ("curate", "train"), T0 + 51)
    assert [(stage.state, stage.elapsed_s) for stage in found] == [("running", 1.0), ("waiting", None)]


@pytest.mark.parametrize(
    ("process", "silent_s", "state"),
    [
        (ME, 10 * SILENT_S, "running"),  # it is there, and busy
        (GONE, GONE_S - 1, "running"),
        (GONE, GONE_S + 1, "interrupted"),
        (ELSEWHERE, SILENT_S - 1, "running"),
        (ELSEWHERE, SILENT_S + 1, "interrupted"),
        ({**ME, "created": ME["created"] - 100}, GONE_S + 1, "interrupted"),  # another process has its number
    ],
)
def test_a_stage_is_given_up_when_its_process_is_gone(process: dict[str, object], silent_s: float, state: str) -> None:
    told = [started(0, "train", process), progress(10, "train", 5, 10), (30, "train", "alive")]
    found = stage_of(30 + silent_s, *told)
    assert found.state == state
    if state == "interrupted":
        assert (found.elapsed_s, found.rate_per_min, found.left_s) == (30.0, None, None)


def test_a_stage_that_was_interrupted_says_so_at_once() -> None:
    assert stage_of(3, started(0, "train"), (2, "train", "interrupted")).state == "interrupted"


def test_a_killed_process_is_gone_even_while_its_parent_has_not_looked() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = Process(str(ME["host"]), child.pid, psutil.Process(child.pid).create_time())
    assert process.lives()
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert process.lives() is False
    child.wait()
    assert process.lives() is False and Process("another-machine", 7, T0).lives() is None


def test_two_stages_at_once_are_told_apart() -> None:
    told = [started(0, "curate"), started(1, "clients", GONE)]
    told += [progress(t, stage, t // 2, 100) for t in range(2, 40, 2) for stage in ("curate", "clients")]
    told += [(40, "clients", "end")]
    assert stage_of(41, *told, name="curate").state == "running"
    assert stage_of(41, *told, name="curate").done == stage_of(41, *told, name="clients").done == 19
    assert stage_of(41, *told, name="clients").state == "done"


def slow_rate(points: list[Point], now: float) -> tuple[float, float]:
    """The same by counting what was done at each advance, and up to when."""
    advances = [(after.t, after.done - before.done) for before, after in pairwise(points)]
    moments = [points[0].t, *(t for t, _ in advances)]
    if len(advances) > 2:
        moments = moments[1:]
    wanted = max(LEAST_ADVANCES, len([t for t in moments if now - t <= WINDOW_S]))
    while len(moments) > wanted + 1:
        moments.pop(0)
    gaps = sorted(b - a for a, b in pairwise(moments))
    end = moments[-1] if now - moments[-1] <= gaps[-1] else now
    done = sum(n for t, n in advances if moments[0] < t <= end)
    return done / (end - moments[0]), end


@pytest.mark.parametrize("seed", range(20))
def test_rate_and_time_left_are_those_of_a_slow_calculation(seed: int) -> None:
    rng = random.Random(seed)
    points, total = [Point(0.0, 0)], 1000
    for _ in range(rng.randint(1, 60)):
        points.append(Point(points[-1].t + rng.choice([1, 5, 40, 300]), points[-1].done + rng.choice([1, 1, 2, 8])))
    now = points[-1].t + rng.choice([0, 3, 1000])
    rate, end = slow_rate(points, now)
    assert rate_of(points, now) == pytest.approx((rate, end))
    told = [started(0, "train"), *(progress(point.t, "train", point.done, total) for point in points)]
    found = stage_of(now, *told)
    steps, clock = points[-1].done, end
    while steps < total:
        steps, clock = steps + 1, clock + 1 / rate
    assert found.rate_per_min == pytest.approx(60 * rate)
    assert found.left_s == pytest.approx(max(0.0, clock - now), abs=1e-6)


def test_a_rate_is_that_of_late_and_not_of_the_start() -> None:
    slow = [Point(100.0 * i, i) for i in range(20)]
    fast = [Point(1900 + 2.0 * i, 19 + i) for i in range(1, 301)]
    assert rate_of([*slow, *fast], 2500)[0] == pytest.approx(0.5)


def test_loading_models_is_no_part_of_the_rate_once_there_is_one() -> None:
    points = [Point(0, 0), Point(600, 10), Point(660, 20), Point(720, 30)]
    assert rate_of(points, 720)[0] == pytest.approx(10 / 60)
    assert rate_of(points[:2], 600)[0] == pytest.approx(10 / 600)
    assert rate_of(points[:1], 600)[0] is None


def test_a_bar_that_stands_still_has_ever_more_time_left() -> None:
    told = [started(0, "train"), *(progress(10 * i, "train", i, 100) for i in range(11))]
    left = [stage_of(now, *told).left_s for now in (100, 105, 200, 1000)]
    assert left[0] == pytest.approx(900) and left[1] == pytest.approx(895)
    assert left[2] is not None and left[3] is not None and 900 < left[2] < left[3]


def test_steps_that_an_earlier_run_did_are_done_but_were_not_fast() -> None:
    told = [
        started(0, "train"),
        progress(0, "train", 0, 1000),
        *(progress(60 + 10 * i, "train", 900 + i, 1000, skipped=900) for i in range(11)),
    ]
    found = stage_of(160, *told)
    assert (found.done, found.queue) == (910, 90) and found.rate_per_min == pytest.approx(6)


def test_a_training_that_went_back_to_its_checkpoint_is_measured_from_there() -> None:
    forth = [progress(10 * i, "train", 10 * i, 1000) for i in range(30)]
    again = [progress(300 + 10 * i, "train", 100 + i, 1000) for i in range(4)]
    found = stage_of(330, started(0, "train"), *forth, *again)
    assert found.done == 103 and found.rate_per_min == pytest.approx(6)


def test_a_part_is_counted_for_itself() -> None:
    told = [started(0, "baselines"), *(progress(i, "baselines", i, 30, part="label") for i in range(31))]
    told += [progress(40 + 10 * i, "baselines", i, 8, part="distributions") for i in range(4)]
    found = stage_of(70, *told, name="baselines")
    assert (found.part, found.done, found.total) == ("distributions", 3, 8)
    assert found.rate_per_min == pytest.approx(6)


def test_a_full_bar_says_nothing_of_how_long_the_stage_goes_on() -> None:
    told = [started(0, "train"), *(progress(i, "train", i, 10) for i in range(11))]
    found = stage_of(11, *told)
    assert (found.state, found.queue, found.left_s) == ("running", 0, None)


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    assert read_events(file) == []
    whole = b'{"t": 1, "stage": "train", "event": "start"}\n'
    odd = b'\n[1]\n{"t": "x", "stage": "train", "event": "end"}\n{"t": 1}\n\xff\xfe\n'
    odd += b'{"t": NaN, "stage": "train", "event": "end"}\n'
    odd += b'{"t": 1, "stage": "train", "event": "start", "pid": null}\n'
    odd += b'{"t": 1, "stage": "train", "event": "progress", "skipped": "x"}\n{"t": 2, "stage": "tra'
    file.write_bytes(whole + odd)
    assert [event["event"] for event in read_events(file)] == ["start"]
    assert stages_of(read_events(file), (), 1000.0)[0].state == "interrupted"
    with pytest.raises(UserError, match="not readable"):
        read_events(tmp_path)
