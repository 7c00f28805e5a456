# SPDX-License-Identifier: Apache-2.0
"""Shapings of advantages: what each leaves alone, and what it needs."""

import pytest
import torch

from opd_ext.errors import ConfigError
from opd_ext.policy import PolicyConfig, PolicyInputs, get_policy, policy_names

ADVANTAGES = torch.tensor([[1.0, -2.0, 3.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
MASK = torch.ones_like(ADVANTAGES)
TAUGHT = torch.tensor([[True] * 4, [False] * 4])
LABELS = torch.tensor([[0, 1, 2, 1], [0, 1, 0, 0]])


def _inputs(**changes):
    zeros = torch.zeros_like(ADVANTAGES)
    plain = {"mask": MASK, "taught": TAUGHT, "distilled": TAUGHT, "student_log_prob": zeros, "span_label": LABELS}
    return PolicyInputs(ADVANTAGES, **{**plain, **changes})


def test_the_gate_of_trace_weighs_spans_that_have_a_divergence():
    gated = get_policy("complement")(_inputs(gate=0.25, active_spans={1}))
    assert gated.tolist() == [[1.0, -0.5, 3.0, 0.125], [1.0, 0.25, 1.0, 1.0]]
    literal = get_policy("complement")(_inputs(gate=0.25, active_spans={1}, literal_spans=True))
    assert literal[0].tolist() == [1.0, -0.5, 0.75, 0.125], "word for word: every span"


def test_the_policy_of_srpo_trains_where_no_teacher_is():
    assert get_policy("untaught")(_inputs()).tolist() == [[0.0] * 4, [1.0] * 4]


def test_the_ratio_of_rlsd_stays_within_its_bound_and_leaves_the_untaught_alone():
    teacher = torch.tensor([[9.0, 9.0, -9.0, 0.0], [9.0] * 4])
    shaped = get_policy("teacher_ratio")(_inputs(teacher_log_prob=teacher, distillation_weight=1.0), bound=0.2)
    # A (1 - w) + A w clip(exp(sign(A) gap), 0.8, 1.2) with w = 1 (arXiv 2604.03128).
    torch.testing.assert_close(shaped[0], torch.tensor([1.2, -1.6, 2.4, 0.5]))
    assert torch.equal(shaped[1], ADVANTAGES[1])


@pytest.mark.parametrize(("name", "missing"), [("complement", "span_label"), ("teacher_ratio", "teacher_log_prob")])
def test_what_a_shaping_needs_and_does_not_have_is_said(name, missing):
    with pytest.raises(ValueError, match="opd.policy"):
        get_policy(name)(_inputs(**{missing: None}))


def test_the_config_names_shapings_and_refuses_others():
    assert {"complement", "untaught", "teacher_ratio"} <= set(policy_names())
    assert [shaping.name for shaping in PolicyConfig(gate="untaught", shaping=0.2).shapings] == [
        "untaught",
        "teacher_ratio",
    ]
    assert PolicyConfig(shaping=0.2).replaces_divergence and not PolicyConfig(gate="untaught").replaces_divergence
    for config, sentence in (
        (PolicyConfig(gate="mine"), "opd.policy.gate=mine does not exist; choose one of: complement, none"),
        (PolicyConfig(gate="untaught", args={"half": 1}), "opd.policy.half does not exist for gate=untaught"),
        (PolicyConfig(shaping=1.0), r"opd.policy.shaping=1.0 must be in \(0, 1\)"),
        (PolicyConfig(weight=-1.0), "opd.policy.weight=-1.0 must be zero or positive"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            config.check()
