"""Each generator's answers, worked out anew from its prompt: first axis north or south, second day or night."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from gt_ray.tasks.embedded.problems import DOMAINS, GENERATORS
from gt_ray.tasks.embedded.words import PLACE_AND_USE

Answers = list[str]


def gsm8k(row: dict[str, Any]) -> Answers:
    pattern = r"\w+ has (\d) \w+ at home and (\d) at work, buys (\d) by day and (\d) by night\. How many \w+\?"
    match = re.fullmatch(pattern, row["question"])
    assert match
    home, work, day, night = map(int, match.groups())
    sums = [(home, day), (home, night), (work, day), (work, night)]
    return [f"{stock}+{gain}={stock + gain}\n#### {stock + gain}" for stock, gain in sums]


def aqua_rat(row: dict[str, Any]) -> Answers:
    first, second, spring, winter = map(int, re.findall(r"\d+", row["question"]))
    letters = {int(option[2:]): option[0] for option in row["options"]}
    assert [option[:2] for option in row["options"]] == ["A)", "B)", "C)", "D)", "E)"] and len(letters) == 5
    return [letters[price - cost] for cost in (first, second) for price in (spring, winter)]


def commonsense_qa(row: dict[str, Any]) -> Answers:
    match = re.fullmatch(r"What comes to mind with (\w+) and (\w+)\?", row["question"])
    assert match
    letters = dict(zip(row["choices"]["text"], row["choices"]["label"], strict=True))
    assert list(letters.values()) == list("ABCDE")
    return [letters[answer] for thing in match.groups() for answer in PLACE_AND_USE[thing]]


def drop(row: dict[str, Any]) -> Answers:
    pattern = r"The (home|guest) team (\w+) scored (\d+) early and (\d+) late\."
    sides = {side: (early, late) for side, _, early, late in re.findall(pattern, row["passage"])}
    return [*sides["home"], *sides["guest"]]


def samsum(row: dict[str, Any]) -> Answers:
    pattern = r"(\w+): I (\w+ \w+) on (\w+) at the (\w+)\."
    said = [re.fullmatch(pattern, line) for line in row["dialogue"].split("\n")]
    return [
        f"{match[1]} will {match[2]} {detail}."
        for match in said
        if match
        for detail in (f"on {match[3]}", f"at the {match[4]}")
    ]


def dialogsum(row: dict[str, Any]) -> Answers:
    answers = []
    for line in row["dialogue"].split("\n"):
        speaker = line.partition(":")[0]
        wish, worry = re.search(r"I want a (\w+)\.", line), re.search(r"I fear the (\w+)\.", line)
        assert wish and worry
        answers += [f"{speaker} asks for a {wish[1]}.", f"{speaker} complains of the {worry[1]}."]
    return answers


SOLVERS: dict[str, tuple[Callable[[dict[str, Any]], Answers], str]] = {
    "gsm8k": (gsm8k, "answer"),
    "aqua_rat": (aqua_rat, "correct"),
    "commonsense_qa": (commonsense_qa, "answerKey"),
    "drop": (drop, "answers_spans"),
    "samsum": (samsum, "summary"),
    "dialogsum": (dialogsum, "summary"),
}


@pytest.mark.parametrize("task", GENERATORS)
def test_every_domain_answers_by_its_own_conventions(task: str) -> None:
    solve, column = SOLVERS[task]
    rng = random.Random(0)
    for _ in range(200):
        scenario = GENERATORS[task](rng)
        expected = solve(scenario[0])
        assert len(expected) == len(DOMAINS)
        found = [row[column]["spans"][0] if task == "drop" else row[column] for row in scenario]
        assert found == expected


def test_the_rationale_of_a_word_problem_with_options_leads_to_its_answer() -> None:
    rng = random.Random(1)
    for _ in range(50):
        for row in GENERATORS["aqua_rat"](rng):
            result = re.fullmatch(r"(\d)-(\d)=(\d)", row["rationale"])
            assert result and int(result[1]) - int(result[2]) == int(result[3])
            assert f"{row['correct']}){result[3]}" in row["options"]
