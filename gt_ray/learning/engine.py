"""The engine: fine-tuning of many adapters of one frozen model, G at a time (section 4.1, Table 5).

Each adapter has its own data, order, clipping, schedule and optimizer state, so its result is that of a run of its own,
whatever its neighbours; a neighbour that diverges is dropped. G follows from memory where it is not given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice, pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gt_ray.config import FineTuneSettings
from gt_ray.errors import UserError
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.mechanisms import mechanism_of, statement
from gt_ray.learning.mechanisms.base import Sft, Step, batch_gradients, broadcast
from gt_ray.learning.memory import is_out_of_memory, release, training_bytes
from gt_ray.learning.resume import Resume
from gt_ray.learning.samples import Sample, TrainingSet
from gt_ray.learning.schedule import Schedule
from gt_ray.learning.stacked import keep_adapters, stacked
from gt_ray.pairs.root import Root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SATURATED_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of an optimizer step of all adapters together beyond which more adapters bring no more speed."""

MechanismMaker = Callable[[FineTuneSettings, Sequence[TrainingSet]], Sft]


@dataclass(frozen=True)
class FineTuned:
    """One adapter's result.

    Attributes:
        snapshots_JLd: updates [J, L, d] at the wanted optimizer steps from the end.
        losses: mean loss a target token of each optimizer step.
        held_out: [optimizer steps done, mean held-out loss a target token], where the loss decides the end.
    """

    snapshots_JLd: Tensor
    losses: list[float]
    held_out: list[list[float]] = field(default_factory=list)


