"""What a curation needs: memory of base models and training steps, GPUs of an actor, units, size of the store.

Estimates from a model's config alone, so a study can be planned where its weights are not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from rich.filesize import decimal

from gt_ray.cluster import Nodes, total
from gt_ray.config import Config, ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.devices import piece_parameters, pieces, split
from gt_ray.pairs.families import known_config
from gt_ray.pairs.models import EMBEDDED_PREFIX, resolve
from gt_ray.pairs.root import initial_tensors
from gt_ray.progress import say
from gt_ray.updates.layout import Layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LARGE_ON_CPU = 2**31
"""Bytes of weights from which a fine-tune without a GPU is most likely a mistake in the set-up of the cluster."""
TYPICAL_TOKENS = 256
"""Tokens of a sample that estimates count with, where `max_length` is not less."""
ACTIVATIONS = 34
"""Bytes that a layer keeps for its backward pass, for each token and unit of width, in 16 bit (arXiv 2205.05198)."""
TRAINED = 20
"""Bytes of a trained parameter: itself, its gradient, two moments and the step, in float32."""
RESERVE = 0.1
"""Share of a GPU that libraries and fragments take."""
LOOK_S = 120
"""How long to wait for a GPU of the cluster to be looked at."""
GPU_BYTES = "GT_RAY_GPU_BYTES"
"""Environment variable: memory of a GPU of the cluster, for processes that need not look for themselves."""
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
SPREADS = (2, 4, 8)
"""GPUs over which a model that does not fit into one is spread; of one node, whose GPUs are near each other."""


@dataclass(frozen=True)
class ModelNeeds:
    """What fine-tuning adapters of one model takes.

    Attributes:
        weight_bytes: the frozen base model.
        step_bytes: of an optimizer step of one adapter: activations of `batch_size` samples of typical length, and what
            it trains.
        update_shape: [L, d] of an update.
        pieces: bytes of weights and of the step of each piece that stays on one GPU (pairs/devices.py); none: the model
            cannot be spread over several.
        layer_bytes: what a step holds of one layer at a time, whichever GPU it is on.
    """

    parameters: int
    weight_bytes: int
    step_bytes: int
    update_shape: tuple[int, int]
    pieces: tuple[tuple[int, int], ...]
    layer_bytes: int

    @property
    def least_bytes(self) -> int:
        """The base model and one sample of one adapter at a time would do; one whole adapter is what one wants."""
        return self.weight_bytes + self.step_bytes

    def parts(self, n: int) -> list[tuple[int, int]]:
        """Bytes of weights and of the step on each of n GPUs."""
        parts = [(0, self.layer_bytes)] * n
        for device, (weights, step) in zip(split([size for size, _ in self.pieces], n), self.pieces, strict=True):
            parts[device] = (parts[device][0] + weights, parts[device][1] + step)
        return parts

    def part_bytes(self, n: int) -> int:
        """What the fullest of n GPUs holds."""
        return max(weights + step for weights, step in self.parts(n))

    def adapters(self, gpus: float, gpu_bytes: int) -> int:
        """How many adapters' steps fit together, beside the model on so many GPUs; at least one."""
        usable = (1 - RESERVE) * gpu_bytes
        parts = self.parts(int(gpus)) if gpus > 1 else [(self.weight_bytes, self.step_bytes)]
        return max(1, min(int((min(gpus, 1) * usable - weights) // step) for weights, step in parts))

    def gpu_share(self, gpu_bytes: int, settings: ModelSettings, node_gpus: int) -> float:
        """GPUs of one actor: a part of one for a small model, so that several actors share it; several for a large one.

        Args:
            node_gpus: of the node with most of them.

        Raises:
            UserError: the model is larger than the GPUs of one node.
        """
        usable = (1 - RESERVE) * gpu_bytes
        for share in SHARES:
            if self.least_bytes <= share * usable:
                return share
        spreads = [n for n in SPREADS if n <= node_gpus] if self.pieces else []
        for n in spreads:
            if self.part_bytes(n) <= usable:
                return n
        if spreads:
            most = f"spread over {spreads[-1]}, the fullest holds {decimal(self.part_bytes(spreads[-1]))}"
        elif self.pieces:
            most = "no node has a second one to spread it over"
        else:
            most = "it does not say what its layers are, so it cannot be spread over several"
        raise UserError(
            f"{settings.model} needs {decimal(self.least_bytes)} ({decimal(self.weight_bytes)} for weights), a GPU "
            f"here has {decimal(gpu_bytes)}, {decimal(int(usable))} of it usable; {most}. Use gradient_checkpointing="
            "true, a smaller batch_size, larger GPUs or nodes with more of them; a model is not spread over nodes"
        )


def needs(settings: ModelSettings, config: PretrainedConfig | None = None) -> ModelNeeds:
    """Estimate from a model's config.

    Args:
        config: the model's, where it is not to be read from the model's folder.
    """
    return _known_needs(settings) if config is None else _needs(settings, config)


@lru_cache(16)
def _known_needs(settings: ModelSettings) -> ModelNeeds:
    return _needs(settings, _config_of(settings.model))


def _needs(settings: ModelSettings, config: PretrainedConfig) -> ModelNeeds:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    item = getattr(torch, settings.dtype).itemsize
    text = config.get_text_config()
    tokens = settings.fine_tune.batch_size * min(TYPICAL_TOKENS, settings.fine_tune.max_length)
    layer = ACTIVATIONS * item // 2 * tokens * text.hidden_size
    # With checkpointing a layer keeps its input, and the rest is computed again, a layer at a time.
    kept, again = (item * tokens * text.hidden_size, layer) if settings.gradient_checkpointing else (layer, 0)
    layers = text.num_hidden_layers
    shapes = {name: tuple(one.shape) for name, one in initial_tensors(model, settings.lora).items()}
    trained = {name: TRAINED * math.prod(shape) for name, shape in shapes.items()}
    sizes = []
    for number, piece in enumerate(pieces(model)):
        own = sum(size for name, size in trained.items() if name.startswith(tuple(f"{module}." for module in piece)))
        sizes.append((item * piece_parameters(model, piece), own + (kept if 1 <= number <= layers else 0)))
    layout = Layout.of(shapes)
    step = layers * kept + again + sum(trained.values())
    return ModelNeeds(parameters, parameters * item, step, (layout.L, layout.d), tuple(sizes), again)


def _config_of(model: str) -> PretrainedConfig:
    """A model's config, without its weights: of a known family by name, else of the model's folder."""
    from transformers import AutoConfig

    if (known := known_config(model)) is not None:
        return known
    try:
        return AutoConfig.from_pretrained(resolve(model) if model.startswith(EMBEDDED_PREFIX) else model)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"model {model!r} is neither a folder with a config.json nor to be had: {reason}") from error


def gpus_of_an_actor(settings: ModelSettings, nodes: Nodes) -> float:
    """GPUs that a fine-tuning actor of a model asks Ray for; 0 where the cluster has none.

    Raises:
        UserError: the model does not fit the GPUs of one node, or more GPUs are asked for than there are.
    """
    most = int(max((node.get("GPU", 0) for node in nodes), default=0))
    if settings.num_gpus != "auto":
        if settings.num_gpus > 1 and settings.num_gpus != math.floor(settings.num_gpus):
            raise UserError(f"num_gpus={settings.num_gpus}: above one GPU, only whole ones")
        if settings.num_gpus and not most:
            raise UserError(f"num_gpus={settings.num_gpus} for {settings.model}, but this Ray cluster has no GPU")
        if settings.num_gpus > most:
            raise UserError(
                f"num_gpus={settings.num_gpus:g} for {settings.model}, but the nodes of this Ray cluster have up to "
                f"{most} GPUs, and a model is not spread over nodes; lower num_gpus"
            )
        return settings.num_gpus
    if not most:
        if (weights := needs(settings).weight_bytes) > LARGE_ON_CPU:
            say(f"warning: this Ray cluster has no GPU; {settings.model} ({decimal(weights)}) is fine-tuned on CPUs")
        return 0.0
    gpu_bytes = _gpu_bytes()
    share = needs(settings).gpu_share(gpu_bytes, settings, most)
    if share > 1:
        hint = _hint(settings, share, gpu_bytes, most)
        say(f"{settings.model} is spread over {share:g} GPUs, which work in turns{hint}")
    return share


def _hint(settings: ModelSettings, share: float, gpu_bytes: int, most: int) -> str:
    """That fewer GPUs would do with gradient checkpointing, where they would."""
    if settings.gradient_checkpointing:
        return ""
    less = settings.model_copy(update={"gradient_checkpointing": True})
    fewer = needs(less).gpu_share(gpu_bytes, less, most)
    return f"; with gradient_checkpointing=true {fewer:g} would do" if fewer < share else ""


def gpus_as_seen(configs: Sequence[Config], nodes: Nodes) -> dict[str, str]:
    """Environment variables of further processes that work on these studies: a GPU's memory, where they would look.

    Once others are at work there may be no GPU left to be looked at.
    """
    models = (settings for config in configs for settings in unit_counts(config))
    look = total(nodes, "GPU") > 0 and any(settings.num_gpus == "auto" for settings in models)
    return {GPU_BYTES: str(_gpu_bytes())} if look else {}


@cache
def _gpu_bytes() -> int:
    """Memory of a GPU of the cluster, as a task on it finds it.

    Raises:
        UserError: all GPUs are taken.
    """
    if known := os.environ.get(GPU_BYTES):
        return int(known)
    import ray

    @ray.remote(num_gpus=0.01, num_cpus=0)
    def look() -> int:
        import torch

        return torch.cuda.get_device_properties(0).total_memory

    pending = look.remote()
    try:
        found: int = ray.get(pending, timeout=LOOK_S)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(pending)
        raise UserError(
            f"no GPU of this Ray cluster was free for {LOOK_S} s to look at its memory; wait until other jobs have "
            "ended, or set pair.tinylm.num_gpus and pair.llm.num_gpus"
        ) from error
    return found


def unit_bytes(update_shape: tuple[int, int], snapshots: int) -> int:
    """A unit in the store: the last snapshot in float32, earlier ones as 8-bit differences."""
    return round(math.prod(update_shape) * (4 + (snapshots - 1) * 1.03))


def unit_counts(config: Config) -> dict[ModelSettings, int]:
    """The models of all pairs, and how many units a curation makes of each."""
    curation = config.curation
    counts = {"tinylm": curation.shadows + curation.tinylm_shadows, "llm": curation.shadows}
    found: dict[ModelSettings, int] = {}
    for pair in config.pairs:
        for side, n in counts.items():
            found[getattr(pair, side)] = max(n, found.get(getattr(pair, side), 0))
    return found


def plan_rows(config: Config, gpu_bytes: int, node_gpus: int) -> list[dict[str, str]]:
    """A line for each model of all pairs: what curation needs with nodes of GPUs of a given size; for people."""
    rows = []
    for settings, units in unit_counts(config).items():
        found = needs(settings)
        L, d = found.update_shape
        snapshots = len(config.curation.snapshot_steps)
        share = found.gpu_share(gpu_bytes, settings, node_gpus)
        rows.append(
            {
                "model": settings.model,
                "parameters": f"{found.parameters / 1e6:,.2f} M",
                "weights": f"{decimal(found.weight_bytes)} in {settings.dtype}",
                "an adapter's step": decimal(found.step_bytes),
                "GPUs of a worker": f"{share:g} of {decimal(gpu_bytes)}",
                "adapters in its memory": str(found.adapters(share, gpu_bytes)),
                "an update": f"{L} blocks of {d}",
                "units in the store": f"{units} of {snapshots} snapshots",
                "size in the store": decimal(units * unit_bytes(found.update_shape, snapshots)),
            }
        )
    return rows
