"""What the workers of a training share out: nothing (DistributedDataParallel), or by DeepSpeed's ZeRO the optimizer's
state (zero1), gradients too (zero2), weights too (zero3).

All do the same arithmetic: AdamW in float32, gradients averaged over workers and clipped by their norm over all. With
precision=bf16 DeepSpeed averages the gradients of Linear modules in bf16, ddp in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gt_ray.config import TrainingSettings
from gt_ray.errors import require
from gt_ray.grad_transformer.several import SeveralPairs
from gt_ray.training.shards import MOMENTS, STEP, Shard

BUCKET = 200_000_000
"""Elements that DeepSpeed reduces or gathers at a time."""
Groups = Sequence[Sequence[nn.Parameter]]
"""Parameters by learning rate."""


class Strategy:
    """A model that is being trained by this worker and others.

    Attributes:
        model: as it was given; its weights may be elsewhere (zero3) but while it runs.
        shards: what this worker keeps.
        shared_out: whether other workers keep other shards.
    """

    shared_out = False
    model: SeveralPairs
    shards: list[Shard]

    def __call__(self, pair: int, update_S_NLd: Tensor, update_T_NLd: Tensor | None = None) -> Tensor:
        """The model's forward pass."""
        raise NotImplementedError

    def optimize(self, passes: Sequence[Callable[[], Tensor]], rates: Sequence[float]) -> float:
        """An optimizer step on the mean of losses, each of which a pass computes; returns it.

        Args:
            passes: `settings.accumulation` of them.
            rates: learning rate of each group.
        """
        raise NotImplementedError

    def publish(self) -> None:
        """Let the model have the weights of all workers' shards, after these were set."""
        raise NotImplementedError


class DataParallel(Strategy):
    """Each worker has everything."""

    def __init__(self, model: SeveralPairs, groups: Groups, settings: TrainingSettings, device: torch.device) -> None:
        self.model, self._clip_norm = model.to(device), settings.clip_norm
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        self._module: nn.Module = model
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._module = nn.parallel.DistributedDataParallel(
                model, broadcast_buffers=False, find_unused_parameters=model.some_rest
            )
        self._optimizer = torch.optim.AdamW(
            [{"params": list(group)} for group in groups], lr=0.0, weight_decay=settings.weight_decay, fused=True
        )
        state = start_states(self._optimizer, [parameter for group in groups for parameter in group])
        self.shards = [
            Shard(name, 0, parameter.detach().view(-1), state[parameter])
            for name, parameter in model.named_parameters()
            if parameter in state
        ]

    def __call__(self, pair: int, update_S_NLd: Tensor, update_T_NLd: Tensor | None = None) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # of compiled layers: what they returned before is no longer needed
        with self._autocast:
            prediction: Tensor = self._module(pair, update_S_NLd, update_T_NLd)
        return prediction.float()

    def optimize(self, passes: Sequence[Callable[[], Tensor]], rates: Sequence[float]) -> float:
        total = 0.0
        for i, one in enumerate(passes):
            later = i + 1 < len(passes) and isinstance(self._module, nn.parallel.DistributedDataParallel)
            with self._module.no_sync() if later else contextlib.nullcontext():  # type: ignore[operator]
                loss = one() / len(passes)
                loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        _set_rates(self._optimizer, rates)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def publish(self) -> None:
        pass  # a shard is the weight itself


