"""Finding and loading base models, and what is said of folders that are none."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gt_ray.config import ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.models import EMBEDDED, load_model, load_tokenizer, resolve, same_model, weight_files
from gt_ray.pairs.root import make_root

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of a model folder, to be damaged."""
    return shutil.copytree(tiny_pair[0], tmp_path / "model")


def remove(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def overwrite(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def truncate(name: str, n: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n])


def only_other_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard(folder: Path) -> list[Path]:
    """Save the folder's weights as several shards, as large models are."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model.safetensors"), "has no weights"),
        (only_other_weights, "has no weights"),
        (truncate("model.safetensors", 5000), "the weights in .* are damaged"),
        (truncate("model.safetensors", 0), "the weights in .* are damaged"),
        (remove("config.json"), r"has no config\.json"),
        (overwrite("config.json", "{"), r"config\.json is of no causal language model"),
        (overwrite("config.json", "{}"), r"config\.json is of no causal language model"),
        (overwrite("config.json", '{"model_type": "t5"}'), r"config\.json is of no causal language model"),
        (remove("tokenizer.json"), "has no tokenizer"),
        (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
        (overwrite("tokenizer.json", "{"), "has no usable tokenizer"),
        (overwrite("tokenizer.json", "{}"), "has no usable tokenizer"),
        (overwrite("tokenizer_config.json", "{"), "has no usable tokenizer"),
        (remove("chat_template.jinja"), "has no chat template; use an instruction-tuned model"),
    ],
)
def test_a_folder_that_is_no_model_is_named_with_what_it_lacks(damage: Damage, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        make_root(ModelSettings(model=str(folder)))
    assert str(folder) in str(raised.value)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shards = shard(folder)
    assert len(shards) > 1 and weight_files(folder) == shards == weight_files(resolve(str(folder)))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks weights: {shards[1].name} .1 of {len(shards)} missing."):
        resolve(str(folder))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": ["model-1.safetensors"]}'])
def test_a_damaged_index_of_shards_is_an_error(content: str, folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is no index of weights"):
        resolve(str(folder))


def test_an_unknown_embedded_model_names_the_known_ones() -> None:
    with pytest.raises(
        UserError, match="no embedded model 'embedded:nano'; known: embedded:llm, embedded:llm-wide, embedded:tinylm"
    ):
        resolve("embedded:nano")


@pytest.mark.parametrize("model", ["gt-ray-tests/no-such-model", "no-such-model", "no/such/folder", "/no/such/folder"])
def test_what_is_neither_folder_nor_on_the_hub_is_an_error_at_once(model: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"model '{model}' is neither a folder nor to be had from the Hub"):
        resolve(model)
    assert time.perf_counter() - start < 5


def test_a_tokenizer_without_padding_token_pads_with_the_end_token(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token == "<|end|>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_frozen_and_of_the_configured_dtype(dtype: str, tiny_pair: tuple[Path, Path]) -> None:
    model = load_model(ModelSettings.model_validate({"model": str(tiny_pair[0]), "dtype": dtype}))
    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(getattr(torch, dtype), False)}


def test_models_are_the_same_by_name_or_by_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(EMBEDDED / "llm")
    assert same_model("some/model", "some/model") and not same_model("some/model", "other/model")
    assert same_model(str(tmp_path / "link"), str(EMBEDDED / "llm"))
    assert not same_model(str(EMBEDDED / "llm"), str(EMBEDDED / "tinylm"))
