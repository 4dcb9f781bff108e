"""How fast the Grad-Transformer trains, on random tuples, and what it waits for.

    python benchmarks/training.py                       # 10 minutes on 2 cores
    python benchmarks/training.py --part phi            # one CUDA GPU: phi of Flan-T5-Large's size

loop: optimizer steps of this loop and of transformers' Trainer on the same phi and batches, in turns. Trainer has the
whole T5 with its token embeddings, once called as T5 is called, which computes the logits of the LM head, too
(`vs_trainer`), and once by encoder and decoder alone (`vs_trainer_headless`).
ray: whole trainings by Ray Train with one worker and with two, each with a batch of its own: tuples a second from the
first batch on, the share of the time that trainers wait for data, and the seconds until the first batch is there.
strategies: a step of two workers by each strategy.
phi: at the shapes of 3B -> 7B and 0.5B -> 32B, bf16: tuples a second, share of what a large matrix product reaches,
bytes beside what the planner says.

The last line of the output is JSON: `vs_trainer`, `data_wait_share`, `weak_scaling_2`, and of each part its figures.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from gt_ray.config import LoraSettings, PhiSettings, TrainingSettings
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi, phi_of
from gt_ray.grad_transformer.several import SeveralPairs
from gt_ray.pairs.families import known_config, layout_of
from gt_ray.training.meter import matrix_peak, seconds
from gt_ray.training.strategies import Strategy, start_strategy
from gt_ray.training.tuples import Tuples
from gt_ray.training.worker import adapt_layers, groups_of, tuple_passes
from gt_ray.updates.layout import Layout

PAIRS = {
    "3B-7B": ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    "0.5B-32B": ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-32B-Instruct"),
}
SMALL = PhiSettings(d_model=256, layers=4, heads=4, d_ff=512)


def random_tuples(layout_S: Layout, layout_T: Layout, N: int, device: torch.device) -> Tuples:
    """N tuples of one task."""
    S, T = (torch.randn(N, one.L, one.d, device=device) for one in (layout_S, layout_T))
    return Tuples(S, T, torch.zeros(N), torch.zeros(N))


def step_of(strategy: Strategy, tuples: Tuples, settings: TrainingSettings) -> Callable[[], float]:
    """An optimizer step of this loop."""
    generator = torch.Generator().manual_seed(0)
    return lambda: strategy.optimize(tuple_passes(strategy, 0, tuples, settings, generator), [1e-5])


def by_loop(layout_S: Layout, layout_T: Layout, N: int, rounds: int) -> dict[str, float]:
    """This loop, Trainer, and Trainer without LM head in turns; medians in seconds a step."""
    from transformers import T5ForConditionalGeneration, Trainer, TrainingArguments

    device = torch.device("cpu")
    tuples = random_tuples(layout_S, layout_T, N, device)
    settings = TrainingSettings(batch_size=N)
    model = GradTransformer(layout_S, layout_T, make_phi(SMALL), {"tinylm": "", "llm": ""}).train()
    several = SeveralPairs([model])
    own = step_of(start_strategy(several, groups_of(several, "tuples"), settings, device, False), tuples, settings)

    class Whole(GradTransformer):
        """The same with all of a T5 with a usual vocabulary, as Trainer is given it; its own forward pass, which is the
        only one that T5ForConditionalGeneration has, ends with the logits."""

        def __init__(self, head: bool) -> None:
            config = make_phi(SMALL).config
            config.vocab_size = 32128
            t5: Any = T5ForConditionalGeneration(config)
            super().__init__(layout_S, layout_T, t5, {"tinylm": "", "llm": ""})
            if head:
                t5.decoder.register_forward_hook(lambda _module, _given, out: (t5.lm_head(out[0]), None)[1])

        def forward(self, S: torch.Tensor, T: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"loss": torch.nn.functional.mse_loss(super().forward(S, T), self.standard_T(T))}

    steps = 10
    rows = [{"S": S, "T": T} for S, T in zip(tuples.S_NLd, tuples.T_NLd, strict=True)] * steps
    logging.disable(logging.WARNING)

    def by_trainer(head: bool) -> float:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=N,
                max_steps=steps,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            trainer = Trainer(Whole(head).train(), arguments, train_dataset=rows)
            return float(trainer.train().metrics["train_runtime"]) / steps

    own()
    found: dict[str, list[float]] = {"own": [], "trainer": [], "headless": []}
    for _ in range(rounds):
        found["own"].append(statistics.median(seconds(own, device) for _ in range(steps)))
        found["trainer"].append(by_trainer(head=True))
        found["headless"].append(by_trainer(head=False))
    return {name: statistics.median(walls) for name, walls in found.items()}


def by_ray(folder: Path, workers: int, epochs: int) -> dict[str, float]:
    """A training by Ray Train on the shapes of the embedded pair and random shadows."""
    import ray

    from gt_ray.config import load_config
    from gt_ray.curation.study import Study
    from gt_ray.training.run import train
    from gt_ray.training.tuples import input_keys, shadow_keys
    from gt_ray.updates.store import UnitMeta

    config = load_config(
        "embedded",
        [
            f"runs={folder / 'runs'}",
            f"store={folder / 'store'}",
            f"name=workers-{workers}",
            "curation.plan=domains",
            "curation.tinylm_shadows=0",
            "curation.shadows=96",
            "grad_transformer.recipe=paper",
            "grad_transformer.phi.d_model=256",
            "grad_transformer.phi.layers=4",
            f"grad_transformer.training.batch_size={32 * workers}",
            f"grad_transformer.training.workers={workers}",
            f"grad_transformer.training.epochs={epochs}",
            "grad_transformer.training.checkpoint_epochs=1000",
        ],
    )
    study = Study.load(config)
    steps = config.curation.snapshot_steps
    for validation in (False, True):
        for row in (*shadow_keys(study, validation), *input_keys(study, validation)):
            for side, key in row.items():
                if side in ("S", "T") and study.store.missing([key]):
                    root = study.roots["tinylm" if side == "S" else "llm"]
                    update_JLd = 0.01 * torch.randn(len(steps), root.layout.L, root.layout.d)
                    study.store.write(key, update_JLd, UnitMeta(root.hash, {}, list(steps), 1, [], 0.0, []))
    ray.init(num_cpus=8, log_to_driver=False, logging_level="ERROR")
    try:
        out = train(study)
    finally:
        ray.shutdown()
    last = json.loads((out / "history.json").read_text())[-1]
    return {
        "tuples_per_s": last["step"] * 32 * workers / last["train_s"],
        "data_wait_share": last["data_wait_share"],
        "first_batch_s": last["first_batch_s"],
    }


def _strategy_worker(rank: int, folder: str, names: list[str], rounds: int) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    layout_S, layout_T = (layout_of(f"embedded:{side}", LoraSettings()) for side in ("tinylm", "llm"))
    for name in names:
        settings = TrainingSettings.model_validate({"strategy": name, "batch_size": 64, "workers": 2})
        model = SeveralPairs([GradTransformer(layout_S, layout_T, make_phi(SMALL), {"tinylm": "", "llm": ""}).train()])
        strategy = start_strategy(model, groups_of(model, "tuples"), settings, torch.device("cpu"), False)
        step = step_of(strategy, random_tuples(layout_S, layout_T, 32, torch.device("cpu")), settings)
        step()
        wall_s = statistics.median(seconds(step, torch.device("cpu")) for _ in range(rounds))
        kept = sum(value.numel() for shard in strategy.shards for value in shard.values().values())
        if rank == 0:
            (Path(folder) / f"{name}.json").write_text(json.dumps({"step_s": wall_s, "kept_mb": 4 * kept / 1e6}))
    dist.destroy_process_group()


def by_strategy(rounds: int) -> dict[str, Any]:
    """Seconds a step of two workers, and what one keeps of weights and moments."""
    names = ["ddp", "zero1", "zero2", "zero3"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        torch.multiprocessing.spawn(_strategy_worker, (folder, names, rounds), nprocs=2)  # type: ignore[no-untyped-call]
        return {name: json.loads((Path(folder) / f"{name}.json").read_text()) for name in names}


def by_shape(pair: str, phi: str, variant: str, batches: list[int]) -> dict[str, Any]:
    """Steps at the shapes of a pair on this device."""
    from torch.utils.flop_counter import FlopCounterMode

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout_S, layout_T = (layout_of(name, LoraSettings()) for name in PAIRS[pair])
    settings = TrainingSettings(
        precision="bf16", activation_checkpointing="checkpointing" in variant, compile="compile" in variant
    )
    with device:
        model = GradTransformer(layout_S, layout_T, phi_of(known_config(phi)), {"tinylm": "", "llm": ""}).train()
        two = random_tuples(layout_S, layout_T, 2, device)
        with FlopCounterMode(display=False) as counter, torch.autocast(device.type, torch.bfloat16):
            model.loss(two.S_NLd, two.T_NLd).backward()
        model.zero_grad()
    flops, peak = counter.get_total_flops() / 2, matrix_peak(device, "bf16")
    several = SeveralPairs([model])
    adapt_layers(several, settings)
    strategy = start_strategy(several, groups_of(several, "tuples"), settings, device, False)
    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for N in batches:
        step = step_of(strategy, random_tuples(layout_S, layout_T, N, device), settings)
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            first_s = seconds(step, device)
            step()
            wall_s = statistics.median(seconds(step, device) for _ in range(5))
        except torch.OutOfMemoryError:
            print(f"{pair} {variant} {N} tuples: out of memory", flush=True)
            torch.cuda.empty_cache()
            continue
        gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        found[str(N)] = {
            "tuples_per_s": N / wall_s,
            "peak_share": N * flops / wall_s / peak,
            "gib": gib,
            "first_s": first_s,
        }
        print(
            f"{pair} {variant} {N} tuples: {N / wall_s:.0f}/s, {N * flops / wall_s / peak:.2f} of the peak of "
            f"{peak / 1e12:.0f} TFLOP/s, {gib:.1f} GiB, first step {first_s:.0f} s",
            flush=True,
        )
    return found


def main(
    part: Annotated[str, typer.Option(help="loop, ray, strategies, phi, or cpu: the first three.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    epochs: Annotated[int, typer.Option(help="Of a training by Ray Train.")] = 20,
    pairs: Annotated[str, typer.Option(help="Of phi.")] = ",".join(PAIRS),
    phi: Annotated[str, typer.Option(help="By name; random weights.")] = "google/flan-t5-large",
    batches: Annotated[str, typer.Option(help="Tuples of a step (phi).")] = "32,256,512",
    variants: Annotated[str, typer.Option(help="plain, compile, checkpointing, or several with +.")] = "plain,compile",
) -> None:
    """Measure training; the last line is JSON."""
    found: dict[str, Any] = {}
    torch.set_num_threads(1)
    if part in ("cpu", "loop"):
        layouts = [layout_of(f"embedded:{side}", LoraSettings()) for side in ("tinylm", "llm")]
        walls = by_loop(layouts[0], layouts[1], 32, rounds)
        found["vs_trainer"] = walls["trainer"] / walls["own"]
        found["vs_trainer_headless"] = walls["headless"] / walls["own"]
        print(
            f"a step of 32 tuples: {walls['own']:.3f} s, by Trainer {walls['trainer']:.3f} s, without its LM head "
            f"{walls['headless']:.3f} s"
        )
    if part in ("cpu", "ray"):
        with tempfile.TemporaryDirectory() as folder:
            one, two = (by_ray(Path(folder), workers, epochs) for workers in (1, 2))
        found |= {
            "data_wait_share": one["data_wait_share"],
            "data_wait_share_2": two["data_wait_share"],
            "first_batch_s": one["first_batch_s"],
            "tuples_per_s": one["tuples_per_s"],
            "weak_scaling_2": two["tuples_per_s"] / (2 * one["tuples_per_s"]),
        }
        print(f"Ray Train: one worker {one}, two {two}")
    if part in ("cpu", "strategies"):
        found["strategies"] = by_strategy(rounds)
        print(found["strategies"])
    if part == "phi":
        for pair in pairs.split(","):
            for variant in variants.split(","):
                found[f"{pair} {variant}"] = by_shape(pair, phi, variant, [int(N) for N in batches.split(",")])
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
