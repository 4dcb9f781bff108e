"""Finding and loading base models: by Hub id, by folder, or the embedded pair that ships with the package."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from gt_ray.config import ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.devices import Device, bring_inputs, device_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_PREFIX = "embedded:"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


def resolve(model: str) -> Path:
    """The local folder of a model.

    Args:
        model: `embedded:tinylm`, `embedded:llm`, a folder, or a Hub id (downloaded, or taken from the local cache).

    Raises:
        UserError: no such model, or a folder without config or safetensors weights.
    """
    if model.startswith(EMBEDDED_PREFIX):
        folder = EMBEDDED / model.removeprefix(EMBEDDED_PREFIX)
        if not folder.is_dir():
            known = ", ".join(f"{EMBEDDED_PREFIX}{path.name}" for path in sorted(EMBEDDED.iterdir()) if path.is_dir())
            raise UserError(f"no embedded model {model!r}; known: {known}")
    elif Path(model).is_dir():
        folder = Path(model)
    else:
        folder = _download(model)
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no config.json")
    if not weight_files(folder):
        raise UserError(f"model folder {folder} has no weights (model*.safetensors); other formats are not loaded")
    return folder


def same_model(name: str, other: str) -> bool:
    """Whether two names are of one model: equal, or of one folder."""
    return name == other or (Path(name).is_dir() and Path(other).is_dir() and Path(name).samefile(other))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a model folder: a single one, or the shards of an index.

    Raises:
        UserError: the index is not readable, or names a shard that is not there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        shards = sorted(
            {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weights: {error!r}") from error
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(f"model folder {folder} lacks weights: {missing[0]} ({len(missing)} of {len(shards)} missing)")
    return shards


def read_weights(folder: Path, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Some of a model's tensors with their names, one after another, as they are in the files.

    Raises:
        UserError: a file has no tensor of such a name; after all others have been read.
    """
    missing = set(names)
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in sorted(missing & set(file.keys())):
                yield name, file.get_tensor(name)
                missing.remove(name)
    if missing:
        raise UserError(
            f"{folder}: no tensor of the weight files is named {min(missing)}; lora.kind=xs and cross_lora need "
            "weights stored by the names of the model's modules"
        )


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(f"model {model!r} is neither a folder nor to be had from the Hub: {error}") from error


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a chat template and a padding token.

    Raises:
        UserError: no tokenizer, or one without a chat template.
    """
    from transformers import AutoTokenizer

    folder = resolve(model)
    # Without its files transformers makes an empty tokenizer of the model's type.
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(f"model folder {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"model folder {folder} has no usable tokenizer: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {folder} has no chat template; use an instruction-tuned model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: ModelSettings, device: Device | Sequence[Device] = "cpu") -> PreTrainedModel:
    """The frozen base model in its configured dtype, in evaluation mode.

    Args:
        device: several: layers are spread over them (devices.py).

    Raises:
        UserError: several devices, but transformers does not know the model's layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, dtype = resolve(settings.model), getattr(torch, settings.dtype)
    devices = [device] if isinstance(device, str | torch.device) else list(device)
    model: PreTrainedModel
    if len(devices) == 1:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(devices[0])
    else:
        with torch.device("meta"):
            places = device_map(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), devices)
        # Weights go from the files to their GPUs; a node's memory may not hold all of them for each of its actors.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=places)
        bring_inputs(model, places)
    model.requires_grad_(False)
    return model.eval()
