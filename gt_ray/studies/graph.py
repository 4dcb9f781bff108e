"""The work of a study as one graph: what several cells need is a node of its own, done once.

    fine-tunes of cell 1 ──┬─▶ cell 1: train, generate, score, report
    fine-tunes of cell 2 ──┼─▶ cell 2, which may need fine-tunes of cell 1, too
                           └─▶ scores of base models, P_S and P_T, where cells run side by side

A fine-tune is of the first cell that needs it: shadows, clients, ceilings, public_sft. Every node skips what is done,
so a graph that is run again goes on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gt_ray.cluster import connect, nodes, total
from gt_ray.config import Config
from gt_ray.curation.jobs import SIDES, FineTuneJob
from gt_ray.curation.planner import gpus_as_seen
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.errors import OutOfBudget, reason, user_error_in
from gt_ray.evaluation.run import score
from gt_ray.studies.clock import devices_of_engines, devices_of_training, timed
from gt_ray.studies.pipeline import pipeline, prepare
from gt_ray.studies.status import SHARED_RUN
from gt_ray.studies.systems import load_plain, plain_systems
from gt_ray.tasks.data import fingerprint
from gt_ray.updates.store import unit_key


@dataclass(frozen=True)
class Node:
    """A piece of a study's work.

    Attributes:
        cell: number of the cell that it is of.
        keys: of what it makes: units, or scores; of a cell none.
        needs: names of the nodes before it.
    """

    kind: Literal["fine-tunes", "scores", "cell"]
    cell: int
    config: Config = field(repr=False)
    keys: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people, and for `needs`."""
        number = f"cell {self.cell + 1}"
        return number if self.kind == "cell" else f"{self.kind} of {number}"


@dataclass(frozen=True)
class Outcome:
    """What became of a node.

    Attributes:
        report: of a cell.
        error: why it failed; empty where it did not.
        out_of_budget: whether it ended for that alone.
    """

    wall_s: float
    report: dict[str, Any] | None = None
    error: str = ""
    out_of_budget: bool = False


def graph_of(
    configs: Sequence[Config], fine_tunes: Sequence[Iterable[str]], scores: Sequence[Iterable[str]] = ()
) -> list[Node]:
    """The nodes of a study, each behind those that it needs.

    Args:
        fine_tunes: keys of each cell.
        scores: keys of each cell, where cells run side by side; one after the other they take each other's.
    """
    owner: dict[str, str] = {}
    shared: list[Node] = []
    cells: list[Node] = []

    def add(kind: Literal["fine-tunes", "scores"], number: int, keys: Sequence[str], needs: tuple[str, ...]) -> None:
        if own := tuple(dict.fromkeys(key for key in keys if key not in owner)):
            shared.append(Node(kind, number, configs[number], own, needs))
            owner.update(dict.fromkeys(own, shared[-1].name))

    for number, config in enumerate(configs):
        keys = list(fine_tunes[number])
        add("fine-tunes", number, keys, ())
        if scores:
            own = list(scores[number])
            add("scores", number, own, tuple(dict.fromkeys(owner[key] for key in keys)))
            keys += own
        cells.append(Node("cell", number, config, (), tuple(dict.fromkeys(owner[key] for key in keys))))
    return shared + cells


def needed(graph: Sequence[Node], finished: Collection[int]) -> list[Node]:
    """The nodes of cells that are not finished, and those that they need."""
    kept: list[Node] = []
    for node in reversed(graph):
        wanted = any(node.name in later.needs for later in kept)
        if wanted if node.kind != "cell" else node.cell not in finished:
            kept.insert(0, node)
    return kept


def fine_tunes_of(study: Study) -> list[FineTuneJob]:
    """All fine-tunes that a cell needs, but for those of the baselines of appendix C.2, which begin with labels."""
    shadows = [job for one in (study, *study.further) for side in reversed(SIDES) for job in one.shadow_jobs(side)]
    public = study.public_jobs() if study.config.evaluation.controls else []
    clients = [*study.client_jobs("tinylm"), *study.client_jobs("llm"), *study.ceiling_jobs().values()]
    return [*shadows, *clients, *public]


def plain_scores(study: Study) -> dict[str, tuple[str, str]]:
    """Key -> client and system, of what is scored whatever the Grad-Transformer is."""
    settings, found = study.config.evaluation.model_dump(mode="json"), {}
    plain = plain_systems(study)
    for client in study.data.clients:
        test = fingerprint(client.task, study.data.rows(client.task, "test", client.test))
        for system, (side, unit) in plain[client.name].items():
            content = {"root": study.roots[side].hash, "unit": unit, "test": test, "evaluation": settings}
            found[unit_key(content)] = (client.name, system)
    return found


