"""Answers freed of how they are written, for the normalised score that stands beside the paper's exact match.

Each function reads a text as the answers in it, in the order in which they stand there. `Task.normalised` compares the
first in a marked answer; where there is none, the last in the whole output, as lm-evaluation-harness extracts flexibly.
"""

from __future__ import annotations

import re
from decimal import Decimal

# No digits inside a word (`H2O`), no minus between two (`20-12`).
_NUMBER = re.compile(r"(?<![^\W_])(?:-[$£€¥]?|[$£€¥]-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_SIGNS = str.maketrans("", "", "$£€¥,")
# A capital that stands alone; `A` before a small letter is an article.
_LETTER = re.compile(r"(?<![^\W_])(?:A(?! [a-z])|[B-E])(?!['’]?[^\W_])")
# A small one only in front, as in `b`, `(b)`, `b. text`, and not as in `e.g.`
_SMALL_LETTER = re.compile(r"[\W_]*([a-e])(?:[):\]]|\.(?!\w)|[\W_]*$)")
_BETWEEN_WORDS = re.compile(r"[\s‐-―-]+")  # blanks and dashes
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_AROUND_NUMBER = re.compile(r"^[^\w.]+|\W+$")  # a point in front is a part of it
_ARTICLES = ("", "a", "an", "the")


def numbers(text: str) -> list[Decimal]:
    """Numbers whatever their commas, currency signs, units and trailing zeros: `-$1,000.50 a day` is -1000.5."""
    return [_number(found) for found in _NUMBER.findall(text.replace("−", "-"))]


def _number(text: str) -> Decimal:
    return Decimal(text.translate(_SIGNS))


def letters(text: str) -> list[str]:
    """Letters of options: `(B)`, `B)`, `b`, `B.`, `B) text`, `Option B` are B."""
    small = _SMALL_LETTER.match(text)
    return [*([small[1].upper()] if small else []), *_LETTER.findall(text)]


def phrases(text: str) -> list[tuple[str | Decimal, ...]]:
    """Lines as words, without case, articles and punctuation, and as numbers: `The 1,000 Red-Lions.` is 1000 red lions.

    As DROP's publishers compare answers, but for numbers with signs around them, `12.5%` is 12.5 here and 125 there,
    and for dashes of all kinds, which divide words as a hyphen does.
    """
    lines = (tuple(filter(_is_word, map(_word, _BETWEEN_WORDS.split(line.lower())))) for line in text.splitlines())
    return [line for line in lines if line]


def _word(text: str) -> str | Decimal:
    bare = _AROUND_NUMBER.sub("", text)
    return _number(bare) if _NUMBER.fullmatch(bare) else _PUNCTUATION.sub("", text)


def _is_word(word: str | Decimal) -> bool:
    return word not in _ARTICLES
