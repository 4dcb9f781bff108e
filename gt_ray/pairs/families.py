"""Configs of the Qwen2.5 and Flan-T5 families, so that sizes are known without weights and without a network."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gt_ray.config import LoraSettings
from gt_ray.errors import UserError
from gt_ray.pairs.root import initial_tensors
from gt_ray.updates.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Config, T5Config


@cache
def _families() -> dict[str, dict[str, Any]]:
    sizes: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))
    return sizes


def known_config(model: str) -> Qwen2Config | T5Config | None:
    """The config of a model by Hub id, such as `Qwen/Qwen2.5-7B-Instruct` or `google/flan-t5-xl`; none: not known."""
    from transformers import Qwen2Config, T5Config

    name = model.rpartition("/")[2].lower().removesuffix("-instruct")
    sizes = _families().get(name)
    if sizes is None:
        return None
    if name.startswith("flan-t5"):
        return T5Config(**sizes, d_kv=64, vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return Qwen2Config(**sizes, pad_token_id=0)


def shape_of(model: str) -> PreTrainedModel:
    """A causal language model without weights, on the meta device: of a known family, or of a folder.

    Raises:
        UserError: neither.
    """
    from transformers import AutoModelForCausalLM

    config = known_config(model)
    if config is None:
        from transformers import AutoConfig

        from gt_ray.pairs.models import resolve

        try:
            config = AutoConfig.from_pretrained(resolve(model))
        except (OSError, ValueError) as error:
            raise UserError(f"{model}: no config.json, and none of {', '.join(_families())}: {error}") from error
    with torch.device("meta"):
        found: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return found


@cache
def parameters_of(model: str) -> int:
    """Number of parameters of a model that is known by its shape alone.

    Raises:
        UserError: its config is not at hand.
    """
    return sum(parameter.numel() for parameter in shape_of(model).parameters())


def layout_of(model: str, lora: LoraSettings) -> Layout:
    """The layout of updates of a model that is known by its shape alone."""
    return Layout.of({name: tuple(tensor.shape) for name, tensor in initial_tensors(shape_of(model), lora).items()})
