"""A study as the stages of `simulation.py`, and what it takes on given GPUs over several seeds.

Blocks are those that `curation/run.py` makes, groups those of the engine by the planner's memory, seconds those of
`gt-ray plan` (`training/hours.py`) or of a finished run's units. The stages follow each other as in
`studies/pipeline.py`. Not in it: baselines, refinement, labels and all that the driver does between stages.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gt_ray.config import Config, ModelSettings, load_config
from gt_ray.curation.jobs import SIDES, FineTuneJob, Side, model_settings
from gt_ray.curation.planner import needs, unit_bytes
from gt_ray.curation.run import _blocks
from gt_ray.errors import UserError
from gt_ray.evaluation.pool import CALL_ROWS
from gt_ray.learning.engine import SATURATED_TOKENS
from gt_ray.studies.simulation import CAUSES, Block, Cause, Conditions, Pool, Stage, simulate
from gt_ray.training.fake_step import FakeStep
from gt_ray.training.hours import Hours, Rates, clients_of, tuples_of
from gt_ray.training.machines import Machines
from gt_ray.training.planner import TrainingPlan, Way, gpus_of_a_worker
from gt_ray.updates.store import UpdateStore

PARTS_OF_S, PARTS_OF_T = ("W_S, place of S", "phi, encoder"), ("W_T, place of T", "phi, decoder", "W_out")
"""Parts of a Grad-Transformer that blocks of S and of T go through."""


@dataclass(frozen=True)
class Measured:
    """What fine-tunes of a finished run took.

    Attributes:
        unit_s: seconds of an actor for one unit, by side.
        sigma: of the logarithm of that, over units of a side.
    """

    unit_s: Mapping[Side, float]
    sigma: float


def measured(run: Path) -> Measured:
    """Read the units of a run folder (`UnitMeta.wall_s`); they count for actors like those that made them.

    Raises:
        UserError: the folder is no run, or its store lacks all units of a side.
    """
    try:
        keys = json.loads((run / "units.json").read_text(encoding="utf-8"))
        store = UpdateStore(load_config(str(run / "config.yaml"), []).store)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--measured {run}: no finished run ({error}); name a folder such as runs/embedded-seed0"
        ) from error
    found: dict[Side, list[float]] = {}
    for side in SIDES:
        there = set(keys[side]) - set(store.missing(keys[side]))
        found[side] = [wall_s for key in sorted(there) if (wall_s := store.header(key).meta.wall_s) > 0]
        if not found[side]:
            raise UserError(f"--measured {run}: {store} has no unit of its {side}; run gt-ray curate")
    deviations = [math.log(s / statistics.geometric_mean(times)) for times in found.values() for s in times]
    return Measured({side: statistics.mean(times) for side, times in found.items()}, statistics.pstdev(deviations))


class CountedPlan(TrainingPlan):
    """A plan that counts operations by parameters, without a step on fake tensors, which takes minutes.

    Whether training fits into memory is for `gt-ray plan` to say.
    """

    def _fake(self, checkpointing: bool) -> FakeStep:
        # Forward and backward pass take 6 operations for each parameter and token that goes through it.
        shape = self.shape
        of_T = sum(shape.parts.get(name, 0) for name in PARTS_OF_T)
        of_S = sum(shape.parts.get(name, 0) for name in PARTS_OF_S)
        flops = 6.0 * (of_S * shape.tokens[0] + of_T * shape.tokens[1])
        return FakeStep((), (), 4 / 3 * flops if checkpointing else flops)

    def configured(self) -> Way:
        """The way that the config names."""
        settings = self.settings
        tuples = max(1, self.settings.batch_size // self.placement.trainers // settings.accumulation)
        return Way(
            settings.strategy,
            settings.offload,
            settings.activation_checkpointing,
            settings.accumulation,
            tuples,
            items={},
            host=0,
            fits=True,
        )


class SimulatedStudy:
    """The stages of a study on given GPUs; training as the config says, whether it fits or not.

    Args:
        times: measured ones in place of the planner's.

    Raises:
        UserError: a model is larger than a node, the GPUs are too few to train on, or there are further pairs.
    """

    def __init__(
        self,
        config: Config,
        machines: Machines,
        rates: Rates | None = None,
        times: Measured | None = None,
    ) -> None:
        if config.further_pairs:
            raise UserError("further_pairs: a simulation is of one pair; name the pair's own preset")
        self.config, self.machines, self.rates, self.times = config, machines, rates or Rates(), times
        self.plan = CountedPlan(config, machines)
        self.hours = Hours(self.plan, self.plan.configured(), self.rates)

    def stages(self, overlap: bool = False) -> list[Stage]:
        """All stages in the pipeline's order.

        Args:
            overlap: clients' and public fine-tunes beside curation, which needs none of what they need.
        """
        curation = self.config.curation
        units: dict[Side, int] = {"llm": curation.shadows, "tinylm": curation.shadows + curation.tinylm_shadows}
        clients = clients_of(self.config)
        public = len(self.config.data.tasks) if self.config.evaluation.controls else 0
        snapshots = len(curation.snapshot_steps)
        stages = [
            Stage("curation", self._fine_tunes(units, snapshots)),
            Stage("training", (self._training(),), ("curation",), idle="training"),
            Stage("clients", self._fine_tunes({"tinylm": clients}, 1), ("training",)),
            Stage("generation", (self._generation(clients),), ("training", "clients")),
            Stage("ceilings", self._fine_tunes({"llm": clients + public}, 1), ("generation",)),
            Stage("evaluation", (self._evaluation(),), ("generation", "ceilings")),
        ]
        free = ("clients", "ceilings") if overlap else ()
        return [replace(stage, after=()) if stage.name in free else stage for stage in stages]

    def _fine_tunes(self, units: Mapping[Side, int], snapshots: int) -> tuple[Pool, ...]:
        """A pool for each demand, of most GPUs first, as `run_fine_tunes` makes them."""
        demands = {side: gpus_of_a_worker(model_settings(self.config, side), self.machines) for side in units}
        pools = []
        for gpus in sorted(set(demands.values()), reverse=True):
            sides = [side for side in units if demands[side] == gpus]
            places = self.machines.nodes * int(self.machines.per_node / gpus)
            workers = self.config.curation.workers
            actors = max(1, places if workers == "auto" else min(workers, places))
            jobs = [job for side in sides for job in self._jobs(side, units[side])]
            blocks = tuple(
                self._block(block, gpus, snapshots)
                for block in _blocks(jobs, self.config.curation.adapters_at_once, actors)
            )
            weights: dict[str, float] = {
                side: float(needs(model_settings(self.config, side)).weight_bytes) for side in sides
            }
            pools.append(Pool(gpus, blocks, weights, math.inf if workers == "auto" else workers))
        return tuple(pools)

    def _weights(self, sides: Sequence[Side]) -> dict[str, float]:
        return {side: float(needs(model_settings(self.config, side)).weight_bytes) for side in sides}

    def _jobs(self, side: Side, count: int) -> list[FineTuneJob]:
        """Jobs as far as blocks depend on them; tasks take turns."""
        tasks, steps = self.config.data.tasks, model_settings(self.config, side).fine_tune.steps
        made_by: dict[str, Any] = {"fine_tune": {}}
        return [
            FineTuneJob(f"{side} {k}", "", side, tasks[k % len(tasks)], "", [], [], k, steps, [0], made_by)
            for k in range(count)
        ]

    def _block(self, jobs: Sequence[FineTuneJob], gpus: float, snapshots: int) -> Block:
        side = jobs[0].side
        settings = model_settings(self.config, side)
        unit_s = self.times.unit_s[side] if self.times else self.hours.fine_tune_s(settings) / gpus
        n = -(-len(jobs) // self._group(settings, gpus))
        sizes = [round(end * len(jobs) / n) - round(start * len(jobs) / n) for start, end in pairwise(range(n + 1))]
        each = unit_bytes(needs(settings).update_shape, snapshots)
        return Block(side, tuple(size * unit_s for size in sizes), tuple(float(size * each) for size in sizes))

    def _group(self, settings: ModelSettings, gpus: float) -> int:
        """Adapters at once, as the engine limits them."""
        at_once = self.config.curation.adapters_at_once
        if at_once != "auto":
            return at_once
        tokens = min(self.rates.tokens, settings.fine_tune.max_length) * settings.fine_tune.batch_size
        by_memory = needs(settings).adapters(gpus, self.machines.gpu.memory)
        return max(1, min(round(SATURATED_TOKENS["cuda"] / tokens), by_memory))

    def _training(self) -> Pool:
        """A gang of trainers and LLM actors; from checkpoint to checkpoint is a group."""
        stages, training, placement = self.hours.stages(), self.config.grad_transformer.training, self.plan.placement
        of_epochs = training.checkpoint_epochs * tuples_of(self.config) // training.batch_size
        steps = {
            "training, Eq. 10": training.epochs * tuples_of(self.config) // training.batch_size,
            "training on behaviour": training.behaviour.steps,
        }
        group_s: list[float] = []
        for name, count in steps.items():
            pieces = max(1, math.ceil(count / max(1, of_epochs)))
            group_s += [3600 * stages[name].wall_hours / pieces] * pieces
        checkpoint = float(self.hours.sizes()["training checkpoint"])
        llm = needs(self.config.pair.llm).weight_bytes * placement.llm_actors
        gpus = placement.trainers + placement.llm_actors * placement.llm_gpus
        block = Block("phi", tuple(group_s), (checkpoint,) * len(group_s))
        return Pool(math.ceil(gpus), (block,), {"phi": float(llm + 4 * self.plan.shape.P * placement.trainers)})

    def _generation(self, clients: int) -> Pool:
        adapter = 4.0 * math.prod(needs(self.config.pair.llm).update_shape)
        block = Block("phi", (self.hours.generation_s(),) * clients, (adapter,) * clients)
        return Pool(1, (block,), {"phi": 4.0 * self.plan.shape.P})

    def _evaluation(self) -> Pool:
        """Calls of rows on engines of the LLM; as many as fit, unless the config says how many."""
        settings = self.config.evaluation
        auto = settings.num_gpus == "auto"
        # 0 means CPUs, which nothing here has.
        gpus = float(settings.vllm.tensor_parallel if auto else settings.num_gpus or 1)
        gpu_s, rows = self.hours.evaluation()
        calls = max(1, -(-rows // CALL_ROWS))
        blocks = (Block("engine", (gpu_s / gpus / calls,), (0.0,)),) * calls
        most = settings.workers if settings.workers > 1 else math.inf
        return Pool(gpus, blocks, {"engine": float(needs(self.config.pair.llm).weight_bytes)}, most)


@dataclass(frozen=True)
class Interval:
    """Median over seeds, and the 5th and 95th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """What a study takes on so many GPUs, over seeds.

    Attributes:
        shares: of GPUs x makespan, by cause, on average; they add up to 1.
        stage_hours: from a stage's start to its end, median.
        busy, idle, lost: GPU-hours, median: of kept work, of paid GPUs without any, and undone by deaths.
        limit: the cause of most GPU-seconds.
    """

    gpus: int
    makespan_hours: Interval
    gpu_hours: Interval
    cost: Interval
    shares: dict[Cause, float]
    stage_hours: dict[str, float]
    busy_gpu_hours: float
    idle_gpu_hours: float
    lost_gpu_hours: float
    deaths: float
    busy_gpus: list[tuple[float, float]]

    @property
    def limit(self) -> Cause:
        """What most GPU-seconds go to; `computing`: more GPUs make it faster."""
        return max(self.shares, key=lambda cause: self.shares[cause])


