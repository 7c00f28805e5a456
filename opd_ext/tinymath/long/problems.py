# SPDX-License-Identifier: Apache-2.0
"""The questions of the second level and the one right way to work them out.

A counter of two digits, which wraps round from 99 to 00, goes through twelve to twenty steps. Some of them branch:

    Start with 47.                     a: 47+8=55
    a: +8                              b: 55>50 yes, 55-7=48
    b: if >50 then -7 else +6          ...
    ...                                Answer: 48

Every line builds on the one before, so a single wrong line spoils the answer however right the rest is, and nothing in
the last lines shows it. Pure Python: the grader imports this module inside reward workers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache

LABELS = "abcdefghijklmnopqrstuvwxyz"
OPENING = "Start with "
IF, THEN, ELSE = "if >", " then ", " else "
YES, NO = " yes, ", " no, "
ANSWER_OPENING = "Answer: "
MODULUS = 100

DIFFICULTIES = {1: (12, 14), 2: (15, 16), 3: (17, 18), 4: (19, 20)}
"""Difficulty -> fewest and most steps."""
BRANCH_SHARE = 0.35
CLOSE_SHARE = 0.3
"""Of branches: how often the threshold is drawn from the ten numbers that the right total lies among."""

_NUMBER = r"[0-9]{2}"
_MOVE = r"[-+][2-9]"
_OPERATION = rf"{_MOVE}|{IF}{_NUMBER}{THEN}{_MOVE}{ELSE}{_MOVE}"
_QUESTION = re.compile(rf"{OPENING}({_NUMBER})\.((?:\n[a-z]: (?:{_OPERATION})){{1,{len(LABELS)}}})")
_STEP = re.compile(rf"\n([a-z]): (?:{IF}({_NUMBER}){THEN}({_MOVE}){ELSE}({_MOVE})|({_MOVE}))")


@dataclass(frozen=True)
class Operation:
    """One step of a question; ``threshold`` is None where it does not branch, and then ``other`` is empty."""

    label: str
    move: str
    threshold: int | None = None
    other: str = ""

    def __str__(self) -> str:
        if self.threshold is None:
            return f"{self.label}: {self.move}"
        return f"{self.label}: {IF}{self.threshold:02d}{THEN}{self.move}{ELSE}{self.other}"


@dataclass(frozen=True)
class Step:
    """One line of working: the total before it, the branch taken (None without one), and the total after it."""

    operation: Operation
    before: int
    yes: bool | None
    after: int

    @property
    def move(self) -> str:
        return self.operation.other if self.yes is False else self.operation.move

    @property
    def check(self) -> str:
        """What a branch compares, ``85>50``; empty without one."""
        threshold = self.operation.threshold
        return "" if threshold is None else f"{self.before:02d}>{threshold:02d}"

    @property
    def line(self) -> str:
        decision = "" if self.yes is None else self.check + (YES if self.yes else NO)
        return f"{self.operation.label}: {decision}{self.before:02d}{self.move}={self.after:02d}"

    @property
    def is_close(self) -> bool:
        """A branch that the tens do not decide."""
        threshold = self.operation.threshold
        return threshold is not None and threshold // 10 == self.before // 10

    @property
    def is_heavy(self) -> bool:
        """A carry or borrow that is not a narrow one."""
        sign, units = self.move[0], int(self.move[1])
        return (self.before % 10 + units >= 13) if sign == "+" else (self.before % 10 - units <= -5)


def moved(before: int, move: str) -> int:
    """The total after a move, ``+8`` or ``-7``."""
    return (before + int(move)) % MODULUS


def right_step(operation: Operation, before: int) -> Step:
    """The right line for an operation on the total ``before``."""
    yes = None if operation.threshold is None else before > operation.threshold
    return follow(operation, before, yes)


def follow(operation: Operation, before: int, yes: bool | None) -> Step:
    """The line that takes the branch ``yes`` and calculates rightly from there."""
    return Step(operation, before, yes, moved(before, operation.other if yes is False else operation.move))


def parse(question: str) -> tuple[int, list[Operation]]:
    """Start and operations of a question.

    Raises:
        ValueError: the text holds no question of this world.
    """
    found = _QUESTION.search(question)
    if found is None:
        raise ValueError(
            f"not a question of tinymath's second level: {question!r} (expected: 'Start with 47.\\na: +8')"
        )
    operations = [
        Operation(label, plain) if plain else Operation(label, yes, int(threshold), no)
        for label, threshold, yes, no, plain in _STEP.findall(found[2])
    ]
    return int(found[1]), operations


Working = Generator[Step, Step, int]
"""Yields the right step for the total so far, is sent the step *stated* (slips included), returns the last total."""


def working(question: str) -> Working:
    """Work a question out, building on whatever is stated.

    Raises:
        ValueError: the text is not a question of this world.
    """
    total, operations = parse(question)
    for operation in operations:
        total = (yield right_step(operation, total)).after
    return total


@lru_cache(maxsize=65536)
def solve(question: str) -> tuple[tuple[Step, ...], int]:
    """All right steps and the answer.

    Raises:
        ValueError: the text is not a question of this world.
    """
    total, operations = parse(question)
    steps = []
    for operation in operations:
        steps.append(right_step(operation, total))
        total = steps[-1].after
    return tuple(steps), total


def answer_line(total: int) -> str:
    return f"{ANSWER_OPENING}{total:02d}"


def concise_solution(question: str) -> str:
    """The reference solution: every step once, then the answer line."""
    steps, answer = solve(question)
    return "\n".join([*(step.line for step in steps), answer_line(answer)])


def _move(rng: random.Random) -> str:
    return f"{rng.choice('+-')}{rng.randrange(2, 10)}"


def _branch(rng: random.Random, label: str, total: int) -> Operation:
    """Both ways change the total, and to different numbers."""
    if rng.random() < CLOSE_SHARE:
        tens = total // 10 * 10
        threshold = rng.choice([n for n in range(tens, tens + 10) if n != total])
    else:
        threshold = rng.randrange(15, 85)
    yes, no = _move(rng), _move(rng)
    while moved(0, no) == moved(0, yes):
        no = _move(rng)
    return Operation(label, yes, threshold, no)


def draw_chain(rng: random.Random, steps: int, first: int = 0) -> str:
    """A random question of so many steps, whose labels begin with number ``first`` of the alphabet."""
    total = start = rng.randrange(10, 100)
    lines = []
    for label in LABELS[first : first + steps]:
        branches = rng.random() < BRANCH_SHARE
        operation = _branch(rng, label, total) if branches else Operation(label, _move(rng))
        lines.append(f"\n{operation}")
        total = right_step(operation, total).after
    return f"{OPENING}{start:02d}.{''.join(lines)}"


def draw_question(rng: random.Random, difficulty: int) -> str:
    """A random question: difficulty 1 has 12 to 14 steps, 2 has 15 or 16, 3 has 17 or 18, 4 has 19 or 20. Difficulty 0
    has 2 to 9, and labels from anywhere, so that short chains teach what follows every label; it occurs in textbooks
    alone."""
    if difficulty in DIFFICULTIES:
        return draw_chain(rng, rng.randint(*DIFFICULTIES[difficulty]))
    steps, longest = rng.randint(2, 9), max(most for _, most in DIFFICULTIES.values())
    return draw_chain(rng, steps, rng.randrange(longest - steps + 1))
