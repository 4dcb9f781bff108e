"""The root: a base model plus the exact initial adapter (A0, B0) that every fine-tune starts from.

Three kinds of adapters (`lora.kind`) on Linear modules, and but for LoRA-XS on the token embedding:

    lora    y = W x + scaling * B A x      trains A and B, of an embedding lora_embedding_A and lora_embedding_B
    xs      y = W x + scaling * B R A x    trains R; B = U_r S_r and A = V_r^T of W = U S V^T (arXiv 2405.17604)
    full    y = (W + weight) x             trains weight, which is zero at the root

Its hash (decision 3) is SHA-256 over the base model's tensors, the initial adapter, the LoRA settings, the tokenizer
and the chat template in canonical form; never over paths, versions or sharding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gt_ray.config import LoraSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.models import load_tokenizer, read_weights, resolve, weight_files
from gt_ray.updates.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "gt-ray-root/1"


@dataclass(frozen=True)
class Root:
    """What an update is a difference from.

    Attributes:
        hash: identifies base model and initial adapter.
        base_model: as configured: Hub id, folder or `embedded:...`.
        lora: rank, alpha and target modules.
        initial: trained parameters by name, float32: A0 and B0 (`<module>.lora_A` [r, in], `<module>.lora_B`
            [out, r]), R0, or zeros of a weight's shape.
        fixed: A and B of LoRA-XS, which are not trained.
    """

    hash: str
    base_model: str
    lora: LoraSettings
    initial: dict[str, Tensor]
    fixed: dict[str, Tensor] = field(default_factory=dict)

    @property
    def public_name(self) -> str:
        """What others are told of the base model: a folder's own name, not where it lies."""
        return Path(self.base_model).name if Path(self.base_model).is_absolute() else self.base_model

    @cached_property
    def layout(self) -> Layout:
        """How updates from this root become arrays."""
        return Layout.of({name: tuple(tensor.shape) for name, tensor in self.initial.items()})

    @property
    def scaling(self) -> float:
        """LoRA's alpha / r."""
        return self.lora.alpha / self.lora.rank

    @property
    def is_plain_lora(self) -> bool:
        """Whether its adapters are LoRA of Linear modules, which every engine serves."""
        return all(name.endswith((".lora_A", ".lora_B", ".lora_R")) for name in self.initial)

    @property
    def has_factors(self) -> bool:
        """Whether it trains both factors A and B, and of Linear modules alone (`lora.kind=lora`)."""
        return all(name.endswith((".lora_A", ".lora_B")) for name in self.initial)

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules."""
        return sorted({name.rpartition(".")[0] for name in self.initial})

    def save(self, path: Path) -> None:
        """Write the initial adapter and its settings as one safetensors file, whole or not at all.

        Raises:
            UserError: the disk is full or not writable.
        """
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(self.to_bytes())
            partial.rename(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise UserError(f"could not write {path}: {error}; free some space and run it again") from error

    def to_bytes(self) -> bytes:
        """The file that `save` writes."""
        metadata = {
            "format": FORMAT,
            "root": self.hash,
            "base_model": self.base_model,
            "lora": self.lora.model_dump_json(),
            "sha256": checksum(self.initial | self.fixed),
        }
        parts = {"initial": self.initial, "fixed": self.fixed}
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        return save(tensors, metadata)

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
                parts: dict[str, dict[str, Tensor]] = {"initial": {}, "fixed": {}}
                for key in file.keys():  # noqa: SIM118
                    part, _, name = key.partition(".")
                    parts[part][name] = file.get_tensor(key)
            if metadata["sha256"] != checksum(parts["initial"] | parts["fixed"]):
                raise ValueError("checksum differs")
            lora = LoraSettings.model_validate_json(metadata["lora"])
            return cls(metadata["root"], metadata["base_model"], lora, **parts)
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
    fixed = _singular_factors(folder, settings.lora, initial) if settings.lora.kind == "xs" else {}
    root = Root(hash_root(folder, settings.lora, initial, fixed), settings.model, settings.lora, initial, fixed)
    if cached:
        root.save(cached)
    return root


def initial_adapter(folder: Path, lora: LoraSettings, seed: int) -> dict[str, Tensor]:
    """What every fine-tune of the model in `folder` starts from, drawn from a seed of its own.

    The base model is built without weights, so this is cheap at any size.

    Raises:
        UserError: no causal language model, or one without such modules.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model folder {folder}: config.json is of no causal language model: {error}") from error
    initial = initial_tensors(model, lora, torch.Generator().manual_seed(seed))
    found = {name.split(".")[-2] for name in initial}
    if missing := set(lora.target_modules) - found:
        raise UserError(
            f"{folder}: no module that lora.kind={lora.kind} adapts is named {sorted(missing)} (lora.target_modules)"
        )
    return initial


