"""The Ray Train loop: teacher forcing on the training tuples, checkpoints, best by validation loss, resume."""

from __future__ import annotations

import json
import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gt_ray.cluster import connect
from gt_ray.config import TrainingSettings
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer, block_loss, make_phi
from gt_ray.progress import bar, say
from gt_ray.training.tuples import (
    UNITS_A_TASK,
    epoch_rows,
    load_tuples,
    pool_at_random,
    shadow_keys,
    side_chunks,
)
from gt_ray.updates.files import write_atomically
from gt_ray.updates.store import unit_key

STATE, HISTORY = "training.json", "history.json"


def train(study: Study) -> Path:
    """Train the Grad-Transformer of a study; returns the folder of its best checkpoint.

    A finished training is not repeated; an interrupted one goes on from its last checkpoint.

    Raises:
        UserError: curation has not run.
    """
    settings = study.config.grad_transformer
    out = study.config.run_folder / "grad_transformer"
    keys = {validation: shadow_keys(study, validation) for validation in (False, True)}
    if missing := study.store.missing([row[side] for rows in keys.values() for row in rows for side in ("S", "T")]):
        raise UserError(
            f"{len(missing)} units are missing from {study.config.store}, such as {missing[0]}; curate first"
        )
    trained_by = training_key(study)
    if _finished(out, trained_by):
        say(f"train: nothing to do, {out} is trained")
        return out
    ray = connect()
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    start = study.config.run_folder / "training" / f"start-{trained_by[:12]}"
    if not (start / "config.json").is_file():
        _initial_model(study, keys[False]).save(start)
    training = settings.training
    progress_file = (study.config.run_folder / "training" / "step").resolve()
    n_tuples = len(keys[False]) * study.config.curation.snapshots
    if training.batch_size % training.workers:
        raise UserError(f"training.batch_size={training.batch_size} does not divide among {training.workers} workers")
    # Each worker gets an equal share of the tuples and drops what does not fill its last batch.
    total = (training.epochs * n_tuples // training.workers) // (training.batch_size // training.workers)
    if total == 0:
        raise UserError(
            f"{n_tuples} tuples are fewer than one batch of {training.batch_size}; lower training.batch_size"
        )
    say(f"train: {n_tuples} tuples, {training.epochs} epochs, {total} optimizer steps")
    rows = epoch_rows(keys[False], range(training.epochs), training.seed + study.config.seed)
    load = partial(load_tuples, store=study.store, seed=training.seed + study.config.seed)
    streams = {
        "train": ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // (8 * UNITS_A_TASK))).map_batches(
            load, fn_kwargs={"last_only": False}, batch_size=UNITS_A_TASK, num_cpus=0.5
        ),
        "validation": ray.data.from_items(keys[True]).map_batches(load, fn_kwargs={"last_only": True}, num_cpus=0.5),
    }
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "start": str(start.resolve()),
            "training": training.model_dump(mode="json"),
            "seed": training.seed + study.config.seed,
            "steps": total,
            "checkpoint_steps": max(1, training.checkpoint_epochs * n_tuples // training.batch_size),
            "progress": str(progress_file),
            "events": str((study.config.run_folder / "events").resolve()),
        },
        datasets=streams,
        dataset_config=DataConfig(datasets_to_split=["train"]),  # every worker validates on all validation tuples
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
                num_to_keep=2, checkpoint_score_attribute="validation_generated", checkpoint_score_order="min"
            ),
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _followed(progress_file, total):
            result = trainer.fit()
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own, which later stages would be deaf by
    best, metrics = min(result.best_checkpoints, key=lambda pair: pair[1]["validation_generated"])
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


def training_key(study: Study) -> str:
    """Hash of all that a Grad-Transformer's training depends on."""
    units = [row for validation in (False, True) for row in shadow_keys(study, validation)]
    settings = study.config.grad_transformer.model_dump(mode="json")
    return unit_key({"settings": settings, "units": units, "seed": study.config.seed})


def load_trained(study: Study) -> GradTransformer:
    """The study's trained Grad-Transformer.

    Raises:
        UserError: there is none, or it was trained with other settings or on other shadows than the study has now.
    """
    out = study.config.run_folder / "grad_transformer"
    model = GradTransformer.load(out)
    try:
        trained_by = json.loads((out / STATE).read_text(encoding="utf-8")).get("trained_by")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{out / STATE} is absent or damaged ({error}); train again") from error
    if trained_by != training_key(study):
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


