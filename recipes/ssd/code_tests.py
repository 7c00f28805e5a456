# SPDX-License-Identifier: Apache-2.0
"""A grader of programs for this recipe: 1 if the last fenced block passes every test, else 0.

verl's own grader for data sources like ``apps`` asks whether all tests pass within six seconds together, and otherwise
answers with the share that passes among the first ten; that is not pass@1. The process that runs the tests is verl's.
It is no sandbox: run models that you do not trust in a container.
"""

import json
import re

from verl.utils.reward_score.prime_code.utils import check_correctness

SECONDS = 6  # per test, as LiveCodeBench has it
_BLOCK = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """1.0 or 0.0; the signature is that of verl's custom reward functions.

    Args:
        solution_str: the response; an answer without a closed block is wrong.
        ground_truth: JSON with ``inputs`` and ``outputs``, one text per test, and ``fn_name`` where a function is asked
            for; its arguments are then one JSON value per line.
    """
    blocks = _BLOCK.findall(solution_str)
    if not blocks:
        return 0.0
    tests = json.loads(ground_truth)
    for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True):
        test = {**tests, "inputs": [given], "outputs": [wanted]}
        results, _ = check_correctness(test, blocks[-1], timeout=SECONDS, debug=False)
        if not all(result is True for result in results):
            return 0.0
    return 1.0
