# SPDX-License-Identifier: Apache-2.0
"""The questions of the miniature world and the one right way to work them out.

Arithmetic is done column by column, as on paper, so that a problem has a known number of steps, every
step can be checked on its own, and a harder problem needs more of them:

    What is 487+356?      ones: 7+6=13
                          tens: 8+5+1=14
                          hundreds: 4+3+1=8
                          Answer: 843

Pure Python: the grader imports this module inside reward workers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands")
REWRITE = "now"
QUESTION_OPENING = "What is "
ANSWER_OPENING = "Answer: "
DIFFICULTIES = (1, 2, 3, 4, 5)

_EXPRESSION = re.compile(r"\d+(?:[-+*]\d+){1,3}")


@dataclass(frozen=True)
class Step:
    """One line of working: ``tens: 8+5+1=14`` in a column, ``now: 133-29`` between two operations."""

    label: str
    work: str
    result: int | None

    def line(self, result: int | None = None) -> str:
        """The line as written, with ``result`` in place of the right one when it is given."""
        shown = self.result if result is None else result
        return f"{self.label}: {self.work}" if shown is None else f"{self.label}: {self.work}={shown}"


Working = Generator[Step, "int | None", int]
"""Yields the steps, is sent the result *stated* for each (slips included), returns the final value."""


def expression(question: str) -> str:
    """The arithmetic expression inside a question.

    Raises:
        ValueError: the question holds none.
    """
    found = _EXPRESSION.search(question)
    if found is None:
        raise ValueError(f"not a tinymath question: {question!r} (expected, for example, 'What is 48+7?')")
    return found[0]


def working(question: str) -> Working:
    """Work a question out from left to right, building on whatever results are stated.

    Raises:
        ValueError: the text is not a question of this world.
    """
    first, *rest = re.findall(r"[-+*]?\d+", expression(question))
    value = int(first)
    for position, term in enumerate(rest):
        if position:
            yield Step(REWRITE, f"{value}{''.join(rest[position:])}", None)
        value = yield from _COLUMNS[term[0]](value, int(term[1:]))
    return value


def _digits(number: int) -> list[int]:
    return [int(d) for d in reversed(str(number))]


def _carry_columns(pairs: list[tuple[int, int]], sign: str) -> Working:
    """Columns of a sum or a product, from the ones upwards; ``pairs`` are the two digits of each column."""
    carry, written = 0, ""
    for place, (upper, lower) in enumerate(pairs):
        work = f"{upper}{sign}{lower}" + (f"+{carry}" if carry else "")
        right = (upper * lower if sign == "*" else upper + lower) + carry
        stated = yield Step(PLACES[place], work, right)
        carry, digit = divmod(stated, 10)
        written = f"{digit}{written}"
    return int(f"{carry}{written}")


def _sum_columns(upper: int, lower: int) -> Working:
    a, b = _digits(upper), _digits(lower)
    width = max(len(a), len(b))
    pairs = zip(a + [0] * (width - len(a)), b + [0] * (width - len(b)), strict=True)
    return (yield from _carry_columns(list(pairs), "+"))


def _product_columns(upper: int, lower: int) -> Working:
    """``lower`` is a single digit."""
    return (yield from _carry_columns([(digit, lower) for digit in _digits(upper)], "*"))


def _difference_columns(upper: int, lower: int) -> Working:
    """The smaller number is taken from the larger: after a slip they may have changed places."""
    a, b = _digits(max(upper, lower)), _digits(min(upper, lower))
    borrow, written = 0, ""
    for place, digit in enumerate(a):
        taken = b[place] if place < len(b) else 0
        borrowed = f"-{borrow}" if borrow else ""
        short = digit - borrow < taken
        right = digit + 10 * short - borrow - taken
        stated = yield Step(PLACES[place], f"{digit + 10 * short}{borrowed}-{taken}", right)
        borrow = int(short)
        written = f"{stated % 10}{written}"
    return int(written)


_COLUMNS: dict[str, Callable[[int, int], Working]] = {
    "+": _sum_columns,
    "-": _difference_columns,
    "*": _product_columns,
}


@lru_cache(maxsize=65536)
def solve(question: str) -> tuple[tuple[Step, ...], int]:
    """All steps, each with its right result, and the answer.

    Raises:
        ValueError: the text is not a question of this world.
    """
    work, steps = working(question), []
    try:
        step = next(work)
        while True:
            steps.append(step)
            step = work.send(step.result)
    except StopIteration as done:
        return tuple(steps), done.value


def concise_solution(question: str) -> str:
    """The reference solution: every step once, then the answer line."""
    steps, answer = solve(question)
    return "\n".join([step.line() for step in steps] + [f"{ANSWER_OPENING}{answer}"])


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 1, 10**digits)


def _sum_or_difference(rng: random.Random, digits: int) -> str:
    a, b = _number(rng, digits), _number(rng, rng.choice((digits - 1, digits)))
    return f"{max(a, b)}-{min(a, b)}" if rng.random() < 0.5 else f"{a}+{b}"


def _product(rng: random.Random, digits: int) -> str:
    return f"{_number(rng, digits)}*{rng.randrange(2, 10)}"


def _two_operations(rng: random.Random) -> str:
    kind = rng.randrange(3)
    a, b, c = (_number(rng, 2) for _ in range(3))
    if kind == 0:
        return f"{a}+{b}-{c}" if a + b >= c else f"{c}+{b}-{a}"
    if kind == 1:
        return f"{max(a, b)}-{min(a, b)}+{c}"
    return f"{_product(rng, 2)}+{c}"


_KINDS: dict[int, Callable[[random.Random], str]] = {
    1: lambda rng: _sum_or_difference(rng, 2),
    2: lambda rng: _sum_or_difference(rng, 3),
    3: lambda rng: _product(rng, 3),
    4: lambda rng: _sum_or_difference(rng, 4),
    5: _two_operations,
}


def draw_question(rng: random.Random, difficulty: int) -> str:
    """A random question: 1 two-digit sums and differences (1-2 steps), 2 three-digit ones (3 steps),
    3 a three-digit number times one digit (3), 4 four-digit sums and differences (4),
    5 two operations on two-digit numbers (5-6)."""
    return f"{QUESTION_OPENING}{_KINDS[difficulty](rng)}?"


def distinct_questions(
    rng: random.Random,
    taken: set[str],
    draw: Callable[[random.Random, int], str] = draw_question,
    difficulties: Iterable[int] = DIFFICULTIES,
) -> Iterator[tuple[int, str]]:
    """Endless ``(difficulty, question)`` pairs, difficulties in turn, none twice and none in ``taken``.

    ``taken`` grows with every question drawn, which is what keeps data splits disjoint. Another level has a ``draw``
    and ``difficulties`` of its own.
    """
    while True:
        for difficulty in difficulties:
            question = draw(rng, difficulty)
            while question in taken:
                question = draw(rng, difficulty)
            taken.add(question)
            yield difficulty, question
