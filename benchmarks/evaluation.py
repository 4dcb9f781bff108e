"""How fast many adapters are scored, and whether hot swaps leak memory.

Speed: 32 adapters on 16 and on 64 test rows each, answers and log-likelihoods of the references, on the embedded LLM:
the pool of engines as `gt-ray evaluate` runs it (an engine of one thread on each core), against (a) one adapter after
the other on one vLLM engine, (b) transformers and PEFT, `set_adapter` and batches of 16. Both get all cores, once as
one thread and once as many, and the better counts. Loading adapters counts for everyone, starting engines for no one.
All take turns, so that they meet the same machine; ratios are of medians.

Memory: resident memory of one engine that scores 500 adapters one after the other, as a slope behind the first 100.

    python benchmarks/evaluation.py                            # 15 minutes on 2 cores
    python benchmarks/evaluation.py --rounds 1 --swaps 0

The last line of the output is JSON: `vs_sequential_vllm` and `vs_transformers` at 16 rows, `engine_idle_share`,
`rss_mb_per_100_adapters`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from gt_ray.config import Config, load_config
from gt_ray.evaluation.pool import EngineKind, EnginePool, Item
from gt_ray.evaluation.scorer import System

TASKS = ("samsum", "gsm8k", "drop")
SPREAD = 0.05
"""Standard deviation of the random updates: answers differ from adapter to adapter and mostly end by themselves."""


def make_adapters(folder: Path, n: int, first: int = 0) -> list[Path]:
    """Folders of adapters with random updates."""
    from gt_ray.pairs.root import make_root
    from gt_ray.updates.files import write_adapter

    root = make_root(load_config("embedded").pair.llm)
    made = []
    for number in range(first, first + n):
        generator = torch.Generator().manual_seed(number)
        update_Ld = SPREAD * torch.randn(root.layout.L, root.layout.d, generator=generator)
        write_adapter(folder / f"adapter-{number}", update_Ld, root)
        made.append(folder / f"adapter-{number}")
    return made


def items(folders: Sequence[Path], rows: int) -> list[Item]:
    """Every adapter on test rows of one of the tasks."""
    from gt_ray.tasks.embedded import rows as embedded_rows

    found = {task: embedded_rows(task, "test", "north-day", 0, rows) for task in TASKS}
    return [
        Item(folder.name, System(folder.name, folder=folder), TASKS[i % len(TASKS)], found[TASKS[i % len(TASKS)]])
        for i, folder in enumerate(folders)
    ]


def sequential_vllm(config: Config) -> Callable[[list[Item]], None]:
    """(a) One engine, one adapter after the other."""
    from gt_ray.evaluation.vllm_scorer import VllmScorer

    settings = config.evaluation.model_copy(update={"num_gpus": 0})
    scorer = VllmScorer(config.pair.llm, None, settings, 2, ["q_proj", "k_proj"])

    def score(work: list[Item]) -> None:
        for item in work:
            scorer.score(item.system, item.task, item.rows)

    return score


def transformers_and_peft(config: Config) -> Callable[[list[Item]], None]:
    """(b) As a user would write it."""
    from peft import PeftModel
    from torch.nn.utils.rnn import pad_sequence

    from gt_ray.learning.samples import encode
    from gt_ray.pairs.models import load_model, load_tokenizer
    from gt_ray.tasks import TASKS as KNOWN

    tokenizer = load_tokenizer(config.pair.llm.model)
    tokenizer.padding_side = "left"
    base = load_model(config.pair.llm)

    @torch.no_grad()
    def score(work: list[Item]) -> None:
        model: Any = None
        for item in work:
            name, folder = item.system.name, str(item.system.folder)
            if model is None:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
            model.set_adapter(name)
            samples = encode(tokenizer, KNOWN[item.task], item.rows)
            for first in range(0, len(samples), 16):
                part = samples[first : first + 16]
                inputs = tokenizer.pad({"input_ids": [sample.prompt for sample in part]}, return_tensors="pt")
                new = model.generate(**inputs, max_new_tokens=config.evaluation.max_new_tokens, do_sample=False)
                outputs = tokenizer.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                for output, row in zip(outputs, item.rows[first : first + 16], strict=True):
                    KNOWN[item.task].score(output, row)
                whole = [torch.tensor(sample.prompt + sample.target) for sample in part]
                labels = [torch.tensor([-100] * len(sample.prompt) + sample.target) for sample in part]
                logits = model(
                    input_ids=pad_sequence(whole, batch_first=True),
                    attention_mask=pad_sequence([torch.ones_like(ids) for ids in whole], batch_first=True),
                ).logits
                padded = pad_sequence(labels, batch_first=True, padding_value=-100)
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), padded[:, 1:].flatten(), reduction="none"
                ).view(len(part), -1).sum(1).tolist()
        model.unload()

    return score


def one_by_one(config: Config) -> Callable[[list[Item]], list[float]]:
    """Resident memory in MB after every adapter that one engine scores."""
    import psutil

    score = sequential_vllm(config)

    def measure(work: list[Item]) -> list[float]:
        found = []
        for item in work:
            score([item])
            found.append(psutil.Process().memory_info().rss / 2**20)
        return found

    return measure


def serve(pipe: Any, make: Callable[[Config], Callable[[list[Item]], Any]], config: Config) -> None:
    """A process that scores on request and says how long it took, and what came of it."""
    score = make(config)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        start = time.perf_counter()
        result = score(work)
        pipe.send((time.perf_counter() - start, result))


class Side:
    """One way to score, in a process of so many threads."""

    def __init__(self, make: Callable[[Config], Callable[[list[Item]], Any]], config: Config, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
        self.process = context.Process(target=serve, args=(theirs, make, config), daemon=True)
        self.process.start()
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
        self.pipe.recv()

    def __call__(self, work: list[Item]) -> tuple[float, Any]:
        self.pipe.send(work)
        seconds, result = self.pipe.recv()
        return seconds, result

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def speed(
    say: Callable[[str], None], config: Config, folder: Path, adapters: int, sizes: list[int], rounds: int
) -> dict[str, float]:
    """Rows a second of all sides."""
    cores = len(os.sched_getaffinity(0))
    folders, warm = make_adapters(folder, adapters), make_adapters(folder, 4, adapters)
    kind = EngineKind(config.pair.llm, None, config.evaluation, "vllm", 2, ("q_proj", "k_proj"))
    ways = {"sequential_vllm": sequential_vllm, "transformers": transformers_and_peft}
    sides = {(name, threads): Side(make, config, threads) for name, make in ways.items() for threads in {1, cores}}
    found: dict[str, float] = {}
    with EnginePool(kind, cores) as pool:
        for _ in range(2):
            list(pool.score(items(warm, 16)))
        for side in sides.values():
            side(items(warm, 16))
        for rows in sizes:
            work = items(folders, rows)
            seconds: dict[Any, list[float]] = {"pool": [], **{side: [] for side in sides}}
            idle = []
            for _ in range(rounds):
                start = time.perf_counter()
                assert len(list(pool.score(work))) == adapters
                seconds["pool"].append(time.perf_counter() - start)
                idle.append(pool.idle_share)
                for name, side in sides.items():
                    seconds[name].append(side(work)[0])
            rate = {name: adapters * rows / statistics.median(times) for name, times in seconds.items()}
            for name, value in rate.items():
                label = name if name == "pool" else f"{name[0]}, {name[1]} threads"
                say(f"{adapters} adapters x {rows} rows: {label}: {value:.0f} rows/s")
            for way in ways:
                ratio = rate["pool"] / max(rate[way, threads] for threads in {1, cores})
                say(f"{adapters} adapters x {rows} rows: pool / {way}: {ratio:.2f}")
                found.setdefault(f"vs_{way}", round(ratio, 2))  # the first size is the goal's
            say(f"{adapters} adapters x {rows} rows: engine idle share {statistics.median(idle):.3f}")
            found.setdefault("engine_idle_share", round(statistics.median(idle), 4))
    for side in sides.values():
        side.close()
    return found


def memory(say: Callable[[str], None], config: Config, folder: Path, swaps: int) -> float:
    """MB of resident memory that 100 adapters leave behind."""
    side = Side(one_by_one, config, 1)
    _, rss = side(items(make_adapters(folder, swaps), 2))
    side.close()
    start = min(100, swaps // 2)
    slope = statistics.linear_regression(range(start, swaps), rss[start:]).slope
    say(
        f"resident memory: {rss[0]:.0f} MB after 1 adapter, {rss[start]:.0f} after {start}, {rss[-1]:.0f} after {swaps}"
    )
    return 100 * slope


def main(
    adapters: Annotated[int, typer.Option(help="Adapters.")] = 32,
    rows: Annotated[str, typer.Option(help="Test rows of each adapter; the goal is about the first.")] = "16,64",
    rounds: Annotated[int, typer.Option(help="How often everything is measured; medians count.")] = 3,
    swaps: Annotated[int, typer.Option(help="Adapters of the memory test; 0 leaves it out.")] = 500,
) -> None:
    """Speed of scoring as ratios; example: `python benchmarks/evaluation.py --rounds 1 --swaps 0`."""
    config = load_config("embedded")
    with tempfile.TemporaryDirectory() as folder:
        sizes = [int(n) for n in rows.split(",")]
        found = speed(typer.echo, config, Path(folder), adapters, sizes, rounds)
        if swaps:
            found["rss_mb_per_100_adapters"] = round(memory(typer.echo, config, Path(folder), swaps), 3)
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