class Zero(Strategy):
    """DeepSpeed's ZeRO, stage 1 to 3."""

    shared_out = True

    def __init__(self, model: SeveralPairs, groups: Groups, settings: TrainingSettings, device: torch.device) -> None:
        deepspeed = require("deepspeed", "scale")
        self.model, self.stage = model, int(settings.strategy[-1])
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        kind: Callable[..., Any] = torch.optim.AdamW
        if settings.offload:
            kind = deepspeed.ops.adam.DeepSpeedCPUAdam
        optimizer = kind([{"params": list(group)} for group in groups], lr=0.0, weight_decay=settings.weight_decay)
        numel = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=zero_config(settings, numel), dist_init_required=False
        )
        self._optimizer = self._engine.optimizer
        masters = (
            self._optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self._optimizer.single_partition_of_fp32_groups
        )
        self._states = start_states(self._optimizer.optimizer, masters)
        self.shards = list(self._shards())

    def _shards(self) -> Iterator[Shard]:
        rank = torch.distributed.get_rank()
        parameter: Any  # DeepSpeed adds to it
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, n = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
                master = self._optimizer.fp32_partitioned_groups_flat[group]
                start = rank * n  # n is that of every worker; the last ones may have less, or nothing
                n = min(n, parameter.ds_numel - start)
            elif parameter._hp_mapping is not None:
                piece = parameter._hp_mapping
                master = self._optimizer.single_partition_of_fp32_groups[piece.param_group_index]
                offset, n = piece.hp_fragment_address.start, piece.hp_fragment_address.numel
                start = piece.lp_fragment_address.start
            else:
                continue
            if n > 0:
                yield Shard(name, start, master.detach().narrow(0, offset, n), self._states[master], offset)

    def __call__(self, pair: int, update_S_NLd: Tensor, update_T_NLd: Tensor | None = None) -> Tensor:
        prediction: Tensor = self._engine(pair, update_S_NLd, update_T_NLd)
        return prediction.float()

    def optimize(self, passes: Sequence[Callable[[], Tensor]], rates: Sequence[float]) -> float:
        total = 0.0
        _set_rates(self._optimizer, rates)
        for one in passes:
            loss = one()
            self._engine.backward(loss)  # DeepSpeed divides by the number of passes
            self._engine.step()  # and steps after the last of them
            total += float(loss.detach()) / len(passes)
        return total

    def publish(self) -> None:
        if self.stage < 3:
            self._optimizer.update_lp_params()
            return
        for group in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)


def zero_config(settings: TrainingSettings, parameters: int) -> dict[str, Any]:
    """DeepSpeed's config of these settings.

    Args:
        parameters: of the model; buffers need not be larger.
    """
    bucket = min(BUCKET, max(1, parameters))
    stage: dict[str, Any] = {
        "stage": int(settings.strategy[-1]),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # What is not shared out would not be in the shards.
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": min(5 * 10**7, max(1, parameters)),
    }
    if settings.offload:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # what is passed in is not DeepSpeed's to count
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.clip_norm,
        "zero_optimization": stage,
        **({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if settings.precision == "bf16" else {}),
    }


def construction(settings: TrainingSettings) -> AbstractContextManager[Any]:
    """Around the making of a model: with zero3 no worker ever has a whole one."""
    if settings.strategy != "zero3":
        return contextlib.nullcontext()
    # Imported within, they would look at the Tensor.__new__ that Init replaces.
    import torch._dynamo  # noqa: F401
    from transformers import T5Model  # noqa: F401

    zero: Any = require("deepspeed", "scale").zero
    return zero.Init(config_dict_or_path=zero_config(settings, 1))  # type: ignore[no-any-return]


def start_strategy(
    model: SeveralPairs, groups: Groups, settings: TrainingSettings, device: torch.device, average: bool
) -> Strategy:
    """The model as `settings.strategy` trains it; what is in none of the groups rests.

    Args:
        average: keep a moving average of the weights.
    """
    trained = {id(parameter) for group in groups for parameter in group}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    made = (DataParallel if settings.strategy == "ddp" else Zero)(model, groups, settings, device)
    if average:
        for shard in made.shards:
            shard.average = shard.weight.clone()
    return made


def start_states(optimizer: Any, tensors: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
    """AdamW's states before its first step, by tensor; it would make them only then."""
    counted = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's has a number for its step
    for tensor in tensors:
        step = torch.zeros((), device=tensor.device) if counted else 0
        optimizer.state[tensor] = {STEP: step, **{kind: torch.zeros_like(tensor) for kind in MOMENTS}}
    return {tensor: optimizer.state[tensor] for tensor in tensors}


def _set_rates(optimizer: Any, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
