"""What training a Grad-Transformer takes on given GPUs, and the cheapest way that fits; from configs alone.

Counts are exact (sizes.py), the step's own memory is that of a step on fake tensors (fake_step.py). Covered: training
by Eq. 10 of the study's own pair, with the moving average that training on behaviour keeps. Not covered: ends of
further pairs, the activations of free-running generation in training on behaviour, compiled layers, fragments of memory
(a tenth of a GPU stays free for them and for libraries).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import torch

from gt_ray.config import Config, ModelSettings, TrainingSettings
from gt_ray.curation.planner import RESERVE, needs
from gt_ray.errors import UserError
from gt_ray.training.fake_step import FakeStep, fake_step
from gt_ray.training.machines import Machines
from gt_ray.training.sizes import FLOAT32, STRATEGIES, Held, Strategy, build_shape, held, parts

STEP = "the step beside that"
"""Item of memory: activations and what else comes and goes, gradients not counted twice."""
MOST_PASSES = 4
"""Passes of a step, beyond which another strategy is tried first."""


@dataclass(frozen=True)
class Shape:
    """A Grad-Transformer without weights.

    Attributes:
        parts: parameters of each part.
        buffers: bytes.
        tokens: of phi, of S and of T.
        widths: d of S and of T.
        layers: of phi's encoder and decoder.
        casts: bytes of the bf16 copies of Linear weights that autocast keeps while a pass lasts.
    """

    parts: dict[str, int]
    buffers: int
    tokens: tuple[int, int]
    widths: tuple[int, int]
    layers: tuple[int, int]
    casts: int

    @property
    def P(self) -> int:
        """Parameters."""
        return sum(self.parts.values())


@lru_cache(4)
def shape_of_network(config: Config) -> Shape:
    """The study's Grad-Transformer, on the meta device."""
    with torch.device("meta"):
        model = build_shape(config)
    layouts, phi = (model.layout_S, model.layout_T), model.phi
    return Shape(
        parts(model),
        sum(buffer.nbytes for buffer in model.buffers()),
        (model.embed_S.tokens, model.embed_T.tokens) if phi is not None else (0, 0),
        (layouts[0].d, layouts[1].d),
        (phi.config.num_layers, phi.config.num_decoder_layers) if phi is not None else (0, 0),
        2 * sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)),
    )


@dataclass(frozen=True)
class Way:
    """One way to train, and what a GPU holds at the worst moment.

    Attributes:
        tuples: of one pass on one GPU.
        items: bytes by item.
        host: bytes in the machine's memory for each GPU.
        fits: with a tenth of the GPU to spare.
    """

    strategy: Strategy
    offload: bool
    checkpointing: bool
    accumulation: int
    tuples: int
    items: dict[str, int]
    host: int
    fits: bool

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.items.values())


@dataclass(frozen=True)
class Placement:
    """Who trains: trainers of a GPU each, LLM actors beside them with `llm_gpus` each."""

    trainers: int
    llm_actors: int
    llm_gpus: float


