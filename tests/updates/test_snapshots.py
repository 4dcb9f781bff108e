"""The snapshot codec: its error bound, for any numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gt_ray.errors import UserError
from gt_ray.updates import snapshots
from gt_ray.updates.snapshots import LARGEST, ROUNDING, RUN, TINIEST, decode, encode


def check_bound(x_JLd: Tensor) -> None:
    """|x̂ - x| <= max |x_j - x̂_next| / 254 over the run of 128, in float64, and the last one exact."""
    found_JLd = decode(encode(x_JLd))
    assert found_JLd.shape == x_JLd.shape and found_JLd.dtype == torch.float32
    assert torch.equal(found_JLd[-1], x_JLd[-1].float())
    J, P = len(x_JLd), x_JLd[0].numel()
    x, found = x_JLd.double().reshape(J, P), found_JLd.double().reshape(J, P)
    for j in range(J - 1):
        for first in range(0, P, RUN):
            run = slice(first, first + RUN)
            largest = max(float(y.abs().max()) for y in (x[j, run], found[j + 1, run]))
            bound = float((x[j, run] - found[j + 1, run]).abs().max()) / 254 + ROUNDING * largest + TINIEST
            assert float((found[j, run] - x[j, run]).abs().max()) <= bound


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 300)),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0.0, 1e-45, 1e-40, 1e-30, 1e-3, 1.0, 1e10, 1e36]),
    step=st.sampled_from([0.0, 1e-45, 1e-38, 1e-6, 1e-2, 1.0, 1e36]),
)
def test_the_error_is_within_the_bound(shape: tuple[int, int, int], seed: int, size: float, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise_JLd = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).pow(4)
    check_bound(torch.randn(shape[1:], generator=generator) * size + noise_JLd * step)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_error_is_within_the_bound_for_any_numbers(data: st.DataObject) -> None:
    J, d = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    numbers = st.floats(-(2.0**126), 2.0**126, width=32)
    check_bound(torch.tensor(data.draw(st.lists(numbers, min_size=J * d, max_size=J * d))).view(J, 1, d))


def test_numbers_at_the_limits_of_float32() -> None:
    check_bound(torch.tensor([[[LARGEST, -LARGEST, 0.0]], [[-LARGEST, LARGEST, 1e-45]], [[0.0, LARGEST, -1e-45]]]))


def test_errors_do_not_add_up_over_many_snapshots() -> None:
    generator = torch.Generator().manual_seed(0)
    x_JLd = (torch.randn(200, 2, RUN, generator=generator) * 1e-2).cumsum(0)
    check_bound(x_JLd)
    assert (decode(encode(x_JLd)) - x_JLd).abs().max() < 2e-4  # one step's difference is at most 5e-2


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = encode(torch.randn(3, 2, 10 * RUN))
    whole = decode(stored)
    monkeypatch.setattr(snapshots, "CHUNK_RUNS", 3)
    assert torch.equal(decode(stored), whole)


def test_large_arrays_fit_huge_pages() -> None:
    x_JLd = torch.randn(4, 2, 2**17 + 1)
    found = decode(encode(x_JLd))
    assert found.data_ptr() % snapshots.HUGE_PAGE == 0
    assert (found - x_JLd).abs().max() < 0.1


def test_what_is_stored_is_compact() -> None:
    stored = encode(torch.randn(8, 4, 10 * RUN))
    stored_bytes = sum(tensor.nbytes for tensor in stored.values())
    assert stored_bytes == 4 * 10 * RUN * (4 + 7 * (1 + 4 / RUN))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e38])
def test_what_is_not_finite_is_refused(value: float) -> None:
    for j in range(2):
        x_JLd = torch.zeros(2, 1, 3)
        x_JLd[j, 0, 1] = value
        with pytest.raises(UserError, match="not finite or beyond 1e38"):
            encode(x_JLd)
