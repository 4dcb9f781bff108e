"""Prompts, targets, answer extraction and scores of the six tasks."""

from __future__ import annotations

from typing import Any

import pytest

from gt_ray.tasks import TASKS
from gt_ray.tasks.base import rouge1

# A row in Hub columns, and what Figures 9-14 make of it: prompt, target, accepted answers.
EXAMPLES: dict[str, tuple[dict[str, Any], str, str, list[str]]] = {
    "aqua_rat": (
        {
            "question": "A car covers 60 km (in total) in 2 hours. What is its speed?",
            "options": ["A)20 km/h", "B)30 km/h", "C)f(60)", "D)60 km/h", "E)none"],
            "rationale": "Speed is distance by time.\n60/2 = 30",
            "correct": "B",
        },
        "Let's think step by step and write only the choice letter in the format '#### {answer}'\n"
        "A car covers 60 km (in total) in 2 hours. What is its speed?\n"
        "Which of the following options is correct?\n"
        "A) 20 km/h\nB) 30 km/h\nC) f(60)\nD) 60 km/h\nE) none",
        "Speed is distance by time.\n60/2 = 30\n#### B",
        ["B"],
    ),
    "gsm8k": (
        {
            "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?",
            "answer": "She sold 48/2 = <<48/2=24>>24 in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
        },
        "Let's think step by step and write your answer at the end in the format '#### {answer}'\n"
        "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?",
        "She sold 48/2 = 24 in May.\nIn all 48+24 = 72.\n#### 72",
        ["72"],
    ),
    "commonsense_qa": (
        {
            "id": "1",
            "question": "Where do you keep a knife?",
            "question_concept": "knife",
            "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["bed", "kitchen", "sea", "air", "car"]},
            "answerKey": "B",
        },
        "Answer only the choice letter in capital letter in the format: '#### {answer}'.\n"
        "Where do you keep a knife?\nA) bed\nB) kitchen\nC) sea\nD) air\nE) car",
        "#### B",
        ["B"],
    ),
    "drop": (
        {
            "query_id": "1",
            "passage": "The Bears led 7-3 and won 21-10.",
            "question": "Who lost?",
            "answers_spans": {"spans": ["the Lions", "Lions"]},
        },
        "Let's think step by step and write the answer in the format '#### {answer}'\n"
        "The Bears led 7-3 and won 21-10.\nWho lost?",
        "#### the Lions",
        ["the Lions", "Lions"],
    ),
    "samsum": (
        {
            "id": "1",
            "dialogue": "Amanda: I baked cookies. Do you want some?\r\nJerry: Sure!",
            "summary": "Amanda baked cookies.",
        },
        "Summarize the following dialogue.\nAmanda: I baked cookies. Do you want some?\r\nJerry: Sure!",
        "Amanda baked cookies.",
        ["Amanda baked cookies."],
    ),
    "dialogsum": (
        {
            "id": "1",
            "dialogue": "#Person1#: How are you?\n#Person2#: Fine.",
            "summary": "#Person2# is fine.",
            "topic": "small talk",
        },
        "Summarize the following dialogue.\n#Person1#: How are you?\n#Person2#: Fine.",
        "#Person2# is fine.",
        ["#Person2# is fine."],
    ),
}


def test_there_is_an_example_of_every_task() -> None:
    assert list(TASKS) == list(EXAMPLES)
    for name, (row, *_) in EXAMPLES.items():
        assert TASKS[name].name == name and set(TASKS[name].columns) <= row.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_prompt_is_that_of_the_papers_figure(name: str) -> None:
    row, prompt, _, _ = EXAMPLES[name]
    assert TASKS[name].prompt(row) == prompt


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_target_is_that_of_the_papers_figure_and_scores_100(name: str) -> None:
    row, _, target, references = EXAMPLES[name]
    assert TASKS[name].target(row) == target
    assert TASKS[name].references(row) == references
    assert TASKS[name].score(target, row) == TASKS[name].normalised(target, row) == 100.0
    assert TASKS[name].metric == "rouge1" or target.endswith(f"#### {references[0]}")


def test_accuracy_and_rouge_are_the_metrics_of_table_4() -> None:
    metrics = {name: task.metric for name, task in TASKS.items()}
    assert metrics == {name: "rouge1" if name.endswith("sum") else "accuracy" for name in TASKS}


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("2+5=7\n#### 7", "7"),
        ("#### 3\nno, wait\n#### 7", "7"),
        ("####7", "7"),
        ("####   7  ", "7"),
        ("####\n7", "7"),
        ("#### 7\nand so on", "7"),
        ("#### 1,000", "1,000"),
        ("######## 7", "7"),
        ("7", ""),
        ("### 7", ""),
        ("#### 7\n####", ""),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_last_mark(output: str, answer: str) -> None:
    assert TASKS["gsm8k"].extract(output) == answer


def test_a_summary_is_the_whole_output() -> None:
    assert TASKS["samsum"].extract(" Two lines,\n#### and a mark. ") == "Two lines,\n#### and a mark."


@pytest.mark.parametrize("output", ["#### B", "B is right, so\n#### B"])
def test_the_exact_answer_scores_100(output: str) -> None:
    assert TASKS["aqua_rat"].score(output, EXAMPLES["aqua_rat"][0]) == 100.0


@pytest.mark.parametrize("output", ["#### b", "#### B)", "B", "#### A", "#### 30 km/h", ""])
def test_anything_but_the_exact_answer_scores_0(output: str) -> None:
    assert TASKS["aqua_rat"].score(output, EXAMPLES["aqua_rat"][0]) == 0.0


def test_each_accepted_answer_of_drop_scores() -> None:
    row = EXAMPLES["drop"][0]
    assert [TASKS["drop"].score(f"#### {span}", row) for span in ("the Lions", "Lions", "lions")] == [100, 100, 0]
    blanks = row | {"answers_spans": {"spans": ["  1085", "the Red\nLions "]}}
    assert TASKS["drop"].references(blanks) == ["1085", "the Red Lions"]
    assert TASKS["drop"].score(TASKS["drop"].target(blanks), blanks) == 100


@pytest.mark.parametrize(
    ("reference", "summary", "shared", "n_reference", "n_summary"),
    [
        ("Amanda baked cookies and will bring Jerry some tomorrow.", "Amanda will bring cookies tomorrow", 5, 9, 5),
        ("The cat sat.", "the the the", 1, 3, 3),  # a word counts as often as both have it
        ("#Person1# asks for a map.", "#Person2# asks for a map", 4, 5, 5),
        ("He bakes", "he baked", 1, 2, 2),  # no stemming
        ("one two", "three", 0, 2, 1),
    ],
)
def test_rouge_1_is_the_f_measure_counted_by_hand(
    reference: str, summary: str, shared: int, n_reference: int, n_summary: int
) -> None:
    precision, recall = shared / n_summary, shared / n_reference
    expected = 100 * 2 * precision * recall / (precision + recall) if shared else 0.0
    assert rouge1(reference, summary) == pytest.approx(expected)
    assert TASKS["dialogsum"].score(summary, {"dialogue": "", "summary": reference}) == pytest.approx(expected)


def test_an_empty_summary_scores_0() -> None:
    assert TASKS["samsum"].score("", EXAMPLES["samsum"][0]) == 0.0
