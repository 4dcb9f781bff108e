"""Engines as Ray actors: rows of any number of adapters go to whichever engine has room, results come back by row.

The driver holds all state: an engine that dies is replaced, and only its rows that have not come back are repeated.
Every engine has one call at work and one waiting, so that it never waits for the driver; calls carry references to
items, whose adapters are read, checked and written for the engine by a thread beside generation.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gt_ray.cluster import connect, nodes, room, total
from gt_ray.config import EvaluationSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.evaluation.results import RowScore
from gt_ray.evaluation.scorer import Scored, Scorer, System, TransformersScorer, Work
from gt_ray.pairs.root import Root
from gt_ray.progress import say
from gt_ray.tasks import Row

CALL_ROWS = 256
"""Most rows of one call."""
LEAST_ROWS = 32
"""Fewest rows of one call, while there are as many: calls get smaller towards the end, so that engines end together."""
CALLS = 2
"""Calls that an engine has at a time: one at work, one waiting."""
MOST_DEATHS = 3
"""Engines that may die one after the other without a row that comes back in between."""


@dataclass(frozen=True)
class Item:
    """One system on one set of test rows.

    Attributes:
        key: hash of everything that the results depend on.
        labels: further columns of its results.
    """

    key: str
    system: System
    task: str
    rows: Sequence[Row]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineKind:
    """What an engine is made from.

    Attributes:
        root: of the updates to score; none where adapters come as folders.
        max_lora_rank: largest rank of the adapters to come.
        target_modules: names of all modules that they change.
        proxy: TinyLM and its root, where the systems to come are proxy-tuned (`engine` is transformers).
    """

    model: ModelSettings
    root: Root | None
    settings: EvaluationSettings
    engine: Literal["vllm", "transformers"]
    max_lora_rank: int
    target_modules: tuple[str, ...]
    proxy: tuple[ModelSettings, Root] | None = None

    def make(self, device: str) -> Scorer:
        """The engine, in this process."""
        if self.proxy is not None:
            from gt_ray.evaluation.proxy_scorer import ProxyScorer

            return ProxyScorer(self.model, self.settings, *self.proxy, device)
        if self.engine == "transformers":
            return TransformersScorer(self.model, self.root, self.settings, device)
        from gt_ray.evaluation.vllm_scorer import VllmScorer

        return VllmScorer(self.model, self.root, self.settings, self.max_lora_rank, self.target_modules, device)


def _deaths() -> tuple[type[Exception], ...]:
    """What Ray raises where an actor is gone; its memory monitor's kills are no RayActorError."""
    from ray import exceptions

    return exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.NodeDiedError


class EngineActor:
    """One engine."""

    def __init__(self, kind: EngineKind) -> None:
        import ray
        import torch

        torch.set_num_threads(1)
        self.scorer = kind.make("cuda" if ray.get_gpu_ids() else "cpu")
        # Millions of objects that stay: looking through them again and again takes a tenth of a small model's time.
        gc.collect()
        gc.freeze()
        self.began_s = self.busy_s = 0.0

    def ready(self) -> None:
        """Answers once the engine is up."""

    def work(self, parts: list[tuple[Any, list[int]]], leave: int, first: bool) -> tuple[list[Scored], float, float]:
        """Take rows on, and compute until no more than `leave` rows are unfinished.

        Args:
            parts: reference to an item, and numbers of its rows.
            first: whether this is the first call of a run.

        Returns:
            Rows that are done, seconds in which the engine computed in this run, and seconds since the run began here.
        """
        import ray

        if first:
            self.began_s, self.busy_s = time.perf_counter(), 0.0
        for reference, numbers in parts:
            item: Item = ray.get(reference)
            self.scorer.add(Work(item.key, item.system, item.task, {n: item.rows[n] for n in numbers}))
        done: list[Scored] = []
        while self.scorer.unfinished > leave:
            start = time.perf_counter()
            done += self.scorer.step()
            self.busy_s += time.perf_counter() - start
        return done, self.busy_s, time.perf_counter() - self.began_s


@dataclass
class _Engine:
    """The driver's view of one engine.

    Attributes:
        ready: open call that answers once it is up; none since.
        calls: open calls.
        away: rows that it was given and has not returned.
        busy_s, since_s: as it says of itself; none before the first call of a run.
    """

    actor: Any
    ready: Any
    calls: list[Any] = field(default_factory=list)
    away: set[tuple[str, int]] = field(default_factory=set)
    busy_s: float | None = None
    since_s: float = 0.0


