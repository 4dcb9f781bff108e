"""Training the Grad-Transformer of a study on Ray Train: checkpoints, best by validation, resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gt_ray.baselines.proxy_tuning import require_shared_vocabulary
from gt_ray.cluster import connect, nodes, total
from gt_ray.config import GradTransformerSettings, TrainingSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError, require
from gt_ray.grad_transformer.network import CONFIG, GradTransformer
from gt_ray.grad_transformer.phi import make_phi, phi_config, phi_of
from gt_ray.progress import say
from gt_ray.training.checkpoint import STATE, is_finished
from gt_ray.training.joint import joint_key, pair_key, trained_together, training_key
from gt_ray.training.phases import run_phases
from gt_ray.training.tuples import input_keys, last_updates, load_inputs, shadow_keys, side_chunks
from gt_ray.updates.files import alone, replace_folder, write_atomically

MODEL, LINEAR = "grad_transformer", "linear_behaviour"
"""Folders of a study's models: its Grad-Transformer, and the control that is the linear path alone."""


def models(study: Study) -> dict[str, GradTransformerSettings]:
    """What a study trains: its Grad-Transformer, and where that is trained on behaviour the linear path alone."""
    settings = study.config.grad_transformer
    linear = {LINEAR: settings.model_copy(update={"phi": None})} if study.config.has_linear_control else {}
    return {MODEL: settings, **linear}


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
    if is_finished(out, trained_by):
        say(f"train: nothing to do, {out} is trained")
        return out
    home, events, outs, own = run / "training", run / "events" / name, [out], out
    if len(studies) > 1:
        home = study.config.runs / ".joint" / joint_key(studies, settings)[:12]
        events, outs = home / "events", [home / f"{MODEL}-{i}" for i in range(len(studies))]
        own = outs[next(i for i, one in enumerate(studies) if one is study)]
    with alone(home, lambda: say(f"train: another process trains the same in {home}; waiting for it")):
        if is_finished(own, trained_by):
            say(f"train: nothing to do, {own} is trained")
        else:
            _fit(studies, settings, home, events, outs)
    if own is not out:
        replace_folder(out, lambda folder: shutil.copytree(own, folder))
        shutil.copytree(events, run / "events" / name, dirs_exist_ok=True)
    return out


def _fit(
    studies: Sequence[Study], settings: GradTransformerSettings, home: Path, events: Path, outs: Sequence[Path]
) -> None:
    """Run the training of the studies' pairs in the folder `home`; the best checkpoint's models go to `outs`."""
    connect()
    _say_what_is_missing(settings.training)
    keys = [{validation: shadow_keys(one, validation) for validation in (False, True)} for one in studies]
    starts = [home / f"start-{pair_key(one, settings)[:12]}" for one in studies]
    for one, start, of_pair in zip(studies, starts, keys, strict=True):
        if not (start / CONFIG).is_file():
            _initial_model(one, settings, of_pair).save(start)
    models, metrics = run_phases(studies, keys, settings, starts, home, events)
    for i, (one, out, model) in enumerate(zip(studies, outs, models, strict=True)):
        state = {"trained_by": training_key(one, settings, studies), "best": metrics}
        replace_folder(out, partial(_copy, model, state | ({"pair": i} if len(studies) > 1 else {})))
    say(
        f"train: best checkpoint at step {metrics['step']}, error of generated validation updates "
        f"{metrics['validation_generated']:.3f} of the mean update's"
    )


def _say_what_is_missing(training: TrainingSettings) -> None:
    """Ray Train waits without a word; nodes may yet come."""
    workers, found = training.min_workers or training.workers, nodes()
    if (there := total(found, "CPU")) < (cpus := workers * training.num_cpus + 1):
        say(
            f"train: waits until this Ray cluster has {cpus:g} CPUs, it has {there:g}: {training.num_cpus:g} for each "
            f"of {workers} trainers, one to read tuples"
        )
    if (there := total(found, "GPU")) < (gpus := workers * training.num_gpus):
        say(
            f"train: waits until this Ray cluster has {gpus:g} GPUs, it has {there:g}: {training.num_gpus:g} for each "
            f"of {workers} trainers; training.num_gpus=0 trains on CPUs"
        )


