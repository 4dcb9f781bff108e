"""How fast curation fine-tunes, and whether a shadow costs the same however many there are.

Part 1, fine-tunes an hour of the embedded pair on this machine's cores: the engine as curation runs it (a worker of one
thread for each core, each training a group of adapters), against what a user would write with transformers' Trainer and
PEFT in one process: (a) the paper's recipe, batch 1 with 16 accumulation steps, (b) batches of 16. Same samples, same
optimizer, same number of optimizer steps; loading models and starting processes is not counted for anyone. The three
take turns, so that all of them meet the same machine; ratios are of medians.

Part 2, curation through Ray Data with more and more shadows, all of one task: seconds of a shadow while all workers are
at it; the same over what its fine-tune took its worker, which does not change with the machine's speed (by 25 % within
a minute here) and shows all that scheduling and storing add; and the wall time with all starts.

    python benchmarks/curation.py                 # everything, 25 minutes on 2 cores
    python benchmarks/curation.py --part growth --shadows 50,100

The last line of the output is JSON: `tinylm` and `llm`, each {"vs_trainer_batch1", "vs_trainer_batch16"}, and
`growth_per_shadow`, the largest over the smallest time of a shadow in units of its fine-tune (`growth_seconds`: in
seconds).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from gt_ray.config import Config, load_config

SAMPLES = 256
GROUP = 5
"""Adapters of the TinyLM that a worker trains together here (`adapters_at_once=auto`)."""


def group_samples(config: Config, side: str, task: str) -> list[Any]:
    """A shadow's worth of samples of one task."""
    from gt_ray.learning.samples import encode
    from gt_ray.pairs.models import load_tokenizer
    from gt_ray.tasks import TASKS
    from gt_ray.tasks.data import load_data

    settings = getattr(config.pair, side)
    rows = load_data(config).rows(task, "public-train", range(SAMPLES))
    return encode(load_tokenizer(settings.model), TASKS[task], rows, settings.fine_tune.max_length)


def engine_worker(pipe: Any, config: Config, side: str) -> None:
    """A process of one thread that trains one group on request and says how many adapters it held."""
    torch.set_num_threads(1)
    from gt_ray.learning.engine import Engine
    from gt_ray.learning.samples import TrainingSet
    from gt_ray.pairs.models import load_model
    from gt_ray.pairs.root import make_root

    settings = getattr(config.pair, side)
    engine = Engine(load_model(settings), make_root(settings))
    while (request := pipe.recv()) is not None:
        samples, steps = request
        tune = settings.fine_tune.model_copy(update={"steps": steps})
        G = len(engine.groups([TrainingSet(samples, g) for g in range(64)], tune)[0])
        sets = [TrainingSet(samples, g) for g in range(G)]
        list(engine.fine_tune(sets, tune.model_copy(update={"steps": 1})))
        pipe.send("ready")
        pipe.recv()
        list(engine.fine_tune(sets, tune))
        pipe.send(G)


