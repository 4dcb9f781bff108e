"""Ends per model, phi shared (section 4.2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gt_ray.config import PhiSettings, TrainingSettings
from gt_ray.errors import UserError
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.grad_transformer.several import SeveralPairs, share_ends
from gt_ray.training.strategies import start_strategy
from gt_ray.training.worker import groups_of
from gt_ray.updates.layout import Layout
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI

WIDE_S = Layout.of({f"layers.{i}.q.lora_A": (3, 7) for i in range(2)})
S, WIDE, T, OTHER_T = ("s", LAYOUT_S), ("wide", WIDE_S), ("t", LAYOUT_T), ("other", LAYOUT_T)
"""Roots and their layouts."""


def make(tinylm: tuple[str, Layout], llm: tuple[str, Layout], phi: PhiSettings | None = PHI) -> GradTransformer:
    roots = {"tinylm": tinylm[0], "llm": llm[0]}
    model = GradTransformer(tinylm[1], llm[1], make_phi(phi) if phi else None, roots, linear_rank=2)
    for parameter in model.parameters():  # some of them start at zero, and so would their gradients
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def updates(layout: Layout) -> Tensor:
    return layout.to_array(layout.to_tensors(torch.randn(3, layout.L, layout.d)))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def grid() -> SeveralPairs:
    """Two TinyLMs by two LLMs."""
    torch.manual_seed(0)
    return SeveralPairs([make(tinylm, llm) for tinylm in (S, WIDE) for llm in (T, OTHER_T)])


def test_ends_belong_to_models_and_phi_to_all(grid: SeveralPairs) -> None:
    for i, one in enumerate(grid.pairs):
        for j, other in enumerate(grid.pairs):
            same_S, same_T = i // 2 == j // 2, i % 2 == j % 2
            assert one.phi is other.phi and one.start is other.start
            assert (one.embed_S is other.embed_S) == same_S
            assert (one.embed_T is other.embed_T) == (one.out is other.out) == same_T
            for own, others in zip(
                (one.linear, one.standard_S, one.standard_T),
                (other.linear, other.standard_S, other.standard_T),
                strict=True,
            ):
                assert (own is others) == (i == j)


def test_a_step_of_one_pair_moves_phi_and_leaves_the_others_ends_where_they_are(grid: SeveralPairs) -> None:
    groups = groups_of(grid, "behaviour")
    strategy = start_strategy(grid, groups, TrainingSettings(weight_decay=0.1), torch.device("cpu"), average=False)

    def step(turn: int) -> None:
        inputs = updates(grid.pairs[turn].layout_S)
        strategy.optimize([lambda: strategy(turn, inputs).square().mean()], [1e-3] * len(groups))

    for turn in range(4):  # now every parameter has momentum
        step(turn)
    before = [weights(one) for one in grid.pairs]
    step(0)
    for i, one in enumerate(grid.pairs):
        moved = {name.split(".")[0] for name, now in weights(one).items() if not torch.equal(now, before[i][name])}
        shared = {"phi", "start"} | ({"embed_S"} if i < 2 else set()) | ({"embed_T", "out"} if i in (0, 2) else set())
        assert moved - {"linear"} == shared and ("linear" in moved) == (i == 0)


def test_each_model_saves_and_loads_alone(grid: SeveralPairs, tmp_path: Path) -> None:
    for i, one in enumerate(grid.pairs):
        one.eval().save(tmp_path / str(i))
        loaded = GradTransformer.load(tmp_path / str(i))
        update = updates(one.layout_S)
        assert loaded.roots == one.roots and torch.equal(loaded.generate(update), one.generate(update))


def test_phi_of_another_size_is_refused_and_linear_paths_alone_share_nothing() -> None:
    with pytest.raises(UserError, match=r"one phi, but d_ff of theirs differ; .* same grad_transformer\.phi"):
        share_ends([make(S, T), make(S, OTHER_T, PHI.model_copy(update={"d_ff": 32}))])
    with pytest.raises(UserError, match="one phi"):
        share_ends([make(S, T), make(S, OTHER_T, None)])
    models = [make(S, T, None), make(S, OTHER_T, None)]
    share_ends(models)
    assert models[0].linear is not models[1].linear


LAST_ALONE = Layout.of({"layers.0.q.lora_A": (2, 3), "layers.1.q.lora_A": (2, 4)})
"""Nothing is generated after the last block, so the map of its group reads no block."""


@pytest.mark.parametrize(
    ("llms", "rest"),
    [([T], False), ([("wide", WIDE_S)], False), ([("last", LAST_ALONE)], True), ([T, OTHER_T], True)],
)
def test_parameters_without_gradient_are_foreseen(llms: list[tuple[str, Layout]], rest: bool) -> None:
    """Data-parallel training fails at those that are not, and is slower where there might be some."""
    model = SeveralPairs([make(S, llm) for llm in llms])
    assert _without_gradient(model) is model.some_rest is rest


def _without_gradient(model: SeveralPairs) -> bool:
    found = set()
    for forced in (None, updates(model.pairs[0].layout_T)):
        model.zero_grad()
        model(0, updates(model.pairs[0].layout_S), forced).square().sum().backward()
        found.add(any(parameter.grad is None for parameter in model.parameters()))
    (same,) = found
    return same
