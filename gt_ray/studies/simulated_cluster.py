"""The processes of `simulation.py`, by simpy: stages, nodes, actors, the driver; and what they have spent."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import simpy

from gt_ray.studies.simulated_storage import Steps, Storage
from gt_ray.studies.simulation import CAUSES, Block, Cause, Conditions, Node, Pool, Run, Stage


@dataclass(eq=False)
class _Work:
    """A block under way."""

    name: tuple[str, int]
    block: Block
    group_s: list[float]
    done: int = 0
    nodes: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Pool:
    """A pool of a stage that runs."""

    pool: Pool
    queue: deque[_Work]
    left: int
    done: simpy.Event
    orphans: deque[_Work] = field(default_factory=deque)
    actors: int = 0
    starting: int = 0

    @property
    def wants(self) -> int:
        """Actors that it would start if there were room."""
        new = min(len(self.queue) - self.starting, self.pool.most - self.actors - len(self.orphans))
        return len(self.orphans) + max(0, int(new))


@dataclass(eq=False)
class _Node:
    number: int
    gone: simpy.Event
    free: float = 0.0
    up: bool = False
    booting: bool = False
    wake: simpy.Event | None = None
    uses: int = 0
    actors: set[simpy.Process] = field(default_factory=set)
    models: dict[str, simpy.Event] = field(default_factory=dict)


class Cluster:
    """One run, from its stages and nodes."""

    def __init__(
        self, stages: Sequence[Stage], script: Sequence[Node], conditions: Conditions, rng: random.Random
    ) -> None:
        self.env = simpy.Environment()
        self.stages, self.script, self.conditions, self.rng = stages, script, conditions, rng
        self.storage = Storage(self.env, conditions.storage_bytes_per_s, conditions.stream_bytes_per_s)
        self.driver = simpy.Resource(self.env)
        self.nodes = [_Node(number, self.env.event()) for number in range(len(script))]
        self.pools: list[_Pool] = []
        self.done = {stage.name: self.env.event() for stage in stages}
        self.spans: dict[str, tuple[float, float]] = {}
        self.segments: list[tuple[float, float, float, Cause]] = []
        self.paid: list[tuple[float, float]] = []
        self.on_since: dict[int, float] = {}
        self.works: list[_Work] = []
        self.deaths = self.groups_lost = 0

    def run(self) -> Run:
        """Go through all stages."""
        for node, script in zip(self.nodes, self.script, strict=True):
            self.env.process(self._node(node, script))
        for stage in self.stages:
            self.env.process(self._stage(stage))
        self.env.run(until=simpy.AllOf(self.env, list(self.done.values())))
        makespan_s = self.env.now
        paid = self.paid + [(since_s, makespan_s) for since_s in self.on_since.values()]
        return Run(
            makespan_s,
            self.segments,
            self.spans,
            self._by_cause(paid, makespan_s),
            sum(end - start for start, end in paid) * self.conditions.node_gpus,
            self.deaths,
            self.groups_lost,
            {work.name: work.nodes for work in self.works},
        )

    def _by_cause(self, paid: Sequence[tuple[float, float]], makespan_s: float) -> dict[Cause, float]:
        """GPU-seconds; what nobody uses counts to the first stage that runs."""
        found: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)
        changes: list[tuple[float, float]] = []
        for start, end, gpus, cause in self.segments:
            found[cause] += gpus * (end - start)
            changes += [(start, -gpus), (end, gpus)]
        per_node = self.conditions.node_gpus
        for start, end in paid:
            changes += [(start, per_node), (end, -per_node)]
        changes += [(at, 0.0) for span in self.spans.values() for at in span]
        changes.sort()
        idle = 0.0
        for (at, change), (until, _) in itertools.pairwise(changes):
            idle += change
            if until > at:
                spans = ((stage.idle, self.spans[stage.name]) for stage in self.stages)
                cause = next(cause for cause, (start, end) in spans if start <= at < end)
                found[cause] += max(0.0, idle) * (until - at)
        found["away"] = len(self.nodes) * per_node * makespan_s - sum(end - start for start, end in paid) * per_node
        return found

    # Stages

    def _stage(self, stage: Stage) -> Steps:
        for name in stage.after:
            yield self.done[name]
        start = self.env.now
        numbers = itertools.count()
        sigma = self.conditions.straggler_sigma
        pools = []
        for pool in stage.pools:
            queue = deque[_Work]()
            for block in pool.blocks:
                group_s = [s * math.exp(self.rng.gauss(-(sigma**2) / 2, sigma)) for s in block.group_s]
                queue.append(_Work((stage.name, next(numbers)), block, group_s))
            self.works += queue
            pools.append(_Pool(pool, queue, len(queue), self.env.event()))
            if not queue:
                pools[-1].done.succeed()
        self.pools += pools
        self._place()
        for one in pools:
            yield one.done
        self.pools = [one for one in self.pools if one not in pools]
        self.spans[stage.name] = (start, self.env.now)
        self.done[stage.name].succeed()

    # Nodes

    def _node(self, node: _Node, script: Node) -> Steps:
        conditions = self.conditions
        yield self.env.timeout(script.up_s)
        while True:
            self.on_since[node.number] = self.env.now
            node.booting = True
            yield from self._spend(conditions.node_gpus, "starting", self.env.timeout(conditions.node_start_s))
            node.booting, node.up, node.free, node.gone = False, True, conditions.node_gpus, self.env.event()
            self._place()
            self._watch(node)
            rate = conditions.deaths_per_s
            life_s = self.rng.expovariate(rate) if rate else math.inf
            yield node.gone | self.env.timeout(max(0.0, min(life_s, script.down_s - self.env.now)))
            node.up = False
            node.models.clear()
            self.paid.append((self.on_since.pop(node.number), self.env.now))
            if node.gone.triggered:
                node.wake = self.env.event()
                yield node.wake
                node.wake = None
                continue
            self.deaths += 1
            for actor in list(node.actors):
                actor.interrupt()
            if self.env.now >= script.down_s:
                return
            yield self.env.timeout(conditions.return_s)

    def _watch(self, node: _Node) -> None:
        """Let a node go that stays without work."""
        if self.conditions.idle_timeout_s is not None and node.up and not node.actors:
            self.env.process(self._wait_idle(node, node.uses, node.gone))

    def _wait_idle(self, node: _Node, uses: int, gone: simpy.Event) -> Steps:
        yield self.env.timeout(self.conditions.idle_timeout_s or 0.0)
        if node.up and node.uses == uses and not gone.triggered:
            gone.succeed()

    def _take(self, gpus: float) -> list[tuple[_Node, float]] | None:
        """Nodes for an actor, and how many of its GPUs are on each; none: there is no room."""
        places, wanted = [], gpus
        for node in self.nodes:
            part = min(wanted, node.free)
            if node.up and part and (part == gpus or gpus > self.conditions.node_gpus):
                places.append((node, part))
                wanted -= part
                if not wanted:
                    break
        if wanted:
            return None
        for node, part in places:
            node.free -= part
            node.uses += 1
        return places

    def _place(self) -> None:
        """Start actors where there is room for them, those first whose block waits for them."""
        for pool in self.pools:
            while pool.wants:
                places = self._take(pool.pool.gpus)
                if places is None:
                    self._wake(pool)
                    break
                work = pool.orphans.popleft() if pool.orphans else None
                pool.actors += 1
                pool.starting += work is None
                actor = self.env.process(self._actor(pool, work, places))
                for node, _ in places:
                    node.actors.add(actor)

    def _wake(self, pool: _Pool) -> None:
        """Ask for nodes that have been let go."""
        asked = sum(node.booting for node in self.nodes)
        wanted = math.ceil(pool.wants * pool.pool.gpus / self.conditions.node_gpus) - asked
        resting = [node for node in self.nodes if node.wake is not None and not node.wake.triggered]
        for node in resting[: max(0, wanted)]:
            if node.wake is not None:
                node.wake.succeed()

    # Actors

    def _actor(self, pool: _Pool, work: _Work | None, places: list[tuple[_Node, float]]) -> Steps:
        gpus, env, conditions = pool.pool.gpus, self.env, self.conditions
        loaded, new = None, work is None
        try:
            yield from self._spend(gpus, "starting", env.timeout(conditions.actor_start_s))
            pool.starting -= new
            new = False
            while work or pool.queue:
                work = work or pool.queue.popleft()
                start = env.now
                with self.driver.request() as turn:
                    yield turn
                    yield env.timeout(conditions.driver_block_s)
                self._note(start, gpus, "scheduling")
                yield from self._spend(gpus, "scheduling", env.timeout(conditions.between_s))
                if work.block.model != loaded:
                    yield from self._load(pool, work.block.model, places)
                    loaded = work.block.model
                while work.done < len(work.group_s):
                    yield from self._group(work, gpus)
                    work.nodes.append(places[0][0].number)
                work = None
                pool.left -= 1
                if not pool.left:
                    pool.done.succeed()
        except simpy.Interrupt:
            if work:
                env.process(self._orphan(pool, work))
        pool.starting -= new
        pool.actors -= 1
        for node, part in places:
            node.actors.discard(env.active_process)
            if node.up:
                node.free += part
                self._watch(node)
        self._place()

    def _orphan(self, pool: _Pool, work: _Work) -> Steps:
        """Its actor starts again, once it is missed and there is room."""
        yield self.env.timeout(self.conditions.notice_s)
        pool.orphans.append(work)
        self._place()

    def _group(self, work: _Work, gpus: float) -> Steps:
        start, seconds = self.env.now, work.group_s[work.done]
        try:
            yield self.env.timeout(seconds)
            yield from self._transfer(gpus, work.block.group_bytes[work.done])
        except simpy.Interrupt:
            self._note(start, gpus, "lost", min(self.env.now, start + seconds))
            self.groups_lost += 1
            raise
        self._note(start, gpus, "computing", start + seconds)
        work.done += 1

    def _load(self, pool: _Pool, model: str, places: list[tuple[_Node, float]]) -> Steps:
        gpus, size = pool.pool.gpus, pool.pool.weight_bytes.get(model, 0.0)
        if self.conditions.broadcast and len(places) == 1 and size:
            start, node = self.env.now, places[0][0]
            try:
                yield from self.storage.receive(node.models, model, size)
            finally:
                self._note(start, gpus, "storage")
        else:
            yield from self._transfer(gpus, size)
        yield from self._spend(gpus, "starting", self.env.timeout(self.conditions.model_start_s))

    def _transfer(self, gpus: float, size: float) -> Steps:
        start = self.env.now
        try:
            yield from self.storage.through(size)
        finally:
            self._note(start, gpus, "storage")

    def _spend(self, gpus: float, cause: Cause, event: simpy.Event) -> Steps:
        start = self.env.now
        try:
            yield event
        finally:
            self._note(start, gpus, cause)

    def _note(self, start: float, gpus: float, cause: Cause, end: float | None = None) -> None:
        end = self.env.now if end is None else end
        if end > start:
            self.segments.append((start, end, gpus, cause))
