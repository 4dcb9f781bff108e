"""Counts against real modules and optimizers."""

from __future__ import annotations

import pytest
import torch

from gt_ray.config import load_config
from gt_ray.errors import UserError
from gt_ray.training.planner import shape_of_network
from gt_ray.training.sizes import STRATEGIES, build_shape, held, parts, shadow_counts

EMBEDDED = load_config("embedded")


def test_parts_are_those_of_the_real_network_and_nothing_else() -> None:
    model = build_shape(EMBEDDED)
    found = parts(model)
    assert found["phi, encoder"] == sum(p.numel() for p in model.phi.encoder.parameters())  # type: ignore[union-attr]
    assert found["linear path"] == sum(p.numel() for p in model.linear.parameters())  # type: ignore[union-attr]
    assert sum(found.values()) == sum(p.numel() for p in model.parameters())
    shape = shape_of_network(EMBEDDED)
    assert shape.parts == found and shape.layers == (2, 2)
    assert shape.buffers == sum(buffer.nbytes for buffer in model.buffers())
    assert shape.tokens == (model.layout_S.L, model.layout_T.L) and shape.widths == (model.layout_S.d, model.layout_T.d)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("qwen2.5-3b-to-7b", 776_687_616), ("qwen2.5-0.5b-to-32b", 790_353_920)]
)
def test_parameters_of_full_sizes_are_those_that_trained_on_a_gpu(preset: str, parameters: int) -> None:
    found = shape_of_network(load_config(preset, ["grad_transformer.linear_rank=0"]))
    assert sum(found.parts.values()) == found.P == parameters


@pytest.mark.parametrize(("phi", "billions"), [("large", 0.72), ("xl", 2.72), ("xxl", 10.87)])
def test_phi_is_as_large_as_its_name_says_but_for_the_token_embedding(phi: str, billions: float) -> None:
    found = shape_of_network(
        load_config("qwen2.5-0.5b-to-32b", [f"grad_transformer.phi.pretrained=google/flan-t5-{phi}"])
    ).parts
    assert (found["phi, encoder"] + found["phi, decoder"]) / 1e9 == pytest.approx(billions, rel=0.02)


def test_what_is_held_is_what_a_real_optimizer_holds() -> None:
    model = build_shape(EMBEDDED)
    optimizer = torch.optim.AdamW(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    items = held(
        sum(parts(model).values()), sum(b.nbytes for b in model.buffers()), 1, "ddp", bf16=False, average=True
    ).on_gpu
    weights = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
    states = [state for of_weight in optimizer.state.values() for state in of_weight.values() if state.numel() > 1]
    assert items["weights"] == items["gradients"] == items["moving average"] == weights
    assert (
        items["moments"] == sum(state.untyped_storage().nbytes() for state in states) and not items["gradient buckets"]
    )
    assert items["buffers"] == sum(buffer.untyped_storage().nbytes() for buffer in model.buffers())


def test_each_strategy_shares_out_more_than_the_one_before() -> None:
    P = 3_000_000_000
    found = {one: held(P, 0, 8, one, bf16=True, average=True).on_gpu for one in STRATEGIES}
    assert found["ddp"]["weights"] == 4 * P and found["ddp"]["gradient buckets"] == 4 * P
    assert found["zero1"]["weights"] == found["zero1"]["gradients"] == 4 * P
    assert found["zero1"]["moments"] == 8 * P // 8 and found["zero1"]["master weights"] == 4 * P // 8
    assert found["zero2"]["weights"] == 4 * P and found["zero2"]["gradients"] == 4 * P // 8
    assert found["zero3"]["weights"] == 4 * P // 8 and not found["zero3"]["master weights"]
    assert held(P, 0, 8, "zero3", bf16=True, average=True, offload=True).on_host == (4 + 8 + 4) * P // 8
    offloaded = held(P, 0, 8, "zero2", bf16=True, average=True, offload=True)
    assert offloaded.on_host == (4 + 8 + 4) * P // 8
    assert sum(offloaded.on_gpu.values()) + offloaded.on_host == sum(found["zero2"].values())


def test_shadows_are_counted_as_they_are_planned() -> None:
    from gt_ray.curation.plan import plan_shadows
    from gt_ray.tasks.data import load_data

    for overrides in ([], ["curation.shadows=20", "curation.tinylm_shadows=3"]):
        config = load_config("embedded", [*overrides, "data.tasks=[gsm8k]"])
        shadows = plan_shadows(config, load_data(config))
        both = [shadow for shadow in shadows if not shadow.tinylm_only]
        validation = sum(shadow.validation for shadow in shadows)
        assert shadow_counts(config) == (len(both) - validation, validation, len(shadows) - validation)


def test_a_model_or_phi_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(UserError, match=r"nobody/knows: no config.json, and none of qwen2.5-0.5b"):
        build_shape(load_config("embedded", ["pair.llm.model=nobody/knows"]))
    with pytest.raises(UserError, match=r"phi.pretrained='nobody/phi'"):
        build_shape(load_config("embedded", ["grad_transformer.phi.pretrained=nobody/phi"]))
