"""The transformers scorer."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from gt_ray.config import EvaluationSettings, ModelSettings
from gt_ray.evaluation.scorer import System, TransformersScorer
from gt_ray.learning.engine import Engine, FineTuned
from gt_ray.learning.samples import TrainingSet, encode
from gt_ray.learning.stacked import stacked
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import make_root
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows
from gt_ray.updates.files import read_adapter, write_adapter

SETTINGS = ModelSettings.model_validate(
    {
        "model": "embedded:tinylm",
        "dtype": "float32",
        "fine_tune": {"steps": 8, "learning_rate": 2e-2, "batch_size": 8, "max_length": 256},
    }
)


EVALUATION = EvaluationSettings(batch_size=3, max_new_tokens=12, max_model_len=256)


def test_batched_scores_equal_row_by_row_generation_and_likelihood() -> None:
    root, task = make_root(SETTINGS), TASKS["samsum"]
    test_rows = rows("samsum", "test", "north-day", 0, 7)
    scores = TransformersScorer(SETTINGS, root, EVALUATION).score(System("base"), "samsum", test_rows)
    model, tokenizer = load_model(SETTINGS), load_tokenizer(SETTINGS.model)
    samples = encode(tokenizer, task, test_rows, 256)
    for row, sample, found in zip(test_rows, samples, scores, strict=True):
        ids = torch.tensor([sample.prompt])
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        new = ids[0, len(sample.prompt) :]
        assert tokenizer.decode(new, skip_special_tokens=True) == found.output
        assert found.tokens == len(new)
        assert found.finish == ("stop" if new[-1] == tokenizer.eos_token_id else "length")
        assert found.score == task.score(found.output, row)
        whole = torch.tensor([sample.prompt + sample.target])
        log_p = model(whole).logits[0].log_softmax(-1)
        start = len(sample.prompt)
        expected = sum(float(log_p[start + i - 1, token]) for i, token in enumerate(sample.target))
        assert found.log_likelihood is not None and abs(expected - found.log_likelihood) < 1e-3


def test_an_adapter_folder_scores_as_its_update_does_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    root = make_root(SETTINGS)
    test_rows = rows("gsm8k", "test", "north-day", 0, 5)
    update_Ld = 0.05 * torch.randn(root.layout.L, root.layout.d, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "adapter", update_Ld, root)
    scorer = TransformersScorer(SETTINGS, root, EVALUATION)
    base = scorer.score(System("base"), "gsm8k", test_rows)
    by_update = scorer.score(System("ours", update_Ld=update_Ld), "gsm8k", test_rows)
    by_folder = scorer.score(System("ours", folder=tmp_path / "adapter"), "gsm8k", test_rows)
    for one, other in zip(by_update, by_folder, strict=True):
        assert (one.output, one.tokens, one.finish) == (other.output, other.tokens, other.finish)
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)
    assert scorer.score(System("base"), "gsm8k", test_rows) == base != by_folder


def test_prompts_beyond_the_window_are_counted_and_near_it_answers_are_shorter() -> None:
    root, test_rows = make_root(SETTINGS), rows("samsum", "test", "north-day", 0, 6)
    samples = encode(load_tokenizer(SETTINGS.model), TASKS["samsum"], test_rows)
    lengths = [len(sample.prompt) for sample in samples]
    window = max(lengths)  # one prompt at least is as long as the window
    settings = EvaluationSettings(batch_size=3, max_new_tokens=12, max_model_len=window)
    scores = TransformersScorer(SETTINGS, root, settings).score(System("base"), "samsum", test_rows)
    for found, sample in zip(scores, samples, strict=True):
        room = window - len(sample.prompt)
        assert (found.finish == "too long") == (room == 0)
        assert found.tokens <= room
        assert (found.log_likelihood is None) == (len(sample) >= window)
    assert any(found.finish == "too long" and found.score == 0 for found in scores)


def test_the_true_update_as_adapter_reproduces_the_fine_tuned_model(tmp_path: Path) -> None:
    root, task = make_root(SETTINGS), TASKS["samsum"]
    tokenizer = load_tokenizer(SETTINGS.model)
    samples = encode(tokenizer, task, rows("samsum", "private", "south-night", 0, 16), 256)
    model = load_model(SETTINGS)
    ((_, tuned),) = Engine(model, root).fine_tune([TrainingSet(samples, 0)], SETTINGS.fine_tune)
    assert isinstance(tuned, FineTuned)
    update_Ld = tuned.snapshots_JLd[-1]
    ids = torch.tensor([samples[0].prompt])
    with stacked(model, root, G=1) as parameters, torch.no_grad():
        for name, delta in root.layout.to_tensors(update_Ld).items():
            parameters[name] += delta
        tuned = model(ids).logits
    write_adapter(tmp_path / "adapter", update_Ld, root)
    loaded = peft.PeftModel.from_pretrained(load_model(SETTINGS), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, tuned, atol=1e-4)
        assert not torch.allclose(load_model(SETTINGS)(ids).logits, tuned, atol=1e-2)
    assert torch.allclose(read_adapter(tmp_path / "adapter", root), update_Ld, atol=1e-6)
