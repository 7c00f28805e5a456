# SPDX-License-Identifier: Apache-2.0
"""Programs: right if the last fenced block passes every test.

verl's own grader for data sources like ``apps`` asks whether all tests pass within six seconds together, and otherwise
answers with the share that passes among the first ten; that is not pass@1. The process that runs the tests is verl's.
It is no sandbox: run models that you do not trust in a container.
"""

import json
import re
from typing import Any

from opd_ext.bridge.graders import passes

SECONDS = 6  # per test, as LiveCodeBench has it
_BLOCK = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


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
        solution_str: the response; an answer without a closed block is wrong.
        ground_truth: JSON with ``inputs`` and ``outputs``, one text per test, and ``fn_name`` where a function is asked
            for; its arguments are then one JSON value per line.
        extra_info: unused.
        **kwargs: whatever else verl passes; ignored.

    Returns:
        ``score`` and ``acc`` (1.0 if every test passes, else 0.0) and ``feedback``, which names the first test that
        fails by its number and tells nothing of it.
    """
    failed = _first_failure(solution_str or "", json.loads(ground_truth))
    return {"score": float(failed is None), "acc": float(failed is None), "feedback": failed or ""}


def _first_failure(response: str, tests: dict[str, Any]) -> str | None:
    blocks = _BLOCK.findall(response)
    if not blocks:
        return "There is no closed block of code."
    for number, (given, wanted) in enumerate(zip(tests["inputs"], tests["outputs"], strict=True), start=1):
        test = {**tests, "inputs": [given], "outputs": [wanted]}
        if not passes(blocks[-1], test, SECONDS):
            return f"Test {number} of {len(tests['inputs'])} fails."
    return None
