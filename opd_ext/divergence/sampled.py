# SPDX-License-Identifier: Apache-2.0
"""The reverse KL on the sampled token, as a policy gradient."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_ext.ratios import LOG_RATIO_BOUND


class SurrogateTerms(NamedTuple):
    """Per-token loss to minimise (differentiable), and, detached, the ratio and where either clip took its gradient."""

    loss: Float[Tensor, "*tokens"]
    ratio: Float[Tensor, "*tokens"]
    clipped: Bool[Tensor, "*tokens"]
    dual_clipped: Bool[Tensor, "*tokens"]


def sampled_advantage(
    student_logp: Float[Tensor, "*tokens"],
    teacher_logp: Float[Tensor, "*tokens"],
    reference_logp: Float[Tensor, "*tokens"] | None = None,
    extrapolation: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """``A_t = log p_T(y_t) - log p_S(y_t)`` of the sampled tokens, detached.

    The score-function gradient with this advantage is that of the reverse KL at every visited state (IW-OPD, arXiv
    2606.22600, section 2). With a reference, G-OPD's ``lambda (log p_T - log p_R) - (log p_S - log p_R)`` (arXiv
    2602.12125), lambda being ``extrapolation``: 1 gives the same for any reference, ExOPD has more.

    Raises:
        ValueError: for another ``extrapolation`` than 1 without a reference.
    """
    student, teacher = student_logp.detach(), teacher_logp.detach()
    if extrapolation == 1.0:
        return teacher - student
    if reference_logp is None:
        raise ValueError(f"extrapolation={extrapolation} starts from a reference: pass reference_logp.")
    reference = reference_logp.detach()
    return extrapolation * (teacher - reference) - (student - reference)


def clipped_surrogate(
    log_prob: Float[Tensor, "*tokens"],
    old_log_prob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "*tokens"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> SurrogateTerms:
    """PPO's clipped objective with the dual clip (arXiv 1707.06347, 1912.09729), negated, per token.

    ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``, and for negative advantages at most ``-A dual_clip``.

    Args:
        log_prob: of the current policy; the only argument that receives a gradient.
        old_log_prob, advantage: constants.

    Raises:
        ValueError: for a dual clip that is not above 1.
    """
    if not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be above 1 but is {dual_clip}.")
    advantage = advantage.detach()
    ratio = (log_prob - old_log_prob.detach()).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    plain, bounded = -advantage * ratio, -advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss, ceiling = torch.maximum(plain, bounded), -advantage * dual_clip
    dual_clipped = (advantage < 0) & (loss > ceiling)
    return SurrogateTerms(torch.where(dual_clipped, ceiling, loss), ratio.detach(), bounded > plain, dual_clipped)


def sampled_kl(
    student_log_prob: Float[Tensor, "*tokens"],
    teacher_log_prob: Float[Tensor, "*tokens"],
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> Float[Tensor, "*tokens"]:
    """Single-sample estimates of KL(q || p) from the log-probs of the sampled token.

    With ``d = log q - log p``: ``k1 = d`` (unbiased, signed), ``k2 = d^2 / 2`` (small bias, its gradient is
    the policy gradient's), ``k3 = exp(-d) - 1 + d`` (unbiased, non-negative). The teacher is a constant.
    """
    d = student_log_prob - teacher_log_prob.detach()
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"Unknown estimator '{estimator}'; allowed: k1, k2, k3.")


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """Reverse KL on the sampled token as a policy gradient (IW-OPD, arXiv 2606.22600; G-OPD, arXiv 2602.12125).

    The advantage is ``log p_T - log p_S`` of the sampled token, constant; ``clip`` and ``dual_clip`` bound the ratio
    of current to old policy, which is 1 while there is one optimiser step per batch. With another
    ``extrapolation`` than 1 it starts from a reference (ExOPD). ``constant`` is a control: the advantage of every
    token, whatever the teacher says (arXiv 2608.31046).
    """

    clip: float = 0.2
    dual_clip: float = 3.0
    extrapolation: float = 1.0
    constant: float | None = None
