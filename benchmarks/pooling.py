"""What bad clients in a round do to its adapter, by pooling: scores with 0, 1 and 2 of 5 clients bad.

Five clients of one domain fine-tune the TinyLM on rows of their own, for each task of the embedded pair. Bad ones send
noise of ten times their update's size (garbage), its negative (sign-flipped), or a hundred times it (100x). The run's
Grad-Transformer generates one adapter from what is pooled, which is scored on test rows of their domain.

    python benchmarks/pooling.py --run runs/embedded-seed0          # 10 minutes on 2 cores

Prints a table of mean accuracy (ROUGE-1 for summaries) over tasks with its standard error over test rows. The last line
is JSON: the scores by pooling.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, cast, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gt_ray.config import EvaluationSettings
from gt_ray.evaluation.scorer import System, TransformersScorer
from gt_ray.learning.engine import Engine, FineTuned
from gt_ray.learning.samples import TrainingSet, encode
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.progress import bar
from gt_ray.serving.checkpoints import Checkpoint, load_checkpoint
from gt_ray.serving.settings import CheckpointSettings
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import DOMAINS, rows
from gt_ray.updates.pooling import Pooling, pool

CLIENTS, SAMPLES = 5, 256
ATTACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "garbage": lambda update_Ld: 10 * update_Ld.square().mean().sqrt() * torch.randn_like(update_Ld),
    "sign-flipped": lambda update_Ld: -update_Ld,
    "100x": lambda update_Ld: 100 * update_Ld,
}


def client_updates(checkpoint: Checkpoint, seed: int) -> dict[str, Tensor]:
    """By task, the updates [N, L, d] of five clients, each with rows of its own."""
    settings, root = checkpoint.description.config.pair.tinylm, checkpoint.description.roots["tinylm"]
    engine = Engine(load_model(settings), root, adapters_at_once=CLIENTS)
    tokenizer = load_tokenizer(settings.model)
    found = {}
    for task in checkpoint.description.config.data.tasks:
        drawn = rows(task, "private", DOMAINS[0], seed, CLIENTS * SAMPLES)
        samples = encode(tokenizer, TASKS[task], drawn, settings.fine_tune.max_length)
        sets = [TrainingSet(samples[c * SAMPLES : (c + 1) * SAMPLES], seed + c) for c in range(CLIENTS)]
        results = dict(engine.fine_tune(sets, settings.fine_tune))
        found[task] = torch.stack([cast(FineTuned, results[c]).snapshots_JLd[-1] for c in range(CLIENTS)])
    return found


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a study on the embedded pair.")] = Path(
        "runs/embedded-seed0"
    ),
    seed: Annotated[int, typer.Option(help="Of the clients' rows and the noise.")] = 1000,
    test_rows: Annotated[int, typer.Option(help="Of each task.")] = 60,
) -> None:
    """Score every pooling under every attack."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    checkpoint = load_checkpoint("pooling", CheckpointSettings(run=run))
    model, description = checkpoint.model, checkpoint.description
    limits = EvaluationSettings(max_new_tokens=24, log_likelihood=False, batch_size=test_rows)
    scorer = TransformersScorer(description.config.pair.llm, description.roots["llm"], limits)
    tests = {task: rows(task, "test", DOMAINS[0], seed + 7, test_rows) for task in description.config.data.tasks}
    updates = client_updates(checkpoint, seed)
    cases = [(0, "none"), *((bad, attack) for bad in (1, 2) for attack in ATTACKS)]
    scores: dict[str, dict[str, list[float]]] = {}
    with bar("score", len(cases) * len(get_args(Pooling)) * len(tests)) as progress:
        for bad, attack in cases:
            for pooling in get_args(Pooling):
                of_rows: list[float] = []
                for task, test in tests.items():
                    sent_NLd = updates[task].clone()
                    for c in range(bad):
                        sent_NLd[c] = ATTACKS[attack](sent_NLd[c])
                    pooled_Ld = pool(sent_NLd, pooling, description.mean_S_Ld)
                    system = System("pooled", update_Ld=model.generate(pooled_Ld[None])[0])
                    of_rows += [row.score for row in scorer.score(system, task, test)]
                    progress.advance()
                scores.setdefault(f"{bad} {attack}", {})[pooling] = of_rows
    table = Table("bad clients of 5", *get_args(Pooling))
    for case, by_pooling in scores.items():
        errors = {how: statistics.stdev(values) / len(values) ** 0.5 for how, values in by_pooling.items()}
        table.add_row(case, *(f"{statistics.mean(by_pooling[how]):.1f} ± {errors[how]:.1f}" for how in by_pooling))
    Console(width=110).print(table)
    means = {case: {how: round(statistics.mean(v), 1) for how, v in one.items()} for case, one in scores.items()}
    print(json.dumps(means))


if __name__ == "__main__":
    typer.run(main)
