"""A discrete-event model of how a study runs on a cluster: blocks of work, pools of actors, nodes that come and go.

It follows `curation/run.py`. A block is what an actor takes at a time; its groups run one after the other, and what a
finished group has written is kept, so a death costs the groups in flight. An actor that dies keeps its block, as Ray's
does, and starts again where there is room; others go on with what waits. Pools are served in their order, so those of
most GPUs come first. All reading and writing shares one bandwidth, all blocks pass one driver.

Every GPU-second of a run has one cause (`Cause`), so that the largest but computing tells what limits it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from gt_ray.errors import UserError, require

Cause = Literal["computing", "lost", "starting", "storage", "scheduling", "last block", "training", "away"]
"""What a GPU is at: work that is kept; work that a death undid; start of nodes, actors, models; waiting for storage;
waiting for the driver; nothing, since no block is left; nothing, while others train the Grad-Transformer; not there."""
CAUSES: tuple[Cause, ...] = get_args(Cause)
MOST_RETRIES = 7.0
"""Mean lifetimes of its nodes that a group may last: longer ones are repeated over a thousand times."""


@dataclass(frozen=True)
class Block:
    """What an actor takes at a time, of one model.

    Attributes:
        group_s: seconds of each group on its actor.
        group_bytes: what each writes.
    """

    model: str
    group_s: tuple[float, ...]
    group_bytes: tuple[float, ...]


@dataclass(frozen=True)
class Pool:
    """Actors of one demand and the blocks that they go through in order.

    Attributes:
        gpus: of an actor; more than a node has: one gang, whose members all die with one of them.
        weight_bytes: what an actor reads before it works on a model.
        most: actors.
    """

    gpus: float
    blocks: tuple[Block, ...]
    weight_bytes: Mapping[str, float] = field(default_factory=dict)
    most: float = math.inf


@dataclass(frozen=True)
class Stage:
    """Pools that share the cluster, once the stages of `after` are done.

    Attributes:
        idle: why GPUs without a block have none.
    """

    name: str
    pools: tuple[Pool, ...]
    after: tuple[str, ...] = ()
    idle: Cause = "last block"


@dataclass(frozen=True)
class Node:
    """A node by a script: when it comes, and when it goes for good.

    Attributes:
        up_s: seconds after the start; none: there from the start.
        down_s: none: it stays.
    """

    up_s: float = 0.0
    down_s: float = math.inf


@dataclass(frozen=True)
class Conditions:
    """What the cluster is like.

    Attributes:
        node_gpus: GPUs of a node.
        node_start_s: from asking for a node to its GPUs; paid for.
        actor_start_s: process and imports of an actor.
        model_start_s: of a model besides reading it.
        driver_block_s: of the driver for one block, one after the other.
        between_s: from an actor's last block to its next, however many ask, besides that.
        storage_bytes_per_s: of the object store or file system, over all actors.
        stream_bytes_per_s: of one actor's reading or writing.
        broadcast: whether weights are read from storage once and go from node to node, twice as many each time.
        node_hours: mean life of a node by failures, exponential; preempt_hours: by preemption. None: it stays.
        return_s: from a node's end to the start of the one in its place.
        notice_s: from a node's end to its work being given out anew.
        straggler_sigma: of the logarithm of a group's time over what is planned; the mean stays.
        idle_timeout_s: nodes without work go after so long, and come back for more; none: all stay to the end.
    """

    node_gpus: int = 8
    node_start_s: float = 300.0
    actor_start_s: float = 30.0
    model_start_s: float = 20.0
    driver_block_s: float = 0.05
    between_s: float = 0.1
    storage_bytes_per_s: float = 10e9
    stream_bytes_per_s: float = 1e9
    broadcast: bool = False
    node_hours: float | None = None
    preempt_hours: float | None = None
    return_s: float = 600.0
    notice_s: float = 30.0
    straggler_sigma: float = 0.05
    idle_timeout_s: float | None = None

    @property
    def deaths_per_s(self) -> float:
        """Of one node."""
        return sum(1 / (3600 * hours) for hours in (self.node_hours, self.preempt_hours) if hours)


@dataclass(frozen=True)
class Run:
    """One run of the model.

    Attributes:
        segments: (start s, end s, GPUs, cause) of whatever GPUs did.
        stages: (start s, end s) by name.
        gpu_s: GPU-seconds by cause; together GPUs x makespan.
        paid_gpu_s: of nodes that were there or starting.
        deaths: of nodes.
        groups_lost: by them.
        placed: nodes that each block's groups ended on, by stage and number of the block.
    """

    makespan_s: float
    segments: list[tuple[float, float, float, Cause]]
    stages: dict[str, tuple[float, float]]
    gpu_s: dict[Cause, float]
    paid_gpu_s: float
    deaths: int
    groups_lost: int
    placed: dict[tuple[str, int], list[int]]

    def busy_gpus(self, points: int = 100) -> list[tuple[float, float]]:
        """(seconds, GPUs that compute on average) for each of so many equal parts of the makespan."""
        step = self.makespan_s / points
        found = [0.0] * points
        for start, end, gpus, cause in self.segments:
            for i in range(int(start / step), min(points, math.ceil(end / step))):
                if cause == "computing":
                    found[i] += gpus * max(0.0, min(end, (i + 1) * step) - max(start, i * step)) / step
        return [((i + 0.5) * step, gpus) for i, gpus in enumerate(found)]


def simulate(stages: Sequence[Stage], nodes: int | Sequence[Node], conditions: Conditions, seed: int = 0) -> Run:
    """Run the stages on so many nodes, or on nodes by a script. The same seed gives the same run.

    Raises:
        UserError: a group lasts so much longer than nodes do that it would hardly ever end, or an actor finds no place.
    """
    script = [Node()] * nodes if isinstance(nodes, int) else list(nodes)
    _check(stages, len(script), conditions)
    require("simpy", "eval")
    from gt_ray.studies.simulated_cluster import Cluster

    return Cluster(stages, script, conditions, random.Random(seed)).run()


def _check(stages: Sequence[Stage], nodes: int, conditions: Conditions) -> None:
    for stage in stages:
        for pool in stage.pools:
            if pool.blocks and pool.gpus > nodes * conditions.node_gpus:
                have = f"{nodes} nodes of {conditions.node_gpus}"
                raise UserError(f"{stage.name}: an actor takes {pool.gpus:g} GPUs, the cluster has {have}")
            spread = max(1, math.ceil(pool.gpus / conditions.node_gpus))
            longest_s = max((s for block in pool.blocks for s in block.group_s), default=0.0)
            if longest_s * spread * conditions.deaths_per_s > MOST_RETRIES:
                mean_h = 1 / conditions.deaths_per_s / 3600 / spread
                raise UserError(
                    f"{stage.name}: a group lasts {longest_s / 3600:.1f} h and its nodes {mean_h:.2f} h on average, so "
                    "it would hardly ever end; use curation.adapters_at_once=1, fewer steps or nodes that stay"
                )
