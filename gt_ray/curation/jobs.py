"""Fine-tunes as rows: what to fine-tune, on which rows, under which key. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gt_ray.config import Config, ModelSettings
from gt_ray.curation.plan import Shadow, plan_content
from gt_ray.pairs.root import Root
from gt_ray.tasks.data import Client, TaskData, fingerprint
from gt_ray.updates.store import unit_key

Side = Literal["tinylm", "llm"]
SIDES: tuple[Side, Side] = ("tinylm", "llm")


@dataclass(frozen=True)
class FineTuneJob:
    """One fine-tune of one model: a unit of the store.

    Attributes:
        name: for people, e.g. `shadow 12`.
        positions: rows in the pool (task, split).
        made_by: content of the key.
    """

    key: str
    name: str
    side: Side
    task: str
    split: str
    positions: list[int]
    seed: int
    snapshot_steps: list[int]
    made_by: dict[str, Any]

    def as_row(self) -> dict[str, Any]:
        """A row of a Ray Data data set."""
        return asdict(self)


def model_settings(config: Config, side: Side) -> ModelSettings:
    """Settings of one model of the pair."""
    return config.pair.tinylm if side == "tinylm" else config.pair.llm


def shadow_job(config: Config, root: Root, side: Side, shadow: Shadow) -> FineTuneJob:
    """The fine-tune of a shadow."""
    steps = list(config.curation.snapshot_steps)
    content = plan_content(config, shadow)
    return _job(
        config,
        root,
        side,
        f"shadow {shadow.k}",
        shadow.task,
        shadow.split,
        shadow.positions,
        shadow.seed,
        steps,
        content,
    )


def client_job(config: Config, data: TaskData, root: Root, side: Side, client: Client) -> FineTuneJob:
    """A client's own fine-tune: of the TinyLM its update (P_S), of the LLM the ceiling (P_T)."""
    seed = config.clients.seed + config.seed * 1_000_003 + 500_000
    content = {"client": fingerprint(client.task, data.rows(client.task, "private", client.private)), "seed": seed}
    return _job(
        config,
        root,
        side,
        f"client {client.name}",
        client.task,
        "private",
        client.private,
        seed,
        [0],
        content,
    )


def public_job(config: Config, data: TaskData, root: Root, side: Side, task: str) -> FineTuneJob:
    """The control public_sft: a fine-tune on all public training rows of a task."""
    seed = config.curation.seed + config.seed * 1_000_003 + 900_000
    positions = data.positions(task, "public-train")
    content = {"public": fingerprint(task, data.rows(task, "public-train", positions)), "seed": seed}
    return _job(config, root, side, f"public {task}", task, "public-train", positions, seed, [0], content)


def _job(
    config: Config,
    root: Root,
    side: Side,
    name: str,
    task: str,
    split: str,
    positions: list[int],
    seed: int,
    snapshot_steps: list[int],
    content: Mapping[str, Any],
) -> FineTuneJob:
    settings = model_settings(config, side)
    made_by = {
        "root": root.hash,
        "dtype": settings.dtype,
        "fine_tune": settings.fine_tune.model_dump(mode="json"),
        "snapshot_steps": snapshot_steps,
        **content,
    }
    return FineTuneJob(unit_key(made_by), name, side, task, split, positions, seed, snapshot_steps, made_by)
