# SPDX-License-Identifier: Apache-2.0
"""Grader of the second level: is the answer right, and if not, which line went wrong first.

Follows verl's custom reward function signature. Feedback names the first line that is wrong, says what belongs there
and which kind of mistake it was, and never states the final answer.
"""

from __future__ import annotations

import re
from typing import Any

from opd_ext.tinymath.grader import graded
from opd_ext.tinymath.long.problems import ANSWER_OPENING, Step, solve

FEEDBACK = {
    "branch": "The first wrong line takes the wrong branch. It should be {line}",
    "carry": "The first wrong line forgets to carry. It should be {line}",
    "total": "The first wrong line has a wrong total. It should be {line}",
    "copy": "The first wrong line is not about this step. It should be {line}",
    "last_line": "The last line is wrong. Look again at {line}",
    "answer_line": "All lines are right but the answer does not follow from them.",
    "no_answer": "The answer line is missing.",
    "wrong": "The answer is wrong.",
}

_LINE = re.compile(r"^([a-z]): ([^\n]{1,40})$", re.MULTILINE)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float | str]:
    """Grade one response.

    Args:
        data_source: unused; part of verl's signature.
        solution_str: the response text. The *last* ``Answer:`` line counts.
        ground_truth: the right answer, a whole number as text; leading zeros do not matter.
        extra_info: ``question`` (the bare question) allows feedback about lines.
        **kwargs: whatever else verl passes; ignored.

    Returns:
        Always the same keys: ``score`` and ``acc`` (1.0 right, 0.0 wrong), ``format_ok`` (1.0 if the last answer line
        holds a whole number), ``feedback`` (empty when the answer is right).

    Raises:
        ValueError: ``ground_truth`` is no whole number, or ``question`` none of this world: a fault of the data.
    """
    question = (extra_info or {}).get("question")
    return graded(solution_str, ground_truth, lambda readable: _feedback(solution_str or "", question, readable))


def _feedback(response: str, question: str | None, readable: bool) -> str:
    if not question:
        return FEEDBACK["wrong" if readable else "no_answer"]
    steps, _ = solve(question)
    stated = stated_lines(response)
    wrong = first_wrong(stated, steps)
    if wrong is not None and (readable or wrong < len(stated)):
        return describe(steps, wrong, stated[wrong] if wrong < len(stated) else "")
    return FEEDBACK["answer_line" if readable else "no_answer"]


def stated_lines(response: str) -> list[str]:
    """The lines of working in a response; one that repeats the label before it, looked at again, takes its place."""
    stated: list[str] = []
    for found in _LINE.finditer(response.partition(ANSWER_OPENING)[0]):
        if stated and stated[-1][0] == found[1]:
            stated.pop()
        stated.append(found[0])
    return stated


def first_wrong(stated: list[str], steps: tuple[Step, ...]) -> int | None:
    """Index of the first line that differs from the right ones, None if there is none; lines may be missing."""
    for index, step in enumerate(steps):
        if index >= len(stated) or stated[index] != step.line:
            return index
    return None


def kind_of_mistake(step: Step, stated: str) -> str:
    """``branch``, ``carry``, ``total`` or ``copy``: how a stated line departs from the right ``step``."""
    if stated.rpartition("=")[0] == step.line.rpartition("=")[0]:
        return "carry" if step.is_heavy else "total"
    wrong_way = step.yes is not None and stated.startswith(f"{step.operation.label}: {step.check}")
    return "branch" if wrong_way else "copy"


def describe(steps: tuple[Step, ...], wrong: int, stated: str = "") -> str:
    """Feedback on the line ``wrong``; the last line's total is the answer, so it is kept back."""
    step = steps[wrong]
    if wrong == len(steps) - 1:
        return FEEDBACK["last_line"].format(line=step.line.rpartition("=")[0])
    return FEEDBACK[kind_of_mistake(step, stated)].format(line=step.line)
