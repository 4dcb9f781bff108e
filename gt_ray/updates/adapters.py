"""Folders of PEFT adapters of any origin: what an engine has to know of one before it meets it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.updates.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config, read_tensors

UNSUPPORTED = (
    "use_dora modules_to_save bias lora_bias alora_invocation_tokens layer_replication use_qalora use_bdlora "
    "trainable_token_indices target_parameters"
).split()
"""What vLLM does not serve, or serves otherwise than PEFT, where it is set."""
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter in a folder, checked.

    Attributes:
        name: of the folder.
        modules: names of the modules that it changes, with [in, out].
        sha256: of its config and weights.
    """

    name: str
    folder: Path
    base_model: str
    rank: int
    modules: Mapping[str, tuple[int, int]]
    sha256: str

    @property
    def target_modules(self) -> frozenset[str]:
        """Last parts of the names of its modules."""
        return frozenset(name.rpartition(".")[2] for name in self.modules)


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
    modules = _modules(folder, tensors)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder}: {name} holds NaN or infinity; the fine-tune diverged, lower its learning rate")
    digest = hashlib.sha256()
    try:
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            digest.update((folder / file).read_bytes())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    base = str(config.get("base_model_name_or_path") or "")
    return Adapter(folder.resolve().name, folder.resolve(), base, max(ranks), modules, digest.hexdigest())


def _modules(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Names and [in, out] of the Linear modules that hold an A and a B of one rank.

    Raises:
        UserError: a tensor is something else.
    """
    sizes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        parts = NAME.fullmatch(name)
        if parts is None or tensor.dim() != 2:
            raise UserError(
                f"{folder / ADAPTER_WEIGHTS}: {name} {list(tensor.shape)} is no LoRA tensor of a Linear module"
            )
        sizes.setdefault(parts["module"], {})[parts["part"]] = tuple(tensor.shape)
    found = {}
    for module, shapes in sizes.items():
        if len(shapes) < 2 or shapes["A"][0] != shapes["B"][1]:
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: A and B of {module} do not belong together: {shapes}")
        found[module] = (shapes["A"][1], shapes["B"][0])
    if not found:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} holds no LoRA tensors")
    return found
