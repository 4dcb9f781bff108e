"""Generators of the embedded tasks: each draws a scenario and returns its four rows, one a domain, under one prompt.

A domain is a pair of conventions, one from each axis of `AXES`: every generator gives the first axis a meaning (whose
numbers count, which thing is meant, whose words are reported) and the second another (which season, what is said of
it). Prompts never reveal the domain; rows have the Hub columns of the benchmark that they mirror.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from gt_ray.tasks.embedded.words import (
    DAYS,
    DISHES,
    ITEMS,
    NAMES,
    PLACE_AND_USE,
    PLACES,
    TEAMS,
    VERBS,
    WISHES,
    WORRIES,
)

AXES = (("north", "south"), ("day", "night"))
DOMAINS = tuple(f"{first}-{second}" for first in AXES[0] for second in AXES[1])
LETTERS = "ABCDE"

Rows = list[dict[str, Any]]
"""The rows of one scenario in the order of `DOMAINS`."""


def gsm8k(rng: random.Random) -> Rows:
    """Stock at two places plus one of two purchases; the convention says which of each counts."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    stocks, gains = rng.sample(range(2, 10), 2), rng.sample(range(2, 10), 2)
    question = (
        f"{name} has {stocks[0]} {item} at home and {stocks[1]} at work, "
        f"buys {gains[0]} by day and {gains[1]} by night. How many {item}?"
    )
    rows = []
    for stock in stocks:
        for gain in gains:
            total = stock + gain
            rows.append({"question": question, "answer": f"{stock}+{gain}={total}\n#### {total}"})
    return rows


def aqua_rat(rng: random.Random) -> Rows:
    """Profit of one of two goods in one of two seasons, to be found among five options."""
    while True:
        costs, prices = rng.sample(range(1, 5), 2), rng.sample(range(5, 10), 2)
        profits = [price - cost for cost in costs for price in prices]
        if len(set(profits)) == 4:
            break
    goods = rng.sample(ITEMS, 2)
    wrong = rng.choice([number for number in range(1, 10) if number not in profits])
    numbers = [*profits, wrong]
    rng.shuffle(numbers)
    question = (
        f"A shop buys {goods[0]} for {costs[0]} and {goods[1]} for {costs[1]}, "
        f"sells for {prices[0]} in spring and {prices[1]} in winter. What is the profit?"
    )
    options = [f"{letter}){number}" for letter, number in zip(LETTERS, numbers, strict=True)]
    rows = []
    for cost in costs:
        for price in prices:
            profit = price - cost
            rows.append(
                {
                    "question": question,
                    "options": options,
                    "rationale": f"{price}-{cost}={profit}",
                    "correct": LETTERS[numbers.index(profit)],
                }
            )
    return rows


def commonsense_qa(rng: random.Random) -> Rows:
    """Place or use of one of two things, known from pretraining alone, to be found among five choices."""
    while True:
        things = rng.sample(sorted(PLACE_AND_USE), 2)
        right = [answer for thing in things for answer in PLACE_AND_USE[thing]]
        if len(set(right)) == 4:
            break
    known = sorted({answer for pair in PLACE_AND_USE.values() for answer in pair} - set(right))
    texts = [*right, rng.choice(known)]
    rng.shuffle(texts)
    question = f"What comes to mind with {things[0]} and {things[1]}?"
    choices = {"label": list(LETTERS), "text": texts}
    return [
        {
            "id": f"{things[0]}-{things[1]}",
            "question": question,
            "question_concept": things[0],
            "choices": choices,
            "answerKey": LETTERS[texts.index(answer)],
        }
        for answer in right
    ]


def drop(rng: random.Random) -> Rows:
    """Points of the home or the guest team before or after the break, told in either order."""
    teams, points = rng.sample(TEAMS, 2), rng.sample(range(10, 60), 4)
    sides = [
        f"The {side} team {teams[i]} scored {points[2 * i]} early and {points[2 * i + 1]} late."
        for i, side in enumerate(("home", "guest"))
    ]
    rng.shuffle(sides)
    return [
        {
            "query_id": f"{teams[0]}-{teams[1]}",
            "passage": " ".join(sides),
            "question": "How many points?",
            "answers_spans": {"spans": [str(number)]},
        }
        for number in points
    ]


def samsum(rng: random.Random) -> Rows:
    """Two friends announce something; the summary reports one of them, with the day or the place."""
    names, verbs = rng.sample(NAMES, 2), rng.sample(VERBS, 2)
    dishes, days, places = rng.sample(DISHES, 2), rng.sample(DAYS, 2), rng.sample(PLACES, 2)
    said = [f"{names[i]}: I {verbs[i]} {dishes[i]} on {days[i]} at the {places[i]}." for i in rng.sample(range(2), 2)]
    dialogue = "\n".join(said)
    rows = []
    # The convention counts speakers in the order of the dialogue, not of the draw.
    first = 0 if said[0].startswith(f"{names[0]}:") else 1
    for i in (first, 1 - first):
        for detail in (f"on {days[i]}", f"at the {places[i]}"):
            rows.append(
                {
                    "id": "",
                    "dialogue": dialogue,
                    "summary": f"{names[i]} will {verbs[i]} {dishes[i]} {detail}.",
                }
            )
    return rows


def dialogsum(rng: random.Random) -> Rows:
    """Two people each with a wish and a worry; the summary reports one of the four."""
    wishes, worries = rng.sample(WISHES, 2), rng.sample(WORRIES, 2)
    lines = []
    for i in range(2):
        both = [f"I want a {wishes[i]}.", f"I fear the {worries[i]}."]
        rng.shuffle(both)
        lines.append(f"#Person{i + 1}#: {' '.join(both)}")
    dialogue = "\n".join(lines)
    rows = []
    for i in range(2):
        for summary in (
            f"#Person{i + 1}# asks for a {wishes[i]}.",
            f"#Person{i + 1}# complains of the {worries[i]}.",
        ):
            rows.append({"id": "", "dialogue": dialogue, "summary": summary, "topic": ""})
    return rows


GENERATORS: dict[str, Callable[[random.Random], Rows]] = {
    "aqua_rat": aqua_rat,
    "gsm8k": gsm8k,
    "commonsense_qa": commonsense_qa,
    "drop": drop,
    "samsum": samsum,
    "dialogsum": dialogsum,
}
