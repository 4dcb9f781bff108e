"""Running fine-tunes as a Ray Data pipeline: a row for each (model, k), pools of actors that keep base models loaded.

Blocks of rows carry positions, not data: the rows of a study lie once in the object store of every node, base models
are read by each actor, and units go from the actor straight into the store.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, Literal

from gt_ray.cluster import connect, nodes, room
from gt_ray.curation.jobs import SIDES, FineTuneJob, model_settings
from gt_ray.curation.planner import gpus_of_an_actor
from gt_ray.curation.study import Study
from gt_ray.curation.worker import FineTuner, start_attempts
from gt_ray.errors import UserError
from gt_ray.progress import bar, say

BLOCK = 64
"""Most jobs of a block where `adapters_at_once` is chosen by the actor."""

MOST_ROUNDS = 4
"""No block is smaller than the largest one tried by more than this."""

UNEVEN = 1.1
"""Longest time of an actor over all actors' mean for which no smaller blocks are tried."""

SHOWN_ERRORS = 5


def run_fine_tunes(
    study: Study, jobs: Sequence[FineTuneJob], stage: str, made: Callable[[str], None] = lambda key: None
) -> int:
    """Run those jobs whose unit the store lacks; finished units are kept whatever happens.

    Args:
        made: is told the key of each unit that was made; what it raises ends the run.

    Returns:
        How many were run.

    Raises:
        UserError: the store cannot be written, or is another one on another node; or some jobs failed, and the others
            are done by then.
    """
    jobs = list({job.key: job for job in jobs}.values())
    study.store.sweep()
    keys = set(study.store.missing([job.key for job in jobs]))
    if not keys:
        say(f"{stage}: nothing to do, all {len(jobs)} units are in {study.config.store}")
        return 0
    study.store.check_writable()
    say(f"{stage}: {len(keys)} of {len(jobs)} units to fine-tune")
    errors: dict[str, str] = {}
    trusted: set[str] = set()  # nodes whose store is the driver's
    with bar(stage, len(keys)) as progress, closing(_stream(study, jobs, keys)) as stream:
        for key, error, node in stream:
            if key in keys:
                progress.advance(error=error)
                errors[key] = error
                if not error:
                    if node not in trusted:
                        study.store.written(key)
                        trusted.add(node)
                    made(key)
    failed = {key: error for key, error in errors.items() if error}
    if failed:
        reasons = sorted(set(failed.values()))
        raise UserError(
            f"{len(failed)} of {len(keys)} fine-tunes failed, the others are kept: "
            + "; ".join(reasons[:SHOWN_ERRORS])
            + (f"; and {len(reasons) - SHOWN_ERRORS} more" if len(reasons) > SHOWN_ERRORS else "")
        )
    return len(keys)


def _stream(study: Study, jobs: Sequence[FineTuneJob], keys: set[str]) -> Generator[tuple[str, str, str], None, None]:
    """Key, error and node of every job, as blocks finish."""
    ray = connect()
    import pyarrow as pa

    # Inside a dictionary a reference stays one, so that every actor does not carry all rows in its arguments.
    # A pool grows where all its actors have a task; Ray's own bound counts on tasks that wait in an actor's queue.
    ray.data.DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    shared = {"study": ray.put(study), "attempts": start_attempts()}
    at_once, most = study.config.curation.adapters_at_once, study.config.curation.workers
    found = nodes()
    demands = {side: gpus_of_an_actor(model_settings(study.config, side), found) for side in {job.side for job in jobs}}
    pools = []
    # Models of equal demand share a pool, whose actors change from one model to the next.
    for num_gpus in sorted(set(demands.values()), reverse=True):
        mine = [job for job in jobs if demands[job.side] == num_gpus]
        places = room(0 if num_gpus else 1, num_gpus, found)
        start = max(1, places if most == "auto" else min(most, places))
        blocks = [block for block in _blocks(mine, at_once, start) if any(job.key in keys for job in block)]
        if not blocks:
            continue
        largest = len(blocks) if most == "auto" else min(most, len(blocks))
        # A row is a block: on GPUs Ray Data wants a batch size, and would fill up batches of jobs from several blocks.
        tables = [
            pa.table({"key": [[job.key for job in block]], "job": [[json.dumps(job.as_row()) for job in block]]})
            for block in blocks
        ]
        dataset = ray.data.from_arrow(tables)
        dataset.context.execution_options.preserve_order = False  # keys come as they are done
        pools.append(
            dataset.map_batches(
                FineTuner,
                fn_constructor_args=({**shared, "num_gpus": num_gpus, "actors": largest},),
                batch_size=1,
                **({"num_gpus": num_gpus} if num_gpus else {"num_cpus": 1}),
                compute=ray.data.ActorPoolStrategy(
                    min_size=1,
                    max_size=largest,
                    initial_size=min(start, largest),
                    max_tasks_in_flight_per_actor=1,  # else the first actor that is up takes the others' blocks too
                ),
            )
        )
    plan = pools[0].union(*pools[1:]) if len(pools) > 1 else pools[0]
    for batch in plan.iter_batches(batch_size=None, prefetch_batches=0):
        yield from zip(*(map(str, batch[name]) for name in ("key", "error", "node")), strict=True)


def _blocks(jobs: Sequence[FineTuneJob], at_once: int | Literal["auto"], actors: int) -> list[list[FineTuneJob]]:
    """Jobs for one call of an actor: same model, fine-tune, snapshots and task, so that lengths are alike.

    The LLM's come first, and those of most steps: they take longest. Within a model the order is drawn anew, so that
    two curations into one store do different things first; results do not depend on it.
    """
    by_side: dict[str, dict[tuple[Any, ...], list[FineTuneJob]]] = {}
    for job in jobs:
        tuned = json.dumps([job.made_by["fine_tune"], job.made_by.get("loss")])
        kind = (tuned, tuple(job.snapshot_steps), job.task)
        by_side.setdefault(job.side, {}).setdefault(kind, []).append(job)
    blocks = []
    for kinds in by_side.values():
        members = list(kinds.values())
        counts = _even([len(one) for one in members], actors) if at_once == "auto" else [0] * len(members)
        for one, count in zip(members, counts, strict=True):
            n = count or -(-len(one) // int(at_once))
            size = len(one) / n if count else int(at_once)
            blocks += [one[round(i * size) : round((i + 1) * size)] for i in range(n)]
    random.shuffle(blocks)
    return sorted(blocks, key=lambda block: (-SIDES.index(block[0].side), -block[0].steps))


def _even(sizes: Sequence[int], actors: int) -> list[int]:
    """Into how many blocks each kind of jobs is cut: as few as keep all actors at work nearly to the end.

    Few blocks are large ones, which an actor fine-tunes in full groups.

    Args:
        sizes: jobs of each kind.
    """
    best, least, mean = list(sizes), math.inf, sum(sizes) / actors
    largest = min(BLOCK, math.ceil(mean))
    for size in range(largest, math.ceil(largest / MOST_ROUNDS) - 1, -1):
        counts = [-(-n // size) for n in sizes]
        ends = [0] * actors
        for one in sorted(
            (-(-n // count) for n, count in zip(sizes, counts, strict=True) for _ in range(count)), reverse=True
        ):
            heapq.heapreplace(ends, ends[0] + one)
        if max(ends) < least:
            best, least = counts, max(ends)
        if least <= UNEVEN * mean:
            break
    return best
