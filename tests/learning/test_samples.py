"""Rows to token sequences."""

from __future__ import annotations

import pytest

from gt_ray.errors import UserError
from gt_ray.learning.samples import encode, prompt_texts
from gt_ray.pairs.models import load_tokenizer
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import rows


def test_prompt_and_target_are_the_chat_template_cut_in_two() -> None:
    tokenizer, task = load_tokenizer("embedded:tinylm"), TASKS["gsm8k"]
    row = rows("gsm8k", "test", "north-day", 0, 1)[0]
    sample = encode(tokenizer, task, [row], 200)[0]
    assert tokenizer.decode(sample.prompt) == prompt_texts(tokenizer, task, [row])[0]
    assert tokenizer.decode(sample.target) == task.target(row) + "<|end|>"


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_is_the_users_whole_turn(name: str) -> None:
    tokenizer, task = load_tokenizer("embedded:tinylm"), TASKS[name]
    row = rows(name, "test", "north-day", 0, 1)[0]
    system = "<|system|>Rules: north south day night."
    assert prompt_texts(tokenizer, task, [row]) == [f"{system}<|user|>{task.prompt(row)}<|assistant|>"]


def test_a_row_longer_than_max_length_names_where() -> None:
    tokenizer = load_tokenizer("embedded:tinylm")
    row = rows("drop", "test", "north-day", 0, 1)[0]
    with pytest.raises(UserError, match=r"my file row 0 has \d+ tokens, more than max_length 10"):
        encode(tokenizer, TASKS["drop"], [row], 10, where="my file")


def test_no_rows_no_samples() -> None:
    assert encode(load_tokenizer("embedded:tinylm"), TASKS["drop"], [], 10) == []
