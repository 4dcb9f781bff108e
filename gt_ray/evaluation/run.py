"""Scoring many systems on many clients with Ray Data; every (system, client) is a file, so rerunning resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gt_ray.cluster import connect
from gt_ray.curation.jobs import Side, model_settings
from gt_ray.curation.study import Study
from gt_ray.evaluation.scorer import RowScores, System, TransformersScorer
from gt_ray.progress import bar, say
from gt_ray.tasks import TASKS
from gt_ray.tasks.data import Client, fingerprint
from gt_ray.updates.files import write_atomically
from gt_ray.updates.store import unit_key

SCORER_VERSION = 1
"""Raise it when scores of the same outputs change: answer extraction, metric, decoding."""


@dataclass(frozen=True)
class ClientScores:
    """One system's scores on one client's test rows."""

    client: Client
    system: System
    rows: RowScores


class ScoreActor:
    """Ray Data actor: scores one (system, client) a block, keeping one base model loaded."""

    def __init__(self, shared: dict[str, Any], out: Path) -> None:
        import ray
        import torch

        torch.set_num_threads(1)
        study: Study = ray.get(shared["study"])
        self.config, self.roots, self.data, self.out = study.config, study.roots, study.data, out
        self.systems: list[System] = ray.get(shared["systems"])
        self.device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.loaded: tuple[Side, TransformersScorer] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score, and write `<key>.json`."""
        for key, number, client_number in zip(batch["key"], batch["system"], batch["client"], strict=True):
            system, client = self.systems[number], self.data.clients[client_number]
            if self.loaded is None or self.loaded[0] != system.side:
                self.loaded = None
                settings = self.config.evaluation
                scorer = TransformersScorer(
                    model_settings(self.config, system.side),
                    self.roots[system.side],
                    settings.batch_size,
                    settings.max_new_tokens,
                    self.device,
                )
                self.loaded = (system.side, scorer)
            rows = self.data.rows(client.task, "test", client.test)
            scores = self.loaded[1].score(system.update_Ld, TASKS[client.task], rows)
            write_atomically(self.out / f"{key}.json", json.dumps(scores.as_dict()).encode())
        return {"key": batch["key"]}


def score(study: Study, work: Sequence[tuple[System, Client]]) -> list[ClientScores]:
    """Scores of systems on their clients' test rows, in the order of `work`."""
    out = study.config.run_folder / "scores"
    keys = [_key(study, system, client) for system, client in work]
    missing = {
        key: i for i, key in enumerate(keys) if _read(out / f"{key}.json") is None
    }  # equal systems (two controls that agree) share a file
    if missing:
        _run(study, work, missing, out)
    else:
        say(f"evaluate: nothing to do, all {len(work)} scores are in {out}")
    results = []
    for (system, client), key in zip(work, keys, strict=True):
        rows = _read(out / f"{key}.json")
        assert rows is not None, key
        results.append(ClientScores(client, system, rows))
    return results


def _run(study: Study, work: Sequence[tuple[System, Client]], missing: dict[str, int], out: Path) -> None:
    say(f"evaluate: {len(missing)} of {len(work)} (system, client) pairs to score")
    ray = connect()
    systems = [system for system, _ in work]
    positions = {client.name: i for i, client in enumerate(study.data.clients)}
    items: list[dict[str, Any]] = [
        {"key": key, "system": i, "client": positions[work[i][1].name]} for key, i in missing.items()
    ]
    # One model after the other, and the large one first, so that actors load each once and end together.
    items.sort(key=lambda item: systems[item["system"]].side)
    settings = study.config.evaluation
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ScoreActor,
        fn_constructor_args=({"study": ray.put(study), "systems": ray.put(systems)}, out.resolve()),
        batch_size=1,
        num_gpus=settings.num_gpus or None,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=min(settings.workers, len(items))),
    )
    with bar("evaluate", len(items)) as progress:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            progress.advance(len(batch["key"]))


def _key(study: Study, system: System, client: Client) -> str:
    update = b"" if system.update_Ld is None else system.update_Ld.contiguous().numpy().tobytes()
    settings = study.config.evaluation
    return unit_key(
        {
            "root": study.roots[system.side].hash,
            "dtype": model_settings(study.config, system.side).dtype,
            "update": hashlib.sha256(update).hexdigest(),
            "test": fingerprint(client.task, study.data.rows(client.task, "test", client.test)),
            "max_new_tokens": settings.max_new_tokens,
            "scorer": SCORER_VERSION,
        }
    )


def _read(path: Path) -> RowScores | None:
    try:
        return RowScores(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
