# SPDX-License-Identifier: Apache-2.0
"""What was decisive in a piece of working of the second level, or wrong with it, in TRACE's closed vocabulary.

A branch that the tens do not decide and a heavy carry decide a right answer; of a wrong one, the first line that
departs from the right working is named.
"""

from __future__ import annotations

import re

from opd_ext.tinymath.diagnosis import Finding
from opd_ext.tinymath.long.grader import kind_of_mistake
from opd_ext.tinymath.long.problems import ANSWER_OPENING, Step, solve

ERRORS = {
    "branch": "wrong_constraint",
    "carry": "arithmetic_slip",
    "total": "arithmetic_slip",
    "copy": "illegal_step",
}


def step_type(step: Step) -> str | None:
    """Why a right step is decisive, or None where it is routine."""
    if step.is_close:
        return "case_split"
    return "key_formula" if step.is_heavy else None


def decisive_types(question: str) -> list[str]:
    """The distinct types of a question's decisive steps, in the order of the working."""
    return list(dict.fromkeys(filter(None, map(step_type, solve(question)[0]))))


def diagnose(question: str, response: str, correct: bool) -> list[Finding]:
    """Decisive lines of a right response, or the one line where a wrong one first went wrong.

    Raises:
        ValueError: not a question of this world.
    """
    right, lines = solve(question)[0], _lines(response)
    stated = _stated(lines)
    if correct:
        types = {step.line: step_type(step) for step in right}
        return [Finding(start, end, kind) for start, end, text in stated if (kind := types.get(text))]
    for index, (start, end, text) in enumerate(stated):
        if index == len(right):
            return [Finding(start, end, "illegal_step")]
        if text != right[index].line:
            return [Finding(start, end, ERRORS[kind_of_mistake(right[index], text)])]
    answered = [(start, end) for start, end, text in lines if text.startswith(ANSWER_OPENING)]
    if not lines:
        return []
    early = answered and len(stated) < len(right)
    return [Finding(*(answered or [lines[-1][:2]])[-1], "premature_conclusion" if early else "format_error")]


def _lines(response: str) -> list[tuple[int, int, str]]:
    """(start, end, text without newline); the newline belongs to its line."""
    return [(found.start(), found.end(), found[0].rstrip("\n")) for found in re.finditer(r"[^\n]*\n|[^\n]+", response)]


def _stated(lines: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """The lines of working; of one that was looked at again, the last, on which the rest builds."""
    stated: list[tuple[int, int, str]] = []
    for line in lines:
        if re.match("[a-z]: ", line[2]):
            if stated and stated[-1][2][0] == line[2][0]:
                stated.pop()
            stated.append(line)
    return stated
