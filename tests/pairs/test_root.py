"""The root: its hash, its initial adapter, its file, its cache."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gt_ray.pairs.root
from gt_ray.config import LoraSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.root import Root, initial_adapter, make_root

Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the model folder of two layers, to be changed."""
    return shutil.copytree(tiny_pair[1], tmp_path / "model")


def settings(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings.model_validate({"model": str(folder), "dtype": "float32"} | changes)


def flip_a_bit(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        edit(tree)
        (folder / name).write_text(json.dumps(tree))

    return change


def rename_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["renamed"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def reshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(2, -1)
    save_file(tensors, folder / "model.safetensors")


def retype_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int32)  # the same bytes
    save_file(tensors, folder / "model.safetensors")


def swap_two_tokens(tree: dict[str, Any]) -> None:
    vocabulary = tree["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flip_a_bit(folder / "model.safetensors"),
        rename_a_tensor,
        reshape_a_tensor,
        retype_a_tensor,
        edit_json("tokenizer.json", swap_two_tokens),
        edit_json("tokenizer.json", lambda tree: tree["model"]["merges"].pop()),
        edit_json("tokenizer_config.json", lambda tree: tree.update(eos_token="<|user|>")),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    ],
)
def test_the_hash_changes_with_any_byte_of_the_model_that_matters(change: Change, folder: Path) -> None:
    before = make_root(settings(folder)).hash
    change(folder)
    assert make_root(settings(folder)).hash != before


def test_the_hash_changes_with_everything_that_makes_the_initial_adapter(folder: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"root_seed": 1},
        {"lora": {"rank": 3}},
        {"lora": {"alpha": 8}},
        {"lora": {"target_modules": ["q_proj"]}},
        {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    ]
    assert len({make_root(settings(folder, **change)).hash for change in changes}) == len(changes)


def shard(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def add_metadata(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(reversed(tensors.items())), folder / "model.safetensors", metadata={"format": "pt", "made": "today"})


def add_unrelated_files(folder: Path) -> None:
    (folder / "README.md").write_text("A model.")
    (folder / "training_args.json").write_text("{}")
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "consolidated.safetensors"):
        save_file({"other": torch.ones(3)}, folder / name)
    (folder / "checkpoint-1").mkdir()


def touch_all(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (1, 1))


@pytest.mark.parametrize(
    "change",
    [
        shard,
        add_metadata,
        add_unrelated_files,
        touch_all,
        lambda folder: (folder / "generation_config.json").unlink(),
        edit_json("tokenizer.json", lambda tree: tree.update(truncation=None, padding=None)),
        edit_json("tokenizer.json", lambda tree: [tree.update({key: tree.pop(key)}) for key in sorted(tree)]),
        edit_json("config.json", lambda tree: tree.update(transformers_version="4.0.0", _name_or_path="elsewhere")),
    ],
)
def test_the_hash_changes_with_nothing_else_in_the_folder(change: Change, folder: Path) -> None:
    before = make_root(settings(folder)).hash
    change(folder)
    assert make_root(settings(folder)).hash == before


def test_the_hash_does_not_depend_on_place_or_on_how_the_model_is_used(
    tiny_pair: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_root(settings(tiny_pair[1])).hash
    assert len(before) == 64
    monkeypatch.chdir(folder.parent)
    for model in (folder, Path("model"), Path("./model/")):
        assert make_root(settings(model)).hash == before
    torch.manual_seed(5)
    used = {"dtype": "bfloat16", "fine_tune": {"steps": 3}, "lora": {"target_modules": ["k_proj", "q_proj"]}}
    assert make_root(settings(folder, **used)).hash == before


def test_the_initial_adapter_is_the_same_for_the_same_seed_only(folder: Path) -> None:
    first, again, other = (make_root(settings(folder, root_seed=seed)).initial for seed in (4, 4, 5))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) == name.endswith("lora_B")


def test_the_initial_adapter_has_the_names_and_the_distribution_of_pefts(folder: Path) -> None:
    lora = settings(folder, lora={"rank": 256}).lora
    ours = initial_adapter(folder, lora, 0)
    torch.manual_seed(0)
    config = LoraConfig(r=256, lora_alpha=4, target_modules=["q_proj", "k_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter.detach()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in theirs.items()}
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        if name.endswith("lora_B"):
            assert not tensor.any() and not theirs[name].any()
            continue
        bound = 1 / math.sqrt(tensor.shape[1])  # Kaiming-uniform with a = sqrt(5)
        for found in (tensor, theirs[name]):
            assert 0.99 * bound < found.abs().max() <= bound
            assert abs(float(found.mean())) < 0.03 * bound
            assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not torch.equal(*(ours[f"model.layers.{layer}.self_attn.q_proj.lora_A"] for layer in (0, 1)))


def test_an_unknown_target_module_is_named(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"no module that lora.kind=lora adapts is named \['query'\] \(lora\.target_modules\)"
    ):
        make_root(settings(folder, lora={"target_modules": ["q_proj", "query"]}))


def test_a_root_file_gives_back_the_root(folder: Path, tmp_path: Path) -> None:
    root = make_root(settings(folder, lora={"rank": 3, "alpha": 1.5}))
    root.save(tmp_path / "root.safetensors")
    found = Root.load(tmp_path / "root.safetensors")
    assert (found.hash, found.base_model, found.lora) == (root.hash, root.base_model, root.lora)
    assert (found.scaling, found.modules, found.layout) == (0.5, root.modules, root.layout)
    assert found.initial.keys() == root.initial.keys()
    assert all(torch.equal(found.initial[name], tensor) for name, tensor in root.initial.items())


def lose_metadata(key: str) -> Change:
    def change(file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        del metadata[key]
        save_file(load_file(file), file, metadata=metadata)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), "is damaged or missing"),
        (lambda file: file.write_bytes(b""), "is damaged or missing"),
        (lambda file: file.write_bytes(b"no safetensors file"), "is damaged or missing"),
        (lambda file: file.unlink(), "is damaged or missing"),
        (flip_a_bit, "is damaged or missing: checksum differs"),
        (lose_metadata("root"), "is damaged or missing"),
        (lose_metadata("lora"), "is damaged or missing"),
        (lose_metadata("format"), "is not a root file"),
        (lambda file: save_file({"x": torch.ones(1)}, file), "is not a root file"),
    ],
)
def test_a_damaged_root_file_is_an_error(damage: Change, message: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "root.safetensors"
    make_root(settings(folder)).save(file)
    damage(file)
    with pytest.raises(UserError, match=message) as raised:
        Root.load(file)
    assert str(file) in str(raised.value)


def test_a_cached_root_is_not_hashed_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_root(settings(folder), tmp_path / "roots")
    assert first.hash == make_root(settings(folder)).hash and len(list((tmp_path / "roots").iterdir())) == 1
    monkeypatch.setattr(gt_ray.pairs.root, "hash_root", lambda *_: pytest.fail("hashed again"))
    again = make_root(settings(folder), tmp_path / "roots")
    assert again.hash == first.hash and again.base_model == str(folder)
    assert all(torch.equal(again.initial[name], tensor) for name, tensor in first.initial.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flip_a_bit(folder / "model.safetensors"),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        edit_json("tokenizer.json", swap_two_tokens),
    ],
)
def test_the_cache_notices_a_changed_file(change: Change, folder: Path, tmp_path: Path) -> None:
    before = make_root(settings(folder), tmp_path / "roots").hash
    change(folder)
    after = make_root(settings(folder), tmp_path / "roots").hash
    assert after != before and after == make_root(settings(folder)).hash


