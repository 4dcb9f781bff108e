"""Blocks as tokens against chunks of them (`grad_transformer.chunk`), at equal numbers of parameters.

Grad-Transformers of the paper's recipe (Eq. 10 alone, no linear path) train on the shadows of a run on the embedded
pair, each with the phi of the run's config but for d_model, which is chosen so that all have as many parameters as with
blocks. Every seed is another start and order of the tuples. As in training, the checkpoint counts that validates best;
there is one after each epoch.

    python benchmarks/chunks.py --run runs/embedded-seed0            # 3 minutes on an idle core
    python benchmarks/chunks.py --chunks 64 --epochs 30 --learning-rate 3e-4

Prints for each layout its parameters, those of its ends, the steps of a generation, the wall time of one relative to
blocks, and the error of generated validation updates relative to the mean update's: mean over seeds and standard
deviation. The last line is JSON: the same by chunk.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table

from gt_ray.config import GradTransformerSettings, PhiSettings
from gt_ray.curation.study import Study
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.grad_transformer.several import SeveralPairs
from gt_ray.progress import bar
from gt_ray.serving.checkpoints import load_checkpoint
from gt_ray.serving.settings import CheckpointSettings
from gt_ray.training.tuples import Tuples, load_tuples, shadow_keys
from gt_ray.training.validation import Validation
from gt_ray.training.worker import optimizer_of

GENERATIONS = 15
"""Of one update, timed; the layouts take turns."""


def tuples_of(study: Study, validation: bool) -> Tuples:
    """All training tuples, or the last ones of the validation shadows."""
    rows = shadow_keys(study, validation)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    loaded = load_tuples(columns, study.store, last_only=validation, seed=0)
    return Tuples.of({name: torch.from_numpy(column) for name, column in loaded.items()})


def size(*parts: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def make(trained: GradTransformer, phi: PhiSettings, chunk: int | None) -> GradTransformer:
    """A new network for the pair of a trained one, standardised alike."""
    model = GradTransformer(trained.layout_S, trained.layout_T, make_phi(phi), trained.roots, chunk=chunk)
    model.standard_S.load_state_dict(trained.standard_S.state_dict())
    model.standard_T.load_state_dict(trained.standard_T.state_dict())
    return model


def widest(trained: GradTransformer, phi: PhiSettings, chunk: int, parameters: int) -> PhiSettings:
    """phi with the d_model that gives the nearest number of parameters."""
    found = {}
    for d_model in range(2 * phi.heads, 4 * phi.d_model, phi.heads):
        other = phi.model_copy(update={"d_model": d_model})
        found[d_model] = abs(size(make(trained, other, chunk)) - parameters)
        if len(found) > 1 and found[d_model] > found[d_model - phi.heads]:
            return phi.model_copy(update={"d_model": d_model - phi.heads})
    raise ValueError(f"no d_model below {4 * phi.d_model} gives {parameters} parameters with chunk={chunk}")


def error_of(
    model: GradTransformer, tuples: Tuples, validation: Validation, settings: GradTransformerSettings, seed: int
) -> float:
    """Train; least error of generated validation updates relative to the mean update's, over the epochs."""
    training = settings.training
    an_epoch = len(tuples.task_N) // training.batch_size
    optimizer, schedule = optimizer_of(SeveralPairs([model]), training.epochs * an_epoch, training)
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(training.epochs):
        order = torch.randperm(len(tuples.task_N), generator=generator)
        for n in range(an_epoch):
            batch = order[n * training.batch_size : (n + 1) * training.batch_size]
            optimizer.zero_grad()
            model.loss(tuples.S_NLd[batch], tuples.T_NLd[batch]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            optimizer.step()
            schedule.step()
        errors.append(validation(model)["validation_generated"])
    return min(errors)


def main(
    run: Annotated[
        Path, typer.Option(help="Run folder of a study on the embedded pair; its store is needed too.")
    ] = Path("runs/embedded-seed0"),
    chunks: Annotated[str, typer.Option(help="Coordinates of a token, separated by commas.")] = "192,96",
    seeds: Annotated[int, typer.Option(min=2)] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="None: the run's.")] = None,
) -> None:
    """Train all layouts with all seeds and print what comes out."""
    torch.set_num_threads(1)
    checkpoint = load_checkpoint("chunks", CheckpointSettings(run=run))
    study, trained = Study.load(checkpoint.description.config), checkpoint.model
    tree = study.config.grad_transformer.model_dump() | {"recipe": "paper"}
    tree["training"] |= {"epochs": epochs} | ({"learning_rate": learning_rate} if learning_rate else {})
    settings = GradTransformerSettings.model_validate(tree)
    assert settings.phi is not None
    tuples, validation = tuples_of(study, validation=False), Validation(tuples_of(study, validation=True), None)
    phis: dict[int | None, PhiSettings] = {None: settings.phi}
    blocks = size(make(trained, settings.phi, None))
    phis |= {int(chunk): widest(trained, settings.phi, int(chunk), blocks) for chunk in chunks.split(",")}
    errors: dict[int | None, list[float]] = {chunk: [] for chunk in phis}
    models = {}
    with bar("train", seeds * len(phis)) as progress:
        for seed in range(seeds):
            for chunk, phi in phis.items():
                torch.manual_seed(seed)
                models[chunk] = make(trained, phi, chunk)
                errors[chunk].append(error_of(models[chunk], tuples, validation, settings, seed))
                progress.advance()
    times: dict[int | None, list[float]] = {chunk: [] for chunk in phis}
    for _ in range(GENERATIONS):
        for chunk, model in models.items():
            start = time.perf_counter()
            model.generate(tuples.S_NLd[:1])
            times[chunk].append(time.perf_counter() - start)
    table = Table("layout", "d_model", "parameters", "of ends", "steps", "time", "error")
    found: dict[str, dict[str, Any]] = {}
    for chunk, model in models.items():
        of_chunk = {
            "d_model": phis[chunk].d_model,
            "parameters": size(model),
            "of_ends": size(model.embed_S, model.embed_T, model.out),
            "steps": model.embed_T.tokens,
            "time_vs_blocks": round(statistics.median(times[chunk]) / statistics.median(times[None]), 2),
            "error": round(statistics.mean(errors[chunk]), 4),
            "error_sd": round(statistics.stdev(errors[chunk]), 4),
        }
        name = f"chunks of {chunk}" if chunk else "blocks"
        found[name] = of_chunk
        *counts, mean, sd = map(str, of_chunk.values())
        table.add_row(name, *counts, f"{mean} ± {sd}")
    Console(width=110).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
