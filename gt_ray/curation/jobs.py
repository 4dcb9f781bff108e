"""Fine-tunes as rows: what to fine-tune, on which rows, under which key. No Ray here."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gt_ray.baselines.w2s import halves
from gt_ray.config import Config, Mechanism, ModelSettings
from gt_ray.curation.plan import Shadow, plan_content
from gt_ray.errors import UserError
from gt_ray.learning.mechanisms import statement
from gt_ray.pairs.root import Root
from gt_ray.tasks.data import Client, Group, TaskData, fingerprint
from gt_ray.updates.store import unit_key

Side = Literal["tinylm", "llm"]
SIDES: tuple[Side, Side] = ("tinylm", "llm")
HELD_OUT = "public-validation"
AUDITED = "audited"
"""Split of the rows of a privacy audit."""


@dataclass(frozen=True)
class FineTuneJob:
    """One fine-tune of one model: a unit of the store.

    Attributes:
        name: for people, e.g. `shadow 12`.
        positions: rows in the pool (task, split).
        held_out: rows in the pool (task, "public-validation") whose loss ends the fine-tune (`stop.when=plateau`).
        steps: optimizer steps, in place of `fine_tune.steps`.
        made_by: content of the key.
    """

    key: str
    name: str
    side: Side
    task: str
    split: str
    positions: list[int]
    held_out: list[int]
    seed: int
    steps: int
    snapshot_steps: list[int]
    made_by: dict[str, Any]

    def as_row(self) -> dict[str, Any]:
        """A row of a Ray Data data set."""
        return asdict(self)


def model_settings(config: Config, side: Side) -> ModelSettings:
    """Settings of one model of the pair."""
    return config.pair.tinylm if side == "tinylm" else config.pair.llm


def shadow_job(config: Config, data: TaskData, root: Root, side: Side, shadow: Shadow) -> FineTuneJob:
    """The fine-tune of a shadow."""
    rows = _Rows(shadow.task, shadow.domain, shadow.split, shadow.positions)
    steps = list(config.curation.snapshot_steps)
    content = plan_content(config, shadow)
    mechanism = shadow.mechanism if side == "tinylm" else None
    name = f"shadow {shadow.k}"
    return _job(config, data, root, side, name, rows, shadow.seed, steps, content, mechanism=mechanism)


def client_job(config: Config, data: TaskData, root: Root, side: Side, client: Client) -> FineTuneJob:
    """A client's own fine-tune: of the TinyLM its update (P_S), by its mechanism; of the LLM the ceiling (P_T), which
    is never private."""
    rows = _Rows(client.task, client.domain, "private", client.private)
    seed = config.clients.seed + config.seed * 1_000_003 + 500_000
    content = {"client": fingerprint(client.task, data.rows(client.task, "private", client.private)), "seed": seed}
    mechanism = client.mechanism if side == "tinylm" else "sft"
    return _job(config, data, root, side, f"client {client.name}", rows, seed, [0], content, client.steps, mechanism)


def union_job(config: Config, data: TaskData, root: Root, group: Group, task: str) -> FineTuneJob:
    """The ceiling P_T of a group: the LLM fine-tuned on all rows of its clients of a task (Table 2)."""
    members = [client for client in group.members if client.task == task]
    if len(members) == 1:
        return client_job(config, data, root, "llm", members[0])
    positions = [i for client in members for i in client.private]
    domains = "+".join(dict.fromkeys(name for client in members for name in client.domain.split("+")))
    rows = _Rows(task, domains, "private", positions)
    seed = config.clients.seed + config.seed * 1_000_003 + 600_000
    content = {"union": fingerprint(task, data.rows(task, "private", positions)), "seed": seed}
    return _job(config, data, root, "llm", f"union {group.name}", rows, seed, [0], content, mechanism="sft")


def public_job(config: Config, data: TaskData, root: Root, side: Side, task: str) -> FineTuneJob:
    """The control public_sft: a fine-tune on all public training rows of a task."""
    rows = _Rows(task, "", "public-train", data.positions(task, "public-train"))
    seed = config.curation.seed + config.seed * 1_000_003 + 900_000
    content = {"public": fingerprint(task, data.rows(task, "public-train", rows.positions)), "seed": seed}
    return _job(config, data, root, side, f"public {task}", rows, seed, [0], content)


def audit_job(
    config: Config, data: TaskData, root: Root, task: str, number: int, positions: list[int], mechanism: Mechanism
) -> FineTuneJob:
    """The TinyLM's fine-tune number so-and-so of a privacy audit, on these rows of the pool (task, "audited").

    Its seed, of which a simulated mechanism takes its noise, is its own: audits count on independent models.
    """
    seed = config.clients.seed + config.seed * 1_000_003 + 700_000 + number
    content = {"audit": fingerprint(task, data.rows(task, AUDITED, positions)), "seed": seed}
    rows = _Rows(task, "", AUDITED, positions)
    return _job(config, data, root, "tinylm", f"audit model {number}", rows, seed, [0], content, mechanism=mechanism)


def weak_job(config: Config, data: TaskData, root: Root, client: Client) -> FineTuneJob:
    """The weak model of the baselines of appendix C.2: the TinyLM on the first half of a client's rows, by sft."""
    positions, seed = halves_of(config, client)[0], _weak_seed(config)
    content = {"weak": fingerprint(client.task, data.rows(client.task, "private", positions)), "seed": seed}
    rows = _Rows(client.task, client.domain, "private", positions)
    return _job(config, data, root, "tinylm", f"weak {client.name}", rows, seed, [0], content, client.steps, "sft")


