"""Training the Grad-Transformer of a study on Ray Train: checkpoints, best by validation, resume."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gt_ray.baselines.proxy_tuning import require_shared_vocabulary
from gt_ray.cluster import connect
from gt_ray.config import GradTransformerSettings, TrainingSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer, make_phi
from gt_ray.progress import bar, say
from gt_ray.training.behaviour import LlmActors
from gt_ray.training.tuples import (
    UNITS_A_TASK,
    epoch_rows,
    input_keys,
    last_updates,
    load_input_batch,
    load_inputs,
    load_tuples,
    shadow_keys,
    side_chunks,
)
from gt_ray.training.worker import HISTORY, STATE, train_worker
from gt_ray.updates.files import write_atomically
from gt_ray.updates.store import unit_key

MODEL, LINEAR = "grad_transformer", "linear_behaviour"
"""Folders of a study's models: its Grad-Transformer, and the control that is the linear path alone."""


def models(study: Study) -> dict[str, GradTransformerSettings]:
    """What a study trains: its Grad-Transformer, and where that is trained on behaviour the linear path alone with the
    same loss, data and steps, to tell what the network adds."""
    settings, controls = study.config.grad_transformer, study.config.evaluation.controls
    found = {MODEL: settings}
    if settings.phi is not None and settings.linear_rank and settings.training.behaviour.steps and controls:
        found[LINEAR] = settings.model_copy(update={"phi": None})
    return found


def train(study: Study, name: str = MODEL) -> Path:
    """Train one of the study's `models`; returns the folder of its best checkpoint.

    A finished training is not repeated; an interrupted one goes on from its last checkpoint.

    Raises:
        UserError: curation has not run.
    """
    settings = models(study)[name]
    _check(study, settings.training)
    out = study.config.run_folder / name
    keys = {validation: shadow_keys(study, validation) for validation in (False, True)}
    needed = [row[side] for rows in keys.values() for row in rows for side in ("S", "T")]
    needed += [row["S"] for row in input_keys(study)]
    if missing := study.store.missing(list(dict.fromkeys(needed))):
        raise UserError(
            f"{len(missing)} units are missing from {study.config.store}, such as {missing[0]}; curate first"
        )
    trained_by = training_key(study, settings)
    if _finished(out, trained_by):
        say(f"train: nothing to do, {out} is trained")
        return out
    ray = connect()
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    start = study.config.run_folder / "training" / f"start-{trained_by[:12]}"
    if not (start / "config.json").is_file():
        _initial_model(study, settings, keys).save(start)
    training = settings.training
    progress_file = (study.config.run_folder / "training" / "step").resolve()
    n_tuples = len(keys[False]) * len(study.config.curation.snapshot_steps)
    # Each worker gets an equal share of the tuples and drops what does not fill its last batch.
    each = training.batch_size // training.workers
    steps = (training.epochs * n_tuples // training.workers) // each
    if settings.phi is None:
        steps = 0  # nothing is left for Eq. 10 to train: the linear path starts as its solution
    elif steps == 0 and training.epochs:
        raise UserError(
            f"{n_tuples} tuples are fewer than one batch of {training.batch_size}; lower training.batch_size"
        )
    total = steps + training.behaviour.steps
    behaviour = f", {training.behaviour.steps} of them on behaviour" if training.behaviour.steps else ""
    what = "the Grad-Transformer" if settings.phi else "the linear path alone"
    say(f"train: {what}, {n_tuples} tuples, {training.epochs} epochs, {total} optimizer steps{behaviour}")
    seed = training.seed + study.config.seed
    rows = epoch_rows(keys[False], range(max(1, training.epochs)), seed)
    load = partial(load_tuples, store=study.store, seed=seed)
    streams = {
        "train": ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // (8 * UNITS_A_TASK))).map_batches(
            load, fn_kwargs={"last_only": False}, batch_size=UNITS_A_TASK, num_cpus=0.5
        ),
        "validation": ray.data.from_items(keys[True]).map_batches(load, fn_kwargs={"last_only": True}, num_cpus=0.5),
    }
    llm = None
    if training.behaviour.steps:
        streams["inputs"] = ray.data.from_items(input_keys(study)).map_batches(
            load_input_batch, fn_kwargs={"store": study.store}, num_cpus=0.5
        )
        llm = LlmActors.start(study, training.behaviour.workers)
    best_by = "validation_behaviour" if llm else "validation_generated"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "start": str(start.resolve()),
            "training": training.model_dump(mode="json"),
            "seed": seed,
            "steps": total,
            "llm": llm,
            "domains": [shadow.domain for shadow in study.shadows],
            "checkpoint_steps": max(1, training.checkpoint_epochs * n_tuples // training.batch_size),
            "progress": str(progress_file),
            "events": str((study.config.run_folder / "events" / name).resolve()),
        },
        datasets=streams,
        dataset_config=DataConfig(datasets_to_split=["train"]),  # every worker has all of the other, smaller ones
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=training.num_gpus > 0,
            resources_per_worker={
                "CPU": training.num_cpus,
                **({"GPU": training.num_gpus} if training.num_gpus else {}),
            },
        ),
        run_config=RunConfig(
            name=f"train-{trained_by[:12]}",
            storage_path=str((study.config.run_folder / "training").resolve()),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=best_by, checkpoint_score_order="min"
            ),
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _followed(progress_file, total):
            result = trainer.fit()
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own, which later stages would be deaf by
        if llm:
            llm.close()
    best, metrics = min(result.best_checkpoints, key=lambda pair: pair[1][best_by])
    partial_out = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    with best.as_directory() as folder:
        shutil.copytree(Path(folder) / "model", partial_out)
        shutil.copy(Path(folder) / HISTORY, partial_out / HISTORY)
    write_atomically(partial_out / STATE, json.dumps({"trained_by": trained_by, "best": metrics}).encode())
    shutil.rmtree(out, ignore_errors=True)
    partial_out.rename(out)
    say(
        f"train: best checkpoint at step {metrics['step']}, error of generated validation updates "
        f"{metrics['validation_generated']:.3f} of the mean update's"
    )
    return out


