"""Proxy-tuning against three models that are run token by token without cache, padding or batches."""

from __future__ import annotations

import torch

from gt_ray.baselines.proxy_tuning import add_shift, share_vocabulary
from gt_ray.config import EvaluationSettings, ModelSettings
from gt_ray.evaluation.proxy_scorer import ProxyScorer
from gt_ray.evaluation.scorer import System, TransformersScorer
from gt_ray.learning.samples import encode
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import make_root
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows

TINYLM = ModelSettings(model="embedded:tinylm", dtype="float32")
LLM = ModelSettings(model="embedded:llm", dtype="float32")
SETTINGS = EvaluationSettings(batch_size=3, max_new_tokens=8, max_model_len=256)


def test_answers_and_likelihoods_are_those_of_the_summed_logits() -> None:
    root = make_root(TINYLM)
    update_Ld = 0.1 * torch.randn(root.layout.L, root.layout.d, generator=torch.Generator().manual_seed(0))
    test_rows = rows("samsum", "test", "north-day", 0, 5)
    test_rows[1]["dialogue"] += "\n" + test_rows[1]["dialogue"]
    tokenizer = load_tokenizer(LLM.model)
    samples = encode(tokenizer, TASKS["samsum"], test_rows)
    assert len({len(sample.prompt) for sample in samples}) > 1  # so that batches are padded
    scorer = ProxyScorer(LLM, SETTINGS, TINYLM, root)
    found = scorer.score(System("proxy_tuning", proxy_Ld=update_Ld), "samsum", test_rows)
    llm, base, tuned = load_model(LLM), load_model(TINYLM), load_model(TINYLM)
    with stacked(tuned, root, G=1) as parameters, torch.no_grad():
        for name, delta in root.layout.to_tensors(update_Ld).items():
            parameters[name].add_(delta)

        def log_p(ids: list[int]) -> torch.Tensor:
            T, S, S_tuned = (model(torch.tensor([ids])).logits[0] for model in (llm, base, tuned))
            return (T + S_tuned - S).log_softmax(-1)

        for sample, score in zip(samples, found, strict=True):
            ids = list(sample.prompt)
            while len(ids) < len(sample.prompt) + 8 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(log_p(ids)[-1].argmax()))
            assert score.output == tokenizer.decode(ids[len(sample.prompt) :], skip_special_tokens=True)
            whole_TV = log_p(sample.prompt + sample.target)
            start = len(sample.prompt) - 1
            expected = sum(float(whole_TV[start + i, token]) for i, token in enumerate(sample.target))
            assert score.log_likelihood is not None and abs(score.log_likelihood - expected) < 1e-3


def test_without_an_update_it_is_the_llm_itself_and_leaves_the_tinylm_as_it_was() -> None:
    root = make_root(TINYLM)
    test_rows = rows("samsum", "test", "north-day", 0, 4)
    scorer = ProxyScorer(LLM, SETTINGS, TINYLM, root)
    layout = root.layout
    scorer.score(System("proxy_tuning", proxy_Ld=torch.ones(layout.L, layout.d)), "samsum", test_rows)
    found = scorer.score(System("proxy_tuning", proxy_Ld=torch.zeros(layout.L, layout.d)), "samsum", test_rows)
    base = TransformersScorer(LLM, None, SETTINGS).score(System("base_T"), "samsum", test_rows)
    assert [row.output for row in found] == [row.output for row in base]


def test_tokens_that_one_model_lacks_are_never_chosen() -> None:
    wide, narrow = torch.zeros(1, 5), torch.ones(1, 3)
    assert add_shift(wide, narrow).tolist() == [[1, 1, 1, -torch.inf, -torch.inf]]
    assert add_shift(narrow, wide).tolist() == [[1, 1, 1]]


def test_the_embedded_pair_shares_its_vocabulary() -> None:
    assert share_vocabulary(TINYLM.model, LLM.model)
