"""Stacked adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gt_ray.config import LoraSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.learning.engine import Engine
from gt_ray.learning.samples import TrainingSet, encode
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import Root, make_root
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows
from gt_ray.updates.files import read_adapter, write_adapter
from gt_ray.updates.update_files import UpdateInfo, read_update, write_update

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
GROUPS = {
    "values and outputs": LoraSettings(target_modules=("v_proj", "o_proj")),
    "mlp": LoraSettings(target_modules=MLP),
    "embedding": LoraSettings(target_modules=("embed_tokens",)),
    "all": LoraSettings(target_modules=(*ATTENTION, *MLP, "embed_tokens")),
    "xs": LoraSettings(kind="xs", rank=4, target_modules=(*ATTENTION, *MLP)),
    "full": LoraSettings(kind="full", target_modules=("q_proj", "k_proj", "down_proj")),
}
"""Parameter groups of section 4.2."""


def test_each_adapter_sees_its_own_samples_only(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[1]), dtype="float32")
    root, model = make_root(settings), load_model(settings)
    ids = torch.randint(10, 200, (6, 7), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with torch.no_grad(), stacked(model, root, G=3) as parameters:
        for parameter in parameters.values():
            parameter.normal_(std=0.3)
        together = model(ids).logits
        apart = []
        for g in range(3):
            alone = {name: parameter[g].clone() for name, parameter in parameters.items()}
            apart.append(_plain_lora(settings, alone, root.scaling, ids[2 * g : 2 * g + 2]))
    assert torch.allclose(together, torch.cat(apart), atol=1e-4)


def test_leaving_restores_the_base_model(tiny_pair: tuple[Path, Path]) -> None:
    settings = ModelSettings(model=str(tiny_pair[0]), dtype="float32")
    root, model = make_root(settings), load_model(settings)
    ids = torch.arange(20, 30)[None]
    before, names = model(ids).logits, [name for name, _ in model.named_modules()]
    with stacked(model, root, G=2) as parameters, torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(1.0)
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("lora", GROUPS.values(), ids=GROUPS)
def test_every_group_is_what_its_folder_is_for_others_and_survives_files(lora: LoraSettings, tmp_path: Path) -> None:
    settings = ModelSettings(model="embedded:tinylm", dtype="float32", lora=lora)
    root, model = make_root(settings), load_model(settings)
    update_GLd = root.layout.to_array(
        {
            name: 0.1 * torch.randn(2, *one.shape, generator=torch.Generator().manual_seed(i))
            for i, (name, one) in enumerate(sorted(root.initial.items()))
        }
    )
    ids = torch.randint(10, 200, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), stacked(model, root, G=2) as parameters:
        add_updates(parameters, root.layout, update_GLd)
        together = model(ids).logits
    assert not torch.allclose(together, model(ids).logits, atol=1e-2)
    for g in range(2):
        folder = tmp_path / str(g)
        write_adapter(folder, update_GLd[g], root)
        assert torch.allclose(read_adapter(folder, root), update_GLd[g], atol=1e-4)
        if lora.kind == "full":
            worn = AutoModelForCausalLM.from_pretrained(folder)
        else:
            worn = PeftModel.from_pretrained(load_model(settings), str(folder))
        with torch.no_grad():
            assert torch.allclose(together[2 * g : 2 * g + 2], worn(ids[2 * g : 2 * g + 2]).logits, atol=1e-3)
        write_update(tmp_path / "update.safetensors", update_GLd[g], root, UpdateInfo({}, 1))
        assert torch.equal(read_update(tmp_path / "update.safetensors", root)[0], update_GLd[g])
    root.save(tmp_path / "root.safetensors")
    loaded = Root.load(tmp_path / "root.safetensors")
    assert loaded.hash == root.hash and loaded.layout == root.layout and loaded.fixed.keys() == root.fixed.keys()


@pytest.mark.parametrize("lora", GROUPS.values(), ids=GROUPS)
def test_every_group_can_be_fine_tuned(lora: LoraSettings) -> None:
    settings = ModelSettings(model="embedded:tinylm", dtype="float32", lora=lora)
    fine_tune = settings.fine_tune.model_copy(update={"steps": 12, "batch_size": 8, "learning_rate": 1e-2})
    samples = encode(
        load_tokenizer(settings.model), TASKS["gsm8k"], rows("gsm8k", "public-train", "north-day", 0, 32), 512
    )
    engine = Engine(load_model(settings), make_root(settings), adapters_at_once=2)
    for _, result in engine.fine_tune([TrainingSet(samples, seed) for seed in range(2)], fine_tune):
        assert not isinstance(result, UserError)
        assert result.losses[-1] < 0.9 * result.losses[0]
        blocks = result.snapshots_JLd[-1].abs().sum(1)
        assert bool((blocks > 0).all())


def test_attention_mlp_and_embedding_are_blocks_of_groups_of_their_own() -> None:
    layout = make_root(ModelSettings(model="embedded:tinylm", dtype="float32", lora=GROUPS["all"])).layout
    assert layout.blocks[0].name == "model.embed_tokens"
    assert [block.name.rpartition(".")[2] for block in layout.blocks[1:3]] == ["mlp", "self_attn"]
    assert len(layout.group_widths) == 3 and layout.groups[1:3] == layout.groups[3:5]


def test_what_no_kind_adapts_is_refused() -> None:
    for lora in (
        {"kind": "full", "target_modules": ["embed_tokens"]},
        {"kind": "xs", "target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
    ):
        with pytest.raises(UserError, match="no module that lora"):
            make_root(ModelSettings.model_validate({"model": "embedded:tinylm", "lora": lora}))


def _plain_lora(
    settings: ModelSettings, adapter: dict[str, torch.Tensor], scaling: float, ids: torch.Tensor
) -> torch.Tensor:
    """Logits with W + scaling * B A written into the weights."""
    model = load_model(settings)
    for module in {name.rpartition(".")[0] for name in adapter}:
        model.get_submodule(module).weight += scaling * adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
    logits: torch.Tensor = model(ids).logits
    return logits


def test_lora_that_is_none_of_a_roots_xs_is_refused(tmp_path: Path) -> None:
    targets = ("q_proj", "k_proj")
    plain, xs = (
        make_root(ModelSettings(model="embedded:tinylm", lora=LoraSettings(kind=kind, target_modules=targets)))  # type: ignore[arg-type]
        for kind in ("lora", "xs")
    )
    write_adapter(tmp_path / "a", torch.randn(plain.layout.L, plain.layout.d), plain)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")  # of an unknown root now
    with pytest.raises(UserError, match="is not spanned by the singular vectors"):
        read_adapter(tmp_path / "a", xs)
    for name, one in tensors.items():
        module, part = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        tensors[name] = xs.fixed[f"{module}.lora_A"] if part == "lora_A" else torch.randn_like(one)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lora_B is not spanned"):
        read_adapter(tmp_path / "a", xs)