class TrainingPlan:
    """All ways to train a study's Grad-Transformer on some GPUs.

    Args:
        progress: called with a line before each step on fake tensors, which takes seconds.

    Raises:
        UserError: the GPUs are too few, or a model is known by no config.
    """

    def __init__(self, config: Config, machines: Machines, progress: Callable[[str], None] = lambda _: None) -> None:
        self.config, self.machines, self.progress = config, machines, progress
        self.settings: TrainingSettings = config.grad_transformer.training
        self.shape = shape_of_network(config)
        self.placement = _placement(config, machines)
        self.fake = cache(self._fake)

    def _fake(self, checkpointing: bool) -> FakeStep:
        precision = self.settings.precision
        self.progress(f"plan: a step on fake tensors ({precision}{', checkpointing' if checkpointing else ''})")
        return fake_step(lambda: build_shape(self.config), precision, checkpointing)

    def held(self, strategy: Strategy, offload: bool) -> Held:
        """What a GPU holds from step to step."""
        bf16, average = self.settings.precision == "bf16", self.settings.behaviour.steps > 0
        return held(self.shape.P, self.shape.buffers, self.placement.trainers, strategy, bf16, average, offload)

    @property
    def room(self) -> int:
        """Bytes of a GPU that may be used."""
        return int((1 - RESERVE) * self.machines.gpu.memory)

    def way(self, strategy: Strategy, offload: bool, checkpointing: bool, accumulation: int) -> Way:
        """One way to train, with what it takes."""
        n, P = self.placement.trainers, self.shape.P
        tuples = self.settings.batch_size // n // accumulation
        found = self.held(strategy, offload)
        step = self.fake(checkpointing)
        if strategy == "ddp":
            kept = found.on_gpu["gradients"]
            # In a single pass gradients come as activations go; the optimizer's step then makes a copy of its own.
            beside = max(step.peak(tuples, True) - kept if accumulation == 1 else step.peak(tuples, False), FLOAT32 * P)
        else:
            # zero3 gathers the weights of Linear modules in bf16, a few at a time, so that nothing is left to cast.
            casts = self.shape.casts if strategy == "zero3" and self.settings.precision == "bf16" else 0
            beside = max(step.peak(tuples, False) - casts, 0 if offload else FLOAT32 * math.ceil(P / n))
        items = {**found.on_gpu, STEP: beside}
        fits = sum(items.values()) <= self.room
        return Way(strategy, offload, checkpointing, accumulation, tuples, items, found.on_host, fits)

    def _passes(self) -> Iterator[int]:
        count, each = 1, self.settings.batch_size // self.placement.trainers
        while each % count == 0:
            yield count
            count *= 2

    def table(self) -> list[Way]:
        """Each strategy as the config has it otherwise (accumulation, checkpointing), and with its state offloaded."""
        settings = self.settings
        count = settings.accumulation if settings.accumulation in self._passes() else 1
        kinds = [(one, offload) for offload in (False, True) for one in STRATEGIES if not (offload and one == "ddp")]
        return [self.way(one, offload, settings.activation_checkpointing, count) for one, offload in kinds]

    def best(self) -> Way | None:
        """The first that fits: rather in several passes than with another strategy, than with checkpointing, than with
        offloading."""
        few = [count for count in self._passes() if count <= MOST_PASSES]
        many = [count for count in self._passes() if count > MOST_PASSES]
        for offload, checkpointing, passes in product((False, True), (False, True), (few, many)):
            for strategy in STRATEGIES[int(offload) :]:
                if sum(self.held(strategy, offload).on_gpu.values()) > self.room:
                    continue
                for count in passes:
                    if (way := self.way(strategy, offload, checkpointing, count)).fits:
                        return way
        return None


def _placement(config: Config, machines: Machines) -> Placement:
    """As many trainers as batch and GPUs allow, unless the config says how many; LLM actors on the other GPUs."""
    training = config.grad_transformer.training
    behaviour = training.behaviour
    share, sizes = 0.0, [training.batch_size]
    if behaviour.steps:
        share = gpus_of_a_worker(config.pair.llm, machines)
        sizes.append(behaviour.adapters)
    room = machines.count - share
    most = [n for n in range(1, machines.count + 1) if n <= room and not any(size % n for size in sizes)]
    if not most:
        raise UserError(
            f"{machines.count} GPUs are too few: a trainer takes one, an LLM actor of training on behaviour {share:g}"
        )
    trainers = training.workers if training.workers in most and training.workers > 1 else most[-1]
    actors = min(behaviour.adapters, int((machines.count - trainers) / share)) if share else 0
    if share > 1:  # each on a node of its own GPUs
        actors = min(actors, machines.nodes * int(machines.per_node // share))
    return Placement(trainers, actors, share)


def gpus_of_a_worker(model: ModelSettings, machines: Machines) -> float:
    """GPUs of a curation worker or an LLM actor: a part of one, one, or several that the model is spread over.

    Raises:
        UserError: more than a node has.
    """
    if model.num_gpus == "auto":
        return needs(model).gpu_share(machines.gpu.memory, model, machines.per_node)
    if model.num_gpus > machines.per_node:
        raise UserError(
            f"num_gpus={model.num_gpus:g} for {model.model}, but a node has {machines.per_node} GPUs, and a model is "
            "not spread over nodes"
        )
    return model.num_gpus
