"""Fine-tunes that sleep for recorded times on real raylets, and what the simulation says of them.

Everything but the optimizer's steps is real: `run_fine_tunes`, Ray Data, actors that load their models, the store. Each
worker notes when it begins and ends what, so that starts, loading and the time between two blocks are known.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gt_ray.config import Config, load_config
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.studies.simulation import Block, Conditions, Node, Pool, Run, Stage, simulate

RECORDED_S = {
    "llm": (1.75, 1.25, 1.77, 1.75, 1.25, 2.63, 2.58, 2.62, 0.97, 3.75, 2.25, 4.44),
    "tinylm": (3.94, 2.74, 3.11, 3.88, 5.07, 2.24, 2.88, 2.54, 3.27, 2.83, 4.65, 1.46),
}
"""`UnitMeta.wall_s` of the first shadows of a run of preset embedded-dp on two cores."""
SHADOWS = 12
Times = Mapping[str, Sequence[float]]
"""Seconds of the fine-tune of each shadow, by side."""
NOTICE_S = 10.0
"""From a node's end until Ray starts its actor elsewhere, with the health checks below."""
ATTEMPTS = 10
HEALTH = {"health_check_period_ms": 2000}


def small_config(folder: Path) -> Config:
    """A study of 12 shadows of one task of the embedded pair, two adapters a group."""
    return load_config(
        "embedded",
        [
            "data.tasks=[gsm8k]",
            "data.embedded_rows=192",
            f"curation.shadows={SHADOWS}",
            "curation.samples=8",
            "curation.snapshots=2",
            "curation.plan=domains",
            "curation.tinylm_shadows=0",
            "curation.adapters_at_once=2",
            f"runs={folder / 'runs'}",
            f"store={folder / 'store'}",
        ],
    )


def sleeping(log: Path, times: Times) -> Callable[[], None]:
    """Set-up of workers whose fine-tunes sleep, and which note what they do in `log`."""

    # Only plain values go along: workers need not find this module.
    seconds = {f"{side} {k}": one for side, line in times.items() for k, one in enumerate(line)}

    def setup() -> None:
        import psutil
        import torch

        from gt_ray.curation.worker import FineTuner
        from gt_ray.learning.engine import Engine, FineTuned

        def note(**what: Any) -> None:
            with log.open("a") as file:
                file.write(json.dumps({"pid": os.getpid(), "at": time.time(), **what}) + "\n")

        load, init = FineTuner._load, FineTuner.__init__

        def noted_init(self: Any, *args: Any) -> None:
            init(self, *args)
            note(what="up", seconds=time.time() - psutil.Process().create_time())

        def noted_load(self: Any, side: Any) -> Any:
            new, start = self.loaded is None or self.loaded[0] != side, time.time()
            found = load(self, side)
            if new:
                note(what="loaded", seconds=time.time() - start)
            return found

        def fine_tune(self: Any, sets: Any, settings: Any, snapshot_steps: Any, **_: Any) -> Iterator[Any]:
            members = [f"{one.name.rpartition(', ')[2].rstrip(')')} {one.name.split()[1]}" for one in sets]
            note(what="begun", members=members)
            time.sleep(sum(seconds[one] for one in members))
            note(what="ended", members=members)
            layout = self.root.layout
            for i in range(len(sets)):
                yield i, FineTuned(torch.full((len(snapshot_steps), layout.L, layout.d), 1e-3), [1.0])

        FineTuner.__init__ = noted_init  # type: ignore[method-assign]
        FineTuner._load = noted_load  # type: ignore[method-assign]
        Engine.fine_tune = fine_tune  # type: ignore[method-assign, assignment]

    return setup


@dataclass(frozen=True)
class Measure:
    """One real run; seconds count from the call of `run_fine_tunes`.

    Attributes:
        makespan_s: to its return.
        first_s: to the first group's begin.
        blocks: members of each group, in the order in which they were first begun.
        placed: the actor that did each of them last, by the order of their first work.
        asked_s: when each actor's process was started, in that order.
        start_s: of each actor from there to its first work, with imports and its first model.
        load_s: of a second model.
        between_s: between two groups of one actor, loading taken off.
        last_s: from the last group's end to the return.
        again: groups that were begun more than once.
        died: the actor that had begun the first of those, as in `placed`.
        event_s: when something happened beside it.
    """

    makespan_s: float
    first_s: float
    blocks: list[list[str]]
    placed: list[int]
    asked_s: list[float]
    start_s: list[float]
    load_s: float
    between_s: float
    last_s: float
    again: int
    died: int | None
    event_s: float = math.inf


During = Callable[[Any, Callable[[], float], Callable[[], int]], float]
"""What happens beside a run, given the cluster, the seconds since the start, and the groups that have ended; when."""


