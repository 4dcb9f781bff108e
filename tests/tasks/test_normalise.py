"""Extraction, strict and normalised scores of outputs as models write them.

Each line of a table: output, accepted answers by `|`, extracted answer, whether the score and the normalised score are
100. What lm-evaluation-harness 0.4.13 makes of the same lines was computed with its own code: `flexible-extract` of its
gsm8k task, and the exact match of its drop task, which is that of DROP's publishers, on the answer extracted here. It
has no task with generated letters.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gt_ray.tasks import TASKS, Row

Line = tuple[str, str, str, int, int]

# The harness says the same as the normalised score.
NUMBERS: list[Line] = [
    ("She has 48+24=72.\n#### 72", "72", "72", 1, 1),
    ("#### 3\nno, wait\n#### 72", "72", "72", 1, 1),
    ("####72", "72", "72", 1, 1),
    ("######## 72", "72", "72", 1, 1),
    ("####\n72", "72", "72", 1, 1),
    ("#### 72.", "72", "72.", 0, 1),
    ("#### $72", "72", "$72", 0, 1),
    ("#### $ 72", "72", "$ 72", 0, 1),
    ("#### €72", "72", "€72", 0, 1),
    ("#### 72%", "72", "72%", 0, 1),
    ("#### 72 clips", "72", "72 clips", 0, 1),
    ("#### 72km", "72", "72km", 0, 1),
    ("#### **72**", "72", "**72**", 0, 1),
    ("#### _72_", "72", "_72_", 0, 1),
    ("#### {72}", "72", "{72}", 0, 1),
    ("#### \\boxed{72}", "72", "\\boxed{72}", 0, 1),
    ("#### The answer is 72.", "72", "The answer is 72.", 0, 1),
    ("#### 48 + 24 = 72", "72", "48 + 24 = 72", 0, 1),
    ("#### 72 (48+24=72)", "72", "72 (48+24=72)", 0, 1),
    ("#### 1000", "1,000", "1000", 0, 1),
    ("#### 1,000", "1,000", "1,000", 1, 1),
    ("#### 1,234,567", "1234567", "1,234,567", 0, 1),
    ("#### -3", "-3", "-3", 1, 1),
    ("#### $-3", "-3", "$-3", 0, 1),
    ("#### 3", "-3", "3", 0, 0),
    ("#### 5", "0.5", "5", 0, 0),
    ("#### 720", "72", "720", 0, 0),
    ("#### 7.2", "72", "7.2", 0, 0),
    ("#### 7 2", "72", "7 2", 0, 0),
    ("#### 72,5", "72", "72,5", 0, 0),
    ("#### seventy-two", "72", "seventy-two", 0, 0),
    ("#### 96-24", "24", "96-24", 0, 0),
    ("The answer is 72.", "72", "", 0, 1),
    ("She sold 48, then 24: 72 in all", "72", "", 0, 1),
    ("72", "72", "", 0, 1),
    ("### 72", "72", "", 0, 1),
    ("72 clips by 2 friends", "72", "", 0, 0),
    ("The answer is 72.\n####", "72", "", 0, 1),
    ("#### Answer\n72", "72", "Answer", 0, 1),
    ("#### 72 ####", "72", "", 0, 1),
    ("I do not know.", "72", "", 0, 0),
    ("", "72", "", 0, 0),
    ("####", "72", "", 0, 0),
]
# The harness says the opposite.
NUMBERS_APART: list[Line] = [
    # It takes the last number of the output, also of one that marks its answer.
    ("#### 72\nSo 5 of 9 are left.", "72", "72", 1, 1),
    ("#### 72 clips in 2 months", "72", "72 clips in 2 months", 0, 1),
    ("#### 72 or 73", "72", "72 or 73", 0, 1),
    ("#### 71 or 72", "72", "71 or 72", 0, 0),
    # It compares digits, not numbers.
    ("#### 72.00", "72", "72.00", 0, 1),
    ("#### 072", "72", "072", 0, 1),
    ("#### US$72.00", "72", "US$72.00", 0, 1),
    ("#### 1,000.0", "1,000", "1,000.0", 0, 1),
    ("#### .5", "0.5", ".5", 0, 1),
    ("#### 0.50", "0.5", "0.50", 0, 1),
    ("#### -$3.00", "-3", "-$3.00", 0, 1),
    ("#### −3", "-3", "−3", 0, 1),
    # It finds numbers in words, the minus of a difference, and denominators.
    ("#### H72", "72", "H72", 0, 0),
    ("She sold 96-24", "24", "", 0, 1),
    ("#### 1/2", "2", "1/2", 0, 0),
]
LETTERS: list[Line] = [
    ("#### B", "B", "B", 1, 1),
    ("60/2 = 30\n#### B", "B", "B", 1, 1),
    ("#### A\n#### B", "B", "B", 1, 1),
    ("#### b", "B", "b", 0, 1),
    ("#### (B)", "B", "(B)", 0, 1),
    ("#### (b)", "B", "(b)", 0, 1),
    ("#### B)", "B", "B)", 0, 1),
    ("#### B.", "B", "B.", 0, 1),
    ("#### B:", "B", "B:", 0, 1),
    ("#### [B]", "B", "[B]", 0, 1),
    ("#### {B}", "B", "{B}", 0, 1),
    ("#### 'B'", "B", "'B'", 0, 1),
    ("#### **B**", "B", "**B**", 0, 1),
    ("#### __B__", "B", "__B__", 0, 1),
    ("#### \\text{B}", "B", "\\text{B}", 0, 1),
    ("#### B) 30 km/h", "B", "B) 30 km/h", 0, 1),
    ("#### b) vitamin C", "B", "b) vitamin C", 0, 1),
    ("#### B. 30 km/h", "B", "B. 30 km/h", 0, 1),
    ("#### b. 30 km/h", "B", "b. 30 km/h", 0, 1),
    ("#### B 30 km/h", "B", "B 30 km/h", 0, 1),
    ("#### Option B", "B", "Option B", 0, 1),
    ("#### The answer is B.", "B", "The answer is B.", 0, 1),
    ("#### A) kitchen", "A", "A) kitchen", 0, 1),
    ("#### A", "B", "A", 0, 0),
    ("#### B\n#### A", "B", "A", 0, 0),
    ("#### F", "B", "F", 0, 0),
    ("#### BC", "B", "BC", 0, 0),
    ("#### Bed", "B", "Bed", 0, 0),
    ("#### bed", "B", "bed", 0, 0),
    ("#### B's", "B", "B's", 0, 0),
    ("#### e.g. 30", "E", "e.g. 30", 0, 0),
    ("#### A train", "A", "A train", 0, 0),  # an article, for all that can be told
    ("#### 30 km/h", "B", "30 km/h", 0, 0),  # an option's text is no letter
    ("Not A, so the answer is B.", "B", "", 0, 1),
    ("B is wrong; it is D", "B", "", 0, 0),
    ("Answer: (B)", "B", "", 0, 1),
    ("ANSWER:B", "B", "", 0, 1),
    ("b", "B", "", 0, 1),
    ("(b)", "B", "", 0, 1),
    ("B\n####", "B", "", 0, 1),
    ("#### Answer\nB", "B", "Answer", 0, 1),
    ("A train of 60 m takes 2 s", "A", "", 0, 0),
    ("", "B", "", 0, 0),
]
# The publishers' exact match says the same as the normalised score.
PHRASES: list[Line] = [
    ("#### Lions", "Lions", "Lions", 1, 1),
    ("#### the Lions", "the Red Lions|the Lions", "the Lions", 1, 1),
    ("#### Bears\n#### Lions\nand more", "Lions", "Lions", 1, 1),
    ("#### The Lions", "Lions", "The Lions", 0, 1),
    ("#### lions.", "the Lions", "lions.", 0, 1),
    ('#### "Lions"', "Lions", '"Lions"', 0, 1),
    ("#### **Lions**", "Lions", "**Lions**", 0, 1),
    ("#### Red-Lions", "Red Lions", "Red-Lions", 0, 1),
    ("#### RED  LIONS", "Bears|Red Lions", "RED  LIONS", 0, 1),
    ("#### O'Brien", "OBrien", "O'Brien", 0, 1),
    ("#### a the Lions an", "Lions", "a the Lions an", 0, 1),
    ("#### theLions", "Lions", "theLions", 0, 0),
    ("#### Lions and Bears", "Lions", "Lions and Bears", 0, 0),
    ("#### Bears, Lions", "Bears and Lions", "Bears, Lions", 0, 0),
    ("#### Lion", "Lions", "Lion", 0, 0),
    ("#### 12", "12", "12", 1, 1),
    ("#### 12.0", "12", "12.0", 0, 1),
    ("#### 12.", "12", "12.", 0, 1),
    ("#### 012", "12", "012", 0, 1),
    ("#### 1,200", "1200", "1,200", 0, 1),
    ("#### 1200", "1,200", "1200", 0, 1),
    ("#### 12%", "12", "12%", 0, 1),
    ("#### $12", "12", "$12", 0, 1),
    ("#### .5", "0.5", ".5", 0, 1),
    ("#### 5", ".5", "5", 0, 0),
    ("#### 12 yards", "12", "12 yards", 0, 0),
    ("#### 12-yard", "12 yard", "12-yard", 0, 1),
    ("#### 12.0-yard", "12-yard", "12.0-yard", 0, 1),
    ("#### twelve", "12", "twelve", 0, 0),
    ("#### 17 May 1814", "17 may, 1814", "17 May 1814", 0, 1),
    ("#### San Luis Potosí", "san luis potosí", "San Luis Potosí", 0, 1),
    ("#### San Luis Potosi", "San Luis Potosí", "San Luis Potosi", 0, 0),
    ("They won.\nLions", "Lions", "", 0, 1),  # the last line is compared
    ("Lions", "Lions", "", 0, 1),
    ("The Lions.\n####", "Lions", "", 0, 1),
    ("The answer is Lions", "Lions", "", 0, 0),
    ("#### ???", "Lions", "???", 0, 0),
    ("", "Lions", "", 0, 0),
]
# It says the opposite.
PHRASES_APART: list[Line] = [
    # With signs around a number it drops the point as well.
    ("#### 12.5%", "12.5", "12.5%", 0, 1),
    ("#### 12.5%", "125", "12.5%", 0, 0),
    ("#### $12.50", "12.5", "$12.50", 0, 1),
    ("#### (12.5)", "12.5", "(12.5)", 0, 1),
    ("#### 1/2", "12", "1/2", 0, 0),
    # It knows the signs of ASCII alone.
    ("#### £12", "12", "£12", 0, 1),
    ("#### 2006-07", "2006–07", "2006-07", 0, 1),
]
LINES = {
    "gsm8k": NUMBERS + NUMBERS_APART,
    "aqua_rat": LETTERS,
    "commonsense_qa": LETTERS,
    "drop": PHRASES + PHRASES_APART,
}


def row_of(task: str, accepted: str) -> Row:
    """A row with these accepted answers; scores need no other columns."""
    return {
        "gsm8k": {"answer": f"so\n#### {accepted}"},
        "aqua_rat": {"correct": accepted},
        "commonsense_qa": {"answerKey": accepted},
        "drop": {"answers_spans": {"spans": accepted.split("|")}},
    }[task]


@pytest.mark.parametrize(("task", "line"), [(task, line) for task, lines in LINES.items() for line in lines])
def test_an_output_is_extracted_and_scored_both_ways(task: str, line: Line) -> None:
    output, accepted, answer, score, normalised = line
    row = row_of(task, accepted)
    assert TASKS[task].extract(output) == answer
    assert (TASKS[task].score(output, row), TASKS[task].normalised(output, row)) == (100 * score, 100 * normalised)


@given(text=st.text() | st.from_regex(r"[-−$£,.\d\sA-Ea-e()#=%–]*", fullmatch=True), before=st.text())
@example(text="-$-5,.", before="")
@example(text="١٢٣٫٥ 1_000 ²", before="####")
@pytest.mark.parametrize("task", LINES)
def test_no_text_is_an_error_and_normalised_is_never_below_strict(task: str, text: str, before: str) -> None:
    row = row_of(task, "B" if task in ("aqua_rat", "commonsense_qa") else text)
    for output in (text, f"{before}#### {text}"):
        assert TASKS[task].normalised(output, row) >= TASKS[task].score(output, row)


def test_where_a_reference_has_no_reading_only_the_exact_answer_is_right() -> None:
    row = row_of("gsm8k", "none")
    assert [TASKS["gsm8k"].normalised(output, row) for output in ("#### none", "#### nothing", "")] == [100, 0, 0]


def test_rouge_1_is_its_own_normalised_score() -> None:
    row = {"dialogue": "", "summary": "He bakes."}
    for output in ("he bakes", "She bakes.", ""):
        assert TASKS["samsum"].normalised(output, row) == TASKS["samsum"].score(output, row)
