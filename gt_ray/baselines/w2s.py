"""W2S (Burns et al., 2024; appendix C.2): the LLM, fine-tuned on what a fine-tuned TinyLM says.

A client's private rows are halved. The TinyLM is fine-tuned on the first half and answers the prompts of the second, by
greedy decoding; the LLM is fine-tuned on these prompts with these outputs as targets. Only text goes from one to the
other, so their vocabularies may differ. Conf and VisSup learn from the same outputs and from the TinyLM's distributions
of their tokens, which takes one vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gt_ray.baselines.distributions import Distributions, SoftSample
from gt_ray.errors import UserError
from gt_ray.learning.samples import Sample, encode
from gt_ray.tasks import Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL = "weak_label"
"""Column of a row that has a WeakLabel."""


@dataclass(frozen=True)
class WeakLabel:
    """What the weak model says to the prompt of a row.

    Attributes:
        output: may be empty; then the end of the turn is all there is to learn.
        ended: whether it ended by itself, not at evaluation.max_new_tokens.
        weak: its distributions of the tokens, for Conf and VisSup.
    """

    output: str
    ended: bool
    weak: Distributions | None = None


def halves(positions: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """The rows that the weak model is fine-tuned on, and those that it labels; of an odd number the first has more.

    Raises:
        UserError: one row cannot be halved.
    """
    if len(positions) < 2:
        raise UserError(f"{len(positions)} private row cannot be halved for w2s, conf and vissup; use larger clients")
    second = set(random.Random(f"halves/{seed}").sample(sorted(positions), len(positions) // 2))
    return [i for i in positions if i not in second], [i for i in positions if i in second]


def labelled_samples(
    tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], max_length: int, where: str
) -> list[Sample]:
    """Token ids of prompts and weak labels; SoftSamples where labels have distributions. Rows without a label are left
    out. An output that did not end has no end token, and one that is too long is cut.

    Args:
        max_length: tokens of prompt and target.

    Raises:
        UserError: no row has a label, a prompt leaves no room for one, or it consists of other tokens here than those
            that its distributions are of.
    """
    labelled = [row for row in rows if LABEL in row]
    if not labelled:
        raise UserError(f"{where}: the weak model has answered no prompt; raise evaluation.max_model_len")
    labels: list[WeakLabel] = [row[LABEL] for row in labelled]
    samples: list[Sample] = []
    for sample, label in zip(
        encode(tokenizer, task, labelled, targets=[label.output for label in labels]), labels, strict=True
    ):
        room = max_length - len(sample.prompt)
        if room < 1:
            raise UserError(f"{where}: a prompt has {len(sample.prompt)} tokens; raise fine_tune.max_length")
        target = sample.target if label.ended or len(sample.target) == 1 else sample.target[:-1]
        target = target[:room]
        if label.weak is None:
            samples.append(Sample(sample.prompt, target))
        elif label.weak.target_n.tolist() == target:
            samples.append(SoftSample(sample.prompt, target, label.weak))
        else:
            raise UserError(
                f"{where}: both models have one vocabulary, but their chat templates write an answer in other tokens; "
                "leave conf and vissup out of evaluation.baselines"
            )
    return samples
