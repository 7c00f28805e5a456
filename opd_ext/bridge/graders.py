# SPDX-License-Identifier: Apache-2.0
"""What graders have of verl: its own grader, which looks at the data source, and its client of SandboxFusion."""

from typing import Any

from verl.utils.reward_score import default_compute_score
from verl.utils.reward_score.sandbox_fusion.utils import call_sandbox_api

__all__ = ["default_compute_score", "run_code"]


def run_code(url: str, code: str, stdin: str, seconds: int, memory_mib: int) -> dict[str, Any]:
    """What a SandboxFusion server answers to one Python program with one input.

    Raises:
        ConnectionError: it does not answer, or with an error.
    """
    answer, error = call_sandbox_api(url, code, stdin, seconds, seconds, memory_mib, "python")
    if error or answer is None:
        raise ConnectionError(f"{url} does not run programs: {error}")
    return answer
