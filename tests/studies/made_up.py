"""Made-up studies: folders of finished cells with scores, reports and configs, as a study leaves them."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gt_ray.config import Config, load_config
from gt_ray.evaluation.results import RowScore, write_scores
from gt_ray.evaluation.run import ClientScores
from gt_ray.evaluation.scorer import System
from gt_ray.evaluation.summary import by_population, report_rows, summarise
from gt_ray.tasks.data import Client

MAIN = {"base_S": 12.0, "P_S": 40.0, "base_T": 18.0, "P_T": 90.0, "ours": 70.0, "ridge": 60.0, "mean_update": 30.0}
TIMES = {
    "device": "cpu",
    "client": {"tinylm_fine_tune_s": 4.0, "llm_fine_tune_s": 20.0, "generate_s": 1.0},
    "provider": {"curate_tinylm_s": 240.0, "curate_llm_s": 1200.0, "train_s": 300.0},
    "units": {"tinylm": 60, "llm": 60},
}
HISTORY = [{"step": s, "behaviour": 2 / s, "validation_behaviour": 2.2 / s} for s in (10, 20, 30)]
FIGURE_7 = [f"curation.samples={samples}" for samples in (32, 64, 128, 256, 512)]

Scores = Mapping[str, float]
"""System -> mean score in percent."""


def rising(config: Config) -> dict[str, float]:
    """Ours follows a power law of the rows of a shadow; its limit is 80."""
    return MAIN | {"ours": 80 - 150 * config.curation.samples**-0.5}


def constant(config: Config) -> dict[str, float]:
    """The same scores whatever the settings."""
    return dict(MAIN)


def made_up_study(
    folder: Path,
    cells: Sequence[str],
    scores: Callable[[Config], Scores] = constant,
    preset: str = "embedded-figure7",
    common: Sequence[str] = (),
    clients: int = 3,
    rows: int = 40,
    times: Mapping[str, Any] | None = TIMES,
    **tree: Any,
) -> Path:
    """A study's folder with a finished cell for each of these overrides.

    Args:
        scores: of a cell, which its test rows have to within a hundredth.
        tree: further keys of `study.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, text in enumerate(cells):
        cell = folder / f"cell-{number}"
        config = load_config(preset, [*common, *shlex.split(text)])
        report = made_up_run(cell, config, scores(config), clients, rows)
        if times is not None:
            report |= {"times": times, "device_s": {"curate": 1440.0, "train": 300.0}}
        (cell / "report.json").write_text(json.dumps(report))
        entries.append({"overrides": shlex.split(text), "report": f"{cell.name}/report.json"})
    whole = {"name": folder.name, "preset": preset, "overrides": list(common), "cells": entries, **tree}
    (folder / "study.json").write_text(json.dumps(whole))
    return folder


def made_up_run(folder: Path, config: Config, scores: Scores, clients: int, rows: int) -> dict[str, Any]:
    """A run's folder, but for its report, which it returns."""
    results = []
    for task in config.data.tasks:
        for number in range(clients):
            client = Client(f"{task}-seen-{number}", task, "", [], [])
            for system, score in scores.items():
                drawn = row_scores(
                    score + 2 * (number - (clients - 1) / 2), rows, f"{config.seed} {client.name} {system}"
                )
                key = f"{client.name}-{system}"
                prompts = [f"{config.seed} {client.name} {i}" for i in range(rows)]
                write_scores(folder / "scores" / f"{key}.parquet", prompts, drawn)
                results.append(ClientScores(client, System(system), drawn, key))
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "report.html").write_text("a page")
    (folder / "grad_transformer").mkdir(exist_ok=True)
    (folder / "grad_transformer" / "history.json").write_text(json.dumps(HISTORY))
    pair = {"tinylm": config.pair.tinylm.model, "llm": config.pair.llm.model}
    return {
        "preset": config.preset,
        "seed": config.seed,
        "pair": {side: {"model": model, "root": "a1" * 32} for side, model in pair.items()},
        "wall_s": {"curate": 900.0, "train": 300.0},
        "rows": report_rows(results, config.seed),
        "summary": summarise(results),
        "populations": by_population(results),
    }


def row_scores(mean: float, rows: int, seed: str) -> list[RowScore]:
    """Scores of test rows around a mean, the same for the same seed."""
    rng = random.Random(seed)
    found = [rng.uniform(-20, 20) for _ in range(rows)]
    shift = mean - sum(found) / rows
    return [RowScore("", "", one + shift, one + shift, -1.0, 1, "stop") for one in found]
