"""Target losses: short cuts give what the model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gt_ray.config import ModelSettings
from gt_ray.learning import losses as module
from gt_ray.learning.batches import packed, padded
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.samples import Sample
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import make_root

GROUPS = [[Sample([21, 22, 23], [24, 25]), Sample([30], [31, 32, 33])], [Sample([40, 41], [42]), Sample([50], [51])]]


@pytest.fixture
def ready(tiny_pair: tuple[Path, Path]) -> TargetLosses:
    settings = ModelSettings(model=str(tiny_pair[1]), dtype="float32")
    return TargetLosses(load_model(settings), make_root(settings))


def by_the_model(ready: TargetLosses, sample: Sample) -> float:
    """Mean loss as transformers computes it."""
    ids = torch.tensor([sample.prompt + sample.target])
    labels = ids.clone()
    labels[:, : len(sample.prompt)] = -100
    return float(ready.model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("collate", [padded, packed])
def test_losses_are_those_of_the_model_sample_by_sample(ready: TargetLosses, collate: object) -> None:
    expected = [sum(by_the_model(ready, s) * len(s.target) for s in group) for group in GROUPS]
    with torch.no_grad(), ready.short_cuts(), stacked(ready.model, make_root_of(ready), G=2):
        sums, counts = ready.by_adapter(collate(GROUPS, 0), 2)  # type: ignore[operator]
    assert counts.tolist() == [5, 2] and torch.allclose(sums, torch.tensor(expected), rtol=1e-5)


def make_root_of(ready: TargetLosses):  # type: ignore[no-untyped-def]
    return make_root(ModelSettings(model=ready.model.config._name_or_path, dtype="float32"))


def test_logits_in_pieces_give_the_same_gradients(ready: TargetLosses, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_root_of(ready)
    found = []
    for at_once in (2**27, 2 * ready.model.get_output_embeddings().weight.shape[0]):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
        with ready.short_cuts(), stacked(ready.model, root, G=2) as parameters:
            ready(packed(GROUPS, 0)).sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None]))
    assert torch.allclose(*found, atol=1e-5) and found[0].abs().sum() > 0


def test_batches_are_packed_where_padding_is_much(ready: TargetLosses) -> None:
    assert ready.batch(GROUPS).packing is not None
    assert ready.batch([[Sample([1, 2], [3])] * 2] * 2).packing is None


def test_attention_is_put_back(ready: TargetLosses) -> None:
    before = ready.model.config._attn_implementation
    with ready.short_cuts():
        assert ready.model.config._attn_implementation != before
    assert ready.model.config._attn_implementation == before
