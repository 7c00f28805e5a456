# SPDX-License-Identifier: Apache-2.0
"""Grader of reasoning-gym's tasks: the answer that a response ends with, judged by the task's own verifier.

The rows are made by ``opd data gym``; ``extra_info.entry`` holds what the verifier needs to know of a question.
:func:`compute_score` reads the answer line that such rows ask for. Models of some hundred million weights hardly ever
write one: :func:`last_number` also takes the number that a response ends with.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

LONGEST = 1000
"""Characters of an answer; longer ones are wrong. Verifiers parse, sort and search, and none asks for so much."""

_LINE = re.compile(r"^[*_\s]*(?:final\s+)?answer[*_\s]*[:：]\s*(.*)$", re.IGNORECASE | re.MULTILINE)


class MissingTasksError(ImportError):
    """reasoning-gym is not installed."""


@cache
def task(name: str) -> Any:
    """The task ``name`` of reasoning-gym, with which its verifier comes.

    Raises:
        MissingTasksError: one sentence that says how to install it.
        ValueError: there is no such task.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise MissingTasksError(
            "reasoning-gym is not installed: it needs a C compiler and Python's headers; then run "
            "`pip install reasoning-gym` in this environment."
        ) from None
    if name not in DATASETS:
        raise ValueError(f"{name} is no task of reasoning-gym; its tasks are: {', '.join(sorted(DATASETS))}.")
    return reasoning_gym.create_dataset(name, size=1, seed=0)


def stated_answer(response: str) -> str | None:
    """What stands behind the last ``Answer:`` at the beginning of a line, after the thinking; None if nothing does.

    >>> stated_answer("2 + 2 = 4, so\\n**Answer:** 4.")
    '4'
    >>> stated_answer("<think>Answer: 3</think> I do not know.") is None
    True
    """
    found = _LINE.findall(response.rpartition("</think>")[2])
    answer = found[-1].strip().strip("*_`$").strip() if found else ""
    return answer.removesuffix(".").strip() or None


_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def final_number(response: str) -> str | None:
    """The last number of a response, after the thinking; None if there is none.

    >>> final_number("We add them: 1,200 + 34 = 1,234.")
    '1234'
    >>> final_number("7 - 12 = -5 (minus five)"), final_number("x1 and v2.0")
    ('-5', None)
    """
    found = _NUMBER.findall(response.rpartition("</think>")[2])
    return found[-1].rstrip(",").replace(",", "") if found else None


def final_answer(response: str) -> str | None:
    """What a response votes for: its answer line, or the number that it ends with."""
    return stated_answer(response) or final_number(response)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """Grade one response; the signature is that of verl's custom reward functions.

    Args:
        data_source: ``gym/<task>``.
        solution_str: the decoded response; its last ``Answer:`` line counts, see :func:`stated_answer`.
        ground_truth: the reference answer, which verifiers of tasks with several right answers do not need.
        extra_info: ``entry``, the question as reasoning-gym made it, in JSON.

    Returns:
        ``score``: the verifier's, in [0, 1]; some tasks pay for nearly right answers. ``acc``: 1.0 for a full score.
        ``format_ok``: 1.0 if there is an answer line. ``feedback``: always empty, since a verifier says no more.

    Raises:
        ValueError: the row was not made by ``opd data gym``.
    """
    return _graded(data_source, stated_answer(solution_str or ""), extra_info)


def last_number(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """As :func:`compute_score`, but a response without an answer line answers with its last number.

    That is how GSM8K is often read (`flexible-extract` of lm-evaluation-harness). It forgives how an answer is written,
    and it pays for a number that stands last by chance. References that are no numbers need the answer line.
    """
    answer = stated_answer(solution_str or "")
    graded = _graded(data_source, answer, extra_info)
    if answer is None and _NUMBER.fullmatch(str(ground_truth).strip()):
        graded |= _graded(data_source, final_number(solution_str or ""), extra_info) | {"format_ok": 0.0}
    return graded


def _graded(data_source: str, answer: str | None, extra_info: Any) -> dict:
    name = str(data_source).removeprefix("gym/")
    try:
        entry = json.loads((extra_info or {})["entry"])
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"a row of {data_source!r} has no extra_info.entry; make the file with `opd data gym`"
        ) from None
    score = 0.0
    if answer is not None and len(answer) <= LONGEST:
        score = _verdict(task(name), answer, entry)
    return {"score": score, "acc": float(score >= 1.0), "format_ok": float(answer is not None), "feedback": ""}


def _verdict(judge: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(judge.score_answer(answer, entry))
    except Exception:  # verifiers parse what they are given, and raise what parsing raises
        return 0.0