def _check(study: Study, training: TrainingSettings) -> None:
    """Refuse what cannot be trained, before anything is."""
    sizes = {"batch_size": training.batch_size}
    if training.behaviour.steps:
        sizes["behaviour.adapters"] = training.behaviour.adapters
    for key, size in sizes.items():
        if size % training.workers:
            raise UserError(f"training.{key}={size} does not divide among {training.workers} workers")
    taught = {
        "training.behaviour.teacher": training.behaviour.teacher if training.behaviour.steps else 0,
        "refinement.steps": study.config.grad_transformer.refinement.steps,
    }
    for key, value in taught.items():
        if value:
            require_shared_vocabulary(study.config.pair, f"{key}={value}")


@contextmanager
def _followed(progress_file: Path, total: int) -> Iterator[None]:
    """A progress bar of what the workers write to `progress_file`."""
    ended = threading.Event()

    def follow() -> None:
        shown = 0
        while not ended.wait(0.5):
            try:
                step = int(progress_file.read_text() or 0)
            except (OSError, ValueError):  # not there yet, or being written
                continue
            progress.advance(step - shown)
            shown = step

    progress_file.unlink(missing_ok=True)
    with bar("train", total) as progress:
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def training_key(study: Study, settings: GradTransformerSettings) -> str:
    """Hash of all that a training depends on."""
    units = [row for validation in (False, True) for row in shadow_keys(study, validation)]
    units += input_keys(study)
    trained = settings.model_dump(mode="json", exclude={"refinement"})
    return unit_key({"settings": trained, "units": units, "seed": study.config.seed})


def load_trained(study: Study, name: str = MODEL) -> GradTransformer:
    """One of the study's trained `models`.

    Raises:
        UserError: there is none, or it was trained with other settings or on other shadows than the study has now.
    """
    out = study.config.run_folder / name
    model = GradTransformer.load(out)
    try:
        trained_by = json.loads((out / STATE).read_text(encoding="utf-8")).get("trained_by")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{out / STATE} is absent or damaged ({error}); train again") from error
    if trained_by != training_key(study, models(study)[name]):
        raise UserError(
            f"{out} was trained with other settings than this study's; train again, or give it another name="
        )
    return model


def _finished(out: Path, trained_by: str) -> bool:
    try:
        state = json.loads((out / STATE).read_text(encoding="utf-8"))
        GradTransformer.load(out)
    except (OSError, ValueError):  # UserError is a ValueError: a damaged checkpoint is trained again
        return False
    return bool(state.get("trained_by") == trained_by)


def _initial_model(
    study: Study, settings: GradTransformerSettings, keys: dict[bool, list[dict[str, Any]]]
) -> GradTransformer:
    """The network before training: standardised on the training tuples, its linear path fitted to the shadows."""
    torch.manual_seed(settings.training.seed + study.config.seed)
    layout_S, layout_T = study.roots["tinylm"].layout, study.roots["llm"].layout
    roots: dict[str, str] = {side: root.hash for side, root in study.roots.items()}
    rank = min(settings.linear_rank, len(keys[False]) - 1)
    phi = make_phi(settings.phi) if settings.phi else None
    inputs = load_inputs([row["S"] for row in input_keys(study)], study.store)
    validation_S = load_inputs([row["S"] for row in keys[True]], study.store)
    shadows = len(inputs), len(validation_S)
    model = GradTransformer(layout_S, layout_T, phi, roots, settings.input_clip, rank, shadows)
    model.standard_S.fit(side_chunks(study.store, keys[False], "S"), layout_S, settings.scale_floor)
    model.standard_T.fit(side_chunks(study.store, keys[False], "T"), layout_T, settings.scale_floor)
    if model.linear is not None:
        model.fit_linear(*(last_updates(study.store, keys[held_out]) for held_out in (False, True)))
    model.fit_certainty(inputs, validation_S)
    return model
