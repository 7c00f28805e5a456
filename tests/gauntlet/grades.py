# SPDX-License-Identifier: Apache-2.0
"""Situations of the maths grader: answers that others judge wrong, and rewards that nobody earned."""

import pytest

from opd_ext.rewards.math_dual import compute_score

ANSWERS = [  # response, reference, whether it is right
    ("x_D = 234. Thus, all four own **73**.\n\n---\n\n✅ Final Answer: **73**", "73", True),  # Math-Verify#76
    ("✅ Final Answer: **234**", "73", False),
    ("Answer: 1728", "1331 and 1728", False),  # Math-Verify#47: one of two
    ("Answer: $1331$ and $1728$", "1331 and 1728", True),
    (r"Answer: $\{1, 2\}$", r"\{1, 2, 3\}", False),
    (r"Answer: $\frac{1}{2006!}$", r"\frac{1}{2004!}", False),  # Math-Verify#14: both are nearly 0
    (r"Answer: $\frac{1}{2^{99}}$", r"\frac{1}{2^{98}}", False),
    (r"Answer: $\frac{1}{2006!}$", r"\frac{1}{2006!}", True),
    ("Answer: 10%", r"10\%", True),
]
UNEARNED = [  # right by the published rule of evaluation, as a reward paid for nothing
    (r"I think \boxed{42}. Wait. Answer: 41", "42"),
    (r"\boxed{5}, no: \boxed{", "5"),  # marin#9163: the last box is open
    ("<think>Answer: 5</think> I do not know", "5"),
]


def answers_and_rewards() -> None:
    for response, reference, right in ANSWERS:
        for policy in ("dual", "strict"):
            assert compute_score("maths", response, reference, policy=policy)["score"] == right, (response, policy)
    for response, reference in UNEARNED:
        graded = compute_score("maths", response, reference, policy="strict")
        assert (graded["score"], graded["acc"]) == (0.0, 1.0), response
    with pytest.raises(ValueError, match="says that there is none"):
        compute_score("maths", "Answer: nan", "nan")
