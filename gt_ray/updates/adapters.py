"""Folders of PEFT adapters of any origin: what an engine has to know of one before it meets it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from gt_ray.errors import UserError
from gt_ray.updates.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config, read_tensors

UNSUPPORTED = ("use_dora", "modules_to_save", "bias")
"""What vLLM does not serve, or serves otherwise than PEFT, where it is set."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter in a folder, checked.

    Attributes:
        name: of the folder.
        target_modules: last parts of the names of the modules that it changes.
        sha256: of its config and weights.
    """

    name: str
    folder: Path
    base_model: str
    rank: int
    target_modules: frozenset[str]
    sha256: str


def inspect_adapter(folder: Path) -> Adapter:
    """Check an adapter before an engine meets it.

    Raises:
        UserError: no config, no LoRA, weights that are damaged or not finite, or what vLLM cannot serve.
    """
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {config.get('peft_type')} adapter; only LoRA is scored")
    for key in UNSUPPORTED:
        if config.get(key) not in (None, False, [], "none"):
            raise UserError(f"{folder}: {key}={config[key]!r} is not supported ({ADAPTER_CONFIG}: {key})")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise UserError(f"{folder}: rank {config.get('r')!r} is none ({ADAPTER_CONFIG}: r)")
    tensors, _ = read_tensors(folder / ADAPTER_WEIGHTS)
    modules = frozenset(name.partition(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name)
    if not modules:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} holds no LoRA tensors")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder}: {name} holds NaN or infinity; the fine-tune diverged, lower its learning rate")
    digest = hashlib.sha256()
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        digest.update((folder / file).read_bytes())
    base = str(config.get("base_model_name_or_path") or "")
    return Adapter(folder.resolve().name, folder.resolve(), base, max(ranks), modules, digest.hexdigest())