def predict(stages: Sequence[Stage], gpus: int, conditions: Conditions, price: float, seeds: int = 5) -> Prediction:
    """Run the model once for each seed.

    Args:
        price: of a GPU-hour, in any currency.
    """
    runs = [simulate(stages, -(-gpus // conditions.node_gpus), conditions, seed) for seed in range(seeds)]
    paid = [run.paid_gpu_s / 3600 for run in runs]

    def median(of: Sequence[float]) -> float:
        return statistics.median(of)

    def hours(*causes: Cause) -> float:
        return median([sum(run.gpu_s[cause] for cause in causes) / 3600 for run in runs])

    return Prediction(
        gpus,
        _interval([run.makespan_s / 3600 for run in runs]),
        _interval(paid),
        _interval([price * one for one in paid]),
        {cause: statistics.mean(run.gpu_s[cause] / sum(run.gpu_s.values()) for run in runs) for cause in CAUSES},
        {name: median([(run.stages[name][1] - run.stages[name][0]) / 3600 for run in runs]) for name in runs[0].stages},
        hours("computing"),
        hours(*(cause for cause in CAUSES if cause not in ("computing", "lost", "away"))),
        hours("lost"),
        statistics.mean(run.deaths for run in runs),
        runs[0].busy_gpus(),
    )


def _interval(values: Sequence[float]) -> Interval:
    if len(values) == 1:
        return Interval(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return Interval(statistics.median(values), cuts[0], cuts[-1])
