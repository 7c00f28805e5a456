# SPDX-License-Identifier: Apache-2.0
"""verl's own graders: the one that looks at the data source, and the one that runs programs."""

from typing import Any

from verl.utils.reward_score import default_compute_score
from verl.utils.reward_score.prime_code.utils import check_correctness

__all__ = ["default_compute_score", "passes"]


def passes(program: str, test: dict[str, Any], seconds: float) -> bool:
    """Whether ``program`` passes one test within ``seconds``, in a process of verl's. It is no sandbox.

    Args:
        test: ``inputs`` and ``outputs`` with one text each, and ``fn_name`` where a function is asked for.
    """
    results, _ = check_correctness(test, program, timeout=seconds, debug=False)
    return all(result is True for result in results)
