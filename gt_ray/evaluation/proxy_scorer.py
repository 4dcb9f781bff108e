"""The scorer of proxy-tuning, which no serving engine decodes: three models a token, by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import LogitsProcessorList

from gt_ray.baselines.proxy_tuning import Proxy, ProxyTuning, add_shift
from gt_ray.config import EvaluationSettings, ModelSettings
from gt_ray.evaluation.scorer import System, TransformersScorer
from gt_ray.learning.batches import padded
from gt_ray.learning.losses import LOGITS_AT_ONCE, sums_by_adapter
from gt_ray.learning.samples import Sample
from gt_ray.pairs.models import load_model
from gt_ray.pairs.root import Root


class ProxyScorer(TransformersScorer):
    """Scores systems with `proxy_Ld`.

    Args:
        tinylm: the model whose logits shift those of `model`.
        tinylm_root: of its updates.
    """

    def __init__(
        self,
        model: ModelSettings,
        settings: EvaluationSettings,
        tinylm: ModelSettings,
        tinylm_root: Root,
        device: str = "cpu",
    ) -> None:
        super().__init__(model, None, settings, device)
        self.proxy = Proxy(load_model(tinylm, device), tinylm_root)

    @contextmanager
    def _wearing(self, system: System) -> Iterator[None]:
        assert system.proxy_Ld is not None
        with self.proxy.wearing(system.proxy_Ld):
            yield

    def _processors(self, mask_RT: Tensor) -> LogitsProcessorList:
        return LogitsProcessorList([ProxyTuning(self.proxy, mask_RT)])

    def _log_likelihoods(self, samples: dict[int, Sample]) -> dict[int, float]:
        if not samples:
            return {}
        longest, V = max(map(len, samples.values())), self.model.config.get_text_config().vocab_size
        size = max(1, LOGITS_AT_ONCE // (longest * V))
        if len(samples) > size:  # logits of three models are large
            numbers = list(samples)
            parts = [numbers[first : first + size] for first in range(0, len(numbers), size)]
            return {n: v for part in parts for n, v in self._log_likelihoods({n: samples[n] for n in part}).items()}
        batch = padded([[sample] for sample in samples.values()], self.tokenizer.pad_token_id).to(self.model.device)
        logits_RTV = add_shift(self.model(batch.ids_RT, use_cache=False).logits, self.proxy.shift(batch.ids_RT))
        log_p_nV = logits_RTV.flatten(0, 1)[batch.due_n].log_softmax(-1)
        log_p_n = log_p_nV.gather(1, batch.target_n[:, None])[:, 0]
        sums, _ = sums_by_adapter(log_p_n, batch, len(samples))
        return dict(zip(samples, sums.tolist(), strict=True))
