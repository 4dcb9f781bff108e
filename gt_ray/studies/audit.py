"""The privacy audit: what updates give away of their rows, beside what their mechanism promises.

Of a pool of rows of one task and domain each model has those whose coins came up heads, so that a model with a row and
one without it are neighbours in the sense of the promise. Some rows, the canaries, have the target of another row: a
model learns them from nowhere else, and an auditor may choose rows. What is attacked is the losses of all rows.

The coins are the same for every mechanism. The number of a model's rows, which DP-SGD takes as known, is not used.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gt_ray.config import Config, DpSgdSettings, FineTuneSettings, Mechanism, mechanism_label
from gt_ray.curation.jobs import AUDITED, FineTuneJob, Side, audit_job, model_settings
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.errors import UserError, require
from gt_ray.learning.audit import Audit, Flags, attack, audit
from gt_ray.learning.epsilon_bounds import CONFIDENCE, Array
from gt_ray.learning.mechanisms import statement
from gt_ray.learning.row_losses import row_losses
from gt_ray.learning.samples import encode
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import Root, make_root
from gt_ray.progress import bar, say
from gt_ray.tasks import TASKS, Row, Task
from gt_ray.tasks.data import TaskData, load_data
from gt_ray.updates.files import write_atomically
from gt_ray.updates.store import UpdateStore

SPLIT = "public-train"
EPSILONS = (1.0, 4.0)
DELTA = 1e-5
"""Of the bounds, where a mechanism states none."""
LEAST_MODELS, LEAST_ROWS = 4, 16


@dataclass(frozen=True)
class AuditPlan:
    """What is audited.

    Attributes:
        models: fine-tunes by each mechanism; half of them choose the attack that the other half is measured by.
        rows: in the pool; a model has half of them on average.
        canaries: share of the rows with the target of another row.
        epsilons: of the DP-SGD to audit; none: the mechanisms of the config's clients, or else `EPSILONS`.
    """

    task: str
    models: int = 32
    rows: int = 256
    canaries: float = 0.5
    epsilons: tuple[float, ...] = ()

    def check(self, config: Config) -> None:
        """Raises:
        UserError: says which values would work.
        """
        if self.task not in TASKS:
            raise UserError(f"unknown task {self.task!r}; known: {', '.join(TASKS)}")
        if self.models < LEAST_MODELS:
            raise UserError(
                f"{self.models} models are too few: one half chooses the attack, the other is attacked; ask for at "
                f"least {LEAST_MODELS}, better 32"
            )
        if self.rows < LEAST_ROWS:
            raise UserError(f"{self.rows} rows are too few to tell rates from chance; ask for at least {LEAST_ROWS}")
        if not 0 <= self.canaries <= 1:
            raise UserError(f"canaries={self.canaries:g} is a share of the rows, from 0 to 1")
        if wrong := [epsilon for epsilon in self.epsilons if epsilon <= 0]:
            raise UserError(f"epsilon={wrong[0]:g} is not above 0; use for instance --epsilon 1")
        if config.pair.tinylm.fine_tune.stop.when == "plateau":
            raise UserError(
                "a private mechanism has a fixed number of steps; set pair.tinylm.fine_tune.stop.when=steps"
            )

    def mechanisms(self, config: Config) -> list[Mechanism]:
        """Plain fine-tuning first."""
        given = [one for one in config.clients.mechanisms if one != "sft"]
        if self.epsilons or not given:
            like = next((one for one in given if isinstance(one, DpSgdSettings)), DpSgdSettings())
            given = [
                like.model_copy(update={"epsilon": epsilon, "noise_multiplier": None})
                for epsilon in self.epsilons or EPSILONS
            ]
        return list(dict.fromkeys(["sft", *given]))


def run_audit(config: Config, plan: AuditPlan) -> dict[str, Any]:
    """Fine-tune, attack, and write `audit.json` in the run folder; fine-tunes that the store has are taken from it.

    Returns:
        What is in the file.

    Raises:
        UserError: the plan asks for what cannot be, or there are fewer rows.
    """
    start = time.perf_counter()
    plan.check(config)
    require("scipy.stats", "dp")
    study, canary_R = _study(config, plan)
    config = study.config
    coins = np.random.default_rng([config.seed, config.clients.seed, plan.rows])  # more models: the same and more
    member_MR: Flags = coins.random((plan.models, plan.rows)) < 0.5
    say(f"audit: {plan.models} models by each mechanism; the noise of each (epsilon, number of rows) takes seconds")
    jobs = {mechanism_label(one): _jobs(study, plan, member_MR, one) for one in plan.mechanisms(config)}
    run_fine_tunes(study, [job for own in jobs.values() for job in own], "audit")
    losses, base_R = _losses(study, plan.task, jobs)
    found = []
    for label, own in jobs.items():
        stated = statement(FineTuneSettings.model_validate(own[0].made_by["fine_tune"]), len(own[0].positions))
        result = audit(losses[label], member_MR, base_R, stated.get("delta", DELTA))
        found.append(_entry(label, stated, result, member_MR, canary_R))
    report: dict[str, Any] = {
        "preset": config.preset,
        "seed": config.seed,
        "model": study.roots["tinylm"].base_model,
        "root": study.roots["tinylm"].hash,
        **{key: value for key, value in asdict(plan).items() if key != "epsilons"},
        "domain": study.data.pools[plan.task, AUDITED][0].get("domain", ""),
        "confidence": CONFIDENCE,
        "mechanisms": found,
        "wall_s": time.perf_counter() - start,
        "config": config.model_dump(mode="json"),
    }
    text = json.dumps(report, indent=1)
    write_atomically(config.run_folder / "audit.json", text.encode())
    return dict(json.loads(text))


def _study(config: Config, plan: AuditPlan) -> tuple[Study, Flags]:
    """A study whose data is the pool of the audit, and which of its rows are canaries."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"tasks": (plan.task,)})}).absolute()
    data = load_data(config)
    domain = next(domain for _, domain in data.kinds())
    found = data.positions(plan.task, SPLIT, domain)
    if len(found) < plan.rows:
        where = f"{plan.task}, domain {domain}," if domain else plan.task
        raise UserError(f"{where} has {len(found)} public rows, {plan.rows} are asked for; use --rows {len(found)}")
    rng = random.Random(f"audit/{config.seed}")
    rows = data.rows(plan.task, SPLIT, rng.sample(found, plan.rows))
    n = round(plan.canaries * plan.rows)
    pool = [*(_canary(TASKS[plan.task], row, rows, rng) for row in rows[:n]), *rows[n:]]
    roots: dict[Side, Root] = {"tinylm": make_root(model_settings(config, "tinylm"), config.runs / ".roots")}
    study = Study(config, TaskData({**data.pools, (plan.task, AUDITED): pool}), roots, [], UpdateStore(config.store))
    return study, np.arange(plan.rows) < n


