"""The phases of a training, each a run of Ray Train that begins with the models that the one before left.

home/
  start-<key>/               each pair's model before training
  train-<key>-<phase>/       Ray Train's run: its checkpoints, from which a killed one goes on
  <key>-<phase>-<pair>/      each pair's model after a phase, its history, its measures
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gt_ray.config import GradTransformerSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.events import here
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.progress import bar, say
from gt_ray.training.behaviour import LlmActors
from gt_ray.training.checkpoint import HISTORY, STATE, is_finished, whole_models
from gt_ray.training.joint import joint_key
from gt_ray.training.tuples import streams
from gt_ray.training.worker import Phase, Task, train_worker
from gt_ray.updates.files import replace_folder, write_atomically

Keys = Sequence[dict[bool, list[dict[str, Any]]]]
"""Of each pair the units of the training (False) and validation shadows."""


def steps_of(settings: GradTransformerSettings, n_tuples: int) -> dict[Phase, int]:
    """Optimizer steps of one pair in each phase.

    Raises:
        UserError: there are fewer tuples than a batch takes.
    """
    training = settings.training
    found: dict[Phase, int] = {}
    if settings.phi is not None and training.epochs:  # the linear path starts as the solution of Eq. 10
        # Each worker gets an equal share of the tuples and drops what does not fill its last batch.
        each = training.batch_size // training.workers
        found["tuples"] = (training.epochs * n_tuples // training.workers) // each
        if not found["tuples"]:
            raise UserError(
                f"{n_tuples} tuples are fewer than one batch of {training.batch_size}; lower training.batch_size"
            )
    if training.behaviour.steps:
        found["behaviour"] = training.behaviour.steps
    return found


def run_phases(
    studies: Sequence[Study],
    keys: Keys,
    settings: GradTransformerSettings,
    starts: Sequence[Path],
    home: Path,
    events: Path,
) -> tuple[list[Path], dict[str, float]]:
    """Train from the models in `starts`; returns each pair's finished model, and the measures of the best checkpoint.

    The last phase ends with its best checkpoint by validation, one before it with its last.
    """
    training, P, study = settings.training, len(studies), studies[0]
    n_tuples = len(keys[0][False]) * len(study.config.curation.snapshot_steps)
    steps = steps_of(settings, n_tuples)
    total = P * sum(steps.values())
    behaviour = f", {P * steps['behaviour']} of them on behaviour" if "behaviour" in steps else ""
    what = "the Grad-Transformer" if settings.phi else "the linear path alone"
    of_pairs = f" of {P} pairs, each" if P > 1 else ","
    epochs = training.epochs if "tuples" in steps else 0
    say(f"train: {what}{of_pairs} {n_tuples} tuples, {epochs} epochs, {total} optimizer steps{behaviour}")
    task = Task(
        phase="tuples",
        starts=[],
        settings=training,
        phi=settings.phi if settings.phi and settings.phi.pretrained else None,
        seed=training.seed + study.config.seed,
        first=0,
        steps=0,
        checkpoint_steps=P * max(1, training.checkpoint_epochs * n_tuples // training.batch_size),
        kinds=[shadow.kind for shadow in study.shadows],
        llms=[],
        progress=str((home / "step").resolve()),
        tracker=(
            training.tracking,
            events.resolve(),
            f"{study.config.run_folder.name} {events.name} {joint_key(studies, settings)[:12]}",
            training.model_dump(mode="json"),
        ),
    )
    models = list(starts)
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    with _followed(home / "step", total):
        for phase, of_pair in steps.items():
            task = replace(
                task, phase=phase, steps=P * of_pair, starts=[str(one.resolve()) for one in models], history=history
            )
            name = f"{joint_key(studies, settings)[:12]}-{phase}"
            finished = [home / f"{name}-{i}" for i in range(P)]
            if not all(is_finished(one) for one in finished):
                _run(studies, keys, task, home, name, finished, best=phase == list(steps)[-1])
            metrics, history = (json.loads((finished[0] / file).read_text("utf-8")) for file in (STATE, HISTORY))
            models, task = finished, replace(task, first=task.first + task.steps, phi=None)
    return models, metrics


def _run(
    studies: Sequence[Study], keys: Keys, task: Task, home: Path, name: str, outs: Sequence[Path], best: bool
) -> None:
    """One phase; its best or its last checkpoint's models go to `outs`."""
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from gt_ray.training.failures import WorkerFailures

    training, P = task.settings, len(studies)
    data: dict[str, Any] = {}
    for i, (one, of_pair) in enumerate(zip(studies, keys, strict=True)):
        made = streams(one, of_pair, task.seed, task.phase)
        data |= {f"{stream}-{i}": rows for stream, rows in made.items()}
    llms = LlmActors.start(studies, training.behaviour.workers) if task.phase == "behaviour" else []
    best_by = "validation_behaviour" if llms else "validation_generated"
    fewest = training.min_workers or training.workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": replace(task, llms=llms)},
        datasets=data,
        # Every worker has all of the other, smaller ones.
        dataset_config=DataConfig(datasets_to_split=[f"train-{i}" for i in range(P)]),
        scaling_config=ScalingConfig(
            num_workers=training.workers if fewest == training.workers else (fewest, training.workers),
            use_gpu=training.num_gpus > 0,
            resources_per_worker={
                "CPU": training.num_cpus,
                **({"GPU": training.num_gpus} if training.num_gpus else {}),
            },
        ),
        run_config=RunConfig(
            name=f"train-{name}",
            storage_path=str(home.resolve()),
            callbacks=[WorkerFailures(*place)] if (place := here()) else None,
            failure_config=FailureConfig(max_failures=-1 if training.min_workers else 3),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2,
                checkpoint_score_attribute=best_by if best else "step",
                checkpoint_score_order="min" if best else "max",
            ),
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own, which later stages would be deaf by
        for llm in set(llms):
            llm.close()
    score = (lambda pair: pair[1][best_by]) if best else (lambda pair: -pair[1]["step"])
    checkpoint, metrics = min(result.best_checkpoints, key=score)
    with checkpoint.as_directory() as folder:
        models = whole_models(Path(folder), [Path(start) for start in task.starts])
        for model, out in zip(models, outs, strict=True):
            replace_folder(out, partial(_finish, model, Path(folder), metrics))
    shutil.rmtree(home / f"train-{name}", ignore_errors=True)  # checkpoints of a large training are terabytes


def _finish(model: GradTransformer, checkpoint: Path, metrics: Mapping[str, Any], out: Path) -> None:
    model.save(out)
    write_atomically(out / HISTORY, (checkpoint / HISTORY).read_bytes())
    write_atomically(out / STATE, json.dumps(dict(metrics)).encode())


@contextmanager
def _followed(progress_file: Path, total: int) -> Iterator[None]:
    """A progress bar of what the workers write to `progress_file`."""
    ended = threading.Event()

    def follow() -> None:
        shown: int | None = None
        last = False
        while not last:
            last = ended.wait(0.5)
            try:
                step = int(progress_file.read_text())
            except (OSError, ValueError):  # not there yet, or being written
                continue
            if shown is None:
                progress.skip(step)  # an earlier run did these
            elif step != shown:
                progress.advance(step - shown)  # less than none where a worker died, for the last checkpoint goes on
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
