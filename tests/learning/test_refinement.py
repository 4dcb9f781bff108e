"""Refinement of generated updates towards the mean of themselves and proxy-tuning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gt_ray.config import ModelSettings, RefinementSettings
from gt_ray.learning.behaviour import Behaviour
from gt_ray.learning.refinement import proxy_share, refine
from gt_ray.learning.samples import Sample, encode
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import Root, make_root
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows

TINYLM, LLM = (ModelSettings(model=f"embedded:{side}", dtype="float32") for side in ("tinylm", "llm"))


@pytest.fixture(scope="module")
def behaviour() -> Behaviour:
    return Behaviour(load_model(LLM), make_root(LLM), (load_model(TINYLM), make_root(TINYLM)), weight=1.0)


@pytest.fixture(scope="module")
def groups() -> list[list[Sample]]:
    tokenizer = load_tokenizer(LLM.model)
    return [
        encode(tokenizer, TASKS[task], rows(task, "public-train", "north-day", 0, 6), 512) for task in ("gsm8k", "drop")
    ]


def updates(root: Root, seed: int, size: float = 0.1) -> Tensor:
    return size * torch.randn(2, root.layout.L, root.layout.d, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def log_p(settings: ModelSettings, update_Ld: Tensor | None, sample: Sample) -> Tensor:
    """Logits of the target's tokens, of one sample alone."""
    model, root = load_model(settings), make_root(settings)
    ids, due = torch.tensor([sample.prompt + sample.target]), slice(len(sample.prompt) - 1, -1)
    if update_Ld is None:
        return model(ids).logits[0, due]
    with stacked(model, root, G=1) as parameters:
        add_updates(parameters, root.layout, update_Ld[None])
        return model(ids).logits[0, due]


def test_the_loss_is_the_divergence_from_the_geometric_mean(behaviour: Behaviour, groups: list[list[Sample]]) -> None:
    update_S, start, now = updates(make_root(TINYLM), 0), updates(make_root(LLM), 1), updates(make_root(LLM), 2)
    share_G = torch.tensor([0.3, 0.8])
    loss_G, _ = behaviour(now, groups, update_S_GLd=update_S, start=(start, share_G))
    for g, samples in enumerate(groups):
        divergences = []
        for sample in samples:
            proxy = log_p(LLM, None, sample) + log_p(TINYLM, update_S[g], sample) - log_p(TINYLM, None, sample)
            w = float(share_G[g])
            mean = proxy.softmax(-1) ** w * log_p(LLM, start[g], sample).softmax(-1) ** (1 - w)
            teacher = mean / mean.sum(-1, keepdim=True)
            divergences.append((teacher * (teacher.log() - log_p(LLM, now[g], sample).log_softmax(-1))).sum(-1))
        assert float(loss_G[g]) == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)


def test_refining_comes_nearer_to_the_teacher_and_leaves_its_input_alone(
    behaviour: Behaviour, groups: list[list[Sample]]
) -> None:
    update_S, start = updates(make_root(TINYLM), 0, 0.2), updates(make_root(LLM), 1, 0.05)
    before, share_G = start.clone(), torch.tensor([1.0, 1.0])
    settings = RefinementSettings(steps=8, rows=6)
    refined = refine(behaviour, start, lambda step: (update_S, share_G), lambda step: groups, settings)
    assert torch.equal(start, before)
    first, last = (
        behaviour(now, groups, gradient=False, update_S_GLd=update_S, start=(start, share_G))[0]
        for now in (start, refined)
    )
    assert bool((last < 0.8 * first).all())


def test_an_update_that_teaches_itself_stays_what_it_is(behaviour: Behaviour, groups: list[list[Sample]]) -> None:
    update_S, start = updates(make_root(TINYLM), 0), updates(make_root(LLM), 1)
    share_G = torch.zeros(2)
    settings = RefinementSettings(steps=4, rows=6)
    refined = refine(behaviour, start, lambda step: (update_S, share_G), lambda step: groups, settings)
    loss_G, _ = behaviour(refined, groups, gradient=False, update_S_GLd=update_S, start=(start, share_G))
    assert float(loss_G.max()) < 1e-3


def test_the_share_of_proxy_tuning_grows_with_the_distance() -> None:
    settings = RefinementSettings(near=0.5, far=0.8)
    shares = [proxy_share(d, 2.0, settings) for d in (0.3, 1.0, 1.5, 2.0, 9.0)]
    assert shares == pytest.approx([0.5, 0.5, 0.65, 0.8, 0.8])
    assert proxy_share(None, 1.0, settings) == 0.8
