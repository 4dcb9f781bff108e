"""Adapter folders (PEFT, loadable), and files that are written whole or not at all.

Adapters and update files (update_files.py) never mix: an adapter names its tensors `base_model.model.<module>...`, an
update file `delta.<module>...`, and each reader refuses the other's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.pairs.models import EMBEDDED_PREFIX, resolve
from gt_ray.pairs.root import Root
from gt_ray.updates.model_folders import read_model, write_model

PEFT_PREFIX = "base_model.model."
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def write_adapter(folder: Path, update_Ld: Tensor, root: Root, card: str = "") -> None:
    """Write root + update (Eq. 3) as a PEFT folder that PEFT and vLLM load; of full weights as a model folder.

    Args:
        card: model card; the folder's README.md.
    """
    check_finite(update_Ld, str(folder))
    if root.lora.kind == "full":
        write_model(folder, root.layout.to_tensors(update_Ld.float()), root, card)
        return
    existed = folder.exists()
    try:
        # The embedded pair has no Hub id; PEFT and vLLM find it by folder.
        for name, content in adapter_files(update_Ld, root, card, base_model_path(root)).items():
            write_atomically(folder / name, content)
    except UserError:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def base_model_path(root: Root) -> str:
    """Where PEFT and vLLM find a root's base model on this machine."""
    embedded = root.base_model.startswith(EMBEDDED_PREFIX)
    return str(resolve(root.base_model)) if embedded else root.base_model


def adapter_files(update_Ld: Tensor, root: Root, card: str, base_model: str) -> dict[str, bytes]:
    """The files of root + update (Eq. 3) as a PEFT folder; the weights are the last.

    Args:
        base_model: what the adapter names as its base model.
    """
    from peft import LoraConfig, TaskType

    delta = root.layout.to_tensors(update_Ld.float())
    tensors = _peft_tensors({name: initial + delta[name] for name, initial in root.initial.items()}, root)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=root.lora.rank,
        lora_alpha=root.lora.alpha,
        target_modules=list(root.lora.target_modules),
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    found = {ADAPTER_CONFIG: json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list).encode()}
    if card:
        found["README.md"] = card.encode()
    return found | {ADAPTER_WEIGHTS: save(tensors, {"format": "pt", "root": root.hash})}


def _peft_tensors(adapted: dict[str, Tensor], root: Root) -> dict[str, Tensor]:
    """Parameters by the names that PEFT gives them; those of LoRA-XS as the LoRA that they are."""
    found = {}
    for name, tensor in adapted.items():
        module, _, part = name.rpartition(".")
        if part == "lora_R":
            found[f"{PEFT_PREFIX}{module}.lora_A.weight"] = root.fixed[f"{module}.lora_A"]
            found[f"{PEFT_PREFIX}{module}.lora_B.weight"] = root.fixed[f"{module}.lora_B"] @ tensor
        else:
            found[f"{PEFT_PREFIX}{name}{_peft_suffix(part)}"] = tensor
    return found


def _from_peft(tensors: dict[str, Tensor], root: Root, folder: Path) -> dict[str, Tensor]:
    """Inverse of `_peft_tensors`, of names without PEFT's prefix.

    Raises:
        UserError: LoRA that is none of this root's LoRA-XS.
    """
    named = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    if root.lora.kind != "xs":
        return named
    found = {}
    for name, tensor in named.items():
        module, _, part = name.rpartition(".")
        fixed = root.fixed.get(name)
        if fixed is None or fixed.shape != tensor.shape:
            found[name] = tensor  # the layout says what is wrong with it
            continue
        if part == "lora_A":
            rest, whole = tensor.float() - fixed, fixed
        else:
            found[f"{module}.lora_R"] = torch.linalg.lstsq(fixed, tensor.float()).solution
            rest, whole = fixed @ found[f"{module}.lora_R"] - tensor.float(), tensor.float()
        if rest.norm() > 1e-3 * whole.norm():
            raise UserError(f"{folder}: {name} is not spanned by the singular vectors of root {root.hash[:8]}")
    return found