def run_sleeping(config: Config, nodes: int, times: Times, during: During | None = None) -> Measure:
    """Curate on so many raylets of one CPU."""
    import ray
    from ray.cluster_utils import Cluster

    log = Path(config.store).with_name("check.jsonl")
    log.touch()
    cluster = Cluster()
    _add(cluster, num_cpus=0, _system_config=HEALTH)
    for _ in range(nodes):
        _add(cluster, num_cpus=1)
    environment = {"worker_process_setup_hook": sleeping(log, times)}
    ray.init(address=cluster.address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    try:
        study = Study.load(config)
        jobs = [*study.shadow_jobs("llm"), *study.shadow_jobs("tinylm")]
        began = time.time()
        # Nodes can be added by the main thread alone.
        with ThreadPoolExecutor(1) as beside:
            running = beside.submit(run_fine_tunes, study, jobs, "check")
            ended = lambda: log.read_text().count('"ended"')  # noqa: E731
            event_s = during(cluster, lambda: time.time() - began, ended) if during else math.inf
            running.result()
            makespan_s = time.time() - began
        notes = [json.loads(line) for line in log.read_text().splitlines()]
    finally:
        ray.shutdown()
        cluster.shutdown()
    return replace(_measure([one | {"at": one["at"] - began} for one in notes], makespan_s), event_s=event_s)


def _add(cluster: Any, **what: Any) -> None:
    """Add a node; a raylet gives up after 30 s in which its agents have not started, which a busy machine exceeds."""
    for tries_left in reversed(range(ATTEMPTS)):
        try:
            cluster.add_node(include_dashboard=False, **what)
            return
        except Exception:  # Ray raises nothing narrower
            if not tries_left:
                raise


def _measure(notes: list[dict[str, Any]], makespan_s: float) -> Measure:
    begun = [one for one in notes if one["what"] == "begun"]
    first = {tuple(one["members"]): one for one in reversed(begun)}
    last = {tuple(one["members"]): one["pid"] for one in begun}
    order = sorted(first, key=lambda members: first[members]["at"])
    pids = list(dict.fromkeys(one["pid"] for one in begun))
    asked, start, load, between = [], [], [], []
    for pid in pids:
        mine = [one for one in notes if one["pid"] == pid]
        loads = [one for one in mine if one["what"] == "loaded"]
        load += [one["seconds"] for one in loads[1:]]
        (up,) = (one for one in mine if one["what"] == "up")
        work = next(one for one in mine if one["what"] == "begun")
        asked.append(up["at"] - up["seconds"])
        start.append(work["at"] - asked[-1])
        for ended in (one for one in mine if one["what"] == "ended"):
            following = next((one for one in mine if one["what"] == "begun" and one["at"] > ended["at"]), None)
            if following:
                loaded = sum(one["seconds"] for one in loads if ended["at"] < one["at"] < following["at"])
                between.append(following["at"] - ended["at"] - loaded)
    return Measure(
        makespan_s,
        min(one["at"] for one in begun),
        [list(members) for members in order],
        [pids.index(last[members]) for members in order],
        asked,
        start,
        statistics.median(load) if load else 0.0,
        statistics.median(between),
        makespan_s - max(one["at"] for one in notes if one["what"] == "ended"),
        len(begun) - len(first),
        next((pids.index(first[members]["pid"]) for members in order if first[members]["pid"] != last[members]), None),
    )


def predicted(of: Measure, script: Sequence[Node], times: Times, between_s: float) -> Run:
    """The simulation of a run: blocks in the order of the run, its starts and loading, the time between blocks as
    stated. Actors that come later take a time of their own, as the first ones start all at once, on one machine.

    Args:
        script: of nodes; `up_s` of those of the first actors is left out, and follows from their first work.
    """
    first = [node for node in script if not node.up_s]
    start_s = statistics.median(of.start_s[len(first) :] or of.start_s)
    begins = iter(asked_s + own_s for asked_s, own_s in zip(of.asked_s, of.start_s, strict=True))
    script = [node if node.up_s else replace(node, up_s=max(0.0, next(begins) - start_s)) for node in script]
    seconds = {f"{side} {k}": one for side, line in times.items() for k, one in enumerate(line)}
    blocks = tuple(Block(one[0].split()[0], (sum(seconds[k] for k in one),), (0.0,)) for one in of.blocks)
    conditions = Conditions(
        node_gpus=1,
        node_start_s=0,
        actor_start_s=max(0.0, start_s - of.load_s - between_s),
        model_start_s=of.load_s,
        driver_block_s=0,
        between_s=between_s,
        notice_s=NOTICE_S,
        straggler_sigma=0,
    )
    return simulate([Stage("curation", (Pool(1, blocks),))], script, conditions)


Case = tuple[str, int, During | None]


def checks(scale: float, only: Sequence[str]) -> Iterator[tuple[str, float, float, Measure]]:
    """Name, predicted makespan and first begin of a group (s), and measures of runs at 1, 2 and 3 raylets, with one
    that is killed and one that joins.

    Args:
        only: names of the runs that are wanted; none: all. The time between blocks is that of the first.
    """
    times = {side: [scale * one for one in line] for side, line in RECORDED_S.items()}
    between_s = None
    cases: list[Case] = [
        ("1 raylet", 1, None),
        ("2 raylets", 2, None),
        ("3 raylets", 3, None),
        ("3 raylets, one killed", 3, _kill),
        ("1 raylet, one joins", 1, _join),
    ]
    for name, nodes, during in cases:
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = run_sleeping(small_config(Path(folder)), nodes, times, during)
        between_s = found.between_s if between_s is None else between_s
        script = [Node()] * sum(asked_s < found.event_s for asked_s in found.asked_s)  # actors that were there first
        if during is _kill:
            died = len(script) - 1 if found.died is None else found.died
            script[died] = replace(script[died], down_s=found.event_s)
        if during is _join:
            script.append(Node(up_s=found.event_s))
        run = predicted(found, script, times, between_s)
        first_s = min(start for start, _, _, cause in run.segments if cause == "computing")
        yield name, run.makespan_s + found.last_s, first_s, found


def _kill(cluster: Any, since_s: Callable[[], float], ended: Callable[[], int]) -> float:
    """Once four groups have ended; returns when."""
    while ended() < 4:
        time.sleep(0.05)
    cluster.remove_node(list(cluster.worker_nodes)[-1], allow_graceful=False)
    return since_s()


def _join(cluster: Any, since_s: Callable[[], float], ended: Callable[[], int]) -> float:
    """Once two groups have ended; returns when."""
    while ended() < 2:
        time.sleep(0.05)
    _add(cluster, num_cpus=1)
    return since_s()
