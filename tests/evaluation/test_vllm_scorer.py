"""The vLLM scorer against the transformers scorer, on the embedded LLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gt_ray.config import EvaluationSettings, VllmSettings, load_config
from gt_ray.evaluation.results import RowScore
from gt_ray.evaluation.scorer import System, TransformersScorer, Work
from gt_ray.evaluation.vllm_scorer import VllmScorer
from gt_ray.learning.samples import Sample
from gt_ray.pairs.root import make_root
from gt_ray.tasks import Row
from gt_ray.tasks.embedded import rows
from gt_ray.updates.files import write_adapter

pytestmark = pytest.mark.vllm

LLM = load_config("embedded").pair.llm
SLOTS = 3
SETTINGS = EvaluationSettings(
    batch_size=8, max_new_tokens=16, max_model_len=128, num_gpus=0, vllm=VllmSettings(max_loras=SLOTS)
)
TIE = 1e-3
"""Difference of the two best logits from which on engines have to choose alike."""


@pytest.fixture(scope="module")
def vllm() -> VllmScorer:
    root = make_root(LLM)
    return VllmScorer(LLM, root, SETTINGS, root.lora.rank, root.lora.target_modules)


@pytest.fixture(scope="module")
def transformers() -> TransformersScorer:
    return TransformersScorer(LLM, make_root(LLM), SETTINGS)


def update(seed: int) -> torch.Tensor:
    layout = make_root(LLM).layout
    return 0.05 * torch.randn(layout.L, layout.d, generator=torch.Generator().manual_seed(seed))


def mixed(scorer: VllmScorer, works: list[Work]) -> dict[tuple[str, int], RowScore]:
    """All at once, so that they share batches."""
    for work in works:
        scorer.add(work)
    found = {}
    while scorer.unfinished:
        found |= {(key, number): row for key, number, row in scorer.step()}
    return found


def check_same(found: RowScore, expected: RowScore, scorer: TransformersScorer, system: System, sample: Sample) -> None:
    """The same answer token for token, unless it was a tie; the same log-likelihood."""
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=2e-3)
    if found.output == expected.output:
        assert found == RowScore(**{**vars(expected), "log_likelihood": found.log_likelihood})
        return
    one, other = (
        scorer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (found.output, expected.output)
    )
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    with scorer._wearing(system), torch.no_grad():
        best = scorer.model(torch.tensor([sample.prompt + one[:same]])).logits[0, -1].topk(2).values
    assert float(best[0] - best[1]) < TIE, (found.output, expected.output)


def test_many_adapters_in_one_batch_answer_as_each_does_alone(
    vllm: VllmScorer, transformers: TransformersScorer
) -> None:
    """More adapters than slots, and the base model among them, before and after all slots have been filled."""
    systems = [System("base_T"), *(System(f"client-{n}", update_Ld=update(n)) for n in range(7)), System("again")]
    tasks = ["samsum", "gsm8k", "drop"]
    works = [
        Work(system.name, system, tasks[n % 3], dict(enumerate(rows(tasks[n % 3], "test", "north-day", 0, 12))))
        for n, system in enumerate(systems)
    ]
    found = mixed(vllm, works)
    assert len(found) == 9 * 12
    for work in works:
        samples = transformers.samples(work)
        transformers.add(work)
        for key, number, expected in transformers.step():
            check_same(found[key, number], expected, transformers, work.system, samples[number])
    assert len({row.output for row in found.values()}) > 30, "the adapters make no difference"


def test_the_base_model_is_not_answered_with_an_adapter_once_all_slots_are_filled(vllm: VllmScorer) -> None:
    """What vLLM does to requests without an adapter beside others; the all-zero adapter keeps clear of it."""
    test_rows = dict(enumerate(rows("gsm8k", "test", "north-day", 0, 8)))
    alone = mixed(vllm, [Work("base", System("base_T"), "gsm8k", test_rows)])
    others = [Work(f"{n}", System(f"{n}", update_Ld=update(50 + n)), "gsm8k", test_rows) for n in range(SLOTS + 2)]
    beside = mixed(vllm, [*others, Work("base", System("base_T"), "gsm8k", test_rows)])
    assert [beside["base", n].output for n in test_rows] == [alone["base", n].output for n in test_rows]
    assert any(beside[other.key, n].output != alone["base", n].output for other in others for n in test_rows)


def test_adapters_of_other_origin_by_folder_and_eviction_when_done(
    vllm: VllmScorer, transformers: TransformersScorer, tmp_path: Path
) -> None:
    test_rows = rows("drop", "test", "south-day", 0, 6)
    write_adapter(tmp_path / "mine", update(99), make_root(LLM))
    by_folder = vllm.score(System("mine", folder=tmp_path / "mine"), "drop", test_rows)
    by_update = vllm.score(System("ours", update_Ld=update(99)), "drop", test_rows)
    for one, other in zip(by_folder, by_update, strict=True):
        assert one.output == other.output and one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
    assert not vllm.engine.list_loras() and not vllm._adapters and not vllm._rows
    assert not list(Path(vllm.folder.name).iterdir()) and (tmp_path / "mine").is_dir()


def long_row(n: int) -> Row:
    return {"question": " ".join(["How many pens?"] * n), "answer": "#### 7"}


def test_prompts_beyond_the_window_come_back_and_are_counted(
    vllm: VllmScorer, transformers: TransformersScorer
) -> None:
    """At every length around the window both engines agree on what fits."""
    test_rows = [long_row(n) for n in (1, 20, 22, 23, 24, 25, 26, 27, 28, 40)]
    found = vllm.score(System("base_T"), "gsm8k", test_rows)
    expected = transformers.score(System("base_T"), "gsm8k", test_rows)
    for one, other in zip(found, expected, strict=True):
        assert (one.finish, one.tokens, one.score) == (other.finish, other.tokens, other.score)
        assert (one.log_likelihood is None) == (other.log_likelihood is None)
    assert {row.finish for row in found} >= {"too long", "length"} or {row.finish for row in found} >= {
        "too long",
        "stop",
    }
    assert found[-1] == RowScore("", "", 0.0, 0.0, None, 0, "too long")


def test_log_likelihoods_can_be_left_out(transformers: TransformersScorer) -> None:
    settings = SETTINGS.model_copy(update={"log_likelihood": False})
    scorer = TransformersScorer(LLM, make_root(LLM), settings)
    assert all(
        row.log_likelihood is None for row in scorer.score(System("b"), "drop", rows("drop", "test", "north-day", 0, 3))
    )
