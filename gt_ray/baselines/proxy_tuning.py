"""Proxy-tuning: at decoding, the LLM's logits plus what fine-tuning did to the TinyLM's (arXiv 2401.08565).

    log p(next) = log_softmax(T + S_fine-tuned - S)

It needs no training, but one vocabulary for both models and three models a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from gt_ray.config import PairSettings
from gt_ray.errors import UserError
from gt_ray.learning.stacked import add_updates, stacked
from gt_ray.pairs.families import parameters_of
from gt_ray.pairs.models import load_tokenizer
from gt_ray.pairs.root import Root

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def share_vocabulary(tinylm: str, llm: str) -> bool:
    """Whether two models' tokens are the same, which adding their logits needs."""
    vocabulary_S, vocabulary_T = (load_tokenizer(model).get_vocab() for model in (tinylm, llm))
    return bool(vocabulary_S == vocabulary_T)


def require_shared_vocabulary(pair: PairSettings, key: str) -> None:
    """Refuse what adds the logits of both models where their tokens differ.

    Args:
        key: the setting that asks for it.

    Raises:
        UserError: they differ.
    """
    if not share_vocabulary(pair.tinylm.model, pair.llm.model):
        raise UserError(
            f"{key} adds the logits of {pair.tinylm.model} and {pair.llm.model}, but their vocabularies differ; set it "
            "to 0"
        )


def operations_ratio(pair: PairSettings) -> float:
    """Operations of a token, over those of the LLM with an adapter: (T + 2 S) / T by the models' numbers of parameters.

    Raises:
        UserError: no config of a model is at hand.
    """
    S, T = (parameters_of(model.model) for model in (pair.tinylm, pair.llm))
    return float((T + 2 * S) / T)


class Proxy:
    """The TinyLM with and without an update, in one pass.

    Args:
        model: the TinyLM.
        root: of the updates.
    """

    def __init__(self, model: PreTrainedModel, root: Root) -> None:
        self.model, self.root = model, root

    @contextmanager
    def wearing(self, update_Ld: Tensor) -> Iterator[None]:
        """Let the first half of every batch have the update, the second half none."""
        with stacked(self.model, self.root, G=2) as parameters, torch.no_grad():
            add_updates(parameters, self.root.layout, torch.stack([update_Ld, torch.zeros_like(update_Ld)]))
            yield

    def shift(self, ids_RT: Tensor, **inputs: Any) -> Tensor:
        """What the update does to the logits [R, T, V], float32; only while it is worn."""
        twice = {name: torch.cat([value, value]) if torch.is_tensor(value) else value for name, value in inputs.items()}
        logits = self.model(input_ids=torch.cat([ids_RT, ids_RT]), **twice).logits.float()
        tuned, base = logits.chunk(2)
        shift: Tensor = tuned - base
        return shift


def add_shift(logits: Tensor, shift: Tensor) -> Tensor:
    """Sum of both [..., V], V of the first: models pad their vocabularies to other sizes; what one lacks is out."""
    V = logits.shape[-1]
    missing = max(0, V - shift.shape[-1])
    return logits.float() + torch.nn.functional.pad(shift[..., :V], (0, missing), value=-torch.inf)


class ProxyTuning(LogitsProcessor):
    """For `generate` of the LLM: adds the proxy's shift to the logits of every token.

    Args:
        mask_RT: attention mask of the prompts, padded on the left.
    """

    def __init__(self, proxy: Proxy, mask_RT: Tensor) -> None:
        self.proxy, self.mask_RT = proxy, mask_RT
        self.cache = DynamicCache()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The next token's logits [R, V]."""
        new = input_ids.shape[1] - self.mask_RT.shape[1]
        if new:
            self.mask_RT = torch.cat([self.mask_RT, self.mask_RT.new_ones(len(input_ids), new)], 1)
        known = self.cache.get_seq_length()
        positions_RT = (self.mask_RT.cumsum(1) - 1).clamp(min=0)
        shift_RV = self.proxy.shift(
            input_ids[:, known:],
            attention_mask=self.mask_RT,
            position_ids=positions_RT[:, known:],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )[:, -1]
        return add_shift(scores, shift_RV)
