"""Sizes of known models without their weights."""

from __future__ import annotations

import pytest
from transformers import Qwen2Config, T5Config

from gt_ray.config import LoraSettings
from gt_ray.errors import UserError
from gt_ray.pairs.families import known_config, layout_of, shape_of


@pytest.mark.parametrize(
    ("model", "L", "d"),
    [
        ("0.5B", 24, 5632),
        ("1.5B", 28, 9728),
        ("3B", 36, 12800),
        ("7B", 28, 22528),
        ("14B", 48, 32768),
        ("32B", 64, 32768),
    ],
)
def test_blocks_have_the_sizes_of_the_design(model: str, L: int, d: int) -> None:
    layout = layout_of(f"Qwen/Qwen2.5-{model}-Instruct", LoraSettings())
    assert (layout.L, layout.d) == (L, d)


def test_configs_are_known_by_hub_id() -> None:
    qwen, t5 = known_config("Qwen/Qwen2.5-7B-Instruct"), known_config("google/flan-t5-xxl")
    assert isinstance(qwen, Qwen2Config) and qwen.num_key_value_heads == 4
    assert isinstance(t5, T5Config) and (t5.d_model, t5.d_kv, t5.feed_forward_proj) == (4096, 64, "gated-gelu")
    assert known_config("somebody/else") is None
    parameters = sum(parameter.numel() for parameter in shape_of("Qwen/Qwen2.5-7B-Instruct").parameters())
    assert parameters == 7_615_616_512


def test_a_folder_is_read_and_nothing_else_is_guessed(tmp_path: object) -> None:
    assert layout_of("embedded:llm", LoraSettings()).L == 4
    with pytest.raises(UserError):
        shape_of("no/such-model")
