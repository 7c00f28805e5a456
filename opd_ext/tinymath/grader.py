# SPDX-License-Identifier: Apache-2.0
"""Grader of the miniature world: is the answer right, and if not, which step went wrong.

Follows verl's custom reward function signature. Feedback names the first wrong step and what belongs
there, never the final answer, so that a teacher which sees it still has to do the rest of the work.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from opd_ext.tinymath.problems import PLACES, REWRITE, Step, solve

FEEDBACK = {
    "step": "One step is wrong. It should be {line}",
    "last_step": "One step is wrong. Look again at {line}",
    "answer_line": "All steps are right but the answer does not follow from them.",
    "no_answer": "The answer line is missing.",
    "wrong": "The answer is wrong.",
}

_ANSWER = re.compile(r"Answer\s*:\s*([^\n]+)", re.IGNORECASE)
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_LABEL = "|".join((*PLACES, REWRITE))
_STEP = re.compile(rf"^({_LABEL}): ([-+*0-9]{{1,32}})(?:=([0-9]{{1,9}}))?$", re.MULTILINE)


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
        ground_truth: the right answer, an integer as text.
        extra_info: ``question`` (the bare question) allows feedback about steps.
        **kwargs: whatever else verl passes; ignored.

    Returns:
        Always the same keys: ``score`` and ``acc`` (1.0 right, 0.0 wrong), ``format_ok`` (1.0 if the last
        answer line holds an integer), ``feedback`` (empty when the answer is right).
    """
    question = (extra_info or {}).get("question")
    return graded(solution_str, ground_truth, lambda readable: _feedback(solution_str or "", question, readable))


def graded(response: str, ground_truth: str, feedback: Callable[[bool], str]) -> dict[str, float | str]:
    """What a grader of a miniature world returns, by the last answer line of a response.

    Args:
        feedback: on a wrong response; is told whether that line holds a whole number.

    Raises:
        ValueError: ``ground_truth`` is no whole number.
    """
    answers = _ANSWER.findall(response or "")
    stated = answers[-1].strip().rstrip(".,;:?\"' ") if answers else ""
    readable = _INTEGER.fullmatch(stated) is not None
    if not _INTEGER.fullmatch(str(ground_truth)):  # a fault of the data, whatever the response
        raise ValueError(f"the miniature world's answers are whole numbers, ground_truth={ground_truth!r} is none")
    correct = readable and int(stated) == int(ground_truth)
    return {
        "score": float(correct),
        "acc": float(correct),
        "feedback": "" if correct else feedback(readable),
        "format_ok": float(readable),
    }


def _feedback(response: str, question: str | None, readable: bool) -> str:
    if not question:
        return FEEDBACK["wrong" if readable else "no_answer"]
    steps, answer = solve(question)
    stated = _stated_steps(response, steps)
    wrong = next((i for i, step in enumerate(steps) if i >= len(stated) or stated[i] != step), None)
    if wrong is not None and (readable or wrong < len(stated)):
        return describe_step(steps[wrong], answer)
    return FEEDBACK["answer_line" if readable else "no_answer"]


def describe_step(step: Step, answer: int) -> str:
    """Feedback on a wrong step; its result is kept back where it would be the final answer."""
    if step.result == answer:
        return FEEDBACK["last_step"].format(line=f"{step.label}: {step.work}")
    return FEEDBACK["step"].format(line=step.line())


def _stated_steps(response: str, steps: tuple[Step, ...]) -> list[Step]:
    """The working in the response, in the order of ``steps``; a repeated column replaces the first one."""
    stated: list[Step] = []
    for label, work, result in _STEP.findall(response):
        found = Step(label, work, int(result) if result else None)
        if len(stated) < len(steps) and label == steps[len(stated)].label:
            stated.append(found)
        elif stated and label == stated[-1].label:
            stated[-1] = found
    return stated
