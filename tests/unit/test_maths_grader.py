# SPDX-License-Identifier: Apache-2.0
"""Maths is graded by the strict rule wherever the verdict is trained on, and by CRISP's where it only measures."""

import pytest

from opd_ext.config.compose import compose_config

# What the papers train on: rewards, siblings that were right, or notes and spans that depend on the verdict.
TRAINED_ON = {"grpo", "cispo", "sdpo", "trace", "srpo", "rlsd"}
MEASURED = {"crisp", "opsd", "opd", "iw_opd", "tip", "exopd"}


def grader(*overrides: str) -> str:
    config = compose_config(["scale=node_8xh200", *overrides])
    return config.reward.custom_reward_function.path.rpartition(".")[2]


@pytest.mark.parametrize("method", sorted(TRAINED_ON | MEASURED))
def test_a_method_without_a_recipe_has_the_grader_that_fits_it(method):
    assert grader(f"method={method}") == ("math_strict" if method in TRAINED_ON else "math_dual")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=crisp", "opd.policy.loss=vanilla"], "math_strict"),
        (["method=crisp", "opd.context={kind: feedback}"], "math_strict"),
        (["method=crisp", "opd.teachers={a: {context: {kind: feedback}}}"], "math_strict"),
        (["method=sdpo", "opd.context={kind: same}"], "math_dual"),
        (["method=grpo", "reward.custom_reward_function.path=pkg://opd_ext.rewards.math_dual"], "math_dual"),
        (["method=grpo", "world=gym"], "gym"),
    ],
)
def test_what_overrides_make_of_a_method_counts(overrides, expected):
    assert grader(*overrides) == expected
