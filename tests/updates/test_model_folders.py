"""Folders of whole models, against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gt_ray.config import LoraSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.models import EMBEDDED
from gt_ray.pairs.root import Root, make_root
from gt_ray.updates.model_folders import read_model, write_model
from tests.conftest import copy_tokenizer

FULL = LoraSettings(kind="full", target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def root() -> Root:
    return make_root(ModelSettings(model="embedded:tinylm", lora=FULL))


@pytest.fixture(scope="module")
def delta(root: Root) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 1e-4 * torch.randn(one.shape, generator=generator) for name, one in root.initial.items()}


def test_a_small_update_of_a_16_bit_model_survives_loading_as_users_do(
    root: Root, delta: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_model(tmp_path / "model", delta, root, "# Card")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tinylm")
    assert base.dtype == torch.float16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights, before = loaded.state_dict(), base.state_dict()
    for name, tensor in delta.items():
        assert torch.allclose(weights[name] - before[name].float(), tensor, atol=1e-7)
    assert all(torch.equal(weights[name], before[name].float()) for name in before if name not in delta)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert (tmp_path / "model" / "README.md").read_text() == "# Card"
    found = read_model(tmp_path / "model", root)
    assert found.keys() == delta.keys()
    assert all(torch.allclose(found[name], delta[name], atol=1e-7) for name in delta)


def test_shards_are_read_and_written(root: Root, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tinylm")
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    copy_tokenizer(tmp_path / "base")
    sharded = make_root(ModelSettings(model=str(tmp_path / "base"), lora=FULL))
    assert sharded.hash == root.hash and len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    delta = {name: torch.ones_like(one) for name, one in sharded.initial.items()}
    write_model(tmp_path / "model", delta, sharded, "")
    assert all(torch.allclose(one, torch.ones(()), atol=1e-6) for one in read_model(tmp_path / "model", root).values())


def test_only_what_it_wrote_is_replaced(root: Root, delta: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    write_model(tmp_path / "work", delta, root, "")  # empty
    write_model(tmp_path / "work", delta, root, "again")
    assert (tmp_path / "work" / "README.md").read_text() == "again"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="exists and is no generated model"):
        write_model(tmp_path / "mine", delta, root, "")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "work"]


def test_a_folder_of_another_root_or_of_none_is_refused(
    root: Root, delta: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_model(tmp_path / "model", delta, root, "")
    other = make_root(
        ModelSettings(model="embedded:tinylm", lora=FULL.model_copy(update={"target_modules": ("k_proj",)}))
    )
    with pytest.raises(UserError, match=f"is of root {root.hash}, not of {other.hash}"):
        read_model(tmp_path / "model", other)
    with pytest.raises(UserError, match="is of root None"):
        read_model(EMBEDDED / "tinylm", root)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    assert config["gt_ray_root"] == root.hash
    with pytest.raises(UserError, match="no usable model folder"):
        read_model(tmp_path / "model", root)