def _copy(model: Path, state: dict[str, Any], folder: Path) -> None:
    shutil.copytree(model, folder)
    write_atomically(folder / STATE, json.dumps(state).encode())


def _units(study: Study) -> list[str]:
    """Keys of all units that a training of its pair reads."""
    rows = [row for validation in (False, True) for row in shadow_keys(study, validation)]
    return [row[side] for row in rows for side in ("S", "T")] + [row["S"] for row in input_keys(study)]


def _check(study: Study, settings: GradTransformerSettings, studies: Sequence[Study]) -> None:
    """Refuse what cannot be trained, or refined later, before anything is."""
    training = settings.training
    sizes = {"batch_size": (training.batch_size, training.accumulation)}
    if training.behaviour.steps:
        sizes["behaviour.adapters"] = (training.behaviour.adapters, 1)
    for key, (size, passes) in sizes.items():
        for workers in range(training.min_workers or training.workers, training.workers + 1):
            if size % (workers * passes):
                in_passes = f" and {passes} passes" if passes > 1 else ""
                raise UserError(f"training.{key}={size} does not divide among {workers} workers{in_passes}")
    if len(studies) > 1 and training.strategy != "ddp":
        raise UserError(
            f"training.strategy={training.strategy} trains one pair; several pairs (further_pairs) need strategy=ddp, "
            "for what is not a step's own has to rest"
        )
    if training.strategy != "ddp":
        require("deepspeed", "scale")
    if training.tracking != "tensorboard":
        require(training.tracking, "track")
    teacher = training.behaviour.teacher if training.behaviour.steps else 0
    taught = [("training.behaviour.teacher", teacher, one.config.pair) for one in studies]
    for key, value, pair in [*taught, ("refinement.steps", settings.refinement.steps, study.config.pair)]:
        if value:
            require_shared_vocabulary(pair, f"{key}={value}")


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


def _initial_model(
    study: Study, settings: GradTransformerSettings, keys: dict[bool, list[dict[str, Any]]]
) -> GradTransformer:
    """The network before training: standardised on the training tuples, its linear path fitted to the shadows."""
    torch.manual_seed(settings.training.seed + study.config.seed)
    layout_S, layout_T = study.roots["tinylm"].layout, study.roots["llm"].layout
    roots: dict[str, str] = {side: root.hash for side, root in study.roots.items()}
    rank = min(settings.linear_rank, len(keys[False]) - 1)
    phi = None
    if settings.phi and settings.phi.pretrained:
        with torch.device("meta"):  # the trainers read its weights, each what it needs
            phi = phi_of(phi_config(settings.phi))
    elif settings.phi:
        phi = make_phi(settings.phi)
    input_rows = input_keys(study)
    inputs = load_inputs([row["S"] for row in input_rows], study.store)
    validation_S = load_inputs([row["S"] for row in keys[True]], study.store)
    shadows = len(inputs), len(validation_S)
    input_rank = min(settings.input_rank, len(inputs))
    model = GradTransformer(
        layout_S, layout_T, phi, roots, settings.input_clip, rank, shadows, settings.chunk, input_rank
    )
    model.standard_S.fit(side_chunks(study.store, keys[False], "S"), layout_S, settings.scale_floor)
    if input_rank:
        shadows_of = [study.shadows[row["shadow"]] for row in input_rows]
        model.standard_S.fit_directions(inputs, [(shadow.task, *shadow.kind) for shadow in shadows_of])
    model.standard_T.fit(side_chunks(study.store, keys[False], "T"), layout_T, settings.scale_floor)
    if model.linear is not None:
        model.fit_linear(*(last_updates(study.store, keys[held_out]) for held_out in (False, True)))
    model.fit_certainty(inputs, validation_S)
    return model
