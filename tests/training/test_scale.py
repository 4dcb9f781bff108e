"""Dry runs of the presets of real models: shapes on fake tensors, checkpoints, and a real step of one layer.

In the small form phi is Flan-T5-Large with one layer of full width, and the LLM is 32B; in the full form (markers scale
and slow) phi has all layers, and all presets are tried.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from gt_ray.config import load_config, preset_names
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.training.fake_step import fake_step
from gt_ray.training.machines import GIB
from gt_ray.training.sizes import build_shape, parts

PRESETS = [name for name in preset_names() if name.startswith("qwen2.5-")]
QUICK = [name if name.endswith("32b") else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
FULL = [pytest.mark.scale, pytest.mark.slow]
LAYERS = [pytest.param(1, id="one-layer"), pytest.param(None, id="full-size", marks=FULL)]
NUMERIC_BYTES = 12 * GIB
"""What a real step may take here."""


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("preset", QUICK)
def test_forward_and_backward_at_full_width(preset: str, layers: int | None) -> None:
    config = load_config(preset)
    training = config.grad_transformer.training
    step = fake_step(lambda: build_shape(config, layers), training.precision, training.activation_checkpointing)
    with torch.device("meta"):
        model = build_shape(config, layers)
    P = sum(parts(model).values())
    # Each parameter that Eq. 10 reaches has a gradient by the end: all but the linear path's are complete or coming.
    trained = P - parts(model)["linear path"]
    assert max(step.gradients) >= 0.5 * 4 * trained
    assert step.flops > 6 * parts(model)["phi, encoder"]
    tuples = training.batch_size // training.workers // training.accumulation
    assert step.peak(tuples, False) > step.peak(2, False) > 0


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("preset", QUICK)
def test_a_checkpoint_at_full_width(preset: str, layers: int | None) -> None:
    config = load_config(preset)
    with torch.device("meta"):
        model = build_shape(config, layers)
        assert model.phi is not None and model.linear is not None
        # What `GradTransformer.load` makes of an exported config.
        loaded = GradTransformer.shaped(model.to_json())
    exported = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert exported == {name: tensor.shape for name, tensor in loaded.state_dict().items()}
    D = model.phi.config.d_model
    assert exported["out.maps.0.weight"] == (model.layout_T.d, D)
    assert exported["embed_S.maps.0.weight"] == (D, model.layout_S.d)
    assert exported["linear.up"] == (239, len(model.layout_T.places))  # of 240 training shadows
    assert not any(name.startswith("phi.shared") for name in exported)


@pytest.mark.scale
@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_real_step_of_one_layer_at_full_width(preset: str) -> None:
    """Without the linear path, which rests while the network learns by Eq. 10."""
    config = load_config(preset, ["grad_transformer.linear_rank=0"])
    with torch.device("meta"):
        needed = 8 * sum(parts(build_shape(config, layers=1)).values())
    assert needed < NUMERIC_BYTES
    torch.manual_seed(0)
    model = build_shape(config, layers=1).eval()  # dropout would hide that the loss falls
    updates = [torch.randn(2, layout.L, layout.d) for layout in (model.layout_S, model.layout_T)]

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.grad_transformer.training.precision == "bf16"):
            return model.loss(*updates)

    before = loss()
    before.backward()
    with torch.no_grad():
        square = sum(float(weight.grad.square().sum()) for weight in model.parameters() if weight.grad is not None)
        rate = 0.1 * float(before) / square  # a tenth of the loss, by the gradient
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= rate * weight.grad
                weight.grad = None
        after = float(loss())
    assert 0 < square < float("inf") and torch.isfinite(before)
    assert 0.5 * float(before) < after < 0.97 * float(before)