class EngineWorkers:
    """As many workers as there are cores."""

    def __init__(self, config: Config, side: str, cores: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(cores):
            ours, theirs = context.Pipe()
            process = context.Process(target=engine_worker, args=(theirs, config, side), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def seconds_per_step(self, samples: list[Any], steps: int) -> tuple[float, int]:
        """Seconds of an optimizer step of one adapter with all workers at work, and how many adapters each held."""
        for pipe in self.pipes:
            pipe.send((samples, steps))
        for pipe in self.pipes:
            pipe.recv()
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send("go")
        held = [pipe.recv() for pipe in self.pipes]
        return (time.perf_counter() - start) / (steps * sum(held)), held[0]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def trainer_seconds_per_step(
    config: Config, side: str, samples: list[Any], batch: int, accumulate: int, steps: int, folder: Path
) -> float:
    """Seconds of an optimizer step with Trainer and PEFT, one adapter, all cores."""
    import peft
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from gt_ray.pairs.models import load_tokenizer, resolve

    settings = getattr(config.pair, side)
    tune = settings.fine_tune
    lora = peft.LoraConfig(
        r=settings.lora.rank, lora_alpha=settings.lora.alpha, target_modules=list(settings.lora.target_modules)
    )
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(resolve(settings.model), dtype=torch.float32), lora
    )
    rows = [
        {
            "input_ids": sample.prompt + sample.target,
            "attention_mask": [1] * len(sample),
            "labels": [-100] * len(sample.prompt) + sample.target,
        }
        for sample in samples
    ]
    marks = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=steps + 1,
            learning_rate=tune.learning_rate,
            weight_decay=tune.weight_decay,
            max_grad_norm=tune.clip_norm,
            lr_scheduler_type="linear",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(load_tokenizer(settings.model), padding=True),
        callbacks=[Clock()],
    ).train()
    return (marks[-1] - marks[0]) / steps  # the first step warms up


def matrix_peak(cores: int) -> float:
    """Floating-point operations a second of a large float32 matrix product on all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * 2048**3 / min(times)


def step_operations(config: Config, side: str, samples: list[Any]) -> int:
    """Floating-point operations of the matrix products of one adapter's optimizer step."""
    from torch.utils.flop_counter import FlopCounterMode

    from gt_ray.learning.engine import Engine
    from gt_ray.learning.samples import TrainingSet
    from gt_ray.pairs.models import load_model
    from gt_ray.pairs.root import make_root

    settings = getattr(config.pair, side)
    engine = Engine(load_model(settings), make_root(settings), 1)
    tune = settings.fine_tune.model_copy(update={"steps": 1})
    with FlopCounterMode(display=False) as counter:
        list(engine.fine_tune([TrainingSet(samples, 0)], tune))
    return int(counter.get_total_flops())


