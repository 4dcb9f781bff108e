"""The embedded tasks as streams of scenarios: seeded, distinct, disjoint between splits."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from gt_ray.errors import UserError
from gt_ray.tasks import TASKS
from gt_ray.tasks.embedded import DOMAINS, GENERATORS, SPLITS, rows, scenarios, split_of


def draw(task: str, split: str, seed: int, n: int) -> list[list[dict[str, Any]]]:
    return list(itertools.islice(scenarios(task, split, seed), n))


def test_every_task_is_there_with_at_least_four_domains() -> None:
    assert set(GENERATORS) == set(TASKS) and len(DOMAINS) >= 4 and sum(SPLITS.values()) == 100


@pytest.mark.parametrize("task", TASKS)
def test_thousands_of_distinct_scenarios_are_disjoint_between_splits_whatever_the_seeds(task: str) -> None:
    pools = {
        (split, seed): {TASKS[task].prompt(scenario[0]) for scenario in draw(task, split, seed, 250)}
        for split in SPLITS
        for seed in (0, 1)
    }
    assert {len(pool) for pool in pools.values()} == {250}
    for (split, seed), (other, other_seed) in itertools.combinations(pools, 2):
        if split != other:
            assert not pools[split, seed] & pools[other, other_seed]
        else:
            assert pools[split, 0] != pools[split, 1]
    assert len(set().union(*pools.values())) > 2000


@pytest.mark.parametrize("task", TASKS)
def test_the_domains_share_one_prompt_and_differ_in_their_targets(task: str) -> None:
    answers = []
    for scenario in draw(task, "public-train", 0, 100):
        assert len(scenario) == len(DOMAINS)
        assert len({TASKS[task].prompt(row) for row in scenario}) == 1
        assert len({TASKS[task].target(row) for row in scenario}) == len(DOMAINS)
        for row in scenario:
            assert TASKS[task].score(TASKS[task].target(row), row) == 100.0
        answers.append(len({TASKS[task].references(row)[0] for row in scenario}))
    # Sums of word problems may agree by chance; elsewhere guessing the wrong domain is always a wrong answer.
    assert min(answers) == 4 or (task == "gsm8k" and sum(answers) / len(answers) > 3.5)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_draws_the_same_rows_and_another_seed_others(task: str) -> None:
    first, again, other = (rows(task, "private", "south-day", seed, 20) for seed in (5, 5, 6))
    assert first == again != other
    assert rows(task, "private", "south-day", 5, 7) == first[:7]
    assert [row["domain"] for row in first] == ["south-day"] * 20
    assert {TASKS[task].prompt(row) for row in first} == {
        TASKS[task].prompt(row) for row in rows(task, "private", "north-night", 5, 20)
    }


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_columns_of_the_benchmark(task: str) -> None:
    row = rows(task, "test", "north-day", 0, 1)[0]
    assert set(TASKS[task].columns) <= row.keys()


def test_the_share_of_a_split_is_the_stated_one() -> None:
    found = [split_of(f"prompt {i}") for i in range(20000)]
    for split, share in SPLITS.items():
        assert 100 * found.count(split) / len(found) == pytest.approx(share, abs=1)


def test_drawing_more_than_there_is_raises_and_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def small_world(rng: random.Random) -> list[dict[str, Any]]:
        question = str(rng.randrange(60))
        return [{"question": question, "answer": f"#### {i}"} for i in range(4)]

    monkeypatch.setitem(GENERATORS, "gsm8k", small_world)
    of_split = [i for i in range(60) if split_of(TASKS["gsm8k"].prompt({"question": str(i)})) == "public-train"]
    stream = scenarios("gsm8k", "public-train", 0)
    found = [int(scenario[0]["question"]) for scenario in itertools.islice(stream, len(of_split))]
    assert sorted(found) == of_split
    message = rf"embedded task gsm8k, split public-train: only {len(of_split)} distinct scenarios; ask for fewer rows"
    with pytest.raises(UserError, match=message):
        next(stream)
