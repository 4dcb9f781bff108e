"""What every stage of a run starts from, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gt_ray.config import Config
from gt_ray.curation.jobs import SIDES, FineTuneJob, Side, client_job, model_settings, public_job, shadow_job, union_job
from gt_ray.curation.plan import Shadow, plan_shadows
from gt_ray.errors import UserError
from gt_ray.pairs.root import Root, make_root
from gt_ray.tasks.data import Group, TaskData, load_data
from gt_ray.updates.store import UpdateStore


def root_file(run: Path, side: Side) -> Path:
    """Where a run keeps the root of a side."""
    return run / "roots" / f"{side}.safetensors"


@dataclass(frozen=True)
class Study:
    """Config, rows, roots, shadows, store.

    Attributes:
        further: for each of `further_pairs` the same study of that pair alone, on the same rows and shadows.
    """

    config: Config
    data: TaskData
    roots: dict[Side, Root]
    shadows: list[Shadow]
    store: UpdateStore
    further: tuple[Study, ...] = ()

    @classmethod
    def load(cls, config: Config) -> Study:
        """Check all input before any work starts.

        Raises:
            UserError: models, data or plan are not usable, or two pairs are of the same roots.
        """
        config = config.absolute()
        configs = [config.model_copy(update={"pair": pair, "further_pairs": ()}) for pair in config.pairs]
        roots = [load_roots(one) for one in configs]
        for i, one in enumerate(roots):
            if _hashes(one) in map(_hashes, roots[:i]):
                raise UserError(
                    f"further_pairs.{i - 1}: another pair has the same roots, {' and '.join(_hashes(one))}; two pairs "
                    "that train together differ in a model or in its lora or root_seed"
                )
        data = load_data(config)
        study = cls(config, data, roots[0], plan_shadows(config, data), UpdateStore(config.store))
        further = zip(configs[1:], roots[1:], strict=True)
        return replace(study, further=tuple(replace(study, config=one, roots=own) for one, own in further))

    @property
    def pairs(self) -> list[Study]:
        """A study for each pair, in an order that does not depend on which pair is this study's own."""
        return sorted([self, *self.further], key=lambda one: _hashes(one.roots))

    def shadow_jobs(self, side: Side) -> list[FineTuneJob]:
        """The fine-tunes of all shadows of one model, in the order of the shadows; the LLM has fewer of them."""
        return [
            shadow_job(self.config, self.data, self.roots[side], side, shadow)
            for shadow in self.shadows
            if side == "tinylm" or not shadow.tinylm_only
        ]

    def client_jobs(self, side: Side) -> list[FineTuneJob]:
        """The fine-tunes of all clients, in the order of the clients."""
        return [client_job(self.config, self.data, self.roots[side], side, client) for client in self.data.clients]

    def groups(self) -> list[Group]:
        """The clients whose updates become one adapter each."""
        return self.data.groups(self.config.clients.joint)

    def ceiling_jobs(self) -> dict[str, FineTuneJob]:
        """By client, the LLM's fine-tune on the private rows of its group that are of its task (P_T)."""
        return {
            client.name: union_job(self.config, self.data, self.roots["llm"], group, client.task)
            for group in self.groups()
            for client in group.members
        }

    def public_jobs(self) -> list[FineTuneJob]:
        """LLM fine-tunes on each task's public rows (control public_sft)."""
        return [public_job(self.config, self.data, self.roots["llm"], "llm", task) for task in self.config.data.tasks]


def load_roots(config: Config) -> dict[Side, Root]:
    """The pair's roots, cached beside the runs."""
    return {side: make_root(model_settings(config, side), config.runs / ".roots") for side in SIDES}


def _hashes(roots: dict[Side, Root]) -> tuple[str, ...]:
    return tuple(roots[side].hash for side in SIDES)
