"""Make the pair of the presets `smollm2` and `smollm2-small`: SmolLM2-135M-Instruct, and a TinyLM pruned from it.

    python jobs/prepare_smollm2.py data.source=files data.folder=<rows>
    python jobs/prepare_smollm2.py --llm SmolLM2-135M-Instruct.Q4_1.gguf ...    # without the Hub: docs/real-models.md

`<out>/llm` are plain weights and tokenizer. `<out>/tinylm` keeps every third layer and is healed: trained for the LLM's
token distributions on the public training rows of the preset's tasks. What is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gt_ray.config import load_config
from gt_ray.errors import UserError
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.samples import Sample, encode
from gt_ray.progress import bar, say
from gt_ray.tasks import TASKS
from gt_ray.tasks.data import TaskData, load_data
from gt_ray.updates.files import replace_folder

LONGEST = 256
"""Tokens of a row that are read."""
ROWS = 8
"""Of a step of healing."""
COMPARED = 256
"""Tokens of a step whose distributions are compared: the LM head takes most of the time of a small model."""


def load_llm(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights in float32 and tokenizer of a Hub id, a folder, or a GGUF file."""
    if not source.endswith(".gguf"):
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)
    if not (file := Path(source)).is_file():
        raise UserError(f"there is no file {source}")
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The file only names its pre-tokenizer ("smollm"), and transformers takes GPT-2's, which differs at "\n\n1".
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return model, tokenizer


def kept_layers(layers: int) -> list[int]:
    """A third of so many layers, evenly spaced from the first to the last."""
    n = max(2, layers // 3)
    return [round(i * (layers - 1) / (n - 1)) for i in range(n)]


def prune(llm: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of its own that has the same weights and these layers alone."""
    config = copy.deepcopy(llm.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    tinylm = type(llm)(config)
    tinylm.load_state_dict(llm.state_dict(), strict=False)  # right but for the layers
    for layer, i in zip(tinylm.model.layers, kept, strict=True):
        layer.load_state_dict(llm.model.layers[i].state_dict())
    return tinylm.eval()


def texts(tokenizer: PreTrainedTokenizerBase, data: TaskData, split: str, most: int | None = None) -> list[Sample]:
    """Prompts and targets of the rows of a split; a loss is due on all but how the rows of a task all begin."""
    found = []
    for task in [task for task, name in data.pools if name == split]:
        rows = [s.prompt + s.target for s in encode(tokenizer, TASKS[task], data.pools[task, split][:most])]
        start = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))))
        found += [Sample(row[:start], row[start:LONGEST]) for row in rows]
    return found


def divergence(tinylm: PreTrainedModel, llm: PreTrainedModel, samples: Sequence[Sample]) -> Tensor:
    """Mean KL(LLM || TinyLM) of the next token at `COMPARED` random places of the samples."""
    batch = TargetLosses(llm, None).batch([samples])
    batch = replace(batch, due_n=batch.due_n[torch.randperm(len(batch.due_n))[:COMPARED]])

    def logs_nV(model: PreTrainedModel) -> Tensor:
        hidden_nd = TargetLosses(model, None).due_hidden(batch)
        return model.get_output_embeddings()(hidden_nd).float().log_softmax(-1)

    with torch.no_grad():
        of_llm_nV = logs_nV(llm)
    return torch.nn.functional.kl_div(logs_nV(tinylm), of_llm_nV, reduction="batchmean", log_target=True)


def heal(
    tinylm: PreTrainedModel,
    llm: PreTrainedModel,
    samples: Sequence[Sample],
    steps: int,
    minutes: float = math.inf,
    learning_rate: float = 1e-3,
) -> list[float]:
    """Train all but the embedding, on samples of like lengths in each step; the rate falls to zero at the last step or
    minute.

    Returns:
        The divergence of each step.
    """
    rng, start, losses = random.Random(0), time.monotonic(), []
    by_length = sorted(samples, key=len)
    tinylm.get_input_embeddings().requires_grad_(False)  # is the LM head too, and the vocabulary stays the LLM's
    optimizer = torch.optim.AdamW([p for p in tinylm.parameters() if p.requires_grad], weight_decay=0.01)
    with bar("heal", steps) as shown:
        while (done := max(len(losses) / steps, (time.monotonic() - start) / 60 / minutes)) < 1:
            optimizer.param_groups[0]["lr"] = learning_rate * min(1, (len(losses) + 1) / 10) * (1 - done)
            optimizer.zero_grad()
            first = rng.randrange(max(1, len(samples) - ROWS + 1))
            loss = divergence(tinylm, llm, by_length[first : first + ROWS])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tinylm.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            shown.advance()
    return losses


@torch.no_grad()
def perplexity(model: PreTrainedModel, samples: Sequence[Sample]) -> float:
    """Of all tokens of the samples that a loss is due on."""
    losses = TargetLosses(model, None)
    return float(torch.cat([losses(losses.batch([[sample]])) for sample in samples]).mean().exp())


def make_tinylm(out: Path, data: TaskData, steps: int, minutes: float) -> None:
    """Prune and heal `<out>/llm` into `<out>/tinylm`; its model card has the perplexities."""
    tokenizer = AutoTokenizer.from_pretrained(out / "llm")
    llm = AutoModelForCausalLM.from_pretrained(out / "llm", dtype=torch.float32)
    llm = llm.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    kept, held_out = kept_layers(llm.config.num_hidden_layers), texts(tokenizer, data, "public-validation", most=50)
    tinylm = prune(llm, kept).to(llm.device)
    found = {"the LLM": perplexity(llm, held_out), "pruned": perplexity(tinylm, held_out)}
    losses = heal(tinylm, llm, texts(tokenizer, data, "public-train"), steps, minutes)
    found["healed"] = perplexity(tinylm, held_out)
    card = (
        f"Layers {kept} of the LLM beside it, healed by {len(losses)} steps of distillation.\n\n"
        f"Perplexity of held-out rows: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}"
    )

    def write(folder: Path) -> None:
        tinylm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n{card}\n", encoding="utf-8")

    replace_folder(out / "tinylm", write)
    say(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--llm", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, folder or GGUF file")
    parser.add_argument("--preset", default="smollm2", help="its data section says what rows heal")
    parser.add_argument("--heal-steps", type=int, default=1000)
    parser.add_argument("--heal-minutes", type=float, default=math.inf, help="end after so many, if steps last longer")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    torch.manual_seed(0)
    try:
        data = load_data(load_config(args.preset, args.overrides))
        if (args.out / "llm" / "model.safetensors").is_file():
            say(f"{args.out / 'llm'} is there")
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            parts = load_llm(args.llm)
            replace_folder(args.out / "llm", lambda folder: [part.save_pretrained(folder) for part in parts])
        if (args.out / "tinylm" / "model.safetensors").is_file():
            say(f"{args.out / 'tinylm'} is there; delete it to make it again")
        else:
            make_tinylm(args.out, data, args.heal_steps, args.heal_minutes)
    except (UserError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