class Engine:
    """Fine-tunes adapters of one root on one device.

    Args:
        model: the frozen base model.
        adapters_at_once: G; auto: by memory, and no more than keeps the device busy.
        memory_bytes: what a step may take (auto only).
        gradient_checkpointing: compute each layer's activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        root: Root,
        adapters_at_once: int | Literal["auto"] = "auto",
        memory_bytes: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model, self.root = model, root
        self.memory_bytes = memory_bytes
        self.losses = TargetLosses(model, root)
        self.adapters_at_once = adapters_at_once
        self._most_tokens: int | None = None  # of a pass, since more ran out of memory
        self._measured = (0, 0)  # tokens of the longest step of one adapter that was measured, bytes that it took
        if gradient_checkpointing:
            checkpoint_layers(model)

    def groups(self, sets: Sequence[TrainingSet], settings: FineTuneSettings) -> list[list[int]]:
        """The sets that are trained together: as few groups as these sets' lengths allow, of even sizes."""
        if not sets:
            return []
        n = -(-len(sets) // self._limit(sets, settings))
        borders = [round(i * len(sets) / n) for i in range(n + 1)]
        return [list(range(start, end)) for start, end in pairwise(borders)]

    def fine_tune(
        self,
        sets: Sequence[TrainingSet],
        settings: FineTuneSettings,
        snapshot_steps: Sequence[int] = (0,),
        on_step: Callable[[], None] = lambda: None,
        resume: Resume | None = None,
        mechanism: MechanismMaker | None = None,
    ) -> Iterator[tuple[int, FineTuned | UserError]]:
        """Fine-tune one adapter on each set, all from the same root; yields its number and result as groups finish.

        An adapter that diverges yields its error and leaves its neighbours alone. Out of memory, the group is halved
        and, at one adapter, the batch cut into pieces; what has been yielded is not repeated.

        Args:
            snapshot_steps: optimizer steps from the end at which the update is kept, largest first.
            on_step: called after every optimizer step of a group.
            resume: of a single set, whose last update alone is kept: where it goes on from.
            mechanism: in place of the one that the settings name, for losses that are no client's choice.

        Raises:
            UserError: a data set is empty or too small for the mechanism, or fewer steps than snapshots reach back.
        """
        _check(sets, settings, snapshot_steps)
        waiting = list(range(len(sets)))
        fits = self._most_tokens
        while waiting:
            group = [waiting[i] for i in self.groups([sets[i] for i in waiting], settings)[0]]
            members = [sets[i] for i in group]
            try:
                for g, result in self._train(members, settings, snapshot_steps, on_step, resume, mechanism):
                    waiting.remove(group[g])
                    yield group[g], result
                fits = self._most_tokens
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                pieces = self._pieces(members, settings)
                if len(group) > 1 or pieces < settings.batch_size:
                    self._most_tokens = max(1, len(group) * _step_tokens(members, settings) // pieces // 2)
                else:
                    self._most_tokens = fits  # the others are not to blame
                    waiting.remove(group[0])
                    yield (
                        group[0],
                        UserError(
                            f"{members[0].name}: one sample of one adapter does not fit into memory; set "
                            "gradient_checkpointing, or lower max_length"
                        ),
                    )
            release(self.losses.device)

    def _limit(self, sets: Sequence[TrainingSet], settings: FineTuneSettings) -> int:
        """Most of these adapters at once: as set, or by memory and speed; fewer where as many ran out of memory."""
        if self.adapters_at_once == "auto":
            limit = min(self._by_speed(sets, settings), self._by_memory(sets, settings))
        else:
            limit = self.adapters_at_once
        if self._most_tokens is not None:
            limit = min(limit, self._most_tokens // _step_tokens(sets, settings))
        return max(1, limit)

    def _pieces(self, sets: Sequence[TrainingSet], settings: FineTuneSettings) -> int:
        """Parts into which a group's batch is cut: more than one where a whole one ran out of memory."""
        if self._most_tokens is None:
            return 1
        return min(settings.batch_size, -(-len(sets) * _step_tokens(sets, settings) // self._most_tokens))

    def _by_speed(self, sets: Sequence[TrainingSet], settings: FineTuneSettings) -> int:
        tokens = sum(len(sample) for s in sets for sample in s.samples) / sum(len(s.samples) for s in sets)
        saturated = SATURATED_TOKENS.get(self.losses.device.type, SATURATED_TOKENS["cuda"])
        return round(saturated / (tokens * settings.batch_size))

    def _by_memory(self, sets: Sequence[TrainingSet], settings: FineTuneSettings) -> int:
        """G by what one adapter's step on the longest samples takes; shorter ones than measured take their share."""
        if self.memory_bytes is None:
            return len(sets)
        tokens = _step_tokens(sets, settings)
        if self._most_tokens is not None and self._most_tokens < tokens:
            return 1  # less has run out of memory
        if tokens > self._measured[0]:
            batch = [_longest(sets, settings)]
            with self.losses.short_cuts(), stacked(self.model, self.root, G=1):
                try:
                    self._measured = (
                        tokens,
                        training_bytes(lambda: batch_gradients(self.losses, batch, 1), *self.losses.devices),
                    )
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._most_tokens = max(1, tokens // 2)
            release(self.losses.device)
            if self._measured[0] < tokens:
                return 1
        return int(self.memory_bytes * self._measured[0] / (tokens * max(1, self._measured[1])))

    def _train(
        self,
        sets: Sequence[TrainingSet],
        settings: FineTuneSettings,
        snapshot_steps: Sequence[int],
        on_step: Callable[[], None],
        resume: Resume | None,
        make: MechanismMaker | None,
    ) -> Iterator[tuple[int, FineTuned | UserError]]:
        """Fine-tune all sets together."""
        layout, G = self.root.layout, len(sets)
        start_Ld = layout.to_array(self.root.initial)
        schedule = Schedule(settings, G)
        kept: list[list[Tensor]] = [[] for _ in sets]
        losses: list[list[float]] = [[] for _ in sets]
        held_out: list[list[list[float]]] = [[] for _ in sets]
        active = list(range(G))
        pieces = self._pieces(sets, settings)
        mechanism = (make or mechanism_of(settings))(settings, sets)
        step = 0
        with self.losses.short_cuts(), stacked(self.model, self.root, G) as parameters:
            trained = list(parameters.values())
            optimizer = mechanism.optimizer(trained)
            if resume:
                losses[0], step = resume.restore(trained, optimizer), resume.steps
                mechanism.skip(0, step)
            while active:
                if schedule.wants_check(step):
                    for g, loss in zip(
                        active, self._held_out([sets[g] for g in active], settings, pieces), strict=True
                    ):
                        held_out[g].append([step, loss])
                        schedule.check(g, step, loss)
                batch = [mechanism.draw(g, step) for g in active]
                factors = [schedule.factor(g, step) if mechanism.decays else 1.0 for g in active]
                optimizer.zero_grad()
                loss_G = mechanism.gradients(self.losses, Step(step, trained, active, batch, pieces, factors))
                _step(optimizer, trained, factors)
                step += 1
                on_step()
                ended = []
                for row, (g, loss) in enumerate(zip(active, loss_G.tolist(), strict=True)):
                    losses[g].append(loss)
                    end = schedule.end(g)
                    if end is not None and end - step in snapshot_steps:
                        one = {name: parameter.detach()[row] for name, parameter in parameters.items()}
                        kept[g].append(mechanism.released(g, layout.to_array(one) - start_Ld, step))
                    finite = math.isfinite(loss) and (step != end or bool(torch.isfinite(kept[g][-1]).all()))
                    if not finite:
                        yield (
                            g,
                            UserError(
                                f"{sets[g].name} diverged: its loss is not finite at optimizer step {step}; lower "
                                "learning_rate, or look for a row that does not belong"
                            ),
                        )
                    elif step == end:
                        yield g, FineTuned(torch.stack(kept[g]), losses[g], held_out[g])
                    if not finite or step == end:
                        ended.append(row)
                if resume:
                    resume.keep(step, trained, optimizer, losses[0])
                if ended:
                    rows = [row for row in range(len(active)) if row not in ended]
                    active = [active[row] for row in rows]
                    keep_adapters(optimizer, rows)

    @torch.no_grad()
    def _held_out(self, sets: Sequence[TrainingSet], settings: FineTuneSettings, pieces: int) -> list[float]:
        """Mean held-out loss a target token of each adapter."""
        G = len(sets)
        sum_G, count_G = torch.zeros(2, G, device=self.losses.device)
        size = -(-settings.batch_size // pieces)
        for first in range(0, settings.stop.held_out, size):
            sums, counts = self.losses.by_adapter(
                self.losses.batch([s.held_out[first : min(first + size, settings.stop.held_out)] for s in sets]), G
            )
            sum_G += sums
            count_G += counts
        return [float(loss) for loss in sum_G / count_G]


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], factors: list[float]) -> None:
    """One optimizer step, each adapter at its share of the learning rate: the change of AdamW is linear in the rate."""
    before = [parameter.clone() for parameter in parameters]
    optimizer.step()
    factor_G = torch.tensor(factors, device=parameters[0].device)
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(torch.lerp(old, parameter, broadcast(factor_G, parameter)))


def _longest(sets: Sequence[TrainingSet], settings: FineTuneSettings) -> list[Sample]:
    """The longest batch that a step of one of these adapters could meet."""
    samples = sorted((sample for s in sets for sample in s.samples), key=len, reverse=True)
    return list(islice(cycle(samples), settings.batch_size))


def _step_tokens(sets: Sequence[TrainingSet], settings: FineTuneSettings) -> int:
    """Places for tokens in the longest step of one of these adapters; attention has all of them, filled or not."""
    return settings.batch_size * max(len(sample) for s in sets for sample in s.samples)


def _check(sets: Sequence[TrainingSet], settings: FineTuneSettings, snapshot_steps: Sequence[int]) -> None:
    if settings.last_steps <= max(snapshot_steps):
        raise UserError(f"{settings.last_steps} steps are fewer than the snapshots need ({max(snapshot_steps) + 1})")
    for number, one in enumerate(sets):
        if not one.samples:
            raise UserError(f"data set {number} ({one.name}) is empty")
        statement(settings, len(one.samples))  # refuses what the mechanism cannot do
        if settings.stop.when == "plateau" and len(one.held_out) < settings.stop.held_out:
            raise UserError(
                f"{one.name} has {len(one.held_out)} held-out rows, stop.held_out={settings.stop.held_out} are needed"
            )


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let every layer compute its activations again in the backward pass instead of keeping them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Not transformers' own switch: it works in training mode only, which turns dropout on.
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
