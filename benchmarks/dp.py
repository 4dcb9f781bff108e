"""Clipped gradients of rows: stacked adapters (learning/mechanisms/dp_sgd.py) against Opacus' hooks on PEFT's LoRA.

The embedded TinyLM and rows of a task, the same batches, in turns, on one thread: a pass of one client, and one of four
together. Opacus gets its rows padded, since its hooks know no packing.

    python benchmarks/dp.py            # a minute

The last line of the output is JSON: `vs_opacus`, `vs_opacus_of_4` (rows a second over Opacus'), `vs_plain` (rows a
second over those of plain fine-tuning by the same engine: what clipping each row costs).
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from gt_ray.config import load_config
from gt_ray.curation.study import load_roots
from gt_ray.learning.batches import padded
from gt_ray.learning.engine import Engine
from gt_ray.learning.mechanisms.base import batch_gradients
from gt_ray.learning.mechanisms.dp_sgd import clipped_sums
from gt_ray.learning.samples import Sample, encode
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import DOMAINS, rows

ROW_NORM = 0.1


def by_opacus(model: Any, root: Any) -> Callable[[Sequence[Sample]], None]:
    """Clipped gradients of a batch of one client."""
    import opacus
    import peft

    lora = root.lora
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    hooked = opacus.GradSampleModule(peft.get_peft_model(model, config).train(), loss_reduction="sum")
    trained = [parameter for parameter in hooked.parameters() if parameter.requires_grad]

    def step(samples: Sequence[Sample]) -> None:
        hooked.zero_grad()
        batch = padded([samples], pad=0)
        logits = hooked(input_ids=batch.ids_RT).logits.flatten(0, 1)[batch.due_n]
        loss_n = torch.nn.functional.cross_entropy(logits, batch.target_n, reduction="none")
        row_n = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s.target) for s in samples]))
        sums = torch.zeros(len(samples)).index_add(0, row_n, loss_n)
        (sums / torch.bincount(row_n)).sum().backward()
        norm_B = torch.stack([parameter.grad_sample.flatten(1).norm(dim=1) for parameter in trained]).norm(dim=0)
        factor_B = (ROW_NORM / norm_B).clamp(max=1)
        for parameter in trained:
            parameter.grad = torch.einsum("b,b...->...", factor_B, parameter.grad_sample)
            parameter.grad_sample = None

    return step


def main(
    batch_size: Annotated[int, typer.Option(help="Rows of a client.")] = 64,
    rounds: Annotated[int, typer.Option(help="Turns; medians are reported.")] = 9,
) -> None:
    """Measure; the last line is JSON. Example: `python benchmarks/dp.py --batch-size 32`."""
    warnings.filterwarnings("ignore", category=UserWarning)  # of hooks whose inputs need no gradients
    torch.set_num_threads(1)
    config = load_config("embedded")
    root, settings = load_roots(config)["tinylm"], config.pair.tinylm
    samples = encode(
        load_tokenizer(settings.model), TASKS["drop"], rows("drop", "public-train", DOMAINS[0], 0, 4 * batch_size)
    )
    clients = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    engine, opacus_step = Engine(load_model(settings), root), by_opacus(load_model(settings), root)

    def stacked_step(batch: Sequence[Sequence[Sample]], private: bool) -> None:
        with engine.losses.short_cuts(), stacked(engine.model, root, len(batch)) as parameters:
            if private:
                clipped_sums(engine.losses, list(parameters.values()), batch, ROW_NORM)
            else:
                batch_gradients(engine.losses, batch, 1)

    kinds: dict[str, tuple[Callable[[], None], int]] = {
        "Opacus": (lambda: opacus_step(clients[0]), 1),
        "stacked": (lambda: stacked_step(clients[:1], True), 1),
        "stacked, 4 clients": (lambda: stacked_step(clients, True), 4),
        "plain": (lambda: stacked_step(clients[:1], False), 1),
    }
    walls: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, (step, _) in kinds.items():
            start = time.perf_counter()
            step()
            walls[name].append(time.perf_counter() - start)
    rate = {name: n * batch_size / statistics.median(walls[name][1:]) for name, (_, n) in kinds.items()}
    for name, rows_per_s in rate.items():
        print(f"{name:20s} {rows_per_s:8.0f} rows/s")
    found = {
        "vs_opacus": rate["stacked"] / rate["Opacus"],
        "vs_opacus_of_4": rate["stacked, 4 clients"] / rate["Opacus"],
        "vs_plain": rate["stacked"] / rate["plain"],
    }
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    typer.run(main)
