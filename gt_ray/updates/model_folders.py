"""Folders of whole models: what a generated update of full weights becomes (`lora.kind=full`)."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.pairs.models import resolve
from gt_ray.pairs.root import Root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
ROOT = "gt_ray_root"
"""Key of config.json: the hash of the root that the weights were made from."""


def write_model(folder: Path, delta: dict[str, Tensor], root: Root, card: str) -> None:
    """The base model with `delta` added to its weights, in float32, for 16 bit would round small updates off.

    Args:
        delta: by names of parameters.

    Raises:
        UserError: the folder holds something else than a model that this function wrote; it is left as it is.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and _root_of(folder) is None:
        raise UserError(f"{folder} exists and is no generated model; choose another folder, or empty this one")
    base = resolve(root.base_model)
    model = _load(base)
    parameters = dict(model.named_parameters())
    for name, tensor in delta.items():
        parameters[name].data.add_(tensor)
    setattr(model.config, ROOT, root.hash)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Tokenizer and chat template as they are; what save_pretrained writes is its own.
        weights = shutil.ignore_patterns("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", CONFIG)
        shutil.copytree(base, partial, ignore=weights)
        model.save_pretrained(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not write {folder}: {error}; free some space and run it again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_model(folder: Path, root: Root) -> dict[str, Tensor]:
    """Inverse of `write_model`: the difference from the base model, by names of parameters.

    Raises:
        UserError: no model folder of this root.
    """
    if (found := _root_of(folder)) != root.hash:
        raise UserError(f"{folder} is of root {found}, not of {root.hash} ({root.base_model})")
    base, model = (dict(_load(path).named_parameters()) for path in (resolve(root.base_model), folder))
    return {name: model[name].data - base[name].data for name in root.initial}


def _root_of(folder: Path) -> str | None:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = config.get(ROOT)
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _load(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is no usable model folder: {error}") from error
    return model
