"""What each Ray Train worker runs: optimizer steps, validation, checkpoints.

Steps come in two phases: Eq. 10 under teacher forcing, then the behaviour loss of freely generated updates, if any.
With P pairs, step s is that of pair s % P, so each has as many as it would have alone; what is not its own rests.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gt_ray.config import BehaviourSettings, TrainingSettings
from gt_ray.grad_transformer.network import GradTransformer, block_loss
from gt_ray.grad_transformer.several import SeveralPairs
from gt_ray.training.behaviour import Draw, LlmActors
from gt_ray.training.checkpoint import finished, restore, save
from gt_ray.training.inputs import Inputs
from gt_ray.training.tuples import Tuples, mixing_weights
from gt_ray.training.validation import Validation, together


def train_worker(config: dict[str, Any]) -> None:
    """Train from the models in `config["starts"]`, or from Ray Train's last checkpoint; report checkpoints."""
    import ray.train
    import ray.train.torch
    from torch.utils.tensorboard import SummaryWriter

    settings = TrainingSettings.model_validate(config["training"])
    llms: list[LlmActors] = config["llms"]
    context = ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    model = SeveralPairs([GradTransformer.load(Path(start)) for start in config["starts"]]).train()
    P = len(model.pairs)
    # Moves the model, so before the optimizer takes its parameters. Buffers are the same on all workers, and large.
    wrapping = {"broadcast_buffers": False, "find_unused_parameters": model.some_rest}
    trained = ray.train.torch.prepare_model(model, parallel_strategy_kwargs=wrapping)
    steps, first_behaviour = config["steps"], config["steps"] - P * settings.behaviour.steps
    optimizer, schedule = optimizer_of(model, steps, settings)
    averaged = averaged_of(model, settings.behaviour)
    done = 0
    history: list[dict[str, float]] = []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            done, history = restore(Path(folder), model, averaged, optimizer, schedule)
    device = ray.train.torch.get_device()
    validations = [
        Validation(_validation_tuples(i, device), llm) for i, llm in enumerate(llms or itertools.repeat(None, P))
    ]
    writer = SummaryWriter(config["events"]) if rank == 0 else None
    inputs = [Inputs.of(list(_batches(f"inputs-{i}", 64, device)), config["domains"]) for i in range(len(llms))]
    # Ray Data may have more batches than there are steps, by rounding; behaviour needs none.
    of_pairs = (_batches(f"train-{i}", settings.batch_size // world, device, drop_last=True) for i in range(P))
    turns = itertools.chain.from_iterable(zip(*of_pairs, strict=False))
    # The data of steps that a checkpoint already holds are passed over, those of a whole phase are not even read.
    first_phase = itertools.islice(turns, done, first_behaviour) if done < first_behaviour else ()
    batches = itertools.chain(first_phase, itertools.repeat({}))
    losses: list[float] = []
    started = time.perf_counter()
    for step, batch in zip(range(done, steps), batches, strict=False):
        i = step % P
        pair, own = model.pairs[i], partial(trained, i)
        step_seed = config["seed"] * 1_000_003 + step * world + rank
        torch.manual_seed(step_seed)  # dropout
        optimizer.zero_grad()
        if step < first_behaviour:
            mixed = Tuples.of(batch)
            generator = torch.Generator().manual_seed(step_seed)
            update_S, update_T = mixed.mixed(mixing_weights(mixed.task_N, settings.pool_max, generator))
            loss = block_loss(own(update_S, update_T), pair.standard_T(update_T))
            loss.backward()
            losses.append(loss.item())
            for parameter in pair.linear.parameters() if pair.linear is not None else ():
                parameter.grad = None  # rests, also in the clipping and in the optimizer's moments
        else:
            size = settings.behaviour.adapters // world
            drawn = inputs[i].draw(size, settings.behaviour.rows, settings.behaviour.mix, random.Random(step_seed))
            losses.append(behave(own, pair, *drawn, llms[i]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        if step >= first_behaviour and i == P - 1:
            averaged.update_parameters(model)
        if rank == 0 and step % 10 == 0:
            Path(config["progress"]).write_text(str(step + 1))
        ends_phase = step + 1 in (first_behaviour, steps)
        if ends_phase or (step + 1) % config["checkpoint_steps"] == 0:
            kept = finished(model, averaged)
            metrics = {
                "step": step + 1,
                "behaviour" if step >= first_behaviour else "loss": math.fsum(losses) / len(losses),
                **together([validate(one) for validate, one in zip(validations, kept.pairs, strict=True)]),
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


def optimizer_of(model: SeveralPairs, steps: int, settings: TrainingSettings) -> tuple[Any, Any]:
    """Optimizer and learning rates; the linear paths rest in the first phase, where the network learns the residual.

    Args:
        steps: of all pairs together; the rates follow each pair's own.
    """
    P = len(model.pairs)
    of_linear = [parameter for pair in model.pairs if pair.linear is not None for parameter in pair.linear.parameters()]
    known = {id(parameter) for parameter in of_linear}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [(others, False)] * bool(others) + [(of_linear, True)] * bool(of_linear)
    optimizer = torch.optim.AdamW(
        [{"params": parameters} for parameters, _ in groups], lr=1.0, weight_decay=settings.weight_decay
    )

    def rate(step: int, linear: bool) -> float:
        return learning_rate(step // P, steps // P, settings, linear)

    rates: list[Callable[[int], float]] = [partial(rate, linear=linear) for _, linear in groups]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


def averaged_of(model: SeveralPairs, settings: BehaviourSettings) -> AveragedModel:
    """The exponential moving average of the weights over the behaviour phase, which is what is validated and kept."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.average))


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


def behave(own: Any, model: GradTransformer, update_S_GLd: Tensor, draws: Sequence[Draw], llm: LlmActors) -> float:
    """Gradients of the mean behaviour loss of G generated updates; returns the loss.

    Generation runs freely, for teacher forcing would leak the true update (decision 9).

    Args:
        own: the model's forward pass, perhaps wrapped for data-parallel training.
    """
    update_GLd = model.standard_T.inverse(own(update_S_GLd))
    loss_G, gradient_GLd = llm(update_GLd, draws, update_S_GLd)
    assert gradient_GLd is not None
    ((update_GLd * gradient_GLd).sum() / len(draws)).backward()
    return float(loss_G.mean())


def _validation_tuples(pair: int, device: torch.device) -> Tuples:
    batches = list(_batches(f"validation-{pair}", 64, device))
    return Tuples.of({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
