"""Time to generate an adapter with a phi of Flan-T5-Large's size (random weights), beside the floor from bytes moved.

The floor: what a step of generation has to read (the decoder, W_T and W_out for each block, the encoder and W_S once)
over the speed at which this device reads memory.

    python benchmarks/generation.py                     # a CUDA GPU where there is one, else the CPU (one thread)
    python benchmarks/generation.py --updates 1,32      # several updates in one generation

On a GPU also recorded as a CUDA graph, as the endpoint does. The last line of the output is JSON: {dtype: {updates:
{"seconds", "graphed", "floor"}}}.
"""

from __future__ import annotations

import json
import statistics
from typing import Annotated

import torch
import typer

from gt_ray.config import LoraSettings
from gt_ray.grad_transformer.graphs import GraphedGeneration
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.grad_transformer.phi import phi_of
from gt_ray.pairs.families import known_config, layout_of
from gt_ray.training.meter import seconds


def bytes_moved(model: GradTransformer) -> int:
    """The least that one generation reads."""
    assert model.phi is not None

    def size(*modules: torch.nn.Module) -> int:
        return sum(parameter.nbytes for module in modules for parameter in module.parameters())

    again = size(model.phi.decoder, model.embed_T, model.out)
    return model.layout_T.L * again + size(model.phi.encoder, model.embed_S)


def main(
    tinylm: Annotated[str, typer.Option(help="By name; its weights are not needed.")] = "Qwen/Qwen2.5-3B-Instruct",
    llm: Annotated[str, typer.Option(help="By name.")] = "Qwen/Qwen2.5-7B-Instruct",
    phi: Annotated[str, typer.Option(help="By name; random weights.")] = "google/flan-t5-large",
    updates: Annotated[str, typer.Option(help="Numbers of updates in one generation.")] = "1,32",
    rounds: int = 3,
) -> None:
    """Time an adapter; the last line is JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    layout_S, layout_T = layout_of(tinylm, LoraSettings()), layout_of(llm, LoraSettings())
    with device:
        model = GradTransformer(layout_S, layout_T, phi_of(known_config(phi)), {"tinylm": "", "llm": ""}).eval()
    source = torch.randn(2**28, device=device)
    bytes_per_s = source.nbytes / min(seconds(source.sum, device) for _ in range(5))
    found: dict[str, dict[int, dict[str, float]]] = {}
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for dtype in dtypes:
        model.to(dtype)
        floor_s = bytes_moved(model) / bytes_per_s
        of_dtype = found[str(dtype).removeprefix("torch.")] = {}
        for N in map(int, updates.split(",")):
            update_NLd = torch.randn(N, layout_S.L, layout_S.d, device=device, dtype=dtype)
            model.generate(update_NLd)
            wall_s = statistics.median(
                seconds(lambda update_NLd=update_NLd: model.generate(update_NLd), device) for _ in range(rounds)
            )
            of_dtype[N] = {"seconds": round(wall_s, 4), "floor": round(floor_s, 4)}
            print(f"{device}, {dtype}, {N} updates: {wall_s:.3f} s a generation, floor {floor_s:.3f} s")
            if device.type == "cuda":
                generate = GraphedGeneration(model)
                first_s = seconds(lambda: generate(update_NLd), device)  # noqa: B023
                wall_s = statistics.median(seconds(lambda: generate(update_NLd), device) for _ in range(rounds))  # noqa: B023
                of_dtype[N]["graphed"] = round(wall_s, 4)
                print(f"    graphed {wall_s:.3f} s, recorded in {first_s:.1f} s")
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
