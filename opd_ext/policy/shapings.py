# SPDX-License-Identifier: Apache-2.0
"""Shapings of advantages, where a teacher is at hand: ``opd.policy.gate`` names one.

Every policy loss of verl's registry is positively homogeneous in the advantage, so a factor on advantages weighs the
policy term itself. Shapings run inside the step's loss, where student and teacher have scored the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from opd_ext.policy.advantages import self_distilled_advantage, span_gate
from opd_ext.registry import Registry

_policies: Registry[Callable[..., Tensor]] = Registry("policy shaping")
register_policy = _policies.register
get_policy = _policies.get
policy_names = _policies.names

RATIO_SHAPING = "teacher_ratio"


class PolicyInputs(NamedTuple):
    """What a registered shaping may look at, detached; ``None`` where a run does not have it.

    Attributes:
        advantages: verl's, times ``opd.policy.weight``.
        mask: trained tokens, 0/1 or bool.
        taught: tokens of samples that have a teacher.
        distilled: tokens that the distillation term trains.
        student_log_prob: of the sampled tokens, before the update.
        teacher_log_prob: of the sampled tokens; means something where ``distilled``.
        span_label: 0 none, 1 key, 2 error.
        distillation_weight: of the distillation term at this step.
        gate: what the schedule leaves to the policy term on spans, 0 to 1 as the distillation term fades.
        active_spans: labels that have a divergence.
        literal_spans: spans of a class without divergence count as spans too (``opd.credit.inactive_span``).
    """

    advantages: Float[Tensor, "B T"]
    mask: Shaped[Tensor, "B T"]
    taught: Bool[Tensor, "B T"]
    distilled: Bool[Tensor, "B T"]
    student_log_prob: Float[Tensor, "B T"]
    teacher_log_prob: Float[Tensor, "B T"] | None = None
    span_label: Int[Tensor, "B T"] | None = None
    distillation_weight: float = 1.0
    gate: float = 1.0
    active_spans: Collection[int] = ()
    literal_spans: bool = False


@dataclass(frozen=True)
class Shaping:
    """A registered shaping and its options."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, inputs: PolicyInputs) -> Float[Tensor, "B T"]:
        return get_policy(self.name)(inputs, **self.args)


F = TypeVar("F", bound=Callable[..., Tensor])


def in_place_of_divergence(shaping: F) -> F:
    """Mark a shaping that is all that the teacher does (:func:`replaces_divergence`)."""
    marked: Any = shaping
    marked.replaces_divergence = True
    return shaping


def replaces_divergence(name: str) -> bool:
    """Whether the shaping is all that the teacher does: the distillation term then adds nothing to the loss."""
    return getattr(get_policy(name), "replaces_divergence", False)


@register_policy("complement")
def complement(inputs: PolicyInputs) -> Float[Tensor, "B T"]:
    """TRACE (arXiv 2605.10194, eq. 1): the policy term grows on annotated spans as the divergence fades.

    Raises:
        ValueError: the run has no annotated spans.
    """
    if inputs.span_label is None:
        raise ValueError("opd.policy.gate=complement is about annotated spans: set opd.credit.annotator.kind.")
    label, active = inputs.span_label, inputs.active_spans
    return span_gate(inputs.advantages, label, inputs.gate, active, inputs.literal_spans)


@register_policy("untaught")
def untaught(inputs: PolicyInputs) -> Float[Tensor, "B T"]:
    """The policy term alone where no teacher is, the teacher alone elsewhere (SRPO, arXiv 2604.02288)."""
    return inputs.advantages * ~inputs.taught


@register_policy(RATIO_SHAPING)
@in_place_of_divergence
def teacher_ratio(inputs: PolicyInputs, bound: float = 0.2) -> Float[Tensor, "B T"]:
    """RLSD (arXiv 2604.03128): the teacher's ratio decides how much a token counts, the reward its direction.

    Raises:
        ValueError: the run has no log-probs of the teacher.
    """
    if inputs.teacher_log_prob is None:
        raise ValueError("opd.policy.shaping needs the teacher's log-probs: set opd.divergence.support=sampled.")
    student, teacher = inputs.student_log_prob, inputs.teacher_log_prob
    shaped = self_distilled_advantage(inputs.advantages, student, teacher, inputs.distillation_weight, bound)
    return torch.where(inputs.distilled, shaped, inputs.advantages)
