"""Training the Grad-Transformer of a study on Ray Train: checkpoints, best by validation, resume."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gt_ray.baselines.proxy_tuning import require_shared_vocabulary
from gt_ray.cluster import connect
from gt_ray.config import GradTransformerSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer, make_phi
from gt_ray.progress import bar, say
from gt_ray.training.behaviour import LlmActors
from gt_ray.training.checkpoint import HISTORY, STATE, numbered
from gt_ray.training.joint import alone, joint_key, pair_key, trained_together, training_key
from gt_ray.training.tuples import (
    input_keys,
    last_updates,
    load_inputs,
    shadow_keys,
    side_chunks,
    streams,
)
from gt_ray.training.worker import train_worker
from gt_ray.updates.files import write_atomically

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

    A finished training is not repeated; an interrupted one goes on from its last checkpoint. A training of several
    pairs lies beside the runs (`.joint`) and belongs to all studies that name one another's pairs: whichever comes
    first runs it, each copies the model of its own pair.

    Raises:
        UserError: curation has not run.
    """
    settings = models(study)[name]
    studies = trained_together(study, settings)
    _check(study, settings, studies)
    needed = [key for one in studies for key in _units(one)]
    if missing := study.store.missing(list(dict.fromkeys(needed))):
        raise UserError(
            f"{len(missing)} units are missing from {study.config.store}, such as {missing[0]}; curate first"
        )
    run, trained_by = study.config.run_folder, training_key(study, settings)
    out = run / name
    if _finished(out, trained_by):
        say(f"train: nothing to do, {out} is trained")
    elif len(studies) == 1:
        _fit(studies, settings, run / "training", run / "events" / name, [out])
    else:
        home = study.config.runs / ".joint" / joint_key(studies, settings)[:12]
        outs = [home / f"{MODEL}-{i}" for i in range(len(studies))]
        shared = outs[next(i for i, one in enumerate(studies) if one is study)]
        with alone(home):
            if _finished(shared, trained_by):
                say(f"train: nothing to do, {shared} is trained, together with other pairs")
            else:
                _fit(studies, settings, home, home / "events", outs)
        _replace(out, lambda folder: shutil.copytree(shared, folder))
        shutil.copytree(home / "events", run / "events" / name, dirs_exist_ok=True)
    return out