def run_graph(
    graph: Sequence[Node], parallel: int, left_s: Callable[[], float | None]
) -> Iterator[tuple[Node, Outcome]]:
    """Run nodes, `parallel` at a time; yields each as it is done.

    What comes behind a failed node is run all the same: a cell that needs what failed fails by itself, and says why.

    Args:
        left_s: device-seconds that may still be spent (None: any number); where none are left no node is started.
    """
    if parallel == 1:
        for node in graph:
            if (left := left_s()) is not None and left <= 0:
                return
            yield node, run_node(node, left)
        return
    ray = connect()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's own node: others may be taken away at any time, and a node's work is done by workers elsewhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    seen = gpus_as_seen([node.config for node in graph], nodes())
    environment = {"runtime_env": {"env_vars": seen}} if seen else {}
    elsewhere = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here, **environment)(run_node)
    waiting = list(graph)
    running: dict[Any, Node] = {}
    promised: dict[Any, float] = {}  # of the budget, to those that run
    done: set[str] = set()
    while waiting or running:
        left = left_s()
        if left is not None:
            left -= sum(promised.values())
        ready = [node for node in waiting if done.issuperset(node.needs)] if left is None or left > 0 else []
        ready = ready[: parallel - len(running)]
        for node in ready:
            waiting.remove(node)
            share = None if left is None else left / len(ready)
            # Paths that are relative are so to the driver's folder, not to a worker's.
            task = elsewhere.remote(replace(node, config=node.config.absolute()), share)
            running[task], promised[task] = node, share or 0.0
        if not running:
            return
        (answered,), _ = ray.wait(list(running))
        node = running.pop(answered)
        del promised[answered]
        try:
            outcome = ray.get(answered)
        except ray.exceptions.RayError as error:  # its process died
            outcome = Outcome(0.0, error=" ".join(str(error).split())[-400:])
        if outcome.out_of_budget and (left_s() or 0.0) > 0:
            waiting.insert(0, node)  # it had a share of the budget alone, and others have left some of theirs
            continue
        done.add(node.name)
        yield node, outcome


def places(configs: Sequence[Config]) -> int:
    """How many cells the connected cluster has room for at a time, by what each may hold at once."""
    connect()
    found, most = nodes(), float(len(configs))
    for config in configs:
        training = config.grad_transformer.training
        gpus = max(devices_of_training(config), devices_of_engines(config)) if total(found, "GPU") else 0
        # A trainer reads its tuples by tasks of Ray Data, and would wait for ever for a core that another cell holds.
        cpus = 1 + max(training.workers * training.num_cpus, config.evaluation.workers)
        most = min(most, *(total(found, name) // need for name, need in (("CPU", cpus), ("GPU", gpus)) if need))
    return max(1, int(most))


def run_node(node: Node, most_s: float | None) -> Outcome:
    """Do a node's work; one node's fault is not the others'."""
    start = time.perf_counter()
    try:
        if node.kind == "cell":
            report = pipeline(node.config)
            return Outcome(time.perf_counter() - start, report)
        if node.kind == "fine-tunes":
            study = prepare(node.config)  # who watches knows by its config which cell it is
            with timed(study, "curate"):
                _fine_tune(study, set(node.keys), most_s)
        else:
            study = Study.load(shared_run(node.config))
            with timed(study, "evaluate", devices_of_engines):
                _score(study, set(node.keys))
    except OutOfBudget:
        return Outcome(time.perf_counter() - start, out_of_budget=True)
    except Exception as wrong:
        if user_error_in(wrong) is None:
            traceback.print_exc()
        return Outcome(time.perf_counter() - start, error=reason(wrong))
    return Outcome(time.perf_counter() - start)


def shared_run(cell: Config) -> Config:
    """Of the run, beside the cells, that scores what is of a cell and others need, too."""
    return cell.model_copy(update={"name": f"{SHARED_RUN}-{cell.name}"})


def _fine_tune(study: Study, keys: set[str], most_s: float | None) -> None:
    spent_s = 0.0

    def count(key: str) -> None:
        nonlocal spent_s
        if most_s is None:
            return
        spent_s += study.store.written(key).meta.device_s
        if spent_s >= most_s:
            raise OutOfBudget("the budget is spent")

    for one in (study, *study.further):
        run_fine_tunes(one, [job for job in fine_tunes_of(one) if job.key in keys], "fine-tunes", count)


def _score(study: Study, keys: set[str]) -> None:
    clients = {client.name: client for client in study.data.clients}
    plain = plain_systems(study)
    wanted = [place for key, place in plain_scores(study).items() if key in keys]
    score(study, [(load_plain(study, name, plain[client][name]), clients[client]) for client, name in wanted])