def _initial_model(study: Study, keys: list[dict[str, Any]]) -> GradTransformer:
    """The network before training, standardised on the training tuples."""
    settings = study.config.grad_transformer
    torch.manual_seed(settings.training.seed + study.config.seed)
    layout_S, layout_T = study.roots["tinylm"].layout, study.roots["llm"].layout
    roots: dict[str, str] = {side: root.hash for side, root in study.roots.items()}
    model = GradTransformer(layout_S, layout_T, make_phi(settings.phi), roots, settings.input_clip)
    model.standard_S.fit(side_chunks(study.store, keys, "S"), layout_S, settings.scale_floor)
    model.standard_T.fit(side_chunks(study.store, keys, "T"), layout_T, settings.scale_floor)
    return model


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import ray.train.torch
    from torch.utils.tensorboard import SummaryWriter

    settings = TrainingSettings.model_validate(config["training"])
    context = ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    model = GradTransformer.load(Path(config["start"])).train()
    trained = ray.train.torch.prepare_model(model)  # moves the model, so before the optimizer takes its parameters
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warmup = max(1, round(settings.warmup_share * config["steps"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, max(0.0, (config["steps"] - s) / max(1, config["steps"] - warmup))),
    )
    done = 0
    history: list[dict[str, float]] = []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            done, history = _restore(Path(folder), model, optimizer, schedule)
    device = ray.train.torch.get_device()
    validation = _validation_tuples(device)
    writer = SummaryWriter(config["events"]) if rank == 0 else None
    batches = ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=settings.batch_size // world, device=device, drop_last=True, prefetch_batches=2
    )
    losses: list[float] = []
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        if step >= config["steps"]:
            break
        if step < done:  # the data of steps that a checkpoint already holds
            continue
        step_seed = config["seed"] * 1_000_003 + step * world + rank
        torch.manual_seed(step_seed)  # dropout
        generator = torch.Generator().manual_seed(step_seed)
        update_S, update_T = pool_at_random(
            batch["S"].float(), batch["T"].float(), batch["task"].cpu(), settings.pool_max, generator
        )
        loss = block_loss(trained(update_S, update_T), model.standard_T(update_T))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if rank == 0 and step % 10 == 0:
            Path(config["progress"]).write_text(str(step + 1))
        last = step + 1 == config["steps"]
        if last or (step + 1) % config["checkpoint_steps"] == 0:
            metrics = {
                "step": step + 1,
                "loss": math.fsum(losses) / len(losses),
                **_validate(model, validation),
                "wall_s": time.perf_counter() - started,
            }
            losses.clear()
            history.append(metrics)
            if writer:
                for name, value in metrics.items():
                    writer.add_scalar(f"train/{name}", value, step + 1)
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    _save(Path(folder), model, optimizer, schedule, history)
                    ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
                else:
                    ray.train.report(metrics)
    if writer:
        writer.close()


def _validation_tuples(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    import ray.train

    batches = list(ray.train.get_dataset_shard("validation").iter_torch_batches(batch_size=64, device=device))
    return torch.cat([batch["S"] for batch in batches]), torch.cat([batch["T"] for batch in batches])


@torch.no_grad()
def _validate(model: GradTransformer, tuples: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Losses on validation shadows: Eq. 10, and of free-running generation relative to the mean update's."""
    model.eval()
    update_S, update_T = tuples
    target = model.standard_T(update_T)
    teacher_forced = block_loss(model(update_S, update_T), target)
    generated = block_loss(model.generate_standardised(update_S), target)
    of_mean = block_loss(torch.zeros_like(target), target)
    model.train()
    return {
        "validation_loss": float(teacher_forced),
        "validation_generated": float(generated / of_mean),
    }


def _save(folder: Path, model: GradTransformer, optimizer: Any, schedule: Any, history: list[dict[str, float]]) -> None:
    model.save(folder / "model")
    # Optimizer state as safetensors too: no pickle anywhere.
    from safetensors.torch import save_file

    state = optimizer.state_dict()["state"]
    save_file(
        {f"{i}.{name}": value.contiguous() for i, entry in state.items() for name, value in entry.items()},
        folder / "optimizer.safetensors",
    )
    (folder / HISTORY).write_text(json.dumps(history), encoding="utf-8")
    (folder / STATE).write_text(json.dumps({"step": schedule.last_epoch}), encoding="utf-8")


def _restore(folder: Path, model: GradTransformer, optimizer: Any, schedule: Any) -> tuple[int, list[dict[str, float]]]:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        number, _, part = name.partition(".")
        entries.setdefault(int(number), {})[part] = value
    step = int(json.loads((folder / STATE).read_text(encoding="utf-8"))["step"])
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.last_epoch = step
    for group, rate in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = rate * schedule.lr_lambdas[0](step)
    return step, json.loads((folder / HISTORY).read_text(encoding="utf-8"))
