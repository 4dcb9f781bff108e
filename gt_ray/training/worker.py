"""What each Ray Train worker runs: optimizer steps, validation, checkpoints.

Steps come in two phases: Eq. 10 under teacher forcing, then the behaviour loss of freely generated updates, if any.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gt_ray.config import BehaviourSettings, TrainingSettings
from gt_ray.grad_transformer.network import WEIGHTS, GradTransformer, block_loss
from gt_ray.training.behaviour import Draw, LlmActors
from gt_ray.training.inputs import Inputs
from gt_ray.training.tuples import mixing_weights

STATE, HISTORY = "training.json", "history.json"
LEAST_GAIN = 1e-3
"""Of a fine-tune, in loss a token, below which errors are not compared with it: of 4 digits one at best would count."""
VALIDATION_ROWS = 16
"""Rows of a validation shadow that the behaviour of its generated update is measured on."""


@dataclass
class Tuples:
    """A batch: updates S [N, L_S, d_S] and T [N, L_T, d_T], and task and shadow [N] of each."""

    S_NLd: Tensor
    T_NLd: Tensor
    task_N: Tensor
    shadow_N: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> Tuples:
        """From the columns that `load_tuples` makes."""
        return cls(batch["S"].float(), batch["T"].float(), batch["task"].cpu(), batch["shadow"].cpu())

    def mixed(self, weights_MN: Tensor) -> tuple[Tensor, Tensor]:
        """Mixtures of these tuples."""
        weights_MN = weights_MN.to(self.S_NLd.device)
        return torch.einsum("mn,nld->mld", weights_MN, self.S_NLd), torch.einsum("mn,nld->mld", weights_MN, self.T_NLd)


def train_worker(config: dict[str, Any]) -> None:
    """Train from the model in `config["start"]`, or from Ray Train's last checkpoint; report checkpoints."""
    import ray.train
    import ray.train.torch
    from torch.utils.tensorboard import SummaryWriter

    settings = TrainingSettings.model_validate(config["training"])
    llm: LlmActors | None = config["llm"]
    context = ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    model = GradTransformer.load(Path(config["start"])).train()
    trained = ray.train.torch.prepare_model(model)  # moves the model, so before the optimizer takes its parameters
    steps, first_behaviour = config["steps"], config["steps"] - settings.behaviour.steps
    optimizer, schedule = optimizer_of(model, steps, settings)
    averaged = averaged_of(model, settings.behaviour)
    done = 0
    history: list[dict[str, float]] = []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            done, history = restore(Path(folder), model, averaged, optimizer, schedule)
    device = ray.train.torch.get_device()
    validation = _validation_tuples(device)
    writer = SummaryWriter(config["events"]) if rank == 0 else None
    inputs = Inputs.of(list(_batches("inputs", 64, device)), config["domains"]) if llm else None
    # Ray Data may have more batches than there are steps, by rounding; behaviour needs none.
    tuples = _batches("train", settings.batch_size // world, device, drop_last=True)
    # The data of steps that a checkpoint already holds are passed over, those of a whole phase are not even read.
    first_phase = itertools.islice(tuples, done, first_behaviour) if done < first_behaviour else ()
    batches = itertools.chain(first_phase, itertools.repeat({}))
    linear = list(model.linear.parameters()) if model.linear is not None else []
    losses: list[float] = []
    started = time.perf_counter()
    for step, batch in zip(range(done, steps), batches, strict=False):
        step_seed = config["seed"] * 1_000_003 + step * world + rank
        torch.manual_seed(step_seed)  # dropout
        optimizer.zero_grad()
        if step < first_behaviour:
            mixed = Tuples.of(batch)
            generator = torch.Generator().manual_seed(step_seed)
            update_S, update_T = mixed.mixed(mixing_weights(mixed.task_N, settings.pool_max, generator))
            loss = block_loss(trained(update_S, update_T), model.standard_T(update_T))
            loss.backward()
            losses.append(loss.item())
            for parameter in linear:
                parameter.grad = None  # rests, also in the clipping and in the optimizer's moments
        else:
            assert llm is not None and inputs is not None
            size = settings.behaviour.adapters // world
            drawn = inputs.draw(size, settings.behaviour.rows, settings.behaviour.mix, random.Random(step_seed))
            losses.append(behave(trained, model, *drawn, llm))
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        if step >= first_behaviour:
            averaged.update_parameters(model)
        if rank == 0 and step % 10 == 0:
            Path(config["progress"]).write_text(str(step + 1))
        ends_phase = step + 1 in (first_behaviour, steps)
        if ends_phase or (step + 1) % config["checkpoint_steps"] == 0:
            metrics = {
                "step": step + 1,
                "behaviour" if step >= first_behaviour else "loss": math.fsum(losses) / len(losses),
                **validate(finished(model, averaged), validation, llm),
                "wall_s": time.perf_counter() - started,
            }
            losses.clear()
            history.append(metrics)
            if writer:
                for name, value in metrics.items():
                    writer.add_scalar(f"train/{name}", value, step + 1)
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    save(Path(folder), model, averaged, optimizer, schedule, history)
                    ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
                else:
                    ray.train.report(metrics)
    if writer:
        writer.close()


def _batches(name: str, size: int, device: torch.device, drop_last: bool = False) -> Iterator[dict[str, Tensor]]:
    import ray.train

    shard = ray.train.get_dataset_shard(name)
    yield from shard.iter_torch_batches(batch_size=size, device=device, drop_last=drop_last, prefetch_batches=2)


def optimizer_of(model: GradTransformer, steps: int, settings: TrainingSettings) -> tuple[Any, Any]:
    """Optimizer and learning rates; the linear path rests in the first phase, where the network learns the residual."""
    of_linear = [parameter for name, parameter in model.named_parameters() if name.startswith("linear.")]
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("linear.")]
    groups = [(others, False)] * bool(others) + [(of_linear, True)] * bool(of_linear)
    optimizer = torch.optim.AdamW(
        [{"params": parameters} for parameters, _ in groups], lr=1.0, weight_decay=settings.weight_decay
    )
    rates: list[Callable[[int], float]] = [
        partial(learning_rate, steps=steps, settings=settings, linear=linear) for _, linear in groups
    ]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


