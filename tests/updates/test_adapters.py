"""What is wrong with a folder of a PEFT adapter is said before an engine meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gt_ray.errors import UserError
from gt_ray.pairs.models import EMBEDDED
from gt_ray.updates.adapters import inspect_adapter
from tests.conftest import change_adapter, make_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "mine")


def test_an_adapter_of_peft_is_described(folder: Path) -> None:
    adapter = inspect_adapter(folder)
    assert (adapter.name, adapter.rank, adapter.target_modules) == ("mine", 2, {"q_proj", "v_proj"})
    assert len(adapter.modules) == 8 and adapter.modules["model.layers.3.self_attn.q_proj"] == (96, 96)
    assert adapter.base_model == str(EMBEDDED / "llm")
    change_adapter(folder, rank_pattern={"v_proj": 6})
    again = inspect_adapter(folder)
    assert again.rank == 6 and again.sha256 != adapter.sha256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LoRA is scored"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"r": 0}, "rank 0 is none"),
        ({"r": None}, "rank None is none"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    change_adapter(folder, **values)
    with pytest.raises(UserError, match=message):
        inspect_adapter(folder)


def test_a_folder_without_config_or_weights_is_no_adapter(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no PEFT adapter"):
        inspect_adapter(tmp_path / "nowhere")
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged or no safetensors file"):
        inspect_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="an object is expected"):
        inspect_adapter(folder)


def test_weights_that_are_not_finite_or_no_lora_are_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
        inspect_adapter(folder)
    save_file({"delta.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"delta.weight \[2\] is no LoRA tensor of a Linear module"):
        inspect_adapter(folder)
    save_file({}, file)
    with pytest.raises(UserError, match="holds no LoRA tensors"):
        inspect_adapter(folder)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{module}.lora_A.weight": torch.zeros(2, 4), f"{module}.lora_B.weight": torch.zeros(4, 3)}, file)
    with pytest.raises(UserError, match=r"A and B of .*q_proj do not belong together"):
        inspect_adapter(folder)
