"""A scorer scores systems (decision 10): answers, and log-likelihoods of the references. Here by transformers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gt_ray.config import EvaluationSettings, ModelSettings
from gt_ray.curation.jobs import Side
from gt_ray.errors import UserError
from gt_ray.evaluation.results import Finish, RowScore
from gt_ray.learning.losses import TargetLosses
from gt_ray.learning.samples import Sample, encode, prompt_text
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.pairs.models import load_model, load_tokenizer, resolve
from gt_ray.pairs.root import Root
from gt_ray.tasks import TASKS, Row

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CACHED_ROWS = 2**16


@dataclass(frozen=True)
class System:
    """A base model plus nothing, an update, an adapter, or a shift of its logits.

    Attributes:
        name: as in DESIGN.md section 6: `P_S`, `base_T`, `ours`, `ridge` ...; of an adapter folder its name.
        update_Ld: difference from the side's root.
        folder: a PEFT adapter of any origin, instead of an update.
        proxy_Ld: update of the TinyLM whose effect on its logits is added to the LLM's (`proxy_tuning`).
    """

    name: str
    side: Side = "llm"
    update_Ld: Tensor | None = None
    folder: Path | None = None
    proxy_Ld: Tensor | None = None


@dataclass(frozen=True)
class Work:
    """Some test rows that one system is to be scored on.

    Attributes:
        key: of the system and all its test rows.
        rows: by their number.
    """

    key: str
    system: System
    task: str
    rows: Mapping[int, Row]


class Scored(NamedTuple):
    """One test row of a `Work` that is done."""

    key: str
    number: int
    score: RowScore


class Scorer(ABC):
    """Scores what is added to it, in steps; rows come back as they are done, in any order."""

    name: str

    def __init__(self, model: ModelSettings, settings: EvaluationSettings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(model.model)
        self.encode = lru_cache(CACHED_ROWS)(self._encode)

    @abstractmethod
    def add(self, work: Work) -> None:
        """Take rows on."""

    @abstractmethod
    def step(self) -> list[Scored]:
        """Compute for a while."""

    @property
    @abstractmethod
    def unfinished(self) -> int:
        """Rows that were added and have not come back."""

    def score(self, system: System, task: str, rows: Sequence[Row]) -> list[RowScore]:
        """Score one system on test rows, in their order."""
        self.add(Work(system.name, system, task, dict(enumerate(rows))))
        done: dict[int, RowScore] = {}
        while self.unfinished:
            done |= {number: score for _, number, score in self.step()}
        return [done[number] for number in range(len(rows))]

    def samples(self, work: Work) -> dict[int, Sample]:
        """Prompt and reference of every row as tokens; systems share rows, so they are kept."""
        return {number: self.encode(work.task, json.dumps(row)) for number, row in work.rows.items()}

    def _encode(self, task: str, row: str) -> Sample:
        return encode(self.tokenizer, TASKS[task], [json.loads(row)])[0]


def window(settings: EvaluationSettings, config: PretrainedConfig) -> int:
    """Tokens that prompt and answer may have together: what is asked for, or the model's own window."""
    own: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(settings.max_model_len, own or settings.max_model_len)


