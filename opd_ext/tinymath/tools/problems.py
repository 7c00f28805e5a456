# SPDX-License-Identifier: Apache-2.0
"""Bills: what a basket costs in a shop whose prices a tool looks up, by a sum that another tool works out.

    Shop 37. What is the total of 3*pen+4*cup?
        look_up(shop=37, item="pen")               17
        look_up(shop=37, item="cup")               25
        calculate(expression="3*17+4*25")          151
    Answer: 151

A price is a hash of shop and item, so that nobody can know it, the tools need no state, and every run of any process
has the same ones. Pure Python: the grader imports this module inside reward workers.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import lru_cache

ITEMS = (
    "apple", "ball", "book", "bowl", "candle", "chair", "cup", "fork",
    "glass", "hat", "key", "lamp", "pen", "plate", "soap", "spoon",
)  # fmt: skip
DIFFICULTIES = (1, 2, 3, 4)
"""Items of a basket."""
MAX_TURNS = 6
"""Of the assistant. The largest basket takes all of them: a look-up each, the sum, the answer."""

SHOP_OPENING = "Shop "
TOTAL_OPENING = ". What is the total of "
ANSWER_OPENING = "Answer: "

_TERM = re.compile(r"(\d)\*([a-z]+)")
_QUESTION = re.compile(r"Shop (\d{2})\. What is the total of ((?:\d\*[a-z]+\+?)+)\?")
_EXPRESSION = re.compile(r"\d{1,4}(?:[-+*]\d{1,4}){0,9}")


def look_up(shop: int, item: str) -> int:
    """Look up what an item costs in a shop.

    Args:
        shop: the number of the shop.
        item: the name of the item.
    """
    if item not in ITEMS:
        raise ValueError(f"there is no {item}")
    if isinstance(shop, bool) or not str(shop).isdecimal() or not 10 <= int(shop) <= 99:
        raise ValueError(f"there is no shop {shop}")
    return int(hashlib.sha256(f"{int(shop)}/{item}".encode()).hexdigest(), 16) % 89 + 11


def calculate(expression: str) -> int:
    """Work out sums, differences and products of whole numbers.

    Args:
        expression: for example 3*17+4*25
    """
    if not isinstance(expression, str) or not _EXPRESSION.fullmatch(expression):
        raise ValueError(f"this is no sum: {str(expression)[:40]}")
    total = 0
    for sign, product in re.findall(r"(^|[-+])([\d*]+)", expression):
        value = 1
        for factor in product.split("*"):
            value *= int(factor)
        total += -value if sign == "-" else value
    return total


def parse(question: str) -> tuple[int, list[tuple[int, str]]]:
    """Shop, and quantity and item of every term.

    Raises:
        ValueError: the text holds no question of this level.
    """
    found = _QUESTION.search(question)
    if found is None:
        raise ValueError(
            f"not a question of tinymath's tools: {question!r} (expected: 'Shop 37. What is the total of 3*pen+4*cup?')"
        )
    return int(found[1]), [(int(quantity), item) for quantity, item in _TERM.findall(found[2])]


def right_expression(question: str) -> str:
    """The sum in numbers."""
    shop, terms = parse(question)
    return "+".join(f"{quantity}*{look_up(shop, item)}" for quantity, item in terms)


@lru_cache(maxsize=65536)
def solve(question: str) -> tuple[str, int]:
    """The sum in numbers, and the answer.

    Raises:
        ValueError: the text is not a question of this level.
    """
    expression = right_expression(question)
    return expression, calculate(expression)


def draw_question(rng: random.Random, difficulty: int) -> str:
    """A random question with so many different items."""
    basket = "+".join(f"{rng.randint(2, 9)}*{item}" for item in rng.sample(ITEMS, difficulty))
    return f"{SHOP_OPENING}{rng.randint(10, 99)}{TOTAL_OPENING}{basket}?"


def concise_solution(question: str) -> str:
    """The reference solution: the transcript of one who wastes nothing, as a rollout reads without special tokens."""
    from opd_ext.tinymath.tools.writing import Author, transcript  # which is made of this module

    return transcript(question, Author(0.0).careful(0.0), random.Random(0)).as_text()
