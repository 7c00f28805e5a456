# SPDX-License-Identifier: Apache-2.0
"""``opd.policy``: its keys, their check and their words."""

from dataclasses import dataclass


@dataclass
class PolicyConfig:
    """The RL term that goes along: a loss of verl's registry on verl's advantages."""

    loss: str = "vanilla"
    weight: float = 1.0
    gate: str = "none"  # complement: on annotated spans it grows as the divergence fades | untaught: no teacher there
    prompt_mean: bool = False  # every prompt's group counts the same, not every token
    shaping: float | None = (
        None  # RLSD: the teacher multiplies advantages within 1 +- this, and adds no term of its own
    )
    anchor: str = "old"  # old: ratio to the policy before the update | sampler: to the rollout engine