def end_tokens(model: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    return {end for end in (*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id) if end is not None}


class TransformersScorer(Scorer):
    """Greedy decoding in batches by transformers, one adapter at a time.

    Args:
        root: of the updates to score; adapter folders need none.
    """

    name = "transformers"

    def __init__(
        self, model: ModelSettings, root: Root | None, settings: EvaluationSettings, device: str = "cpu"
    ) -> None:
        from transformers import GenerationConfig

        super().__init__(model, settings)
        self.root, self.device = root, device
        self.model: Any = load_model(model, device)
        self.window = window(settings, self.model.config)
        self.losses = TargetLosses(self.model, root, exchange=False)  # `generate` needs the model as it is
        self.tokenizer.padding_side = "left"
        self.ends = end_tokens(resolve(model.model), self.tokenizer)
        # A model's own file may ask for sampling or a repetition penalty; greedy decoding is the same everywhere.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=sorted(self.ends), pad_token_id=self.tokenizer.pad_token_id
        )
        self._waiting: deque[Work] = deque()

    def add(self, work: Work) -> None:
        self._waiting.append(work)

    @property
    def unfinished(self) -> int:
        return sum(len(work.rows) for work in self._waiting)

    @torch.no_grad()
    def step(self) -> list[Scored]:
        """All rows of one `Work`."""
        work = self._waiting.popleft()
        samples = self.samples(work)
        by_length = sorted(work.rows, key=lambda n: len(samples[n]))
        done = []
        with self._wearing(work.system):
            for start in range(0, len(by_length), self.settings.batch_size):
                chunk = by_length[start : start + self.settings.batch_size]
                fits = [n for n in chunk if len(samples[n].prompt) < self.window]
                generated = self._generate({n: samples[n].prompt for n in fits})
                due = [n for n in chunk if self.settings.log_likelihood and len(samples[n]) < self.window]
                likelihoods = self._log_likelihoods({n: samples[n] for n in due})
                for n in chunk:
                    output, tokens, finish = generated.get(n, ("", 0, "too long"))
                    row = RowScore.of(TASKS[work.task], work.rows[n], output, likelihoods.get(n), tokens, finish)
                    done.append(Scored(work.key, n, row))
        return done

    @torch.no_grad()
    def answer(self, prompt: str, update_Ld: Tensor | None = None) -> str:
        """What the model says to a user's turn, as it is or with an update from its root.

        Raises:
            UserError: the prompt does not fit into the model's window.
        """
        ids = self.tokenizer(prompt_text(self.tokenizer, prompt), add_special_tokens=False)["input_ids"]
        if len(ids) >= self.window:
            raise UserError(f"the prompt has {len(ids)} tokens, but the model's window is {self.window}; shorten it")
        with self._wearing(System("answer", update_Ld=update_Ld)):
            return self._generate({0: ids})[0][0]

    def _generate(self, prompts: dict[int, list[int]]) -> dict[int, tuple[str, int, Finish]]:
        """Output, its number of tokens, and why it ended."""
        if not prompts:
            return {}
        longest, most = max(map(len, prompts.values())), self.settings.max_new_tokens
        if longest + most > self.window and len(prompts) > 1:  # each has another number of tokens left
            return {n: found for n in prompts for found in self._generate({n: prompts[n]}).values()}
        encoded = self.tokenizer.pad({"input_ids": list(prompts.values())}, return_tensors="pt").to(self.device)
        generated_RT = self.model.generate(
            **encoded,
            max_new_tokens=min(most, self.window - longest),
            logits_processor=self._processors(encoded["attention_mask"]),
        )
        found: dict[int, tuple[str, int, Finish]] = {}
        for n, ids in zip(prompts, generated_RT[:, longest:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(ids) if token in self.ends), None)
            text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
            found[n] = (text, end or len(ids), "stop" if end else "length")
        return found

    def _processors(self, mask_RT: Tensor) -> Any:
        """What changes the logits of a batch of prompts with this attention mask."""
        return None

    def _log_likelihoods(self, samples: dict[int, Sample]) -> dict[int, float]:
        if not samples:
            return {}
        batch = self.losses.batch([[sample] for sample in samples.values()])
        sums, _ = self.losses.by_adapter(batch, len(samples))  # a sample each, as if it had its own adapter
        return dict(zip(samples, (-sums).tolist(), strict=True))

    @contextmanager
    def _wearing(self, system: System) -> Iterator[None]:
        """The base model with the system's adapter."""
        if system.folder is not None:
            from peft import PeftModel

            try:
                worn = PeftModel.from_pretrained(self.model, str(system.folder))
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"PEFT cannot load adapter {system.name}: {error}") from error
            try:
                yield
            finally:
                worn.unload()
        elif system.update_Ld is not None:
            assert self.root is not None
            with stacked(self.model, self.root, G=1) as parameters:
                add_updates(parameters, self.root.layout, system.update_Ld[None])
                yield
        else:
            yield
