# SPDX-License-Identifier: Apache-2.0
"""What was decisive in a piece of working, or wrong with it, in the closed vocabulary of TRACE's annotators.

The world knows every step, so a rule can do here what a language model does on real problems. A carry, a borrow
or the change to the next operation decides a right answer; of a wrong one, the first line that departs from the
working is named.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from opd_ext.tinymath.problems import ANSWER_OPENING, PLACES, REWRITE, Step, solve

_LINE = re.compile(rf"({'|'.join((*PLACES, REWRITE))}): ([-+*0-9]{{1,32}})(?:=([0-9]{{1,9}}))?")


class Finding(NamedTuple):
    """A half-open range of characters and its type, of TRACE's list for the outcome."""

    start: int
    end: int
    type: str


def step_type(step: Step) -> str | None:
    """Why a right step is decisive, or None where it is routine."""
    if step.result is None:
        return "substitution"
    if "*" in step.work and step.result > 9:
        return "key_formula"
    if len(re.findall(r"\d+", step.work)) > 2 or step.result > 9 or re.match(r"\d\d-", step.work):
        return "case_split"
    return None


def decisive_types(question: str) -> list[str]:
    """The distinct types of a question's decisive steps, in the order of the working."""
    return list(dict.fromkeys(filter(None, map(step_type, solve(question)[0]))))


def diagnose(question: str, response: str, correct: bool) -> list[Finding]:
    """Decisive lines of a right response, or the one line where a wrong one first went wrong.

    Raises:
        ValueError: not a question of this world.
    """
    lines = _lines(response)
    return _decisive(lines) if correct else _first_error(question, lines)


def _lines(response: str) -> list[tuple[int, int, str]]:
    """(start, end, text without newline); the newline belongs to its line."""
    return [(found.start(), found.end(), found[0].rstrip("\n")) for found in re.finditer(r"[^\n]*\n|[^\n]+", response)]


def _columns(lines: list[tuple[int, int, str]]) -> list[tuple[int, int, Step]]:
    """The lines that state a step; of a column that was looked at again, the last one, on which the rest builds."""
    stated: list[tuple[int, int, Step]] = []
    for start, end, text in lines:
        if found := _LINE.fullmatch(text):
            step = Step(found[1], found[2], int(found[3]) if found[3] else None)
            if stated and stated[-1][2].label == step.label:
                stated.pop()
            stated.append((start, end, step))
    return stated


def _decisive(lines: list[tuple[int, int, str]]) -> list[Finding]:
    return [Finding(start, end, kind) for start, end, step in _columns(lines) if (kind := step_type(step))]


def _first_error(question: str, lines: list[tuple[int, int, str]]) -> list[Finding]:
    right, stated = solve(question)[0], _columns(lines)
    for index, (start, end, step) in enumerate(stated):
        if index == len(right):
            return [Finding(start, end, "illegal_step")]
        if (step.label, step.work) != (right[index].label, right[index].work):
            return [Finding(start, end, "wrong_constraint")]
        if step.result != right[index].result:
            return [Finding(start, end, "arithmetic_slip")]
    if not lines:
        return []
    answered = [(start, end) for start, end, text in lines if text.startswith(ANSWER_OPENING)]
    early = answered and len(stated) < len(right)
    return [Finding(*(answered or [lines[-1][:2]])[-1], "premature_conclusion" if early else "format_error")]
