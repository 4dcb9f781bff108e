"""Rows to token sequences: chat template, target, and where a loss is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gt_ray.errors import UserError
from gt_ray.tasks import Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One row as token ids; the loss is due on `target` only."""

    prompt: list[int]
    target: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True)
class TrainingSet:
    """What one adapter is fine-tuned on.

    Attributes:
        seed: order of the samples.
        held_out: samples whose loss tells when to stop (`stop.when=plateau`).
        name: for messages.
        noise_seed: what a private mechanism draws rows and noise from: another one for every fine-tune, secret where
            the rows are real, for who knows it can take the noise away. None: `seed`.
    """

    samples: Sequence[Sample]
    seed: int
    held_out: Sequence[Sample] = ()
    name: str = "fine-tune"
    noise_seed: int | None = None

    @property
    def secret_seed(self) -> int:
        """`noise_seed`, or what stands in for it."""
        return self.seed if self.noise_seed is None else self.noise_seed


def prompt_texts(tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row]) -> list[str]:
    """The rows' prompts as one user turn each, up to where the assistant starts to write."""
    return [prompt_text(tokenizer, task.prompt(row)) for row in rows]


def prompt_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as one user turn, up to where the assistant starts to write."""
    return str(tokenizer.apply_chat_template(_user(text), tokenize=False, add_generation_prompt=True))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    max_length: int | None = None,
    where: str = "",
    targets: Sequence[str] | None = None,
) -> list[Sample]:
    """Token ids of prompts and targets; a target ends with the token that ends the assistant's turn.

    Args:
        targets: one a row, in place of the task's.

    Raises:
        UserError: a row is longer than `max_length` tokens, or the template does not extend its own prompt.
    """
    if not rows:
        return []
    prompts = prompt_texts(tokenizer, task, rows)
    answers = []
    for prompt, row, text in zip(prompts, rows, targets or map(task.target, rows), strict=True):
        turns = [*_user(task.prompt(row)), {"role": "assistant", "content": text}]
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
        if not whole.startswith(prompt):
            raise UserError("this chat template changes a prompt once the answer follows; it cannot be fine-tuned on")
        # What a template adds behind the end-of-turn token (Qwen: a line break) is never generated.
        answer, eos, _ = whole[len(prompt) :].rpartition(str(tokenizer.eos_token))
        answers.append(answer + eos if eos else whole[len(prompt) :])
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    target_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    samples = [Sample(p, t) for p, t in zip(prompt_ids, target_ids, strict=True)]
    for number, sample in enumerate(samples):
        if max_length is not None and len(sample) > max_length:
            raise UserError(
                f"{where or task.name} row {number} has {len(sample)} tokens, more than max_length {max_length}; "
                "raise fine_tune.max_length or drop the row"
            )
    return samples


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
