"""What the recipe of docs/transfer.md costs where it is used: generation, and a token of the answers.

Generation: one update of the embedded pair by the preset's network and linear path, against the network alone (the
paper's), greedy block by block as in Eq. 11.

Tokens: answers of the embedded LLM on 50 test rows at once, against proxy-tuning, which runs the LLM and twice the
TinyLM for every token: with the adapter beside the weights, and merged into them, as whoever serves one adapter alone
would. All by transformers, which alone decodes proxy-tuning. A token's cost is the time over the tokens of the answers.

    python benchmarks/transfer.py                # a minute
    python benchmarks/transfer.py --rounds 3

All take turns, so that they meet the same machine; ratios are of medians. The last line of the output is JSON:
`generation_vs_plain`, `token_vs_proxy_tuning`, `merged_token_vs_proxy_tuning`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from gt_ray.config import load_config
from gt_ray.curation.study import load_roots
from gt_ray.evaluation.proxy_scorer import ProxyScorer
from gt_ray.evaluation.scorer import System, TransformersScorer
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import make_phi
from gt_ray.tasks.embedded import rows

TASK, ROWS, GENERATED = "gsm8k", 50, 20
SPREAD = 0.05
"""Standard deviation of the random updates."""


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(rounds: Annotated[int, typer.Option(help="Turns of each; medians count.", min=1)] = 7) -> None:
    """Measure and print both ratios."""
    torch.set_num_threads(1)
    config = load_config("embedded-transfer", ["evaluation.batch_size=50", "evaluation.log_likelihood=false"])
    roots, settings = load_roots(config), config.grad_transformer
    assert settings.phi is not None
    layouts = roots["tinylm"].layout, roots["llm"].layout
    models = {
        "recipe": GradTransformer(*layouts, make_phi(settings.phi), {}, linear_rank=settings.linear_rank).eval(),
        "plain": GradTransformer(*layouts, make_phi(settings.phi), {}).eval(),
    }
    generator = torch.Generator().manual_seed(0)
    update_S, update_T = (
        SPREAD * torch.randn(roots[side].layout.L, roots[side].layout.d, generator=generator)
        for side in ("tinylm", "llm")
    )
    pair = config.pair
    by_transformers = TransformersScorer(pair.llm, roots["llm"], config.evaluation)
    scorers = {
        "adapter": (by_transformers, System("a", "llm", update_T)),
        "merged": (by_transformers, System("m", "llm")),  # costs what the base model costs
        "proxy_tuning": (
            ProxyScorer(pair.llm, config.evaluation, pair.tinylm, roots["tinylm"]),
            System("p", proxy_Ld=update_S),
        ),
    }
    test = rows(TASK, "test", "north-day", 0, ROWS)
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, model in models.items():
            spent = seconds(lambda model=model: [model.generate(update_S[None]) for _ in range(GENERATED)])
            times.setdefault(name, []).append(spent / GENERATED)
        for name, (scorer, system) in scorers.items():
            scored = []
            spent = seconds(lambda s=scorer, y=system, out=scored: out.extend(s.score(y, TASK, test)))
            times.setdefault(name, []).append(spent / sum(row.tokens for row in scored))
        if turn == 0:
            times.clear()  # warm-up
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:14s} {1e3 * median:9.3f} ms {'an update' if name in models else 'a token'}")
    print(
        json.dumps(
            {
                "generation_vs_plain": round(medians["recipe"] / medians["plain"], 3),
                "token_vs_proxy_tuning": round(medians["adapter"] / medians["proxy_tuning"], 3),
                "merged_token_vs_proxy_tuning": round(medians["merged"] / medians["proxy_tuning"], 3),
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
