# SPDX-License-Identifier: Apache-2.0
"""Grader of the tools' level: is the answer right, and if not, what went wrong on the way.

Follows verl's custom reward function signature. What it is shown is the whole rollout, calls and answers of the tools
included; only what the model wrote last counts as its answer. Feedback names the wrong term or the sum that is missing,
never the total.
"""

from __future__ import annotations

import re
from typing import Any

from opd_ext.tinymath.grader import graded
from opd_ext.tinymath.tools.problems import parse, solve

FEEDBACK = {
    "term": "One term of the sum is wrong. It should be {term}",
    "sum": "The sum is not the one that was asked for. It should be {expression}",
    "no_sum": "The sum was not worked out. It should be {expression}",
    "answer_line": "The sum is right but the answer does not follow from it.",
    "no_answer": "The answer line is missing.",
    "wrong": "The answer is wrong.",
}

_SUM = re.compile(r'"name": "calculate", "arguments": \{"expression": "([^"]*)"')


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float | str]:
    """Grade one rollout.

    Args:
        data_source: unused; part of verl's signature.
        solution_str: all turns as text, the tools' answers included.
        ground_truth: the right answer, a whole number as text.
        extra_info: ``question`` (the bare question) allows feedback about the sum; ``last_turn``, what the model wrote
            last, alone can hold the answer where it is given.
        **kwargs: whatever else verl passes; ignored.

    Returns:
        Always the same keys: ``score`` and ``acc`` (1.0 right, 0.0 wrong), ``format_ok`` (1.0 if the last answer line
        holds a whole number), ``feedback`` (empty when the answer is right).

    Raises:
        ValueError: ``ground_truth`` is no whole number, or ``question`` none of this level: a fault of the data.
    """
    info = extra_info or {}
    answered = info.get("last_turn", solution_str)
    question = info.get("question")
    return graded(answered, ground_truth, lambda readable: _feedback(solution_str or "", question, readable))


def _feedback(rollout: str, question: str | None, readable: bool) -> str:
    if not question:
        return FEEDBACK["wrong" if readable else "no_answer"]
    expression, _ = solve(question)
    sums = _SUM.findall(rollout)
    if sums and sums[-1] != expression:
        return describe(question, sums[-1])
    if not readable:
        return FEEDBACK["no_answer"]
    return FEEDBACK["answer_line"] if sums else FEEDBACK["no_sum"].format(expression=expression)


def first_wrong(question: str, stated: str) -> int | None:
    """Which term of a stated sum is the first wrong one; None where the sums have not as many terms."""
    right, terms = solve(question)[0].split("+"), stated.split("+")
    if len(terms) != len(parse(question)[1]):
        return None
    return next((i for i, (a, b) in enumerate(zip(right, terms, strict=True)) if a != b), None)


def describe(question: str, stated: str) -> str:
    """Feedback on a sum that is not the right one; of a single term's, which is the answer's, the sum as a whole."""
    expression, _ = solve(question)
    wrong = first_wrong(question, stated)
    if wrong is None:
        return FEEDBACK["sum"].format(expression=expression)
    return FEEDBACK["term"].format(term=expression.split("+")[wrong])