def _peft_suffix(part: str) -> str:
    """Embeddings' adapters are parameters in PEFT, others modules."""
    return "" if part.startswith("lora_embedding") else ".weight"


def read_adapter(folder: Path, root: Root) -> Tensor:
    """Read a PEFT adapter of the root's base model as an update [L, d]; of full weights a model folder.

    Raises:
        UserError: no adapter, or one of another root, rank, alpha, target modules or base model.
    """
    if root.lora.kind == "full":
        return _one_update(read_model(folder, root), root, folder)
    config_file = folder / ADAPTER_CONFIG
    config = read_adapter_config(folder)
    tensors, metadata = read_tensors(folder / ADAPTER_WEIGHTS)
    short = root.hash[:8]
    if "root" in metadata and metadata["root"] != root.hash:
        raise UserError(f"{folder} is an adapter of root {metadata['root']}, not of {root.hash} ({root.base_model})")
    if "root" not in metadata and config.get("base_model_name_or_path") not in _names(root):
        raise UserError(
            f"adapter of base model {config.get('base_model_name_or_path')!r}, but root {short} is of "
            f"{root.base_model!r} ({config_file}: base_model_name_or_path)"
        )
    for key, wanted in (("r", root.lora.rank), ("lora_alpha", root.lora.alpha)):
        if config.get(key) != wanted:
            raise UserError(f"adapter {key} {config.get(key)}, but root {short} has {wanted} ({config_file}: {key})")
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise UserError(f"adapter with {key}, but root {short} is plain LoRA ({config_file}: {key})")
    if set(config.get("target_modules") or ()) != set(root.lora.target_modules):
        raise UserError(
            f"adapter of target modules {config.get('target_modules')}, but root {short} has "
            f"{list(root.lora.target_modules)} ({config_file}: target_modules)"
        )
    if wrong := [name for name in tensors if not name.startswith(PEFT_PREFIX)]:
        raise UserError(f"{folder}: tensor {wrong[0]} is not part of a PEFT adapter; is it an update file?")
    named = _from_peft({name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}, root, folder)
    update_Ld = _one_update(named, root, folder) - root.layout.to_array(root.initial)
    check_finite(update_Ld, str(folder))
    return update_Ld


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The config of a PEFT adapter.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"an object is expected, not {type(config).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no PEFT adapter: {ADAPTER_CONFIG}: {error}") from error
    return config


@contextlib.contextmanager
def alone(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Keep other processes out of a folder that do the same; a killed one lets go.

    Args:
        busy: called where another one is in; this one waits if it returns.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def replace_folder(out: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a folder, and put it in the place of `out`."""
    partial_out = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    write(partial_out)
    shutil.rmtree(out, ignore_errors=True)
    partial_out.rename(out)


def write_atomically(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file so that it is there whole or not at all (write, then rename).

    Args:
        mode: permissions, less the umask.

    Raises:
        UserError: the disk is full or not writable; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
        partial.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"could not write {path}: {error.strerror or error}; free some space and run it again"
        ) from error


def _one_update(tensors: dict[str, Tensor], root: Root, where: Path) -> Tensor:
    try:
        update_Ld = root.layout.to_array(tensors)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if update_Ld.dim() != 2:
        raise UserError(f"{where}: holds several updates {list(update_Ld.shape)}, one is expected")
    return update_Ld


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: it is damaged or none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def check_finite(update_Ld: Tensor, where: str) -> None:
    """Refuse an update with NaN or infinity, by a UserError."""
    if not bool(torch.isfinite(update_Ld).all()):
        raise UserError(f"{where}: the update holds NaN or infinity; the fine-tune diverged, lower its learning rate")


def _names(root: Root) -> set[str]:
    return {root.base_model, str(resolve(root.base_model))}
