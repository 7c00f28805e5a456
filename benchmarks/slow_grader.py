# SPDX-License-Identifier: Apache-2.0
"""The miniature world's grader after a wait without work, as of a verifier elsewhere: for ``step_rate.py``."""

import time
from typing import Any

from opd_ext.tinymath import grader


def compute_score(*args: Any, seconds: float = 0.0, **kwargs: Any) -> dict[str, float | str]:
    """See :func:`opd_ext.tinymath.grader.compute_score`."""
    time.sleep(seconds)
    return grader.compute_score(*args, **kwargs)
