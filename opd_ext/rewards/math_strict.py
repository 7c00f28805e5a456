# SPDX-License-Identifier: Apache-2.0
"""The maths grader where the grade is trained on: one final answer, of a response that ended, earns the reward.

A module of its own, so that a run that names another grader by its path leaves this rule behind with it.
"""

from opd_ext.rewards import math_dual
from opd_ext.rewards.answers import check_reference

__all__ = ["check_reference", "compute_score"]  # the former is asked about a file's references before a start


def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> dict[str, float | str]:
    """:func:`opd_ext.rewards.math_dual.compute_score` with ``policy="strict"``.

    Raises:
        ValueError: the reference is none.
        RuntimeError: math-verify cannot be started.

    >>> compute_score("math", "\\\\boxed{42}, or not? Answer: 17", "42")["score"]
    0.0
    """
    return math_dual.compute_score(data_source, solution_str, ground_truth, extra_info, policy="strict")
