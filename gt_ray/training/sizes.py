"""Parameters of a Grad-Transformer by part, and what each GPU holds of them under each strategy; exact counts.

P parameters on n GPUs; weights are float32, and bf16 comes by autocast:

    strategy   weights   gradients   master   moments   average
    ddp        4P        4P (+ 4P)   -        8P        4P
    zero1      4P        4P          4P/n     8P/n      4P/n
    zero2      4P        4P/n        4P/n     8P/n      4P/n
    zero3      4P/n      4P/n        -        8P/n      4P/n
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from gt_ray.config import Config, GradTransformerSettings
from gt_ray.curation.plan import validation_every
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import phi_config, phi_of
from gt_ray.pairs.families import layout_of
from gt_ray.training.strategies import BUCKET

Strategy = Literal["ddp", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FLOAT32, BFLOAT16 = 4, 2
MOMENTS = 2
LIVE = 1_000_000_000
"""Most weights that ZeRO-3 holds gathered at a time."""


def build_shape(config: Config, layers: int | None = None) -> GradTransformer:
    """The Grad-Transformer of a study's pair, with random weights on the device that is current.

    Under a meta device or fake tensors it takes no memory. phi is of a known family, of a folder, or from scratch.

    Args:
        layers: of phi's encoder and decoder each, for trials; none: as many as it has.

    Raises:
        UserError: a model or phi is of no known family and no folder.
    """
    settings = config.grad_transformer
    layout_S, layout_T = (layout_of(model.model, model.lora) for model in (config.pair.tinylm, config.pair.llm))
    training, validation, inputs = shadow_counts(config)
    rank = min(settings.linear_rank, training - 1)
    phi, shadows = _phi(settings, layers), (inputs, validation)
    return GradTransformer(layout_S, layout_T, phi, {}, settings.input_clip, rank, shadows, settings.chunk)


def _phi(settings: GradTransformerSettings, layers: int | None) -> Any:
    if settings.phi is None:
        return None
    config = phi_config(settings.phi, by_name=True)
    if layers is not None:
        config.num_layers = config.num_decoder_layers = layers
    return phi_of(config)


def shadow_counts(config: Config) -> tuple[int, int, int]:
    """Training shadows, validation shadows, and training shadows with those of the TinyLM alone."""
    shadows = config.curation.shadows
    validation = shadows // validation_every(shadows)
    return shadows - validation, validation, shadows - validation + config.curation.tinylm_shadows


def parts(model: GradTransformer) -> dict[str, int]:
    """Parameters of every part that is trained."""
    found = {}
    named = {
        "W_S, place of S": getattr(model, "embed_S", None),
        "phi, encoder": model.phi.encoder if model.phi is not None else None,
        "phi, decoder": model.phi.decoder if model.phi is not None else None,
        "W_T, place of T": getattr(model, "embed_T", None),
        "W_out": getattr(model, "out", None),
        "linear path": model.linear,
    }
    for name, module in named.items():
        if module is not None:
            found[name] = _count(module)
    if model.phi is not None:
        found["start"] = model.start.numel()
    return found


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Held:
    """Bytes that one GPU holds from step to step, by item, and those in the machine's memory by offloading."""

    on_gpu: dict[str, int]
    on_host: int


def held(P: int, buffers: int, n: int, strategy: Strategy, bf16: bool, average: bool, offload: bool = False) -> Held:
    """What training P parameters on n GPUs holds on each of them, gradients included.

    Args:
        buffers: bytes of buffers, which every GPU has.
        average: whether there is a moving average of the weights (training on behaviour).
    """
    if strategy == "ddp":
        copies = {"weights": 1, "gradients": 1, "gradient buckets": int(n > 1), "moments": MOMENTS}
        items = {name: FLOAT32 * P * copy for name, copy in copies.items()}
        return Held({**items, "moving average": FLOAT32 * P * average, "buffers": buffers}, 0)
    part = math.ceil(P / n)
    state = {
        # zero3 updates its part of the weights itself, where that is on the GPU.
        "master weights": FLOAT32 * part * (strategy != "zero3" or offload),
        "moments": MOMENTS * FLOAT32 * part,
        "moving average": FLOAT32 * part * average,
    }
    items = {
        "weights": FLOAT32 * (part if strategy == "zero3" else P),
        "gradients": FLOAT32 * (P if strategy == "zero1" else part),
        "buckets": _buckets(P, strategy, bf16),
        "buffers": buffers,
    }
    return Held(items, sum(state.values())) if offload else Held(items | state, 0)


def _buckets(P: int, strategy: Strategy, bf16: bool) -> int:
    """Bytes of the buckets that gradients go through, and with zero3 of the weights that are gathered at a time.

    zero1 and zero2 have two float32 buckets, zero3 one of each type that gradients have.
    """
    bucket = min(P, BUCKET)
    if strategy != "zero3":
        return 2 * FLOAT32 * bucket
    buckets = (FLOAT32 + BFLOAT16 if bf16 else FLOAT32) * bucket
    return buckets + (BFLOAT16 if bf16 else FLOAT32) * min(P, LIVE)
