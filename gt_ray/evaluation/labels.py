"""Weak labels on Ray: what clients' weak models say to the second halves of their rows (baselines of appendix C.2).

Outputs come from a pool of engines, as scores do, and lie in the run folder, `labels/<key>.parquet`. Distributions of
their tokens, where a loss needs them, come from actors that read these outputs again: `labels/<key>.safetensors`. Rerun
to resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gt_ray.baselines.distributions import (
    Distributions,
    distributions_of,
    read_distributions,
    write_distributions,
)
from gt_ray.baselines.w2s import LABEL, WeakLabel, labelled_samples
from gt_ray.cluster import connect, nodes, own_devices, room
from gt_ray.config import ModelSettings
from gt_ray.curation.jobs import FineTuneJob, halves_of, model_settings, weak_job
from gt_ray.curation.planner import gpus_of_an_actor
from gt_ray.curation.study import Study
from gt_ray.evaluation.pool import EnginePool, Item
from gt_ray.evaluation.results import RowScore, read_scores
from gt_ray.evaluation.run import engine_kind, item_key, keep
from gt_ray.evaluation.scorer import System
from gt_ray.pairs.root import Root
from gt_ray.progress import bar, say
from gt_ray.tasks import TASKS, Row
from gt_ray.tasks.data import Client
from gt_ray.updates.store import unit_key

VERSION = 1
"""Of how distributions are computed; files of another one are not read."""


@dataclass(frozen=True)
class Unlabelled:
    """A client's rows that its weak model is to label.

    Attributes:
        key: hash of everything that the outputs depend on.
        weak: the weak model's fine-tune.
        positions: of the rows in the pool (task, "private").
    """

    key: str
    weak: FineTuneJob
    client: str
    task: str
    positions: list[int]
    rows: list[Row]


def unlabelled(study: Study, client: Client) -> Unlabelled:
    """The second half of a client's rows; the same for all mechanisms by which the client fine-tunes."""
    weak = weak_job(study.config, study.data, study.roots["tinylm"], client)
    positions = halves_of(study.config, client)[1]
    rows = study.data.rows(client.task, "private", positions)
    kind = engine_kind(study, "tinylm")
    settings = kind.settings.model_copy(update={"log_likelihood": False})
    key = item_key(settings, kind.engine, {"weak": weak.key}, client.task, rows)
    return Unlabelled(key, weak, client.name, client.task, positions, rows)


def weak_outputs(study: Study, wanted: Sequence[Unlabelled]) -> dict[str, list[RowScore]]:
    """By key, what the weak models say to their rows, and its scores; their fine-tunes are in the store."""
    out = study.config.run_folder / "labels"
    found = {one.key: read_scores(out / f"{one.key}.parquet") for one in wanted}
    missing = [one for one in wanted if found[one.key] is None]
    if missing:
        kind = engine_kind(study, "tinylm")
        kind = replace(kind, settings=kind.settings.model_copy(update={"log_likelihood": False}))
        items = []
        for one in missing:
            system = System("weak", "tinylm", study.store.read(one.weak.key)[0][-1])
            items.append(Item(one.key, system, one.task, one.rows, {"client": one.client, "side": "tinylm"}))
        say(f"baselines: weak models of {len(items)} clients to label their rows, by {kind.engine}")
        with bar("label", len(items)) as progress, EnginePool(kind, min(kind.settings.workers, len(items))) as pool:
            for item, rows in keep(pool, items, out):
                found[item.key] = rows
                progress.advance()
    outputs = {key: rows for key, rows in found.items() if rows is not None}
    if too_long := sum(row.finish == "too long" for rows in outputs.values() for row in rows):
        say(f"baselines: {too_long} prompts are longer than the TinyLM's window and get no label")
    return outputs


def labelled(
    rows: Sequence[Row], outputs: Sequence[RowScore], weak: Sequence[Distributions] | None = None
) -> list[Row]:
    """Rows with their weak labels; one whose prompt was too long has none.

    Args:
        weak: distributions of the tokens of each label.
    """
    found: list[Row] = []
    in_order = iter(weak or ())
    for row, output in zip(rows, outputs, strict=True):
        if output.finish != "too long":
            one = None if weak is None else next(in_order)
            row = {**row, LABEL: WeakLabel(output.output, output.finish == "stop", one)}
        found.append(row)
    return found


def weak_distributions(
    study: Study, wanted: Sequence[tuple[Unlabelled, Mapping[str, Any]]], outputs: Mapping[str, Sequence[RowScore]]
) -> list[list[Distributions]]:
    """The weak models' distributions of the tokens of each label, in the order of `wanted`.

    Args:
        wanted: rows, and `top_k` and `temperature` of their distributions.
        outputs: of `weak_outputs`.
    """
    settings, folder = model_settings(study.config, "tinylm"), study.config.run_folder / "labels"
    length = model_settings(study.config, "llm").fine_tune.max_length  # where labels are cut for it
    made_by = {"max_length": length, "version": VERSION}
    keys = [unit_key({"labels": one.key, **made_by, **kept}) for one, kept in wanted]
    found = {key: read_distributions(folder / f"{key}.safetensors") for key in keys}
    missing = {key: item for key, item in zip(keys, wanted, strict=True) if found[key] is None}
    if missing:
        ray = connect()
        num_gpus = gpus_of_an_actor(settings, nodes())
        needs = {"num_cpus": 0 if num_gpus else 1, "num_gpus": num_gpus}
        most = min(study.config.evaluation.workers, room(nodes=nodes(), **needs), len(missing))
        kind = ray.remote(**needs, max_restarts=3, max_task_retries=3)(_Reader)
        actors = [kind.remote(settings, study.roots["tinylm"]) for _ in range(most)]
        pool = ray.util.ActorPool(actors)
        try:
            for key, (one, kept) in missing.items():
                update_Ld = study.store.read(one.weak.key)[0][-1].numpy()
                item = replace(one, rows=labelled(one.rows, outputs[one.key]))
                pool.submit(lambda actor, call: actor.distributions.remote(*call), (key, item, update_Ld, length, kept))
            with bar("distributions", len(missing)) as progress:
                while pool.has_next():
                    key, rows = pool.get_next_unordered()
                    write_distributions(folder / f"{key}.safetensors", rows)
                    found[key] = rows
                    progress.advance()
        finally:
            for actor in actors:
                ray.kill(actor)
    return [rows for key in keys if (rows := found[key]) is not None]


class _Reader:
    """Keeps the TinyLM loaded."""

    def __init__(self, settings: ModelSettings, root: Root) -> None:
        from gt_ray.learning.losses import TargetLosses
        from gt_ray.pairs.models import load_model, load_tokenizer

        torch.set_num_threads(1)
        self.root, self.tokenizer = root, load_tokenizer(settings.model)
        self.losses = TargetLosses(load_model(settings, own_devices()), root)

    def distributions(
        self, key: str, one: Unlabelled, update_Ld: Any, max_length: int, kept: Mapping[str, Any]
    ) -> tuple[str, list[Distributions]]:
        """The key as it was given, and the distributions of each labelled row."""
        where, task = f"labels of {one.client}", TASKS[one.task]
        samples = labelled_samples(self.tokenizer, task, one.rows, max_length, where)
        update, vocabulary = torch.from_numpy(update_Ld.copy()), len(self.tokenizer)
        return key, distributions_of(self.losses, self.root, update, samples, vocabulary=vocabulary, **kept)
