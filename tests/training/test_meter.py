"""Operations and waiting are counted as an independent count finds them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.training.meter import Meter, operations
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI


@pytest.mark.parametrize("chunk", [None, 8])
def test_operations_are_those_that_pytorch_counts(chunk: int | None) -> None:
    phi = make_phi(PHI.model_copy(update={"d_model": 256, "d_ff": 512}))
    model = GradTransformer(LAYOUT_S, LAYOUT_T, phi, {}, chunk=chunk).train()
    S, T = (torch.randn(2, one.L, one.d, requires_grad=True) for one in (LAYOUT_S, LAYOUT_T))
    with FlopCounterMode(display=False) as counter:
        model.loss(S, T).backward()
    # Attention between tokens and the few that teacher forcing leaves out make the difference.
    assert operations(model) == pytest.approx(counter.get_total_flops() / 2, rel=0.1)


def test_waiting_is_a_share_of_the_time_and_reading_starts_anew() -> None:
    def slow() -> Iterator[int]:
        for i in itertools.count():
            time.sleep(0.05 if i else 0.5)
            yield i

    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {})
    meter = Meter(torch.device("cpu"), "fp32")
    for _ in zip(range(3), meter.waiting(slow()), strict=False):
        meter.count(model, 4)
    found = meter.read()
    assert found["data_wait_share"] > 0.5 and found["train_s"] > 0.1
    assert found["first_batch_s"] > 0.5, "starting is no part of the share"
    assert found["tokens_per_s"] == pytest.approx(3 * 4 * (LAYOUT_S.L + LAYOUT_T.L) / found["train_s"], rel=0.05)
    meter.resume()
    found = meter.read()
    assert found["tokens_per_s"] == found["first_batch_s"] == 0
