# SPDX-License-Identifier: Apache-2.0
"""``opd.policy``: its keys, their check and their words."""

from dataclasses import dataclass, field
from typing import Any

from opd_ext.errors import ABSENT, ConfigError, check_options, one_of, parameters, positive
from opd_ext.policy.shapings import RATIO_SHAPING, Shaping, get_policy, policy_names, replaces_divergence


@dataclass
class PolicyConfig:
    """The RL term that goes along; every other key is an option of the gate.

    The loss is one of verl's registry, on verl's advantages.
    """

    loss: str = "vanilla"  # a loss of verl's registry: vanilla (GRPO), cispo, gspo, ...
    weight: float = 1.0  # of the policy term beside the distillation term
    gate: str = "none"  # a registered shaping of advantages: complement, untaught, ...; none: as verl makes them
    prompt_mean: bool = False  # every prompt's group counts the same, not every token
    shaping: float | None = None  # RLSD: the teacher multiplies advantages within 1 +- this, and adds no term
    anchor: str = "old"  # old: ratio to the policy before the update | sampler: to the rollout engine
    args: dict[str, Any] = field(default_factory=dict)  # options of the gate; write them beside `loss`

    @property
    def present(self) -> bool:
        return self.loss != ABSENT

    @property
    def shapings(self) -> tuple[Shaping, ...]:
        """What the advantages go through where a teacher is at hand, in order."""
        gate = [Shaping(self.gate, self.args)] if self.gate != ABSENT else []
        ratio = [Shaping(RATIO_SHAPING, {"bound": self.shaping})] if self.shaping is not None else []
        return (*gate, *ratio)

    @property
    def replaces_divergence(self) -> bool:
        """Whether the teacher speaks through the advantages alone."""
        return any(replaces_divergence(shaping.name) for shaping in self.shapings)

    def check(self) -> None:
        """Refuse what cannot work, whatever the other places say.

        Raises:
            ConfigError: one sentence.
        """
        one_of("opd.policy.gate", self.gate, (ABSENT, *policy_names()))
        one_of("opd.policy.anchor", self.anchor, ("old", "sampler"))
        allowed = [] if self.gate == ABSENT else parameters(get_policy(self.gate), skip=1)
        check_options("opd.policy", f"gate={self.gate}", self.args, allowed)
        positive("opd.policy.weight", self.weight, zero=True)
        if self.shaping is not None and not 0 < self.shaping < 1:
            raise ConfigError(f"opd.policy.shaping={self.shaping} must be in (0, 1): advantages keep their sign.")

    def __str__(self) -> str:
        parts = [self.loss]
        if self.weight != 1.0:
            parts.append(f"weight {self.weight:g}")
        if self.gate != ABSENT:
            named = {"complement": "gated on spans", "untaught": "where no teacher is"}
            parts.append(named.get(self.gate, f"advantages through {self.gate}"))
        if self.shaping is not None:
            parts.append(f"advantages times teacher's ratio, 1 +- {self.shaping:g}")
        if self.prompt_mean:
            parts.append("mean per prompt")
        return ", ".join(parts)
