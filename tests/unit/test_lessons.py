# SPDX-License-Identifier: Apache-2.0
"""Labels of annotated tokens: where they are, and when they must not be seen."""

import pytest

from opd_ext.lessons import is_correct, span_labels, usable_runs

KEY, ERROR = (1, 3, 1), (1, 3, 2)


def test_runs_become_labels_within_the_response():
    assert span_labels([(1, 3, 1), (4, 9, 2)], 6) == [0, 1, 1, 0, 2, 2]
    assert span_labels([], 3) == [0, 0, 0]


@pytest.mark.parametrize(
    "runs, active, has_teacher, seen",
    [
        ([KEY], {1}, True, [KEY]),
        ([KEY], {1}, False, []),  # the pair was too long: plain policy term, not a gated one without a teacher
        ([ERROR], {1}, False, [ERROR]),  # a class without divergence needs none; the gate decides what that means
        ([], {1}, False, []),
    ],
)
def test_a_span_that_no_teacher_trains_is_not_gated(runs, active, has_teacher, seen):
    assert usable_runs(runs, active, has_teacher) == seen


def test_a_rollout_that_is_not_paid_for_is_not_labelled_right():
    """`acc` reads all of a response, the score one final answer: a label must not teach what the reward refuses."""
    assert is_correct(acc=1.0, score=1.0) and is_correct(acc=1.0, score=10.0)
    assert not is_correct(acc=1.0, score=0.0) and not is_correct(acc=0.0, score=0.1)