def averaged_of(model: GradTransformer, settings: BehaviourSettings) -> AveragedModel:
    """The exponential moving average of the weights over the behaviour phase, which is what is validated and kept."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.average))


def finished(model: GradTransformer, averaged: AveragedModel) -> GradTransformer:
    """The averaged model as soon as there is one, else the model itself."""
    return cast(GradTransformer, averaged.module) if averaged.n_averaged else model


def learning_rate(step: int, steps: int, settings: TrainingSettings, linear: bool = False) -> float:
    """Each phase warms up linearly and decays linearly to zero.

    Args:
        linear: whether it is that of the linear path, which rests in the first phase.
    """
    behaviour = settings.behaviour
    first_behaviour = steps - behaviour.steps
    if step < first_behaviour:
        peak, steps = 0.0 if linear else settings.learning_rate, first_behaviour
    else:
        peak = behaviour.linear_learning_rate if linear else behaviour.learning_rate
        step, steps = step - first_behaviour, behaviour.steps
    warmup = max(1, round(settings.warmup_share * steps))
    return peak * min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def behave(trained: Any, model: GradTransformer, update_S_GLd: Tensor, draws: Sequence[Draw], llm: LlmActors) -> float:
    """Gradients of the mean behaviour loss of G generated updates; returns the loss.

    Generation runs freely, for teacher forcing would leak the true update (decision 9).

    Args:
        trained: the model, perhaps wrapped for data-parallel training.
    """
    update_GLd = model.standard_T.inverse(trained(update_S_GLd))
    loss_G, gradient_GLd = llm(update_GLd, draws, update_S_GLd)
    assert gradient_GLd is not None
    ((update_GLd * gradient_GLd).sum() / len(draws)).backward()
    return float(loss_G.mean())


def _validation_tuples(device: torch.device) -> Tuples:
    batches = list(_batches("validation", 64, device))
    return Tuples.of({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})


@torch.no_grad()
def validate(model: GradTransformer, tuples: Tuples, llm: LlmActors | None) -> dict[str, float]:
    """On validation shadows: Eq. 10, the error of free-running generation relative to the mean update's, and with the
    LLM the behaviour of generated updates, of the shadows and of halves of two shadows of one task."""
    model.eval()
    target = model.standard_T(tuples.T_NLd)
    error_N = (model(tuples.S_NLd) - target).square().flatten(1).sum(1)
    of_mean_N = target.square().flatten(1).sum(1)
    if model.certainty is not None:
        model.certainty.set_errors(error_N / of_mean_N, of_behaviour=False)
    found = {
        "validation_loss": float(block_loss(model(tuples.S_NLd, tuples.T_NLd), target)),
        "validation_generated": float(error_N.sum() / of_mean_N.sum()),
    }
    if llm is not None:
        weights_MN = torch.cat([torch.eye(len(target)), halves(tuples.task_N)])
        update_MLd = model.standard_T.inverse(model(tuples.mixed(weights_MN)[0]))
        draws: list[Draw] = []
        for weights_N in weights_MN:
            members = [int(n) for n in weights_N.nonzero()[:, 0]]
            shadows = [int(tuples.shadow_N[members[i % len(members)]]) for i in range(VALIDATION_ROWS)]
            # Not the first rows: those of a mixture lie domain after domain.
            draws.append([(k, random.Random(f"{k}/{i}").randrange(2**31)) for i, k in enumerate(shadows)])
        loss_M, _ = llm(update_MLd, draws)
        found["validation_behaviour"] = float(loss_M.mean())
        if model.certainty is not None:
            N = len(target)
            known = torch.cat([torch.zeros_like(tuples.T_NLd), tuples.T_NLd])
            base_N, tuned_N = llm(known, [*draws[:N], *draws[:N]])[0].chunk(2)
            gain_N = base_N - tuned_N
            error_N = torch.where(gain_N > LEAST_GAIN, (loss_M[:N] - tuned_N) / gain_N, torch.nan)
            model.certainty.set_errors(error_N, of_behaviour=True)
    model.train()
    return found


def halves(task_N: Tensor) -> Tensor:
    """Weights [N, N]: half of each tuple and half of the next one of its task."""
    N = len(task_N)
    weights_NN = 0.5 * torch.eye(N)
    for n in range(N):
        partner = next((m % N for m in range(n + 1, n + N) if task_N[m % N] == task_N[n]), n)
        weights_NN[n, partner] += 0.5
    return weights_NN


def save(
    folder: Path,
    model: GradTransformer,
    averaged: AveragedModel,
    optimizer: Any,
    schedule: Any,
    history: list[dict[str, float]],
) -> None:
    """A checkpoint from which `restore` goes on; its `model` is the averaged one."""
    # Optimizer state and weights as safetensors: no pickle anywhere.
    from safetensors.torch import save_file

    finished(model, averaged).save(folder / "model")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    state = optimizer.state_dict()["state"]
    save_file(
        {f"{i}.{name}": value.contiguous() for i, entry in state.items() for name, value in entry.items()},
        folder / "optimizer.safetensors",
    )
    (folder / HISTORY).write_text(json.dumps(history), encoding="utf-8")
    progress = {"step": schedule.last_epoch, "averaged": int(averaged.n_averaged)}
    (folder / STATE).write_text(json.dumps(progress), encoding="utf-8")


def restore(
    folder: Path, model: GradTransformer, averaged: AveragedModel, optimizer: Any, schedule: Any
) -> tuple[int, list[dict[str, float]]]:
    """Set everything as it was when `save` wrote it; returns steps done and the history."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / WEIGHTS))
    averaged.module.load_state_dict(load_file(folder / "model" / WEIGHTS))
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        number, _, part = name.partition(".")
        entries.setdefault(int(number), {})[part] = value
    progress = json.loads((folder / STATE).read_text(encoding="utf-8"))
    step = int(progress["step"])
    averaged.n_averaged.fill_(int(progress["averaged"]))
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.last_epoch = step
    for group, rate, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(step)
    return step, json.loads((folder / HISTORY).read_text(encoding="utf-8"))
