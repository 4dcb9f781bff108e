"""phi: the T5 encoder-decoder in a Grad-Transformer, without token embeddings and LM head, which blocks do not need."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gt_ray.config import PhiSettings
from gt_ray.errors import UserError
from gt_ray.pairs.families import known_config
from gt_ray.pairs.models import resolve, weight_files

if TYPE_CHECKING:
    from transformers import T5Config, T5Model


def phi_config(settings: PhiSettings, by_name: bool = False) -> T5Config:
    """The T5's config: of a pretrained one, or one from scratch by size.

    Args:
        by_name: of a pretrained one of a known family by its name, of others from a folder that may lack the weights.

    Raises:
        UserError: there is no such pretrained T5.
    """
    from transformers import T5Config

    if settings.pretrained is None:
        return T5Config(
            vocab_size=1,
            eos_token_id=0,
            d_model=settings.d_model,
            d_kv=settings.d_model // settings.heads,
            d_ff=settings.d_ff,
            num_layers=settings.layers,
            num_heads=settings.heads,
            dropout_rate=settings.dropout,
            feed_forward_proj="gated-gelu",
            relative_attention_max_distance=64,
        )
    if by_name and (known := known_config(settings.pretrained)) is not None:
        return known
    try:
        config: T5Config = T5Config.from_pretrained(settings.pretrained if by_name else resolve(settings.pretrained))
    except (OSError, ValueError) as error:
        raise UserError(f"grad_transformer.phi.pretrained={settings.pretrained!r}: {error}") from error
    return config


def phi_of(config: T5Config) -> T5Model:
    """phi with random weights, of a T5 config."""
    from transformers import T5Model

    config = copy.deepcopy(config)
    config.vocab_size = 1
    phi = T5Model(config)
    phi.shared = phi.encoder.embed_tokens = phi.decoder.embed_tokens = None
    for name, module in phi.named_modules():
        if name.endswith("relative_attention_bias"):
            module.register_forward_hook(_heads_first)
    return phi


def _heads_first(_: nn.Module, ids: object, bias_QKH: Tensor) -> Tensor:
    """Laid out so that T5's permuted view [H, Q, K] is contiguous: memory-efficient attention takes no other bias."""
    return bias_QKH.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def pretrained_name(name: str) -> str | None:
    """The name in a T5's files of a parameter of a module that has phi within; none: not phi's."""
    _, is_of_phi, own = name.rpartition("phi.")
    return own if is_of_phi else None


def make_phi(settings: PhiSettings) -> T5Model:
    """phi with the pretrained weights, or with random ones.

    Raises:
        UserError: there is no such pretrained T5, or its files are damaged.
    """
    config = phi_config(settings)
    if settings.pretrained is None:
        return phi_of(config)
    with torch.device("meta"):
        phi = phi_of(config)
    try:
        with ExitStack() as opened:
            files = [opened.enter_context(safe_open(path, framework="pt")) for path in phi_files(settings)]
            where = {key: file for file in files for key in file.keys()}  # noqa: SIM118
            weights = {name: where[name].get_tensor(name).float() for name in phi.state_dict()}
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"grad_transformer.phi.pretrained={settings.pretrained!r} is no T5: {error}") from error
    phi.load_state_dict(weights, assign=True)
    return phi


def phi_files(settings: PhiSettings) -> list[Path]:
    """The safetensors files of a pretrained T5."""
    return weight_files(resolve(str(settings.pretrained)))
