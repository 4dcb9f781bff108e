"""A scorer scores systems (decision 10): answers, and log-likelihoods of the references. Here by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gt_ray.config import ModelSettings
from gt_ray.curation.jobs import Side
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.samples import encode, prompt_texts
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import Root
from gt_ray.tasks import Row, Task


@dataclass(frozen=True)
class System:
    """A base model of the pair plus nothing or an update.

    Attributes:
        name: as in DESIGN.md section 6: `P_S`, `base_T`, `ours`, `ridge` ...
        update_Ld: difference from the side's root; none for the base model.
    """

    name: str
    side: Side
    update_Ld: Tensor | None = None


@dataclass(frozen=True)
class RowScores:
    """Per test row: output, score in percent, log-likelihood of the target (sum over its tokens)."""

    outputs: list[str]
    scores: list[float]
    log_likelihoods: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Scorer(Protocol):
    """What every engine offers."""

    def score(self, update_Ld: Tensor | None, task: Task, rows: Sequence[Row]) -> RowScores:
        """Score one system on test rows, in their order."""


class TransformersScorer:
    """Greedy decoding in batches by transformers, one adapter at a time."""

    def __init__(
        self, settings: ModelSettings, root: Root, batch_size: int, max_new_tokens: int, device: str = "cpu"
    ) -> None:
        from transformers import GenerationConfig

        self.root, self.batch_size, self.max_new_tokens, self.device = (
            root,
            batch_size,
            max_new_tokens,
            device,
        )
        self.max_length = settings.fine_tune.max_length
        self.model: Any = load_model(settings, device)
        self.losses = TargetLosses(self.model, root, exchange=False)  # `generate` needs the model as it is
        self.tokenizer = load_tokenizer(settings.model)
        self.tokenizer.padding_side = "left"
        # A model's own file may ask for sampling or a repetition penalty; greedy decoding is the same everywhere.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    @torch.no_grad()
    def score(self, update_Ld: Tensor | None, task: Task, rows: Sequence[Row]) -> RowScores:
        """Score one system (the base model where there is no update) on test rows, in their order."""
        outputs: list[str] = [""] * len(rows)
        log_likelihoods = [0.0] * len(rows)
        samples = encode(self.tokenizer, task, rows, self.max_length, where=f"{task.name} test")
        prompts = prompt_texts(self.tokenizer, task, rows)
        by_length = sorted(range(len(rows)), key=lambda n: len(samples[n]))
        with stacked(self.model, self.root, G=1) as parameters:
            if update_Ld is not None:
                for name, delta in self.root.layout.to_tensors(update_Ld).items():
                    parameters[name].add_(delta.to(self.device))
            for start in range(0, len(rows), self.batch_size):
                chunk = by_length[start : start + self.batch_size]
                encoded = self.tokenizer(
                    [prompts[n] for n in chunk], return_tensors="pt", padding=True, add_special_tokens=False
                ).to(self.device)
                generated = self.model.generate(
                    input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
                )
                new = generated[:, encoded["input_ids"].shape[1] :]
                texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
                batch = self.losses.batch([[samples[n]] for n in chunk])
                sums, _ = self.losses.by_adapter(batch, len(chunk))  # a sample each, as if it had its own adapter
                for n, text, loss in zip(chunk, texts, sums.tolist(), strict=True):
                    outputs[n], log_likelihoods[n] = text, -loss
        scores = [task.score(output, row) for output, row in zip(outputs, rows, strict=True)]
        return RowScores(outputs, scores, log_likelihoods)
