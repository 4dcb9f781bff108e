"""The root: a base model plus the exact initial adapter (A0, B0) that every fine-tune starts from.

Its hash (decision 3) is SHA-256 over the base model's tensors, the initial adapter, the LoRA settings, the tokenizer
and the chat template in canonical form; never over paths, versions or sharding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gt_ray.config import LoraSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.models import load_tokenizer, resolve, weight_files
from gt_ray.updates.layout import Layout

FORMAT = "gt-ray-root/1"


@dataclass(frozen=True)
class Root:
    """What an update is a difference from.

    Attributes:
        hash: identifies base model and initial adapter.
        base_model: as configured: Hub id, folder or `embedded:...`.
        lora: rank, alpha and target modules.
        initial: A0 and B0 by parameter name (`<module>.lora_A` [r, in], `<module>.lora_B` [out, r]), float32.
    """

    hash: str
    base_model: str
    lora: LoraSettings
    initial: dict[str, Tensor]

    @property
    def layout(self) -> Layout:
        """How updates from this root become arrays."""
        return Layout.of({name: tuple(tensor.shape) for name, tensor in self.initial.items()})

    @property
    def scaling(self) -> float:
        """LoRA's alpha / r."""
        return self.lora.alpha / self.lora.rank

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules."""
        return sorted({name.rpartition(".")[0] for name in self.initial})

    def save(self, path: Path) -> None:
        """Write A0, B0 and their settings as one safetensors file."""
        metadata = {
            "format": FORMAT,
            "root": self.hash,
            "base_model": self.base_model,
            "lora": self.lora.model_dump_json(),
            "sha256": _checksum(self.initial),
        }
        save_file({f"initial.{name}": tensor for name, tensor in self.initial.items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Root:
        """Read what `save` wrote.

        Raises:
            UserError: not a root file, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path} is not a root file ({FORMAT})")
                initial = {name.removeprefix("initial."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["sha256"] != _checksum(initial):
                raise ValueError("checksum differs")
            lora = LoraSettings.model_validate_json(metadata["lora"])
            return cls(metadata["root"], metadata["base_model"], lora, initial)
        except UserError:
            raise
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"root file {path} is damaged or missing: {error}") from error


def make_root(settings: ModelSettings, cache: Path | None = None) -> Root:
    """The root of a model: draws A0 from `settings.root_seed`, hashes the base model.

    Args:
        cache: folder that keeps roots, so that a large base model is hashed once.

    Raises:
        UserError: the model has no weights, tokenizer or such target modules.
    """
    folder = resolve(settings.model)
    cached = cache / f"{_stat_key(folder, settings)}.safetensors" if cache else None
    if cached and cached.is_file():
        with contextlib.suppress(UserError):  # a damaged one is made again
            return replace(Root.load(cached), base_model=settings.model)
    initial = initial_adapter(folder, settings.lora, settings.root_seed)
    root = Root(hash_root(folder, settings.lora, initial), settings.model, settings.lora, initial)
    if cached:
        partial = cached.with_name(f".{cached.name}.{uuid.uuid4().hex[:8]}")
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            root.save(partial)
            partial.rename(cached)
        except (SafetensorError, OSError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise UserError(f"could not write {cached}: {error}; free some space and run it again") from error
    return root


def initial_adapter(folder: Path, lora: LoraSettings, seed: int) -> dict[str, Tensor]:
    """A0 and B0 as PEFT initialises them (Kaiming-uniform A with a = sqrt(5), zero B), from a seed of its own.

    The base model is built without weights, so this is cheap at any size.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model folder {folder}: config.json is of no causal language model: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    initial = {}
    for name, module in sorted(model.named_modules()):
        if name.rpartition(".")[2] in lora.target_modules and isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / ((1 + 5) * module.in_features))
            initial[f"{name}.lora_A"] = torch.empty(lora.rank, module.in_features).uniform_(
                -bound, bound, generator=generator
            )
            initial[f"{name}.lora_B"] = torch.zeros(module.out_features, lora.rank)
    found = {name.split(".")[-2] for name in initial}
    if missing := set(lora.target_modules) - found:
        raise UserError(f"{folder}: no Linear module is named {sorted(missing)} (lora.target_modules)")
    return initial


def hash_root(folder: Path, lora: LoraSettings, initial: dict[str, Tensor]) -> str:
    """SHA-256 of decision 3."""
    tokenizer = load_tokenizer(str(folder))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for runtime_state in ("truncation", "padding"):
        backend.pop(runtime_state, None)
    digest = hashlib.sha256()
    digest.update(
        _canonical(
            {
                "rank": lora.rank,
                "alpha": lora.alpha,
                "scaling": lora.alpha / lora.rank,
                "target_modules": sorted(lora.target_modules),
                "tokenizer": backend,
                "special_tokens": tokenizer.special_tokens_map,
                "chat_template": tokenizer.chat_template,
            }
        )
    )
    shards = {}
    try:
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                shards.update({name: path for name in file.keys()})  # noqa: SIM118
        for name in sorted(shards):
            with safe_open(shards[name], framework="pt") as file:
                _add_tensor(digest, f"base.{name}", file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights in {folder} are damaged: {error}; download the model again") from error
    for name in sorted(initial):
        _add_tensor(digest, f"initial.{name}", initial[name])
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def _add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _stat_key(folder: Path, settings: ModelSettings) -> str:
    """Cache key: cheap to compute, changes whenever a file of the model does."""
    content = [model_stats(folder), settings.lora.model_dump(mode="json"), settings.root_seed]
    return hashlib.sha256(_canonical(content)).hexdigest()[:32]


def model_stats(folder: Path) -> list[list[str | int]]:
    """Names, sizes, times and places of a model's files: cheap to look at, and other whenever one of them is."""
    files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".jinja", ".txt"})
    return [
        [path.name, path.resolve().stat().st_size, path.resolve().stat().st_mtime_ns, str(path.resolve())]
        for path in files
    ]
