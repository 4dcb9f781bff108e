"""The layout: named tensors to [L, d] and back, for random architectures."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.updates.layout import Layout

Shapes = dict[str, tuple[int, ...]]
Q_AND_K: Shapes = {
    f"model.layers.{layer}.self_attn.{module}.{part}": shape
    for layer in range(12)
    for module, out in (("q_proj", 8), ("k_proj", 4))
    for part, shape in (("lora_A", (2, 8)), ("lora_B", (out, 2)))
}


def tensors_of(shapes: Shapes, lead: tuple[int, ...] = (), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*lead, *shape, generator=generator) for name, shape in shapes.items()}


@st.composite
def architectures(draw: st.DrawFn) -> Shapes:
    """Adapted attention and MLP modules of layers that need not be alike, and modules outside the layers."""
    size = st.integers(1, 5)
    shapes: Shapes = {}
    prefix = draw(st.sampled_from(["model.layers", "transformer.h", "layers", "model.decoder.layers"]))
    rank = draw(size)
    for layer in range(draw(st.integers(1, 13))):
        for module in draw(st.sets(st.sampled_from(["attn.q", "attn.k", "mlp.up", "experts.7.up"]), min_size=1)):
            name = f"{prefix}.{layer}.{module}"
            if draw(st.booleans()):
                shapes |= {f"{name}.lora_A": (rank, draw(size)), f"{name}.lora_B": (draw(size), rank)}
            else:
                shapes[f"{name}.weight"] = (draw(size), draw(size))
    for module in draw(st.sets(st.sampled_from(["model.embed_tokens", "model.norm", "lm_head"]))):
        shapes[f"{module}.weight"] = (draw(size),) if module == "model.norm" else (draw(size), draw(size))
    return shapes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(architectures(), st.sampled_from([(), (1,), (3,), (2, 3)]), st.randoms(use_true_random=False))
def test_arrays_and_tensors_are_one_to_one_for_random_architectures(
    shapes: Shapes, lead: tuple[int, ...], rng: random.Random
) -> None:
    names = list(shapes)
    rng.shuffle(names)
    layout = Layout.of({name: shapes[name] for name in names})
    assert layout == Layout.of(shapes) and layout.shapes == shapes
    tensors = tensors_of(shapes, lead)
    array = layout.to_array(tensors)
    assert array.shape == (*lead, layout.L, layout.d) and array.dtype == torch.float32
    back = layout.to_tensors(array)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].is_contiguous() for name, tensor in tensors.items())
    assert torch.equal(layout.to_array(back), array)
    # Every number stands somewhere once, and what is left over is zero.
    assert int(array.count_nonzero()) == sum(tensor.numel() for tensor in tensors.values())
    for row, block in enumerate(layout.blocks):
        assert not array[..., row, block.width :].any()
    assert Layout.from_json(layout.to_json()) == layout


@settings(max_examples=30, deadline=None, derandomize=True)
@given(architectures())
def test_slices_groups_and_widths_describe_the_blocks(shapes: Shapes) -> None:
    layout = Layout.of(shapes)
    array = layout.to_array(tensors_of(shapes))
    covered = [torch.zeros(block.width) for block in layout.blocks]
    for (row, columns), param in zip(
        layout.module_slices, (param for block in layout.blocks for param in block.params), strict=True
    ):
        covered[row][columns] += 1
        assert torch.equal(array[row, columns], tensors_of(shapes)[param.name].flatten())
    assert all(bool((count == 1).all()) for count in covered)
    assert layout.d == max(layout.group_widths) and len(layout.groups) == layout.L
    assert [layout.group_widths[group] for group in layout.groups] == [block.width for block in layout.blocks]
    assert sorted(set(layout.groups), key=layout.groups.index) == list(range(len(layout.group_widths)))


def test_blocks_are_in_layer_order_with_10_after_2() -> None:
    layout = Layout.of(Q_AND_K)
    assert [block.name for block in layout.blocks] == [f"model.layers.{layer}.self_attn" for layer in range(12)]
    assert layout.groups == (0,) * 12 and layout.group_widths == (56,) and (layout.L, layout.d) == (12, 56)
    layers = {name: torch.full(shape, int(name.split(".")[2]) + 1.0) for name, shape in Q_AND_K.items()}
    assert torch.equal(layout.to_array(layers), torch.arange(1.0, 13.0)[:, None].expand(12, 56))


def test_a_row_holds_its_parameters_flat_and_in_the_order_of_their_names() -> None:
    tensors = tensors_of(Q_AND_K)
    parts = [f"model.layers.3.self_attn.{name}" for name in ("k_proj.lora_A", "k_proj.lora_B", "q_proj.lora_A")]
    row = Layout.of(Q_AND_K).to_array(tensors)[3]
    assert torch.equal(row[:40], torch.cat([tensors[name].flatten() for name in parts]))


def test_layers_of_other_composition_form_groups_of_their_own_and_are_padded() -> None:
    shapes: Shapes = {
        "layers.0.q.lora_A": (2, 3),
        "layers.0.q.lora_B": (5, 2),
        "layers.1.q.lora_A": (2, 3),
        "layers.1.q.lora_B": (5, 2),
        "layers.2.q.weight": (4, 4),  # as wide as layer 0, but something else
        "layers.3.q.lora_A": (2, 1),
        "embed.weight": (7, 3),
        "norm.weight": (2,),
    }
    layout = Layout.of(shapes)
    assert [block.name for block in layout.blocks] == ["embed", "layers.0", "layers.1", "layers.2", "layers.3", "norm"]
    assert layout.groups == (0, 1, 1, 2, 3, 4) and layout.group_widths == (21, 16, 16, 2, 2)
    array = layout.to_array({name: torch.ones(shape) for name, shape in shapes.items()})
    assert array.sum(1).tolist() == [21, 16, 16, 16, 2, 2]
    array[:, 16:] = 9.0  # what stands in the padding is dropped
    assert float(layout.to_array(layout.to_tensors(array))[4].sum()) == 2


def test_half_precision_is_widened_without_loss() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(Q_AND_K).items()}
    layout = Layout.of(Q_AND_K)
    back = layout.to_tensors(layout.to_array(tensors))
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in tensors.items())


def test_an_array_does_not_share_memory_with_the_tensors() -> None:
    tensors = tensors_of({"layers.0.q.weight": (2, 2)})
    layout = Layout.of({"layers.0.q.weight": (2, 2)})
    array = layout.to_array(tensors)
    tensors["layers.0.q.weight"].zero_()
    assert array.all()


FIRST = "model.layers.0.self_attn.k_proj.lora_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST), rf"update lacks {FIRST} \(1 missing\)"),
        (lambda tensors: tensors.clear(), rf"update lacks {FIRST} \(48 missing\)"),
        (lambda tensors: tensors.update(other=torch.ones(1)), r"update has unknown other \(1 extra\)"),
        (lambda tensors: tensors.update({FIRST: torch.ones(4, 8)}), rf"{FIRST} has shape \[4, 8\], but .* \[2, 8\]"),
        (lambda tensors: tensors.update({FIRST: torch.ones(16)}), rf"{FIRST} has shape \[16\], but .* \[2, 8\]"),
        (lambda tensors: tensors.update({FIRST: torch.ones(8, 2)}), rf"{FIRST} has shape \[8, 2\], but .* \[2, 8\]"),
        (lambda tensors: tensors.update({FIRST: torch.ones(3, 2, 8)}), "leading dimensions differ"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: object, message: str) -> None:
    tensors = tensors_of(Q_AND_K)
    change(tensors)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        Layout.of(Q_AND_K).to_array(tensors)


@pytest.mark.parametrize("shape", [(12, 55), (11, 56), (56,), (56, 12)])
def test_an_array_that_does_not_fit_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"but the layout is \[12, 56\]"):
        Layout.of(Q_AND_K).to_tensors(torch.zeros(shape))


def test_no_parameters_are_an_error() -> None:
    with pytest.raises(UserError, match="no parameters to lay out; do the LoRA target modules exist"):
        Layout.of({})


def test_parameters_alone_are_those_of_the_array_without_its_padding() -> None:
    uneven = Layout.of({"embed.weight": (3, 5), "layers.0.self_attn.q.weight": (2, 2), "layers.0.mlp.up.weight": (7,)})
    tensors = {name: 1 + torch.rand(4, *shape) for name, shape in uneven.shapes.items()}
    array = uneven.to_array(tensors)
    flat = uneven.flat(array)
    assert flat.shape == (4, 15 + 4 + 7) and array.shape == (4, 3, 15)
    by_hand = [tensors[param.name].flatten(1) for block in uneven.blocks for param in block.params]
    assert torch.equal(flat, torch.cat(by_hand, 1))
    assert torch.equal(uneven.padded(flat), array) and torch.equal(uneven.padded(flat[0]), array[0])
    even = Layout.of({"layers.0.q.weight": (2, 2), "layers.1.q.weight": (2, 2)})
    assert torch.equal(even.flat(array[..., :2, :4]), array[..., :2, :4].flatten(-2))
    assert torch.equal(even.padded(even.flat(array[..., :2, :4])), array[..., :2, :4])