def initial_tensors(
    model: PreTrainedModel, lora: LoraSettings, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A0 and B0 as PEFT initialises them (Kaiming-uniform A with a = sqrt(5), zero B; of an embedding zero A and normal
    B); what LoRA-XS and full weights train starts at zero.

    Args:
        model: may be without weights, on the meta device.
        generator: without one there are no values, only shapes.
    """
    device = "cpu" if generator else "meta"
    initial: dict[str, Tensor] = {}
    head = model.get_output_embeddings()  # runs on some tokens alone, and often shares the embedding's weights
    for name, module in sorted(model.named_modules()):
        if name.rpartition(".")[2] not in lora.target_modules or module is head or _dims(module) != 2:
            continue
        out, inner = module.weight.shape
        if isinstance(module, torch.nn.Linear) and lora.kind == "xs":
            if lora.rank > min(out, inner):
                raise UserError(f"lora.rank={lora.rank} is more than {name} [{out}, {inner}] has; lora.kind=xs cuts it")
            initial[f"{name}.lora_R"] = torch.zeros(lora.rank, lora.rank, device=device)
        elif isinstance(module, torch.nn.Linear) and lora.kind == "full":
            initial[f"{name}.weight"] = torch.zeros(out, inner, device=device)
        elif isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / ((1 + 5) * inner))
            A = torch.empty(lora.rank, inner, device=device)
            initial[f"{name}.lora_A"] = A.uniform_(-bound, bound, generator=generator)
            initial[f"{name}.lora_B"] = torch.zeros(out, lora.rank, device=device)
        elif type(module) is torch.nn.Embedding and lora.kind == "lora":
            initial[f"{name}.lora_embedding_A"] = torch.zeros(lora.rank, out, device=device)
            initial[f"{name}.lora_embedding_B"] = torch.randn(inner, lora.rank, generator=generator, device=device)
    return initial


def _dims(module: torch.nn.Module) -> int:
    return getattr(getattr(module, "weight", None), "ndim", 0)


def _singular_factors(folder: Path, lora: LoraSettings, initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """A = V_r^T and B = U_r S_r of the base weights; the largest entry of a row of A is positive."""
    fixed = {}
    for name, weight in read_weights(folder, {f"{name.rpartition('.')[0]}.weight" for name in initial}):
        U, S, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
        A, B = Vt[: lora.rank], U[:, : lora.rank] * S[: lora.rank]
        sign = A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
        module = name.removesuffix(".weight")
        fixed[f"{module}.lora_A"] = (A * sign).contiguous()
        fixed[f"{module}.lora_B"] = (B * sign.T).contiguous()
    return fixed


def hash_root(folder: Path, lora: LoraSettings, initial: dict[str, Tensor], fixed: dict[str, Tensor]) -> str:
    """SHA-256 of decision 3; A and B of LoRA-XS too, which another machine's singular values may turn."""
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
                **({} if lora.kind == "lora" else {"kind": lora.kind}),
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
    for name in sorted(fixed):
        _add_tensor(digest, f"fixed.{name}", fixed[name])
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU: names, dtypes, shapes, bytes."""
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
