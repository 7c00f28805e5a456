# SPDX-License-Identifier: Apache-2.0
"""Grader of reasoning-gym's tasks: the answer that a response ends with, judged by the task's own verifier.

The rows are made by ``opd data gym``; ``extra_info.entry`` holds what the verifier needs to know of a question.
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
    name = str(data_source).removeprefix("gym/")
    try:
        entry = json.loads((extra_info or {})["entry"])
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"a row of {data_source!r} has no extra_info.entry; make the file with `opd data gym`"
        ) from None
    answer = stated_answer(solution_str or "")
    score = 0.0
    if answer is not None and len(answer) <= LONGEST:
        score = _verdict(task(name), answer, entry)
    return {"score": score, "acc": float(score >= 1.0), "format_ok": float(answer is not None), "feedback": ""}


def _verdict(judge: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(judge.score_answer(answer, entry))
    except Exception:  # verifiers parse what they are given, and raise what parsing raises
        return 0.0
