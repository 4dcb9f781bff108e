"""How fast the Grad-Transformer trains, and what memory it takes.

    python benchmarks/training.py --part phi            # one CUDA GPU: full-size phi on random tuples

phi: forward, backward and AdamW of a Flan-T5-Large-sized phi (random weights, bf16 autocast, float32 weights) at the
shapes of 3B -> 7B and 0.5B -> 32B: tuples a second, share of what a large matrix product reaches, bytes.

The last line of the output is JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from gt_ray.config import LoraSettings
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import phi_of
from gt_ray.pairs.families import known_config, layout_of

PAIRS = {
    "3B-7B": ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    "0.5B-32B": ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-32B-Instruct"),
}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_peak(device: torch.device) -> float:
    """Operations a second of a large bf16 matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(8))


def steps_of(pair: str, phi: str, device: torch.device, batches: list[int], variants: list[str], profile: int) -> Any:
    """Training steps at the shapes of a pair."""
    layout_S, layout_T = (layout_of(name, LoraSettings()) for name in PAIRS[pair])
    peak = matrix_peak(device)
    print(f"{pair}: matrix peak {peak / 1e12:.0f} TFLOP/s")
    found = {}
    for variant in variants:
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        with device:
            model = GradTransformer(layout_S, layout_T, phi_of(known_config(phi)), {"tinylm": "", "llm": ""}).train()
        assert model.phi is not None
        dtype = torch.bfloat16 if "pure" in variant else torch.float32
        model.to(dtype)
        if "checkpointing" in variant:
            model.phi.gradient_checkpointing_enable({"use_reentrant": False})
        if "compile" in variant:
            for block in [*model.phi.encoder.block, *model.phi.decoder.block]:
                block.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
        for N in batches:
            S, T = (torch.randn(N, one.L, one.d, device=device) * 0.3 for one in (layout_S, layout_T))

            def forward(S=S, T=T) -> Any:
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.float32):
                    return model.loss(S.to(dtype), T.to(dtype))

            def step() -> None:
                optimizer.zero_grad()
                forward().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

            name = f"{variant} N={N}"
            try:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                compile_s = seconds(step, device)
                step()
                wall_s = statistics.median(seconds(step, device) for _ in range(5))
                with FlopCounterMode(display=False) as counter:
                    # One pass on the meta device would do as well; a small batch is as exact.
                    model.phi.gradient_checkpointing_disable() if "checkpointing" in variant else None
                    one = [x[:2] for x in (S, T)]
                    if "compile" not in variant:
                        forward(*one).backward()
                    model.phi.gradient_checkpointing_enable(
                        {"use_reentrant": False}
                    ) if "checkpointing" in variant else None
                flops = counter.get_total_flops() / 2 * N or found.get(f"flops {pair}", 0) * N
                if counter.get_total_flops():
                    found[f"flops {pair}"] = flops / N
                memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
                state = sum(p.nbytes for p in model.parameters())
                found[name] = {
                    "tuples_per_s": N / wall_s,
                    "peak_share": flops / wall_s / peak,
                    "gib": memory / 2**30,
                    "step_s": wall_s,
                    "weights_gib": state / 2**30,
                    "before_gib": before / 2**30,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "first_s": compile_s,
                }
                print(pair, name, {k: round(v, 3) for k, v in found[name].items()}, flush=True)
                if profile == N:
                    with torch.profiler.profile(
                        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
                    ) as prof:
                        step()
                        torch.cuda.synchronize()
                    print(
                        prof.key_averages().table(
                            sort_by="self_cuda_time_total", row_limit=18, max_name_column_width=60
                        )
                    )
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                print(pair, name, "out of memory", flush=True)
        del model, optimizer
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main(
    pairs: Annotated[str, typer.Option()] = ",".join(PAIRS),
    phi: Annotated[str, typer.Option()] = "google/flan-t5-large",
    batches: Annotated[str, typer.Option()] = "32,256,512,1024",
    variants: Annotated[str, typer.Option()] = "autocast,autocast+compile,autocast+checkpointing,pure",
    profile: Annotated[int, typer.Option()] = 256,
) -> None:
    """See the top."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        pair: steps_of(pair, phi, device, [int(N) for N in batches.split(",")], variants.split(","), profile)
        for pair in pairs.split(",")
    }
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
