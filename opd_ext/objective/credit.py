# SPDX-License-Identifier: Apache-2.0
"""Per-token credit: how much each response token counts in the distillation term.

Credits are constants of the loss. They multiply the weights of :mod:`opd_ext.objective.objective`; the
denominators stay plain token or sequence counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opd_ext.objective.registry import Registry

_credits = Registry("credit")
register_credit = _credits.register
get_credit = _credits.get
credit_names = _credits.names

# exp(20) is far beyond any useful ratio; the bound keeps a broken log-prob from becoming inf.
_LOG_RATIO_BOUND = 20.0


class CreditInputs(NamedTuple):
    """What a registered credit may look at: [B, T], detached; ``None`` where a run does not have it."""

    mask: Tensor
    student_log_prob: Tensor | None = None
    teacher_log_prob: Tensor | None = None
    student_entropy: Tensor | None = None
    span_label: Tensor | None = None


def position_weights(student_logp: Tensor, teacher_logp: Tensor, mask: Tensor, gamma: float = 0.5) -> Tensor:
    """IW-OPD's weights: early tokens, before student and teacher have drifted apart, count more.

    ``w_t = 1 + gamma * (1 - sum_{k<t} d_k / (sum_k d_k + 1e-8))`` with ``d = |teacher_logp - student_logp|``
    on trained tokens (arXiv 2606.22600, eq. 17). The sum before t is exclusive and unsigned, and everything
    is per row: the first trained token has weight ``1 + gamma``, weights never increase, and rows do not
    influence each other. Where the mask is 0 the weight is 1.

    Args:
        student_logp, teacher_logp: log-probs of the sampled tokens [B, T]; ignored where the mask is 0.
        mask: trained tokens [B, T], 0/1 or bool. Interior zeros (tool output) keep the running sum.
        gamma: strength, >= 0; 0 gives uniform weights.

    Returns:
        Detached weights [B, T], float32 (float64 for float64 input).

    Raises:
        ValueError: for a negative gamma.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be >= 0 but is {gamma}.")
    trained = mask.bool()
    gap = (teacher_logp.detach() - student_logp.detach()).abs()
    gap = torch.where(trained, gap if gap.dtype == torch.float64 else gap.float(), 0.0)
    before = gap.cumsum(dim=-1) - gap
    remaining = (1.0 - before / (gap.sum(dim=-1, keepdim=True) + 1e-8)).clamp(0.0, 1.0)
    return 1.0 + gamma * remaining * trained


def importance_clip(logp: Tensor, old_logp: Tensor, cap: float) -> Tensor:
    """Truncated importance weight ``min(exp(logp - old_logp), cap)``: [B, T], [B, T] -> [B, T], detached.

    One-sided and per token: SDPO (arXiv 2601.20802) uses cap 2, IW-OPD's trainer against its rollout engine
    cap 5. Positions without a trained token are the caller's to mask.

    Raises:
        ValueError: for a cap that is not positive.
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive but is {cap}.")
    log_ratio = (logp.detach() - old_logp.detach()).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    return log_ratio.exp().clamp(max=cap)


@register_credit("uniform")
def uniform(inputs: CreditInputs) -> Tensor:
    """1 on every token: [B, T]."""
    return torch.ones_like(inputs.mask, dtype=torch.float32)


@register_credit("position")
def position(inputs: CreditInputs, gamma: float = 0.5) -> Tensor:
    """:func:`position_weights` of the run's log-probs: [B, T]."""
    if inputs.student_log_prob is None or inputs.teacher_log_prob is None:
        raise ValueError("Credit 'position' needs log-probs of student and teacher on the sampled tokens.")
    return position_weights(inputs.student_log_prob, inputs.teacher_log_prob, inputs.mask, gamma)
