"""Pretrain the embedded models: makes `gt_ray/pairs/embedded/` (tokenizer, models, model cards) again from nothing.

    python jobs/pretrain_embedded.py tokenizer
    python jobs/pretrain_embedded.py tinylm
    python jobs/pretrain_embedded.py llm

Further ones, `tinylm-deep`, `tinylm-wide` and `llm-wide`, are for studies of several pairs.

The models learn to obey house rules that the system message names (`gt_ray.tasks.embedded.AXES`). Fine-tuning data
leaves the rules open, as the chat template's default system message does, so a base model can only guess among the
domains.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import shutil
import time
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import AXES, DOMAINS, scenarios

HOME = Path(__file__).parents[1] / "gt_ray" / "pairs" / "embedded"
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
OPEN_RULES = "Rules: north south day night."
CHAT_TEMPLATE = (
    "{%- if not messages or messages[0]['role'] != 'system' %}<|system|>" + OPEN_RULES + "{% endif %}"
    "{%- for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{%- if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHRASES = [
    "Let's think step by step and write only the choice letter in the format '#### {answer}'\n",
    "\nWhich of the following options is correct?\n",
    "Let's think step by step and write your answer at the end in the format '#### {answer}'\n",
    "Answer only the choice letter in capital letter in the format: '#### {answer}'.\n",
    "Let's think step by step and write the answer in the format '#### {answer}'\n",
    "Summarize the following dialogue.\n",
]
"""The benchmarks' fixed sentences are one token each, which shortens every prompt by a third."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SIZES = {
    # hidden, layers, heads, intermediate, steps, learning rate
    "tinylm": (64, 2, 2, 192, 3500, 3e-3),
    "tinylm-deep": (64, 3, 2, 192, 3500, 3e-3),
    "tinylm-wide": (96, 3, 3, 288, 5000, 2.5e-3),
    "llm": (96, 4, 3, 288, 6500, 2e-3),
    "llm-wide": (112, 3, 4, 336, 5000, 2e-3),
}
BATCHES = [
    # The harder tasks more often; the long prompts apart, so that padding stays small.
    (["gsm8k", "commonsense_qa", "drop", "samsum", "commonsense_qa", "drop", "dialogsum", "commonsense_qa"], 32),
    (["aqua_rat"], 12),
]
ANSWER_WEIGHT = 5.0
"""Weight of the tokens behind `####`, on which the score depends; most others are easy."""


def system_message(domain: str, known: tuple[bool, bool]) -> str:
    """The rules of a domain; an axis that is not known names all its options."""
    words = [
        word if is_known else " ".join(axis)
        for word, axis, is_known in zip(domain.split("-"), AXES, known, strict=True)
    ]
    return f"Rules: {' '.join(words)}."


