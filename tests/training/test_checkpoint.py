"""Checkpoints of one worker: what is restored goes on exactly, and each pair's model is exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.training.checkpoint import STATE, is_finished, restore, save, whole_models
from gt_ray.training.shards import ShardFiles, average, save_shards
from gt_ray.training.strategies import Strategy
from gt_ray.training.worker import Task, averaged, begin, rates
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI
from tests.training.test_strategies import task_of


@pytest.fixture(params=[1, 2])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> Task:
    """The behaviour phase of one pair, and of two that share phi."""
    starts = []
    for i in range(request.param):
        torch.manual_seed(i)
        roots = {"tinylm": "s", "llm": f"t{i}"}
        GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), roots, linear_rank=2).save(tmp_path / f"start-{i}")
        starts.append(str(tmp_path / f"start-{i}"))
    return replace(task_of(tmp_path), phase="behaviour", starts=starts, steps=8)


def _steps(strategy: Strategy, task: Task, first: int, last: int) -> list[torch.Tensor]:
    """Optimizer steps, pair after pair; the start token after each."""
    seen = []
    P = len(task.starts)
    for step in range(first, last):
        S = torch.randn(4, LAYOUT_S.L, LAYOUT_S.d, generator=torch.Generator().manual_seed(step))

        def one_pass(S: torch.Tensor = S, i: int = step % P) -> torch.Tensor:
            return (strategy(i, S) - 1).square().mean()

        strategy.optimize([one_pass], rates(task, step))
        average(strategy.shards, 0.5, first=step == 0)
        seen.append(strategy.model.pairs[0].start.detach().clone())
    return seen


def test_a_restored_training_goes_on_exactly_and_every_pair_is_exported(task: Task, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    straight, interrupted, resumed = (begin(task, 0, cpu) for _ in range(3))
    seen = _steps(straight, task, 0, 6)
    _steps(interrupted, task, 0, 3)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save(folder, interrupted, 0, {"step": 3}, [{"step": 3.0}])
    assert restore(folder, resumed) == ({"step": 3}, [{"step": 3.0}])
    _steps(resumed, task, 3, 6)
    for one, other in zip(straight.shards, resumed.shards, strict=True):
        assert one.name == other.name
        for kind, value in one.values().items():
            assert torch.allclose(value, other.values()[kind], atol=1e-6), (one.name, kind)
    # The average is the slow calculation's: half of the last weights, and half of the average before.
    slow = seen[0]
    for later in seen[1:]:
        slow = 0.5 * slow + 0.5 * later
    with averaged(straight):
        assert torch.allclose(straight.model.pairs[0].start, slow, atol=1e-6)
    assert torch.equal(straight.model.pairs[0].start, seen[-1])
    with averaged(interrupted):
        models = whole_models(folder, [Path(start) for start in task.starts])
        for i, (own, model) in enumerate(zip(interrupted.model.pairs, models, strict=True)):
            model.save(tmp_path / f"out-{i}")
            kept = GradTransformer.load(tmp_path / f"out-{i}")
            assert kept.roots == own.roots
            assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in own.state_dict().items())


def test_a_checkpoint_that_lacks_a_shard_is_not_restored_in_part(task: Task, tmp_path: Path) -> None:
    strategy = begin(task, 0, torch.device("cpu"))
    last = strategy.shards[-1]
    last.weight = last.weight[:-1]
    save_shards(tmp_path / "shards.safetensors", strategy.shards[-1:])
    with (
        ShardFiles([tmp_path / "shards.safetensors"]) as files,
        pytest.raises(ValueError, match="1 of the coordinates"),
    ):
        files.read(last.name, 0, last.weight.numel() + 1)


def test_a_model_is_finished_that_can_be_read_and_has_the_key(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not is_finished(out)
    GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {}).save(out)
    assert not is_finished(out)
    (out / STATE).write_text('{"trained_by": "key"}')
    assert is_finished(out) and is_finished(out, "key") and not is_finished(out, "other")
    (out / "model.safetensors").write_bytes(b"damaged")
    assert not is_finished(out) and not is_finished(out, "key")