def _fit(
    studies: Sequence[Study], settings: GradTransformerSettings, home: Path, events: Path, outs: Sequence[Path]
) -> None:
    """Run the training of the studies' pairs in the folder `home`; the best checkpoint's models go to `outs`."""
    connect()
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    study, P, key = studies[0], len(studies), joint_key(studies, settings)
    keys = [{validation: shadow_keys(one, validation) for validation in (False, True)} for one in studies]
    starts = [home / f"start-{pair_key(one, settings)[:12]}" for one in studies]
    for one, start, of_pair in zip(studies, starts, keys, strict=True):
        if not (start / "config.json").is_file():
            _initial_model(one, settings, of_pair).save(start)
    training = settings.training
    progress_file = (home / "step").resolve()
    n_tuples = len(keys[0][False]) * len(study.config.curation.snapshot_steps)
    # Each worker gets an equal share of the tuples and drops what does not fill its last batch.
    each = training.batch_size // training.workers
    steps = (training.epochs * n_tuples // training.workers) // each
    if settings.phi is None:
        steps = 0  # nothing is left for Eq. 10 to train: the linear path starts as its solution
    elif steps == 0 and training.epochs:
        raise UserError(
            f"{n_tuples} tuples are fewer than one batch of {training.batch_size}; lower training.batch_size"
        )
    total = P * (steps + training.behaviour.steps)
    behaviour = f", {P * training.behaviour.steps} of them on behaviour" if training.behaviour.steps else ""
    what = "the Grad-Transformer" if settings.phi else "the linear path alone"
    of_pairs = f" of {P} pairs, each" if P > 1 else ","
    say(f"train: {what}{of_pairs} {n_tuples} tuples, {training.epochs} epochs, {total} optimizer steps{behaviour}")
    seed = training.seed + study.config.seed
    data: dict[str, Any] = {}
    for i, (one, of_pair) in enumerate(zip(studies, keys, strict=True)):
        data |= {f"{name}-{i}": stream for name, stream in streams(one, of_pair, seed).items()}
    llms = LlmActors.start(studies, training.behaviour.workers) if training.behaviour.steps else []
    best_by = "validation_behaviour" if llms else "validation_generated"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "starts": [str(start.resolve()) for start in starts],
            "training": training.model_dump(mode="json"),
            "seed": seed,
            "steps": total,
            "llms": llms,
            "domains": [shadow.domain for shadow in study.shadows],
            "checkpoint_steps": P * max(1, training.checkpoint_epochs * n_tuples // training.batch_size),
            "progress": str(progress_file),
            "events": str(events.resolve()),
        },
        datasets=data,
        # Every worker has all of the other, smaller ones.
        dataset_config=DataConfig(datasets_to_split=[f"train-{i}" for i in range(P)]),
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=training.num_gpus > 0,
            resources_per_worker={
                "CPU": training.num_cpus,
                **({"GPU": training.num_gpus} if training.num_gpus else {}),
            },
        ),
        run_config=RunConfig(
            name=f"train-{key[:12]}",
            storage_path=str(home.resolve()),
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
        for llm in set(llms):
            llm.close()
    best, metrics = min(result.best_checkpoints, key=lambda pair: pair[1][best_by])
    with best.as_directory() as folder:
        for i, (one, out) in enumerate(zip(studies, outs, strict=True)):
            state = {"trained_by": training_key(one, settings, studies), "best": metrics}
            _replace(out, partial(_export, Path(folder), i, state | ({"pair": i} if P > 1 else {})))
    say(
        f"train: best checkpoint at step {metrics['step']}, error of generated validation updates "
        f"{metrics['validation_generated']:.3f} of the mean update's"
    )


def _export(checkpoint: Path, pair: int, state: dict[str, Any], folder: Path) -> None:
    shutil.copytree(checkpoint / numbered("model", pair), folder)
    shutil.copy(checkpoint / HISTORY, folder / HISTORY)
    write_atomically(folder / STATE, json.dumps(state).encode())


def _replace(out: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a folder, and put it in the place of `out`."""
    partial_out = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    write(partial_out)
    shutil.rmtree(out, ignore_errors=True)
    partial_out.rename(out)


def _units(study: Study) -> list[str]:
    """Keys of all units that a training of its pair reads."""
    rows = [row for validation in (False, True) for row in shadow_keys(study, validation)]
    return [row[side] for row in rows for side in ("S", "T")] + [row["S"] for row in input_keys(study)]


def _check(study: Study, settings: GradTransformerSettings, studies: Sequence[Study]) -> None:
    """Refuse what cannot be trained, or refined later, before anything is."""
    training = settings.training
    sizes = {"batch_size": training.batch_size}
    if training.behaviour.steps:
        sizes["behaviour.adapters"] = training.behaviour.adapters
    for key, size in sizes.items():
        if size % training.workers:
            raise UserError(f"training.{key}={size} does not divide among {training.workers} workers")
    teacher = training.behaviour.teacher if training.behaviour.steps else 0
    taught = [("training.behaviour.teacher", teacher, one.config.pair) for one in studies]
    for key, value, pair in [*taught, ("refinement.steps", settings.refinement.steps, study.config.pair)]:
        if value:
            require_shared_vocabulary(pair, f"{key}={value}")


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
    model = GradTransformer(layout_S, layout_T, phi, roots, settings.input_clip, rank, shadows, settings.chunk)
    model.standard_S.fit(side_chunks(study.store, keys[False], "S"), layout_S, settings.scale_floor)
    model.standard_T.fit(side_chunks(study.store, keys[False], "T"), layout_T, settings.scale_floor)
    if model.linear is not None:
        model.fit_linear(*(last_updates(study.store, keys[held_out]) for held_out in (False, True)))
    model.fit_certainty(inputs, validation_S)
    return model
