"""What every stage of a run starts from, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass

from gt_ray.config import Config
from gt_ray.curation.jobs import SIDES, FineTuneJob, Side, client_job, model_settings, public_job, shadow_job
from gt_ray.curation.plan import Shadow, plan_shadows
from gt_ray.pairs.root import Root, make_root
from gt_ray.tasks.data import TaskData, load_data
from gt_ray.updates.store import UpdateStore


@dataclass(frozen=True)
class Study:
    """Config, rows, roots, shadows, store."""

    config: Config
    data: TaskData
    roots: dict[Side, Root]
    shadows: list[Shadow]
    store: UpdateStore

    @classmethod
    def load(cls, config: Config) -> Study:
        """Check all input before any work starts.

        Raises:
            UserError: models, data or plan are not usable.
        """
        config = config.absolute()
        roots = load_roots(config)
        data = load_data(config)
        return cls(config, data, roots, plan_shadows(config, data), UpdateStore(config.store))

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

    def public_jobs(self) -> list[FineTuneJob]:
        """LLM fine-tunes on each task's public rows (control public_sft)."""
        return [public_job(self.config, self.data, self.roots["llm"], "llm", task) for task in self.config.data.tasks]


def load_roots(config: Config) -> dict[Side, Root]:
    """The pair's roots, cached beside the runs."""
    return {side: make_root(model_settings(config, side), config.runs / ".roots") for side in SIDES}
