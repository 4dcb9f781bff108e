"""All strategies do the same arithmetic; a checkpoint of one goes on with another, and with more or fewer workers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gt_ray.config import TrainingSettings
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.training.checkpoint import restore, save, whole_models
from gt_ray.training.shards import average
from gt_ray.training.sizes import FLOAT32, held
from gt_ray.training.strategies import Strategy
from gt_ray.training.tuples import Tuples
from gt_ray.training.worker import Task, averaged, begin, groups_of, rates, tuple_passes
from tests.grad_transformer.test_network import LAYOUT_S, LAYOUT_T, PHI

STEPS, N = 6, 8


def start_model(folder: Path) -> Path:
    """A model with a linear path, to begin with."""
    torch.manual_seed(0)
    model = GradTransformer(LAYOUT_S, LAYOUT_T, make_phi(PHI), {"tinylm": "s", "llm": "t"}, linear_rank=2)
    for parameter in (*model.out.parameters(), *model.linear.parameters()):  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter, std=0.1)
    model.save(folder)
    return folder


def task_of(start: Path, phase: Any = "tuples", **settings: Any) -> Task:
    """A phase of STEPS steps."""
    typed = TrainingSettings.model_validate(
        {
            "batch_size": N,
            "learning_rate": 1e-2,
            "behaviour": {"steps": STEPS, "learning_rate": 1e-2, "average": 0.5},
            **settings,
        }
    )
    return Task(phase, [str(start)], typed, None, 0, 0, STEPS, 1, [], [], "", ("tensorboard", Path(), "", {}))


def steps(strategy: Strategy, task: Task, first: int, last: int, rank: int, world: int) -> list[float]:
    """Optimizer steps on batches that depend on the step alone; the losses."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        S, T = (torch.randn(N, one.L, one.d, generator=generator) for one in (LAYOUT_S, LAYOUT_T))
        mine = slice(rank * N // world, (rank + 1) * N // world)
        tuples = Tuples(S[mine], T[mine], torch.zeros(N // world), torch.zeros(N // world))
        if task.phase == "tuples":
            passes = tuple_passes(strategy, 0, tuples, task.settings, generator)
        else:
            passes = [partial(lambda tuples: (strategy(0, tuples.S_NLd) - tuples.T_NLd).square().mean(), tuples)]
        losses.append(strategy.optimize(passes, rates(task, step)))
        if task.phase == "behaviour":
            average(strategy.shards, task.settings.behaviour.average, first=step == 0)
    return losses


def _trainer(rank: int, world: int, folder: Path, runs: list[dict[str, Any]]) -> None:
    """One of `world` workers goes through runs, each with its settings."""
    import os

    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / f'rendezvous-{world}'}", rank=rank, world_size=world)
    for run in runs:
        out = folder / run["name"]
        out.mkdir(exist_ok=True)
        dist.barrier()
        task = task_of(folder / "start", **run["settings"])
        strategy = begin(task, rank, torch.device("cpu"))
        first = 0
        if run["from"]:
            first = restore(folder / run["from"], strategy)[0]["step"]
        if strategy.shared_out:  # each keeps the share that the planner counts, and together they keep all
            trained = [p for p in strategy.model.parameters() if p.requires_grad]
            P = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
            own = torch.tensor(sum(shard.weight.numel() for shard in strategy.shards))
            moments = held(P, 0, world, task.settings.strategy, bf16=False, average=False).on_gpu["moments"]
            assert abs(2 * FLOAT32 * int(own) - moments) <= 2 * FLOAT32 * len(trained), (run["name"], own, P)
            dist.all_reduce(own)
            assert own == P
        losses = steps(strategy, task, first, run["last"], rank, world)
        with torch.no_grad(), averaged(strategy):
            probe = strategy(0, torch.ones(1, LAYOUT_S.L, LAYOUT_S.d))
        mean = torch.tensor(losses)
        dist.all_reduce(mean)
        if rank == 0:
            (out / "losses.json").write_text(json.dumps((mean / world).tolist()))
            save_file({"said": probe}, out / "probe.safetensors")
        save(out, strategy, rank, {"step": run["last"]}, [])
        dist.barrier()
    dist.destroy_process_group()


def spawn(world: int, folder: Path, runs: list[dict[str, Any]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Runs of `world` workers; of each the losses, and what the model says at the end."""
    torch.multiprocessing.spawn(_trainer, (world, folder, runs), nprocs=world)  # type: ignore[no-untyped-call]
    return {
        run["name"]: (
            torch.tensor(json.loads((folder / run["name"] / "losses.json").read_text())),
            load_file(folder / run["name"] / "probe.safetensors")["said"],
        )
        for run in runs
    }


ALL = ("ddp", "zero1", "zero2", "zero3")


@pytest.mark.scale
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategies", [("ddp", "zero3"), pytest.param(ALL, marks=pytest.mark.slow)], ids=" ".join)
def test_strategies_have_the_same_losses_and_go_on_from_one_anothers_checkpoints(
    tmp_path: Path, strategies: tuple[str, ...]
) -> None:
    pytest.importorskip("deepspeed")
    start_model(tmp_path / "start")
    plain: dict[str, Any] = {"phase": "tuples", "accumulation": 2}
    runs: list[dict[str, Any]] = []

    def run(name: str, last: int = STEPS, start: str = "", **settings: Any) -> None:
        runs.append({"name": name, "settings": settings, "last": last, "from": start})

    for strategy in strategies:
        run(f"{strategy}-tuples", **plain, strategy=strategy)
        run(f"{strategy}-behaviour", phase="behaviour", strategy=strategy)
        run(f"{strategy}-bf16", **plain, strategy=strategy, precision="bf16")
    if strategies == ALL:  # DeepSpeed compiles its optimizer for this processor
        run("zero2-offload-bf16", **plain, strategy="zero2", precision="bf16", offload=True)
    run("half", STEPS // 2, **plain, strategy=strategies[-1])
    run("rest", start="half", **plain, strategy=strategies[-2])
    found = spawn(2, tmp_path, runs)
    for phase in ("tuples", "behaviour"):
        losses, probe = found[f"ddp-{phase}"]
        assert losses[-1] < losses[0]
        for strategy in strategies[1:]:
            others, other_probe = found[f"{strategy}-{phase}"]
            assert torch.allclose(losses, others, rtol=1e-5, atol=0), (strategy, phase)
            assert torch.allclose(probe, other_probe, atol=1e-5), (strategy, phase)
    for name in (name for name in found if name.endswith("bf16")):
        assert torch.allclose(found["ddp-bf16"][0], found[name][0], rtol=2e-2, atol=0), name
    losses = found["ddp-tuples"][0]
    assert torch.allclose(losses[STEPS // 2 :], found["rest"][0], rtol=1e-5, atol=0)
    if strategies == ALL:
        runs.clear()
        run("alone", start="half", **plain, strategy="ddp")
        assert torch.allclose(losses[STEPS // 2 :], spawn(1, tmp_path, runs)["alone"][0], rtol=1e-4, atol=0)
    # Exported, each is the model that its workers had, with the averages of the behaviour phase.
    for name in ("ddp-behaviour", f"{strategies[-2]}-behaviour", "zero3-behaviour", "zero3-tuples"):
        whole_models(tmp_path / name, [tmp_path / "start"])[0].save(tmp_path / f"out-{name}")
        exported = GradTransformer.load(tmp_path / f"out-{name}")
        with torch.no_grad():
            said = exported(torch.ones(1, LAYOUT_S.L, LAYOUT_S.d))
        assert torch.allclose(said, found[name][1], atol=1e-6), name


def test_the_linear_path_rests_in_the_first_phase(tmp_path: Path) -> None:
    start_model(tmp_path / "start")
    for phase, rests in (("tuples", True), ("behaviour", False)):
        task = task_of(tmp_path / "start", phase)
        strategy = begin(task, 0, torch.device("cpu"))
        before = [parameter.clone() for parameter in strategy.model.pairs[0].linear.parameters()]  # type: ignore[union-attr]
        assert len(groups_of(strategy.model, phase)) == len(rates(task, 0)) == (1 if rests else 2)
        steps(strategy, task, 0, 2, 0, 1)
        after = strategy.model.pairs[0].linear.parameters()  # type: ignore[union-attr]
        assert all(torch.equal(*both) == rests for both in zip(before, after, strict=True))
