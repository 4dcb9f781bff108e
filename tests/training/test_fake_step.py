"""A step on fake tensors against the same step on real ones, its storages counted in two ways."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gt_ray.config import PhiSettings
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.learning.memory import LiveTensors
from gt_ray.training.fake_step import FakeStep, Precision, fake_step, training_step
from gt_ray.updates.layout import Layout

N = 24
PHI = PhiSettings(d_model=128, layers=3, heads=4, d_ff=256, dropout=0.1)
LAYOUT_S, LAYOUT_T = (
    Layout.of({f"layers.{i}.q.{name}": (2, width) for i in range(L) for name in ("lora_A", "lora_B")})
    for L, width in ((12, 100), (16, 200))
)


MORE = [pytest.param(*one, marks=pytest.mark.slow) for one in (("bf16", False), ("fp32", True), ("fp32", False))]


def build() -> GradTransformer:
    return GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {}, linear_rank=8, shadows=(20, 5))


def prepared(checkpointing: bool) -> GradTransformer:
    torch.manual_seed(0)
    model = build().train()
    assert model.phi is not None
    if checkpointing:
        model.phi.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def allocated_peak(model: GradTransformer, precision: Precision) -> int:
    """The peak of everything that PyTorch's allocator gives out, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training_step(model, N, precision)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def freeing(model: GradTransformer) -> None:
    """Gradients go as they come, so that they do not count."""
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))


@pytest.mark.parametrize(("precision", "checkpointing"), [("bf16", True), *MORE])
def test_memory_is_that_of_real_steps(precision: Precision, checkpointing: bool) -> None:
    fake = fake_step(build, precision, checkpointing, gpu=False)
    for keep_gradients in (True, False):
        model = prepared(checkpointing)
        if not keep_gradients:
            freeing(model)
        with LiveTensors() as live:
            training_step(model, N, precision)
        predicted = fake.peak(N, keep_gradients)
        assert predicted == pytest.approx(live.peak, rel=0.1)
        model.zero_grad()
        gc.collect()
        assert predicted == pytest.approx(allocated_peak(model, precision), rel=0.1)


def test_checkpointing_and_fewer_tuples_take_less_and_operations_are_those_of_all_weights() -> None:
    plain, checkpointed = (fake_step(build, "fp32", one) for one in (False, True))
    assert checkpointed.peak(N, False) < 0.8 * plain.peak(N, False)
    assert plain.peak(N, False) < 0.6 * plain.peak(2 * N, False)
    assert plain.peak(N, True) >= plain.peak(N, False)
    model = build()
    assert model.phi is not None
    # Forward and twice as much backward: 6 operations for each weight and token, and attention.
    weights = sum(p.numel() for p in model.phi.encoder.parameters()) * 12
    weights += sum(p.numel() for p in model.phi.decoder.parameters()) * 16
    assert 6 * weights < plain.flops < 1.6 * 6 * weights
    assert 1.2 * plain.flops < checkpointed.flops < 1.4 * plain.flops


def test_a_gpu_keeps_other_tensors_than_a_cpu() -> None:
    gpu, cpu = (fake_step(build, "bf16", False, gpu=one).peak(N, False) for one in (True, False))
    assert gpu != cpu and gpu == pytest.approx(cpu, rel=0.3)


def test_a_line_for_each_moment() -> None:
    step = FakeStep(live=((100, 110), (50, 90)), gradients=(0, 60), flops=1.0)
    assert step.peak(2, False) == 100 and step.peak(2, True) == 110
    assert step.peak(4, False) == 130 and step.peak(4, True) == 190
