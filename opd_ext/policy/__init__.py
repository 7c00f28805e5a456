# SPDX-License-Identifier: Apache-2.0
"""The fifth place of a method: the RL term that goes along (``opd.policy``)."""

from opd_ext.policy.advantages import prompt_mean_scale, self_distilled_advantage, span_gate
from opd_ext.policy.config import PolicyConfig
from opd_ext.policy.shapings import (
    PolicyInputs,
    Shaping,
    get_policy,
    in_place_of_divergence,
    policy_names,
    register_policy,
)

__all__ = [
    "PolicyConfig",
    "PolicyInputs",
    "Shaping",
    "get_policy",
    "in_place_of_divergence",
    "policy_names",
    "prompt_mean_scale",
    "register_policy",
    "self_distilled_advantage",
    "span_gate",
]