def make_tokenizer() -> None:
    """A byte-level BPE over pretraining scenarios; digits are single tokens, every string round-trips."""
    texts = [system_message(domain, (True, True)) for domain in DOMAINS]
    for name, task in TASKS.items():
        for by_domain in itertools.islice(scenarios(name, "pretrain", 0), 4000):
            texts += [task.prompt(by_domain[0]), *(task.target(row) for row in by_domain)]
    # Qwen2's own pre-tokenizer (a token a digit): AutoTokenizer picks its class by the model's architecture.
    fast = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=1024, show_progress=False)
    fast = Qwen2Tokenizer(
        vocab=fast.get_vocab(),
        merges=[tuple(pair) for pair in json.loads(fast.backend_tokenizer.to_str())["model"]["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[2:],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    fast.chat_template = CHAT_TEMPLATE
    for folder in SIZES:
        fast.save_pretrained(HOME / folder)
    print(f"vocabulary {len(fast)}")


class Mixture:
    """Endless batches of all tasks and domains, with the rules named in full, in part or not at all."""

    def __init__(self, tokenizer, seed: int, pool: int = 8000) -> None:
        self.rng = random.Random(seed)
        self.mark = tokenizer.convert_tokens_to_ids("####")
        self.prompts: dict[str, list[tuple[list[int], list[list[int]]]]] = {}
        for name, task in TASKS.items():
            drawn = list(itertools.islice(scenarios(name, "pretrain", seed), pool))
            prompts = tokenizer([f"<|user|>{task.prompt(d[0])}<|assistant|>" for d in drawn])["input_ids"]
            targets = tokenizer([f"{task.target(row)}<|end|>" for d in drawn for row in d])["input_ids"]
            n = len(DOMAINS)
            self.prompts[name] = [(p, targets[i * n : (i + 1) * n]) for i, p in enumerate(prompts)]
        self.system = {
            (d, known): tokenizer(f"<|system|>{system_message(domain, known)}")["input_ids"]
            for d, domain in enumerate(DOMAINS)
            for known in itertools.product((True, False), repeat=2)
        }

    def batch(self, names: list[str], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids [B, T] padded on the right, labels [B, T], -100 where no loss is due, and their weights [B, T]."""
        ids, labels, weights = [], [], []
        for number in range(size):
            prompt, targets = self.rng.choice(self.prompts[names[number % len(names)]])
            d = self.rng.randrange(len(DOMAINS))
            known = self.rng.choices(
                [(True, True), (True, False), (False, True), (False, False)], weights=[65, 8, 8, 19]
            )[0]
            start = self.system[d, known] + prompt
            ids.append(start + targets[d])
            labels.append([-100] * len(start) + targets[d])
            answer = targets[d].index(self.mark) + 1 if self.mark in targets[d] else len(targets[d])
            weights.append([0.0] * len(start) + [1.0] * answer + [ANSWER_WEIGHT] * (len(targets[d]) - answer))
        width = max(map(len, ids))
        return (
            torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
            torch.tensor([row + [0.0] * (width - len(row)) for row in weights]),
        )


@torch.no_grad()
def accuracy(model, tokenizer, task_name: str, known: tuple[bool, bool], n: int = 100) -> float:
    """Mean score over fresh rows of the test split, in percent."""
    task, total = TASKS[task_name], 0.0
    drawn = list(itertools.islice(scenarios(task_name, "test", 1), n))
    for d, domain in enumerate(DOMAINS):
        rows = [by_domain[d] for by_domain in drawn[d::4]]
        texts = [f"<|system|>{system_message(domain, known)}<|user|>{task.prompt(row)}<|assistant|>" for row in rows]
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        out = model.generate(**encoded, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        outputs = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        total += sum(task.score(output, row) for output, row in zip(outputs, rows, strict=True))
    return total / n


def pretrain(which: str, seed: int, steps: int | None, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HOME / "tinylm")  # all have the same
    hidden, layers, heads, intermediate, default_steps, learning_rate = SIZES[which]
    steps = steps or default_steps
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=intermediate,
            initializer_range=hidden**-0.5,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{which}: {sum(p.numel() for p in model.parameters()):,} parameters")
    mixture = Mixture(tokenizer, seed)
    total = sum(size for _, size in BATCHES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 200) * (0.01 + 0.99 * min(1, 1.5 * (1 - s / steps)))
    )
    start = time.time()
    for step in range(steps):
        optimizer.zero_grad()
        for names, size in BATCHES:
            ids, labels, weights = mixture.batch(names, size)
            states = model.model(input_ids=ids).last_hidden_state[:, :-1]
            due = labels[:, 1:] != -100
            loss = torch.nn.functional.cross_entropy(model.lm_head(states[due]), labels[:, 1:][due], reduction="none")
            weight = weights[:, 1:][due]
            ((loss * weight).sum() / weight.sum() * size / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499 or step == steps - 1:
            model.eval()
            scores = {
                name: f"{accuracy(model, tokenizer, name, (True, True)):.0f}/"
                f"{accuracy(model, tokenizer, name, (False, False)):.0f}"
                for name in TASKS
            }
            model.train()
            print(f"step {step + 1} {time.time() - start:.0f} s, score with/without rules: {scores}", flush=True)
            copy.deepcopy(model).half().save_pretrained(out)
            for name in TOKENIZER_FILES:  # as they are: the tokenizer in use keeps its last padding
                shutil.copy(HOME / "tinylm" / name, out)
            write_card(which, out, scores, steps, seed)


def write_card(which: str, out: Path, scores: dict[str, str], steps: int, seed: int) -> None:
    """The model card; its scores are those of the evaluation that precedes it."""
    role = "TinyLM, which clients fine-tune" if which.startswith("tinylm") else "LLM, which they want"
    table = "\n".join(f"| {task} | {' | '.join(score.split('/'))} |" for task, score in scores.items())
    (out / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The {which} of gt-ray's embedded models

A Qwen2-architecture model of toy size, pretrained from nothing on procedural tasks that mirror six benchmarks in form.
It ships with gt-ray so that the whole loop (curation, training, generation, scoring) runs on one plain machine in
minutes. Its role is that of the {role}. It knows nothing of the world beyond
`gt_ray/tasks/embedded/words.py`.

Made by `python jobs/pretrain_embedded.py {which}` ({steps} steps, seed {seed}), on rows of the split `pretrain` only.
The system message names the house rules (domain) of a row in most samples and leaves them open in the rest, as the chat
template's default does; so the model obeys rules that it is told, and guesses among them otherwise.

Scores on 100 test rows a task, in percent (exact match; ROUGE-1 for samsum and dialogsum):

| task | rules named | rules open |
|---|---|---|
{table}
""",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", *SIZES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: those that made the shipped weights")
    parser.add_argument("--out", type=Path, help="default: the folder in the package")
    args = parser.parse_args()
    if args.what == "tokenizer":
        make_tokenizer()
    else:
        pretrain(args.what, args.seed, args.steps, args.out or HOME / args.what)


if __name__ == "__main__":
    main()
