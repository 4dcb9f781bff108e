"""The Ray Data actor of curation: fine-tunes blocks of jobs of one model and writes their units."""

from __future__ import annotations

import json
import time
from typing import Any

from gt_ray.cluster import device_name, own_devices
from gt_ray.config import FineTuneSettings
from gt_ray.curation.jobs import HELD_OUT, Side, model_settings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.updates.store import UnitMeta

GPU_SHARE, CPU_SHARE = 0.9, 0.5
"""What of its memory an actor's training steps may take, beside the base model."""
MOST_DEATHS = 3
"""Workers that one adapter may take with it, alone, before it is given up."""


def start_attempts() -> Any:
    """A counter, on this node, of how often something has been begun and not ended, since its worker died.

    A worker whose node went away with it, such as a spot machine, did not die of what it did, and does not count.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Attempts:
        def __init__(self) -> None:
            self.begun: dict[str, list[str]] = {}

        def begin(self, what: str, node: str) -> int:
            """How often it has been begun before, on nodes that are still there, and not ended."""
            there = {one["NodeID"] for one in ray.nodes() if one["Alive"]}
            before = [one for one in self.begun.get(what, []) if one in there]
            self.begun[what] = [*before, node]
            return len(before)

        def end(self, what: str) -> None:
            """It has been gone through, well or not; nobody died of it this time."""
            self.begun[what].pop()

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Killed itself, it starts again from zero: then a group that kills its workers does so a few times more.
    forever = {"max_restarts": -1, "max_task_retries": -1}
    return ray.remote(num_cpus=0, scheduling_strategy=here, **forever)(Attempts).remote()


class FineTuner:
    """Keeps a base model loaded; every block of rows is fine-tuned together and written to the store.

    Args:
        shared: `study`, a reference to the study; `attempts`, a counter; `num_gpus` of this actor; `actors`, how many
            there may be of its kind.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        import ray
        import torch

        torch.set_num_threads(1)
        self.study: Study = ray.get(shared["study"])
        self.shared = shared
        self.devices = own_devices()
        self.node = ray.get_runtime_context().get_node_id()
        self.loaded: tuple[Side, Any, Any] | None = None

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """One block of jobs of one model and task, fine-tuned alike.

        Returns:
            Columns `key`, `error`, which is empty where the unit is in the store, and `node`, where this actor is.
        """
        block = {name: list(column[0]) for name, column in block.items()}  # a row is a block
        jobs = [json.loads(text) for text in block["job"]]
        errors = dict.fromkeys(block["key"], "")
        block_name = "start of " + jobs[0]["key"]
        deaths = self._begin(block_name)
        if deaths >= MOST_DEATHS:
            error = f"{deaths} workers died while they loaded {jobs[0]['side']} or measured a step of it"
            return self._answer(dict.fromkeys(errors, f"{error}; is there enough memory?"))
        engine, tokenizer = self._load(jobs[0]["side"])
        settings = FineTuneSettings.model_validate(jobs[0]["made_by"]["fine_tune"])
        sets = {}
        for job in jobs:
            try:
                sets[job["key"]] = self._training_set(tokenizer, job, settings.max_length)
            except UserError as error:  # its neighbours are not to blame
                errors[job["key"]] = str(error)
        jobs = [job for job in jobs if job["key"] in sets]
        # Where measuring a step has killed workers, one adapter at a time is tried without.
        groups = [[i] for i in range(len(jobs))] if deaths else engine.groups(list(sets.values()), settings)
        self._end(block_name)
        for group in groups:
            # Groups do not depend on what is missing, so a unit that is redone has the neighbours that it had before.
            members = [jobs[i] for i in group]
            if self.study.store.missing([job["key"] for job in members]):
                errors |= self._attempt(engine, members, [sets[job["key"]] for job in members], settings)
        return self._answer(errors)

    def _answer(self, errors: dict[str, str]) -> dict[str, Any]:
        return {"key": list(errors), "error": list(errors.values()), "node": [self.node] * len(errors)}

    def _attempt(self, engine: Any, jobs: list[dict[str, Any]], sets: list[Any], settings: Any) -> dict[str, str]:
        """Fine-tune a group, in ever smaller parts where it has killed its workers before; errors by key."""
        name = "group of " + jobs[0]["key"]
        deaths = self._begin(name)
        # One death may be chance; more are most likely for the memory that the group takes.
        size = max(1, len(jobs) >> max(0, deaths - 1))
        errors: dict[str, str] = {}
        for first in range(0, len(jobs), size):
            part = slice(first, first + size)
            if deaths and not self.study.store.missing([job["key"] for job in jobs[part]]):
                continue
            alone = jobs[first]["key"] if size == 1 else None
            if alone and (own := self._begin(alone)) >= MOST_DEATHS:
                errors[alone] = f"{sets[first].name}: its worker died {own} times; is there enough memory?"
                continue
            errors |= self._fine_tune(engine, jobs[part], sets[part], settings)
            if alone:
                self._end(alone)
        self._end(name)
        return errors

    def _begin(self, what: str) -> int:
        """Note that something is begun; how many workers have died of it."""
        import ray

        return int(ray.get(self.shared["attempts"].begin.remote(what, self.node)))

    def _end(self, what: str) -> None:
        self.shared["attempts"].end.remote(what)

    def _fine_tune(self, engine: Any, jobs: list[dict[str, Any]], sets: list[Any], settings: Any) -> dict[str, str]:
        """Fine-tune a group and write what is done as it is done; errors by key."""
        from gt_ray.baselines.weak_to_strong import mechanism_of_loss

        errors = {}
        start, writing_s = time.perf_counter(), 0.0
        mechanism = mechanism_of_loss(jobs[0]["made_by"])
        for i, result in engine.fine_tune(sets, settings, jobs[0]["snapshot_steps"], mechanism=mechanism):
            job = jobs[i]
            if isinstance(result, UserError):
                errors[job["key"]] = str(result)
                continue
            meta = UnitMeta(
                engine.root.hash,
                job["made_by"],
                job["snapshot_steps"],
                len(sets[i].samples),
                result.losses,
                (time.perf_counter() - start - writing_s) / len(jobs),
                result.held_out,
                device_name(self.devices[0]),
                self.shared["num_gpus"] or 1,
            )
            done = time.perf_counter()
            self.study.store.write(job["key"], result.snapshots_JLd, meta)
            writing_s += time.perf_counter() - done
        return errors

    def _training_set(self, tokenizer: Any, job: dict[str, Any], max_length: int) -> Any:
        from gt_ray.baselines.w2s import labelled_samples
        from gt_ray.baselines.weak_to_strong import WEAK_TO_STRONG
        from gt_ray.learning.samples import TrainingSet, encode
        from gt_ray.tasks import TASKS

        def samples(split: str, positions: list[int]) -> Any:
            rows = self.study.data.rows(job["task"], split, positions)
            read = labelled_samples if split in WEAK_TO_STRONG else encode
            return read(tokenizer, TASKS[job["task"]], rows, max_length, where=f"{job['name']}, {job['task']}")

        name = f"{job['name']} ({job['task']}, {job['side']})"
        return TrainingSet(
            samples(job["split"], job["positions"]),
            job["seed"],
            samples(HELD_OUT, job["held_out"]),
            name,
            noise_seed=int(job["key"][:15], 16),  # clients share a seed, and a shadow's two models do, but no noise
        )

    def _load(self, side: Side) -> tuple[Any, Any]:
        """Engine and tokenizer of a model; the other one is let go first."""
        if self.loaded is None or self.loaded[0] != side:
            from gt_ray.learning.engine import Engine
            from gt_ray.pairs.models import load_model, load_tokenizer

            self.loaded = None
            settings = model_settings(self.study.config, side)
            model = load_model(settings, self.devices)
            engine = Engine(
                model,
                self.study.roots[side],
                self.study.config.curation.adapters_at_once,
                self._memory_bytes(),
                settings.gradient_checkpointing,
            )
            self.loaded = (side, engine, load_tokenizer(settings.model))
        return self.loaded[1], self.loaded[2]

    def _memory_bytes(self) -> int:
        """What training steps may take: of the GPU this actor's share, of the machine's memory a part; of several GPUs
        what the fullest has left."""
        import torch

        if self.devices[0] != "cpu":
            share = min(1.0, self.shared["num_gpus"])
            rooms = []
            for device in map(torch.device, self.devices):
                torch.cuda.set_per_process_memory_fraction(share, device)
                total = torch.cuda.get_device_properties(device).total_memory
                rooms.append(int(GPU_SHARE * share * total) - torch.cuda.memory_allocated(device))
            return min(rooms)
        import psutil
        import ray

        cpus = sum(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == self.node)
        neighbours = max(1, min(self.shared["actors"], cpus))  # each takes a CPU of its machine
        return int(CPU_SHARE * psutil.virtual_memory().available / neighbours)
