"""Scoring the systems of a study on its clients; every (system, client) is a file, so rerunning resumes."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gt_ray.config import EvaluationSettings
from gt_ray.curation.jobs import SIDES, Side, model_settings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.evaluation.pool import EngineKind, EnginePool, Item
from gt_ray.evaluation.results import RowScore, read_scores, write_scores
from gt_ray.evaluation.scorer import System
from gt_ray.evaluation.vllm_cpu import head_size_not_served
from gt_ray.pairs.models import resolve
from gt_ray.progress import bar, say
from gt_ray.tasks import TASKS
from gt_ray.tasks.data import Client, fingerprint
from gt_ray.updates.files import write_atomically
from gt_ray.updates.store import unit_key

SCORER_VERSION = 2
"""Raise it when scores of the same outputs change: answer extraction, metric, decoding."""


@dataclass(frozen=True)
class ClientScores:
    """One system's scores on one client's test rows.

    Attributes:
        key: names the file of the run folder that holds them, `scores/<key>.parquet`.
    """

    client: Client
    system: System
    rows: list[RowScore]
    key: str = ""


def engine_of(settings: EvaluationSettings, model: str) -> Literal["vllm", "transformers"]:
    """The engine that scores a model: with `engine=auto` vLLM where it is installed and serves it.

    Raises:
        UserError: vLLM is asked for and not installed, or does not serve the model.
    """
    if settings.engine == "transformers":
        return "transformers"
    why = None
    if importlib.util.find_spec("vllm") is None:
        why = "vLLM is not installed; run: make setup, or pip install vllm"
    elif size := head_size_not_served(resolve(model)):
        why = f"vLLM on CPUs serves no attention heads of size {size}, as {model} has; use evaluation.engine=auto"
    if why and settings.engine == "vllm":
        raise UserError(f"evaluation.engine=vllm, but {why}")
    return "transformers" if why else "vllm"


def item_key(settings: EvaluationSettings, engine: str, item: Mapping[str, Any], task: str, rows: Sequence[Any]) -> str:
    """Key of one system's results: the system (`item`), the test rows, and how they are scored."""
    scoring = settings.model_dump(include={"max_new_tokens", "max_model_len", "log_likelihood"})
    return unit_key({**item, **scoring, "test": fingerprint(task, rows), "engine": engine, "scorer": SCORER_VERSION})


def score(study: Study, work: Sequence[tuple[System, Client]]) -> list[ClientScores]:
    """Scores of systems on their clients' test rows, in the order of `work`."""
    out = study.config.run_folder / "scores"
    items = [_item(study, system, client) for system, client in work]
    found = {item.key: read_scores(out / f"{item.key}.parquet") or _of_another_run(out, item.key) for item in items}
    # Equal systems (two controls that agree) share a file.
    missing = {item.key: item for item in items if found[item.key] is None}
    if not missing:
        say(f"evaluate: nothing to do, all {len(work)} scores are in {out}")
    else:
        settings = study.config.evaluation
        engines = " and ".join(sorted({_engine(study, item.system) for item in missing.values()}))
        say(f"evaluate: {len(missing)} of {len(work)} (system, client) pairs to score, by {engines}")
        with bar("evaluate", len(missing)) as progress:
            for kind in _kinds(study):
                mine = [item for item in missing.values() if _is_of(item.system, kind, study)]
                if mine:
                    with EnginePool(kind, min(settings.workers, len(mine))) as pool:
                        for item, scored in keep(pool, mine, out):
                            found[item.key] = scored
                            progress.advance()
    results = []
    for (system, client), item in zip(work, items, strict=True):
        rows = found[item.key]
        assert rows is not None, item.key
        results.append(ClientScores(client, system, rows, item.key))
    report_too_long([row for result in results for row in result.rows], study.config.evaluation.log_likelihood)
    return results


def _of_another_run(out: Path, key: str) -> list[RowScore] | None:
    """Scores that a run beside this one has, such as of the base models; they are this one's, too, from then on."""
    for file in out.parent.parent.glob(f"*/scores/{key}.parquet"):
        if (rows := read_scores(file)) is not None:
            write_atomically(out / file.name, file.read_bytes())
            return rows
    return None