def against_trainer(say: Callable[[str], None], cores: int, rounds: int, tasks: list[str]) -> dict[str, Any]:
    """Part 1."""
    config = load_config("embedded", ["clients.per_task=1", "clients.samples=8", "evaluation.test_rows=8"])
    peak = matrix_peak(cores)
    found: dict[str, Any] = {}
    for side in ("tinylm", "llm"):
        workers = EngineWorkers(config, side, cores)
        seconds: dict[str, list[float]] = {"engine": [], "batch1": [], "batch16": []}
        operations, held = [], set()
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(rounds):
                for task in tasks:
                    samples = group_samples(config, side, task)
                    engine, G = workers.seconds_per_step(samples, config.pair.llm.fine_tune.steps)
                    seconds["engine"].append(engine)
                    held.add(G)
                    operations.append(step_operations(config, side, samples))
                    for name, batch, steps in (("batch1", 1, 4), ("batch16", 16, 12)):
                        seconds[name].append(
                            trainer_seconds_per_step(config, side, samples, batch, 16 // batch, steps, Path(folder))
                        )
        workers.close()
        median = {name: statistics.median(times) for name, times in seconds.items()}
        steps = getattr(config.pair, side).fine_tune.steps
        for name, value in median.items():
            say(f"{side} {name}: {1e3 * value:.1f} ms a step of an adapter, {3600 / (value * steps):.0f} fine-tunes/h")
        share = statistics.median(operations) / median["engine"] / peak
        say(
            f"{side} engine: {sorted(held)} adapters a worker, {100 * share:.0f} % of the cores' matrix peak "
            f"({peak / 1e9:.0f} GFLOP/s)"
        )
        found[side] = {
            f"vs_trainer_{name}": round(median[name] / median["engine"], 2) for name in ("batch1", "batch16")
        }
        say(f"{side}: {found[side]}")
    return found


def steady(folder: Path, workers: int) -> tuple[float, float]:
    """Seconds of a shadow while all workers are at it, and how much of their time that is beside fine-tuning.

    A unit's file says how long its fine-tune took its worker, and when it ended; `GROUP` of them share that time.
    """
    from gt_ray.updates.store import UpdateStore

    store = UpdateStore(folder)
    spans = []
    for key in sorted(store.contents()[0]):
        end, took = (folder / key / "updates.safetensors").stat().st_mtime, store.header(key).meta.wall_s
        spans.append((end - GROUP * took, end, took))
    # The moments at which as many fine-tunes run as all workers have room for; starts and ends lie outside.
    at_work = sorted([(start, 1) for start, _, _ in spans] + [(end, -1) for _, end, _ in spans])
    running, full = 0, []
    for moment, change in at_work:
        running += change
        if running > (workers - 1) * GROUP:
            full.append(moment)
    if not full:
        raise typer.BadParameter(f"too few shadows for {workers} workers with {GROUP} at a time each")
    first, last = full[0], full[-1]
    shares = [max(0.0, min(end, last) - max(start, first)) / (end - start) for start, end, _ in spans]
    worked = sum(share * took for share, (_, _, took) in zip(shares, spans, strict=True))
    return (last - first) / sum(shares), workers * (last - first) / worked


def growth(say: Callable[[str], None], rounds: int, sizes: list[int], workers: list[int]) -> dict[str, float]:
    """Part 2: largest over smallest figure of the sizes (medians of the rounds), of the worst number of workers."""
    import ray

    from gt_ray.cluster import connect
    from gt_ray.curation.run import run_fine_tunes
    from gt_ray.curation.study import Study

    connect()
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {(n, size): [] for n in workers for size in sizes}
    for turn in range(rounds):
        # To and fro, so that a machine that gets slower is no size's disadvantage.
        for n, size in list(found)[:: 1 if turn % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                overrides = ["data.tasks=[gsm8k]", f"curation.shadows={size}", f"curation.workers={n}"]
                study = Study.load(load_config("embedded", [*overrides, f"store={folder}/store", f"runs={folder}"]))
                start = time.perf_counter()
                run_fine_tunes(study, study.shadow_jobs("tinylm"), "growth")
                wall = time.perf_counter() - start
                found[n, size].append((*steady(Path(folder) / "store", n), wall / size))
    ray.shutdown()
    worst = {"growth_per_shadow": 1.0, "growth_seconds": 1.0}
    for n in workers:
        medians = {size: [statistics.median(figure) for figure in zip(*found[n, size], strict=True)] for size in sizes}
        for size, (seconds, over, wall) in medians.items():
            every = ", ".join(f"{once:.3f} / {factor:.3f}" for once, factor, _ in found[n, size])
            say(
                f"{n} workers, {size} shadows: {seconds:.3f} s a shadow, {over:.3f} of its fine-tune ({every}); "
                f"with all starts {wall:.3f} s"
            )
        for key, place in (("growth_seconds", 0), ("growth_per_shadow", 1)):
            figures = [figure[place] for figure in medians.values()]
            worst[key] = max(worst[key], round(max(figures) / min(figures), 3))
    return worst


def main(
    part: Annotated[str, typer.Option(help="trainer, growth or all.")] = "all",
    rounds: Annotated[int, typer.Option(help="How often everything is measured; medians count.")] = 3,
    tasks: Annotated[str, typer.Option(help="Tasks whose samples are trained on.")] = "gsm8k,drop,samsum",
    shadows: Annotated[str, typer.Option(help="Numbers of shadows.")] = "50,100,200",
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = "1,2",
) -> None:
    """Speed of curation as ratios; example: `python benchmarks/curation.py --part trainer --rounds 1`."""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {}
    if part in ("trainer", "all"):
        found |= against_trainer(typer.echo, cores, rounds, tasks.split(","))
    if part in ("growth", "all"):
        sizes, counts = ([int(n) for n in text.split(",")] for text in (shadows, workers))
        found |= growth(typer.echo, rounds, sizes, counts)
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