def _canary(task: Task, row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """The row with another one's target: the other's columns, where the prompt does not show them."""
    for other in rng.sample(rows, len(rows)):
        if task.target(other) != task.target(row):
            hidden = {
                column: other[column]
                for column in task.columns
                if task.prompt({**row, column: other[column]}) == task.prompt(row)
            }
            return {**row, **hidden}
    raise UserError(f"all rows of {task.name} have one target, which leaves nothing for canaries; use --canaries 0")


def _jobs(study: Study, plan: AuditPlan, member_MR: Flags, mechanism: Mechanism) -> list[FineTuneJob]:
    """A fine-tune of each model, on the rows that it has."""
    return [
        audit_job(
            study.config, study.data, study.roots["tinylm"], plan.task, m, np.flatnonzero(member_R).tolist(), mechanism
        )
        for m, member_R in enumerate(member_MR)
    ]


def _losses(study: Study, task: str, jobs: dict[str, list[FineTuneJob]]) -> tuple[dict[str, Array], Array]:
    """Losses [M, R] of all rows under all models by mechanism, and those [R] of the base model."""
    settings = model_settings(study.config, "tinylm")
    model = load_model(settings, "cuda" if torch.cuda.is_available() else "cpu")
    rows = study.data.pools[task, AUDITED]
    samples = encode(load_tokenizer(settings.model), TASKS[task], rows, settings.fine_tune.max_length)
    updates = {label: [study.store.read(job.key)[0][-1] for job in own] for label, own in jobs.items()}
    every = [update_Ld for own in updates.values() for update_Ld in own]
    stacked_MLd = torch.stack([*every, torch.zeros_like(every[0])])
    with bar("attack", len(stacked_MLd) * len(samples)) as progress:
        losses_MR = row_losses(model, study.roots["tinylm"], stacked_MLd, samples, progress.advance).double().numpy()
    parts = np.split(losses_MR, np.cumsum([len(own) for own in updates.values()]))
    return dict(zip(updates, parts[:-1], strict=True)), parts[-1][0]


def _entry(label: str, stated: dict[str, Any], result: Audit, member_MR: Flags, canary_R: Flags) -> dict[str, Any]:
    """One mechanism's part of the report."""
    kinds = {"canaries": canary_R, "others": ~canary_R}
    scores_MR = result.scores["likelihood_ratio"]
    return {
        "label": label,
        "stated": stated,
        "attacks": {name: asdict(one) for name, one in result.attacks.items()},
        "likelihood_ratio_of": {
            kind: asdict(attack(scores_MR[:, own_R], member_MR[:, own_R]))
            for kind, own_R in kinds.items()
            if 0 < member_MR[:, own_R].sum() < member_MR[:, own_R].size
        },
        "epsilon_at_least": result.guesses.epsilon,
        "bounds": {"guesses": asdict(result.guesses), "rates": asdict(result.rates)},
    }