def _engine(study: Study, system: System) -> Literal["vllm", "transformers"]:
    """Two models a token, full weights, and adapters of embeddings (which vLLM serves for few models) are scored by
    transformers, whatever the config says."""
    plain = system.proxy_Ld is None and study.roots[system.side].is_plain_lora
    model = model_settings(study.config, system.side).model
    return engine_of(study.config.evaluation, model) if plain else "transformers"


def _kinds(study: Study) -> list[EngineKind]:
    """One model after the other, the large one first, and the LLM with the TinyLM as its proxy."""
    kinds = [engine_kind(study, side) for side in reversed(SIDES)]
    proxy = model_settings(study.config, "tinylm"), study.roots["tinylm"]
    return [*kinds, replace(kinds[0], engine="transformers", proxy=proxy)]


def engine_kind(study: Study, side: Side) -> EngineKind:
    """The engine that scores updates of a model."""
    root = study.roots[side]
    return EngineKind(
        model_settings(study.config, side),
        root,
        study.config.evaluation,
        _engine(study, System("", side)),
        root.lora.rank,
        root.lora.target_modules,
    )


def _is_of(system: System, kind: EngineKind, study: Study) -> bool:
    return kind.root is study.roots[system.side] and (kind.proxy is None) == (system.proxy_Ld is None)


def scores_of_report(run: Path, report: Mapping[str, Any]) -> list[ClientScores]:
    """The results that a report was made from; clients are named with the run's folder, so that runs can be pooled.

    Raises:
        UserError: a file of scores is absent or damaged.
    """
    results = []
    for row in report["rows"]:
        rows = read_scores(run / row["scores"])
        if rows is None:
            raise UserError(f"{run / row['scores']} is absent or damaged; run its cell again")
        client = Client(f"{run.name}/{row['client']}", row["task"], row["domain"], [], [], row["population"])
        client = replace(client, label=row.get("label", ""))
        results.append(ClientScores(client, System(row["system"]), rows, row["scores"]))
    return results


def keep(pool: EnginePool, items: Sequence[Item], out: Path) -> Iterator[tuple[Item, list[RowScore]]]:
    """Score items and write `<key>.parquet` as each is done."""
    for item, rows in pool.score(items):
        task = TASKS[item.task]
        constant = {"adapter": item.system.name, "task": item.task, "engine": pool.kind.engine, **item.labels}
        write_scores(out / f"{item.key}.parquet", [task.prompt(row) for row in item.rows], rows, **constant)
        yield item, rows


def report_too_long(rows: Sequence[RowScore], likelihoods: bool) -> None:
    """Say how many prompts, and references where there are log-likelihoods, did not fit into the model's window."""
    if unread := sum(row.log_likelihood is None and row.finish != "too long" for row in rows) if likelihoods else 0:
        say(
            f"evaluate: {unread} of {len(rows)} references do not fit behind their prompts; they have no log-likelihood"
        )
    if too_long := sum(row.finish == "too long" for row in rows):
        say(
            f"evaluate: {too_long} of {len(rows)} prompts are longer than the model's window and count as wrong; "
            "raise evaluation.max_model_len if the model's own window is larger"
        )


def _made_of(study: Study, side: Side, update_Ld: Tensor | None) -> dict[str, str]:
    update = b"" if update_Ld is None else update_Ld.contiguous().numpy().tobytes()
    return {
        "root": study.roots[side].hash,
        "dtype": model_settings(study.config, side).dtype,
        "update": hashlib.sha256(update).hexdigest(),
    }


def _item(study: Study, system: System, client: Client) -> Item:
    rows = study.data.rows(client.task, "test", client.test)
    settings = study.config.evaluation
    made_of: dict[str, Any] = _made_of(study, system.side, system.update_Ld)
    if system.proxy_Ld is not None:
        made_of["proxy"] = _made_of(study, "tinylm", system.proxy_Ld)
    key = item_key(settings, _engine(study, system), made_of, client.task, rows)
    return Item(key, system, client.task, rows, {"client": client.name, "domain": client.domain, "side": system.side})
