"""The transformers scorer."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

from gt_ray.config import ModelSettings
from gt_ray.evaluation.scorer import TransformersScorer
from gt_ray.learning.engine import Engine, FineTuned, TrainingSet
from gt_ray.learning.samples import encode
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


def test_batched_scores_equal_row_by_row_generation_and_likelihood() -> None:
    root, task = make_root(SETTINGS), TASKS["samsum"]
    test_rows = rows("samsum", "test", "north-day", 0, 7)
    scores = TransformersScorer(SETTINGS, root, batch_size=3, max_new_tokens=12).score(None, task, test_rows)
    model, tokenizer = load_model(SETTINGS), load_tokenizer(SETTINGS.model)
    for row, sample, output, score, log_likelihood in zip(
        test_rows,
        encode(tokenizer, task, test_rows, 256),
        scores.outputs,
        scores.scores,
        scores.log_likelihoods,
        strict=True,
    ):
        ids = torch.tensor([sample.prompt])
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(ids[0, len(sample.prompt) :], skip_special_tokens=True) == output
        assert score == task.score(output, row)
        whole = torch.tensor([sample.prompt + sample.target])
        log_p = model(whole).logits[0].log_softmax(-1)
        start = len(sample.prompt)
        expected = sum(float(log_p[start + i - 1, token]) for i, token in enumerate(sample.target))
        assert abs(expected - log_likelihood) < 1e-3


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
