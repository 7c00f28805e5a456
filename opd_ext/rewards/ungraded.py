# SPDX-License-Identifier: Apache-2.0
"""No grade: for data without reference answers, where nothing that is trained reads one (CRISP, OPD, OPSD)."""

import math
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **kwargs: Any
) -> dict:
    """Score 0 and no correctness (``acc`` is not a number), which no table then shows.

    >>> compute_score("data", "Answer: 3", "")["score"]
    0.0
    """
    return {"score": 0.0, "acc": math.nan, "feedback": ""}
