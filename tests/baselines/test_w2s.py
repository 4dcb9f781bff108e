"""What the weak model labels, and what is learnt of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gt_ray.baselines.distributions import Distributions, SoftSample
from gt_ray.baselines.w2s import LABEL, WeakLabel, halves, labelled_samples
from gt_ray.config import FineTuneSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.learning.engine import Engine, FineTuned
from gt_ray.learning.samples import Sample, TrainingSet, encode
from gt_ray.pairs.models import load_model, load_tokenizer
from gt_ray.pairs.root import make_root
from gt_ray.tasks import TASKS, Row
from gt_ray.tasks.embedded import rows

SETTINGS = ModelSettings(model="embedded:llm", dtype="float32")
TASK = TASKS["gsm8k"]


def labelled(*labels: WeakLabel) -> list[Row]:
    found = rows("gsm8k", "private", "north-day", 0, len(labels))
    return [{**row, LABEL: label} for row, label in zip(found, labels, strict=True)]


def samples_of(found: list[Row], max_length: int = 512) -> list[Sample]:
    return labelled_samples(load_tokenizer(SETTINGS.model), TASK, found, max_length, "client x")


def test_halves_are_disjoint_whole_and_the_same_again() -> None:
    positions = list(range(10, 21))
    first, second = halves(positions, 3)
    assert len(first) == 6 and sorted(first + second) == positions
    assert (first, second) == halves(positions, 3) != halves(positions, 4)
    with pytest.raises(UserError, match="1 private row cannot be halved"):
        halves([7], 0)


def test_a_perfect_weak_model_gives_the_fine_tune_on_the_references() -> None:
    found = rows("gsm8k", "private", "north-day", 0, 8)
    perfect = samples_of([{**row, LABEL: WeakLabel(TASK.target(row), True)} for row in found])
    references = encode(load_tokenizer(SETTINGS.model), TASK, found)
    engine = Engine(load_model(SETTINGS), make_root(SETTINGS))
    tune = FineTuneSettings(steps=3, learning_rate=5e-3, batch_size=4)
    updates = []
    for samples in (perfect, references):
        ((_, result),) = engine.fine_tune([TrainingSet(samples, 0)], tune)
        assert isinstance(result, FineTuned)
        updates.append(result.snapshots_JLd)
    assert updates[0].norm() > 0
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-5, atol=1e-7)


def test_what_was_cut_does_not_end_and_what_is_empty_ends_at_once() -> None:
    end = load_tokenizer(SETTINGS.model).eos_token_id
    ended, cut, empty = samples_of(
        labelled(*(WeakLabel(*one) for one in (("7 + 5", True), ("7 + 5", False), ("", True))))
    )
    assert ended.target == [*cut.target, end] and empty.target == [end]
    (short,) = samples_of(labelled(WeakLabel("7 + 5", True)), max_length=len(ended.prompt) + 2)
    assert short.target == ended.target[:2]
    with pytest.raises(UserError, match=r"client x: a prompt has \d+ tokens; raise fine_tune.max_length"):
        samples_of(labelled(WeakLabel("7", True)), max_length=len(ended.prompt))


def test_rows_without_a_label_are_left_out() -> None:
    one, other = labelled(WeakLabel("7", True), WeakLabel("8", True))
    unlabelled = {name: value for name, value in other.items() if name != LABEL}
    assert samples_of([one, unlabelled]) == samples_of([one])
    with pytest.raises(UserError, match="client x: the weak model has answered no prompt"):
        samples_of([unlabelled])


def test_distributions_go_with_their_tokens() -> None:
    label = WeakLabel("7 + 5", True)
    (plain,) = samples_of(labelled(label))
    kept = [np.asarray(plain.target), np.zeros((len(plain.target), 2)), np.zeros((len(plain.target), 2))]
    (soft,) = samples_of(labelled(replace(label, weak=Distributions(*kept))))
    assert isinstance(soft, SoftSample) and soft.target == plain.target and soft.weak.ids_nk is kept[1]
    with pytest.raises(UserError, match="leave conf and vissup out"):
        samples_of(labelled(replace(label, weak=Distributions(kept[0] + 1, *kept[1:]))))