def strong_job(
    config: Config, data: TaskData, root: Root, client: Client, baseline: str, content: Mapping[str, Any]
) -> FineTuneJob:
    """A baseline of appendix C.2: the LLM on the second half of a client's rows as they are in the pool (task,
    baseline), with the weak model's labels.

    Args:
        content: key of the labels, and what else makes the baseline.
    """
    rows = _Rows(client.task, client.domain, baseline, halves_of(config, client)[1])
    seed, name = _weak_seed(config), f"{baseline} {client.name}"
    return _job(config, data, root, "llm", name, rows, seed, [0], {**content, "seed": seed}, client.steps, "sft")


def halves_of(config: Config, client: Client) -> tuple[list[int], list[int]]:
    """A client's private rows that its weak model is fine-tuned on, and those that it labels.

    Raises:
        UserError: it has one row.
    """
    return halves(client.private, _weak_seed(config))


def _weak_seed(config: Config) -> int:
    return config.clients.seed + config.seed * 1_000_003 + 800_000


@dataclass(frozen=True)
class _Rows:
    """Rows of one task, as positions in the pool (task, split), and their domain where they have one."""

    task: str
    domain: str
    split: str
    positions: list[int]


def _job(
    config: Config,
    data: TaskData,
    root: Root,
    side: Side,
    name: str,
    rows: _Rows,
    seed: int,
    snapshot_steps: list[int],
    content: Mapping[str, Any],
    times_steps: int = 1,
    mechanism: Mechanism | None = None,
) -> FineTuneJob:
    settings = model_settings(config, side)
    fine_tune = settings.fine_tune if mechanism is None else settings.fine_tune.by(mechanism)
    fine_tune = fine_tune.model_copy(update={"steps": fine_tune.steps * times_steps})
    try:
        statement(fine_tune, len(rows.positions))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    held_out = _held_out(data, rows, seed, settings.fine_tune.stop.held_out, name) if _by_plateau(settings) else []
    made_by = {
        "root": root.hash,
        "dtype": settings.dtype,
        "fine_tune": fine_tune.model_dump(mode="json"),
        "snapshot_steps": snapshot_steps,
        **content,
    }
    if len(root.layout.group_widths) > 1:
        made_by["layout"] = root.layout.to_json()  # how blocks of several groups are cut is no part of the root
    if held_out:
        made_by["held_out"] = fingerprint(rows.task, data.rows(rows.task, HELD_OUT, held_out))
    key = unit_key(made_by)
    return FineTuneJob(
        key, name, side, rows.task, rows.split, rows.positions, held_out, seed, fine_tune.steps, snapshot_steps, made_by
    )


def _by_plateau(settings: ModelSettings) -> bool:
    return settings.fine_tune.stop.when == "plateau"


def _held_out(data: TaskData, rows: _Rows, seed: int, n: int, name: str) -> list[int]:
    """Public validation rows of the same task and domain that the fine-tune does not train on; the same for S and T.

    Of all domains where no public row has a client's own.
    """
    own = set(rows.positions) if rows.split == HELD_OUT else set()
    found = data.positions(rows.task, HELD_OUT, rows.domain) or data.positions(rows.task, HELD_OUT)
    free = [i for i in found if i not in own]
    if len(free) < n:
        raise UserError(
            f"{name}: {len(free)} rows of {rows.task} {rows.domain} are left to hold out, fine_tune.stop.held_out={n}; "
            "lower it, or curation.samples"
        )
    return random.Random(f"held-out/{seed}").sample(free, n)