def test_the_cache_tells_seeds_and_settings_apart(folder: Path, tmp_path: Path) -> None:
    for changes in ({}, {"root_seed": 1}, {"lora": {"alpha": 8}}):
        make_root(settings(folder), tmp_path / "roots")
        assert (
            make_root(settings(folder, **changes), tmp_path / "roots").hash
            == make_root(settings(folder, **changes)).hash
        )


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: file.write_bytes(b"")])
def test_a_damaged_root_in_the_cache_is_made_again(damage: Change, folder: Path, tmp_path: Path) -> None:
    before = make_root(settings(folder), tmp_path / "roots").hash
    (cached,) = (tmp_path / "roots").iterdir()
    damage(cached)
    assert make_root(settings(folder), tmp_path / "roots").hash == before == Root.load(cached).hash


def test_a_cache_that_cannot_be_written_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "roots").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"could not write .*roots"):
        make_root(settings(folder), tmp_path / "roots")


def test_kinds_of_adapters_never_share_a_hash_and_xs_hashes_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [LoraSettings.model_validate({"kind": kind}) for kind in ("lora", "xs", "full")]
    roots = [make_root(ModelSettings(model="embedded:tinylm", lora=lora)) for lora in kinds]
    assert len({root.hash for root in roots}) == 3
    svd = torch.linalg.svd

    def turned(*args: Any, **kwargs: Any) -> Any:
        U, S, Vt = svd(*args, **kwargs)
        return U, S * (1 + 1e-6), Vt

    monkeypatch.setattr(torch.linalg, "svd", turned)
    assert make_root(ModelSettings(model="embedded:tinylm", lora=kinds[1])).hash != roots[1].hash


def test_modules_that_no_kind_can_adapt_are_errors(folder: Path) -> None:
    for lora, error in (
        ({"target_modules": ["input_layernorm"]}, "no module that lora.kind=lora adapts"),
        ({"kind": "full", "target_modules": ["norm"]}, "no module that lora.kind=full adapts"),
        ({"kind": "xs", "rank": 100}, r"lora.rank=100 is more than model\.layers\.0\.self_attn\.k_proj"),
    ):
        with pytest.raises(UserError, match=error):
            make_root(ModelSettings.model_validate({"model": str(folder), "lora": lora}))
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): one for name, one in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor of the weight files is named model\.layers"):
        make_root(ModelSettings.model_validate({"model": str(folder), "lora": {"kind": "xs"}}))
