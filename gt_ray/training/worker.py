"""What each Ray Train worker runs: the optimizer steps of one phase, validation, checkpoints.

There are two phases: Eq. 10 under teacher forcing ("tuples"), then the behaviour loss of freely generated updates
("behaviour"). Each has an optimizer of its own and begins with the models that the one before left. With P pairs, step
s is that of pair s % P, so each has as many as it would have alone; what is not its own rests.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gt_ray.config import PhiSettings, TrainingSettings
from gt_ray.grad_transformer.network import GradTransformer, block_loss, read_config
from gt_ray.grad_transformer.phi import phi_files, pretrained_name
from gt_ray.grad_transformer.several import SeveralPairs
from gt_ray.training.behaviour import Draw, LlmActors
from gt_ray.training.checkpoint import load_buffers, load_weights, restore, save, shaped, start_files
from gt_ray.training.inputs import Inputs, Kind
from gt_ray.training.meter import Meter
from gt_ray.training.shards import ShardFiles, average, swap_averages
from gt_ray.training.strategies import Groups, Strategy, construction, start_strategy
from gt_ray.training.tracking import tracked
from gt_ray.training.tuples import Tuples, mixing_weights
from gt_ray.training.validation import Validation, together

Phase = Literal["tuples", "behaviour"]


@dataclass(frozen=True)
class Task:
    """A phase of a training.

    Attributes:
        starts: folders of the models that it begins with, one of each pair.
        phi: the pretrained phi whose weights they have not.
        first, history: optimizer steps of all pairs before this phase, and what was measured in them.
        steps: of this phase, of all pairs.
        checkpoint_steps: between two checkpoints.
        progress: file that the number of steps is written to.
        tracker: where the measures go: arguments of `tracked`.
    """

    phase: Phase
    starts: list[str]
    settings: TrainingSettings
    phi: PhiSettings | None
    seed: int
    first: int
    steps: int
    checkpoint_steps: int
    kinds: list[Kind]
    llms: list[LlmActors]
    progress: str
    tracker: tuple[str, Path, str, dict[str, Any]]
    history: list[dict[str, float]] = field(default_factory=list)


def train_worker(config: dict[str, Any]) -> None:
    """Go through a phase (`config["task"]`) from its start, or from Ray Train's last checkpoint."""
    import ray.train
    import ray.train.torch

    task: Task = config["task"]
    settings, P = task.settings, len(task.starts)
    context = ray.train.get_context()
    world, rank, device = context.get_world_size(), context.get_world_rank(), ray.train.torch.get_device()
    strategy = begin(task, rank, device)
    pairs = strategy.model.pairs
    done, history = 0, list(task.history)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            progress, history = restore(Path(folder), strategy)
            done = progress["step"]
    of_pairs = task.llms or itertools.repeat(None, P)
    asks, behaviour = rank == 0, settings.behaviour
    validations = [Validation(_validation_tuples(i, device), llm, asks, behaviour) for i, llm in enumerate(of_pairs)]
    inputs = [Inputs.of(list(_batches(f"inputs-{i}", 64, device)), task.kinds) for i in range(len(task.llms))]
    # Ray Data may have more batches than there are steps, by rounding; behaviour needs none.
    batches: Iterator[dict[str, Tensor]] = itertools.repeat({})
    if task.phase == "tuples":
        shares = [_batches(f"train-{i}", settings.batch_size // world, device, drop_last=True) for i in range(P)]
        # The data of steps that a checkpoint already holds are passed over.
        batches = itertools.islice(itertools.chain.from_iterable(zip(*shares, strict=False)), done, None)
    if rank == 0:
        Path(task.progress).write_text(str(task.first + done))
    losses: list[float] = []
    started = time.perf_counter()
    meter = Meter(device, settings.precision, world)
    with tracked(*task.tracker) if rank == 0 else nullcontext() as log:
        for step, batch in zip(range(done, task.steps), meter.waiting(batches), strict=False):
            i = step % P
            step_seed = task.seed * 1_000_003 + (task.first + step) * world + rank
            torch.manual_seed(step_seed)  # dropout
            if task.phase == "tuples":
                mine = settings.batch_size // world
                generator = torch.Generator().manual_seed(step_seed)
                passes = tuple_passes(strategy, i, Tuples.of(batch), settings, generator)
            else:
                behaviour, rng = settings.behaviour, random.Random(step_seed)
                mine = behaviour.adapters // world
                drawn = inputs[i].draw(mine, behaviour, rng)
                passes = [partial(behaviour_loss, partial(strategy, i), pairs[i], *drawn, task.llms[i])]
            losses.append(strategy.optimize(passes, rates(task, step)))
            meter.count(pairs[i], mine)
            if task.phase == "behaviour" and i == P - 1:
                average(strategy.shards, settings.behaviour.average, first=step < P)
            if rank == 0 and (step % 10 == 0 or step + 1 == task.steps):
                Path(task.progress).write_text(str(task.first + step + 1))
            if step + 1 == task.steps or (step + 1) % task.checkpoint_steps == 0:
                speed = meter.read()
                with averaged(strategy):
                    found = [validate(pairs[j], partial(strategy, j)) for j, validate in enumerate(validations)]
                metrics = {
                    "step": task.first + step + 1,
                    "loss" if task.phase == "tuples" else "behaviour": math.fsum(losses) / len(losses),
                    **together(found),
                    **speed,
                    "wall_s": time.perf_counter() - started,
                }
                losses.clear()
                history.append(metrics)
                if log:
                    log(metrics, task.first + step + 1)
                _report(strategy, rank, {"step": step + 1}, history)
                meter.resume()
                done = step + 1
    if done < task.steps:
        raise RuntimeError(f"the data ended before optimizer step {task.steps}, after {done} that were kept")


def begin(task: Task, rank: int, device: torch.device) -> Strategy:
    """The models of a phase's start, as its strategy trains them."""
    starts = [Path(start) for start in task.starts]
    settings = task.settings
    if task.phase == "behaviour":
        settings = settings.model_copy(update={"accumulation": 1})
    with construction(settings):
        model = shaped([read_config(start) for start in starts]).train()
    with ExitStack() as opened:
        sources = [opened.enter_context(files) for files in start_files(starts)]
        if task.phi is not None:
            sources.append(opened.enter_context(ShardFiles(phi_files(task.phi), pretrained_name)))
        load_weights(model, sources, rank)
    load_buffers(model, starts)
    if task.phase == "tuples":  # behaviour generates with a cache, which neither goes with
        adapt_layers(model, settings)
    groups = groups_of(model, task.phase)
    return start_strategy(model, groups, settings, device, average=task.phase == "behaviour")


def groups_of(model: SeveralPairs, phase: Phase) -> Groups:
    """What a phase trains, by learning rate: the network; and on behaviour the linear paths, which the network learns
    the residual of before."""
    of_linear = [parameter for pair in model.pairs if pair.linear is not None for parameter in pair.linear.parameters()]
    known = {id(parameter) for parameter in of_linear}
    network = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [network, of_linear if phase == "behaviour" else []]
    return [group for group in groups if group]


def rates(task: Task, step: int) -> list[float]:
    """Learning rates of the groups at a step of a phase."""
    settings, behaviour, P = task.settings, task.settings.behaviour, len(task.starts)
    if task.phase == "tuples":
        peaks = [settings.learning_rate]
    else:
        network, linear = _has(task.starts[0])
        peaks = [behaviour.learning_rate] * network + [behaviour.linear_learning_rate] * linear
    return [peak * schedule(step // P, task.steps // P, settings.warmup_share) for peak in peaks]


@cache
def _has(start: str) -> tuple[bool, bool]:
    """Whether a model has a network, and a linear path."""
    config = read_config(Path(start))
    return bool(config["phi"]), bool(config["linear_rank"])


def schedule(step: int, steps: int, warmup_share: float) -> float:
    """Share of the peak rate: each phase warms up linearly and decays linearly to zero."""
    warmup = max(1, round(warmup_share * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def tuple_passes(
    strategy: Strategy, i: int, tuples: Tuples, settings: TrainingSettings, generator: torch.Generator
) -> list[Callable[[], Tensor]]:
    """Eq. 10 under teacher forcing of a batch, in `settings.accumulation` parts."""
    mixed = tuples.mixed(mixing_weights(tuples.task_N, settings.pool_max, generator))
    standard_T = strategy.model.pairs[i].standard_T

    def one(update_S: Tensor, update_T: Tensor) -> Tensor:
        return block_loss(strategy(i, update_S, update_T), standard_T(update_T))

    parts = zip(*(whole.chunk(settings.accumulation) for whole in mixed), strict=True)
    return [partial(one, *part) for part in parts]


def behaviour_loss(
    own: Callable[..., Tensor], model: GradTransformer, update_S_GLd: Tensor, draws: Sequence[Draw], llm: LlmActors
) -> Tensor:
    """The mean behaviour loss of G generated updates.

    Generation runs freely, for teacher forcing would leak the true update (decision 9). The LLM's actors return loss
    and gradient, so what is returned has the value of the one and passes on the other.

    Args:
        own: the model's forward pass, perhaps wrapped for data-parallel training.
    """
    update_GLd = model.standard_T.inverse(own(update_S_GLd))
    loss_G, gradient_GLd = llm(update_GLd, draws, update_S_GLd)
    assert gradient_GLd is not None
    linear = (update_GLd * gradient_GLd).sum() / len(draws)
    return linear - linear.detach() + loss_G.mean()


@contextmanager
def averaged(strategy: Strategy) -> Iterator[None]:
    """The model with the moving averages in the place of its weights, where these are kept; not in training mode."""
    kept = any(shard.average is not None for shard in strategy.shards)

    def swap() -> None:
        if kept:
            swap_averages(strategy.shards)
            strategy.publish()

    swap()
    strategy.model.eval()
    try:
        # Compiled layers would be compiled anew for each length of the cache that generation has.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        strategy.model.train()
        swap()


def adapt_layers(model: SeveralPairs, settings: TrainingSettings) -> None:
    """Let layers of phi compute their activations again in the backward pass, or be compiled."""
    phi = model.pairs[0].phi
    if phi is None:
        return
    if settings.activation_checkpointing:
        phi.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        # CUDA graphs, too; beside other workers, or DeepSpeed, these have not been tried.
        mode = "reduce-overhead" if settings.strategy == "ddp" and settings.workers == 1 else None
        for layer in (*phi.encoder.block, *phi.decoder.block):
            layer.compile(mode=mode)


def _report(strategy: Strategy, rank: int, progress: dict[str, Any], history: list[dict[str, float]]) -> None:
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode

    if not rank or strategy.shared_out:
        folder = tempfile.mkdtemp()
        save(Path(folder), strategy, rank, progress, history)
        ray.train.report(
            history[-1],
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
    else:
        ray.train.report(history[-1])


def _batches(name: str, size: int, device: torch.device, drop_last: bool = False) -> Iterator[dict[str, Tensor]]:
    import ray.train

    shard = ray.train.get_dataset_shard(name)
    yield from shard.iter_torch_batches(batch_size=size, device=device, drop_last=drop_last, prefetch_batches=2)


def _validation_tuples(pair: int, device: torch.device) -> Tuples:
    batches = list(_batches(f"validation-{pair}", 64, device))
    return Tuples.of({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
