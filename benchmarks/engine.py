"""The engine on one device: tokens a second, share of the matrix peak and memory for G adapters of one base model.

Random weights in the shapes of Qwen2.5, sequences of random tokens and lengths, plain PyTorch, no Ray. Against it, in
turns: PEFT with one adapter, batch 1 and 16 accumulation steps, as the paper trains (`batch1`).

    python benchmarks/engine.py --models 0.5B,1.5B,7B --adapters 1,4,16,64     # one CUDA GPU, bfloat16
    python benchmarks/engine.py --models 0.5B --adapters 1,4 --private          # DP-SGD
    python benchmarks/engine.py --models tiny --adapters 1,4 --lengths 16,64    # a CPU, seconds

The last line of the output is JSON: {model: {G: {"tokens_per_s", "peak_share", "memory_gib", "vs_batch1"}}}.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gt_ray.config import DpSgdSettings, FineTuneSettings, LoraSettings, Mechanism
from gt_ray.learning.engine import Engine, FineTuned
from gt_ray.learning.samples import Sample, TrainingSet
from gt_ray.pairs.root import Root, initial_adapter
from gt_ray.training.meter import matrix_peak, seconds

SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": layers < 37 and hidden < 3000,
    }
    for name, hidden, layers, heads, groups, inner, vocabulary in (
        ("tiny", 64, 2, 2, 1, 192, 1024),
        ("0.5B", 896, 24, 14, 2, 4864, 151936),
        ("1.5B", 1536, 28, 12, 2, 8960, 151936),
        ("3B", 2048, 36, 16, 2, 11008, 151936),
        ("7B", 3584, 28, 28, 4, 18944, 152064),
        ("14B", 5120, 48, 40, 8, 13824, 152064),
        ("32B", 5120, 64, 40, 8, 27648, 152064),
    )
}


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Root]:
    """A Qwen2 of random weights, and a root of rank 2 on q and k."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**SHAPES[name], pad_token_id=0)
    lora = LoraSettings()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        initial = initial_adapter(Path(folder), lora, seed=0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval(), Root("random", name, lora, initial)


def random_samples(n: int, shortest: int, longest: int, vocabulary: int) -> list[Sample]:
    """Samples of random tokens; an eighth of each is target."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator).tolist()
    tokens = [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(ids[: -len(ids) // 8], ids[-len(ids) // 8 :]) for ids in tokens]


def batch1_seconds(model: Any, samples: list[Sample], settings: FineTuneSettings, device: torch.device) -> float:
    """Seconds of an optimizer step of one adapter with PEFT, batch 1, accumulated; LoRA is taken out again."""
    import peft

    lora = LoraSettings()
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    wrapped = peft.get_peft_model(model, config)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate)

    def step() -> None:
        for sample in samples[: settings.batch_size]:
            ids = torch.tensor([sample.prompt + sample.target], device=device)
            labels = ids.clone()
            labels[:, : len(sample.prompt)] = -100
            (wrapped(input_ids=ids, labels=labels).loss / settings.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step_s = statistics.median(seconds(step, device) for _ in range(3))
    wrapped.unload()
    model.requires_grad_(False)
    return step_s


def main(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = "0.5B,1.5B,7B",
    adapters: Annotated[str, typer.Option(help="Numbers of adapters at once.")] = "1,4,16,64",
    lengths: Annotated[str, typer.Option(help="Shortest and longest sequence, tokens.")] = "128,512",
    steps: Annotated[int, typer.Option(help="Optimizer steps that are timed, three times.")] = 2,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = False,
    private: Annotated[bool, typer.Option(help="DP-SGD in place of plain fine-tuning; PEFT's stays plain.")] = False,
) -> None:
    """Speed of the engine; example: `python benchmarks/engine.py --models tiny --adapters 1,4 --lengths 16,64`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak = matrix_peak(device, "bf16" if dtype is torch.bfloat16 else "fp32")
    typer.echo(f"{device}, {dtype}, matrix peak {peak / 1e12:.2f} TFLOP/s")
    shortest, longest = map(int, lengths.split(","))
    mechanism: Mechanism = DpSgdSettings(noise_multiplier=1.0) if private else "sft"
    settings = FineTuneSettings(steps=steps, learning_rate=1e-4, mechanism=mechanism)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name in models.split(","):
        model, root = random_model(name, device, dtype)
        samples = random_samples(4 * settings.batch_size, shortest, longest, SHAPES[name]["vocab_size"])
        baseline = batch1_seconds(model, samples, settings, device)
        outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        weights = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in outside)
        tokens = settings.batch_size * statistics.mean(map(len, samples))
        for G in map(int, adapters.split(",")):
            engine = Engine(model, root, G, gradient_checkpointing=checkpointing)
            sets = [TrainingSet(samples, g) for g in range(G)]
            one = settings.model_copy(update={"steps": 1})

            def train(engine: Engine = engine, sets: list[TrainingSet] = sets, tune: FineTuneSettings = one) -> None:
                assert all(isinstance(result, FineTuned) for _, result in engine.fine_tune(sets, tune))

            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            train()
            if len(engine.groups(sets, settings)[0]) < G:
                typer.echo(f"{name} G={G}: out of memory")
                break
            step_s = statistics.median(seconds(lambda: train(tune=settings), device) for _ in range(3)) / steps
            rate = G * tokens / step_s
            # Forward and backward through frozen weights: two products each, no gradient of weights. The LM head runs
            # on targets alone, which this leaves out, as it does attention: an underestimate.
            found.setdefault(name, {})[G] = {
                "tokens_per_s": round(rate),
                "peak_share": round(4 * weights * rate / peak, 3),
                "vs_batch1": round(baseline * G / step_s, 2),
            }
            if device.type == "cuda":
                found[name][G]["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            typer.echo(f"{name} G={G}: {found[name][G]}")
        del model
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
