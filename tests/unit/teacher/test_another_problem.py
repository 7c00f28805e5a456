# SPDX-License-Identifier: Apache-2.0
"""The control of another problem's context: the request stays, what is shown of the problem is another's."""

import re

import pytest

from opd_ext.context import build_context
from opd_ext.context.config import ContextConfig
from opd_ext.context.prompts import ERROR_TYPES, STEP_TYPES, label_prompt

PROBLEMS = 4
STEPS, ERRORS = list(STEP_TYPES)[:PROBLEMS], list(ERROR_TYPES)[:PROBLEMS]
N = 3


def batch(step=1):
    """Three rollouts of each problem; the first of each is right."""
    samples = []
    for problem in range(PROBLEMS):
        group = [
            {"session": i, "score": float(i == 0), "response": f"attempt {i} of problem {problem}"} for i in range(N)
        ]
        for i in range(N):
            samples.append(
                {
                    "raw_prompt": [{"role": "user", "content": f"question {problem}"}],
                    "extra_info": {
                        "index": problem,
                        "question": f"question {problem}",
                        "solution": f"solution {problem}",
                    },
                    "uid": f"t1p{problem}",
                    "session": i,
                    "score": float(i == 0),
                    "correct": i == 0,
                    "feedback": f"feedback {problem}",
                    "response": f"attempt {i} of problem {problem}",
                    "group": group,
                    "types": [] if i == 1 else [(STEPS if i == 0 else ERRORS)[problem]],
                    "step": step,
                    "batch": samples,
                }
            )
    return samples


def context(kind, problem="another", **options):
    return build_context(ContextConfig(kind=kind, problem=problem, args=options))


def shown(built, sample):
    messages = built.messages(sample)
    return None if messages is None else messages[-1]["content"]


def told_of(text):
    """Numbers of the problems that something but the question is shown of."""
    return {int(number) for number in re.findall(r"(?:solution|feedback|of problem) (\d)", text)}


@pytest.mark.parametrize("kind", ["solution", "feedback"])
def test_the_question_is_ones_own_and_what_is_shown_of_it_is_not(kind):
    taught = 0
    for sample in batch():
        own, other = shown(context(kind, "own"), sample), shown(context(kind), sample)
        assert (own is None) == (other is None)  # the same samples have a teacher
        if own is not None:
            number, taught = sample["extra_info"]["index"], taught + 1
            assert f"question {number}" in own and f"question {number}" in other
            assert told_of(own) == {number} and len(told_of(other)) == 1 and number not in told_of(other)
    assert taught >= 8


def test_the_draw_is_reproducible_and_another_one_at_every_step():
    built = context("solution")
    first, again, later = ([shown(built, sample) for sample in batch(step)] for step in (1, 1, 2))
    assert first == again != later


def test_nothing_of_the_sample_is_changed():
    samples = batch()
    before = [{key: value for key, value in sample.items() if key != "batch"} for sample in batch()]
    for sample in samples:
        context("feedback").messages(sample)
    assert [{key: value for key, value in sample.items() if key != "batch"} for sample in samples] == before


def test_types_are_those_of_another_problems_attempt_with_the_same_outcome():
    for sample in batch():
        note, own = shown(context("label"), sample), sample["types"]
        assert (note is None) == (not own)
        if own:
            types = STEPS if sample["correct"] else ERRORS
            others = [label_prompt(sample["raw_prompt"][0]["content"], [it], sample["correct"]) for it in types]
            assert note in others and note != others[sample["extra_info"]["index"]]


def test_two_rows_with_one_problem_are_no_two_problems():
    samples = batch()
    for sample in samples:
        sample["raw_prompt"] = [{"role": "user", "content": "the same"}]
    built = context("solution")
    assert [built.messages(sample) for sample in samples] == [None] * len(samples)
    assert built.metrics(samples) == {"another": 0.0}


def test_metrics_are_of_what_was_shown():
    metrics = context("feedback").metrics(batch())
    assert metrics["another"] == 1.0 and metrics["success_group_fraction"] == 1.0


def test_options_of_the_context_reach_the_template():
    built = context("solution", thinking=True, ending="student")
    assert built.template_kwargs() == {"enable_thinking": True} and built.ending == "student"