class EnginePool:
    """Engines of one model; start it once, score with it as often as there is something to score.

    Raises:
        UserError: the cluster has no room for one engine.
    """

    def __init__(self, kind: EngineKind, workers: int) -> None:
        self.ray = connect()
        num_gpus = kind.settings.num_gpus
        if num_gpus == "auto":
            num_gpus = kind.settings.vllm.tensor_parallel if total(nodes(), "GPU") else 0
        self.kind = replace(kind, settings=kind.settings.model_copy(update={"num_gpus": num_gpus}))
        self._needs = {"num_cpus": 1.0, **({"num_gpus": num_gpus} if num_gpus else {})}
        self.engines = [self._start() for _ in range(min(workers, self._room()))]
        self.deaths = 0
        self._was_up = False

    def _room(self) -> int:
        """Engines that the cluster can hold."""
        there = nodes()
        found = room(self._needs["num_cpus"], self._needs.get("num_gpus", 0), there)
        if not found:
            raise UserError(
                f"this Ray cluster has no room for an engine, which takes {self._needs} (evaluation.num_gpus): it has "
                f"{total(there, 'CPU'):g} CPUs and {total(there, 'GPU'):g} GPUs on {len(there)} nodes"
            )
        return found

    def _start(self) -> _Engine:
        actor = self.ray.remote(**self._needs)(EngineActor).remote(self.kind)
        return _Engine(actor, actor.ready.remote())

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines."""
        for engine in self.engines:
            self.ray.kill(engine.actor)

    @property
    def idle_share(self) -> float:
        """Share of the last run in which engines did nothing, until the last of them was done.

        Starting an engine does not count; loading adapters is a part of its work.
        """
        longest_s = max(engine.since_s for engine in self.engines)
        busy_s = sum(engine.busy_s or 0.0 for engine in self.engines)
        return 1 - busy_s / (longest_s * len(self.engines)) if longest_s else 0.0

    def score(self, items: Sequence[Item]) -> Iterator[tuple[Item, list[RowScore]]]:
        """Score every item; they come back as they are done.

        Raises:
            UserError: an engine cannot be started, or dies again and again over the same rows.
        """
        by_key = {item.key: item for item in items}
        assert len(by_key) == len(items), "two items have one key"
        references = {item.key: self.ray.put(item) for item in items}
        done: dict[str, dict[int, RowScore]] = {item.key: {} for item in items}
        waiting = deque((item.key, number) for item in items for number in range(len(item.rows)))
        in_vain = 0
        for place, engine in enumerate(self.engines):
            if engine.calls:  # of a run that was not gone through
                self._replace(place)
            engine.busy_s, engine.since_s = None, 0.0
        for item in items:
            if not item.rows:
                yield item, []
        while waiting or any(engine.away for engine in self.engines):
            for _ in range(CALLS):
                size = self._call_rows(len(waiting))
                for engine in self.engines:
                    # One that is not up yet, or has no place in the cluster, holds no rows.
                    room = engine.ready is None and len(engine.calls) < CALLS
                    if room and (waiting or (engine.away and not engine.calls)):
                        self._call(engine, waiting, references, size)
            open_calls = [call for engine in self.engines for call in (engine.ready, *engine.calls) if call is not None]
            (answered,), _ = self.ray.wait(open_calls)
            place, engine = next((i, e) for i, e in enumerate(self.engines) if answered in (e.ready, *e.calls))
            try:
                answer = self.ray.get(answered)
            except _deaths() as error:
                in_vain, self.deaths = in_vain + 1, self.deaths + 1
                if in_vain >= MOST_DEATHS or (engine.ready is not None and not self._was_up):
                    names = sorted({by_key[key].system.name for key, _ in engine.away})
                    what = f"while they scored {', '.join(names[:3])}" if names else "when they started"
                    raise UserError(
                        f"{in_vain} engines died one after the other {what}: {' '.join(str(error).split())[-400:]}; "
                        "finished adapters are kept"
                    ) from error
                say(f"evaluate: an engine died, {len(engine.away)} rows are repeated by a new one")
                waiting.extendleft(sorted(engine.away, reverse=True))
                self._replace(place)
                continue
            if answered == engine.ready:
                engine.ready, self._was_up = None, True
                continue
            engine.calls.remove(answered)
            scored, engine.busy_s, engine.since_s = answer
            for key, number, row in scored:
                in_vain = 0
                engine.away.discard((key, number))
                done[key][number] = row
                if len(done[key]) == len(by_key[key].rows):
                    rows = done.pop(key)
                    del references[key]
                    yield by_key[key], [rows[n] for n in range(len(rows))]

    def _replace(self, place: int) -> None:
        self.ray.kill(self.engines[place].actor)  # it may only be out of reach
        self.engines[place] = self._start()

    @property
    def _one_at_a_time(self) -> bool:
        """Whether engines have one adapter at a time, and want all of its rows together."""
        return self.kind.engine == "transformers"

    def _call_rows(self, waiting: int) -> int:
        """Rows of the next calls, equally many for all engines."""
        least = max(LEAST_ROWS, self.kind.settings.batch_size if self._one_at_a_time else 0)
        return min(CALL_ROWS, max(least, -(-waiting // (CALLS * len(self.engines)))))

    def _call(self, engine: _Engine, waiting: deque[tuple[str, int]], references: dict[str, Any], size: int) -> None:
        """Give an engine its next rows; the last call of a run lets it finish them all."""
        taken: list[tuple[str, int]] = []
        while waiting and len(taken) < size and not (self._one_at_a_time and taken and waiting[0][0] != taken[0][0]):
            taken.append(waiting.popleft())
        parts = [
            (references[key], [number for _, number in group])
            for key, group in itertools.groupby(taken, key=lambda row: row[0])
        ]
        leave = size // 2 if waiting and not self._one_at_a_time else 0
        engine.away |= set(taken)
        first = engine.busy_s is None
        engine.busy_s = engine.busy_s or 0.0
        engine.calls.append(engine.actor.work.remote(parts, leave, first))
