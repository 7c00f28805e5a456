# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient pieces: advantages that a teacher gives, PPO's clipped surrogate, and weights of advantages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) is far beyond any useful ratio; the bound keeps a broken log-prob from becoming inf.
_LOG_RATIO_BOUND = 20.0


class SurrogateTerms(NamedTuple):
    """Per-token loss to minimise (differentiable), and, detached, the ratio and where either clip took its gradient."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def sampled_advantage(
    student_logp: Tensor, teacher_logp: Tensor, reference_logp: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """``A_t = log p_T(y_t) - log p_S(y_t)`` of the sampled tokens, detached: [...], [...] -> [...].

    The score-function gradient with this advantage is that of the reverse KL at every visited state (IW-OPD, arXiv
    2606.22600, section 2). With a reference, G-OPD's ``scale (log p_T - log p_R) - (log p_S - log p_R)`` (arXiv
    2602.12125): scale 1 gives the same for any reference, ExOPD extrapolates with more.

    Raises:
        ValueError: for another scale than 1 without a reference.
    """
    student, teacher = student_logp.detach(), teacher_logp.detach()
    if scale == 1.0:
        return teacher - student
    if reference_logp is None:
        raise ValueError(f"scale={scale} extrapolates from a reference: pass reference_logp.")
    reference = reference_logp.detach()
    return scale * (teacher - reference) - (student - reference)


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> SurrogateTerms:
    """PPO's clipped objective with the dual clip (arXiv 1707.06347, 1912.09729), negated, per token: [...].

    ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``, and for negative advantages at most ``-A dual_clip``.

    Args:
        log_prob: of the current policy; the only argument that receives a gradient.
        old_log_prob, advantage: constants, of the same shape.

    Raises:
        ValueError: for a dual clip that is not above 1.
    """
    if not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be above 1 but is {dual_clip}.")
    advantage = advantage.detach()
    ratio = (log_prob - old_log_prob.detach()).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND).exp()
    plain, bounded = -advantage * ratio, -advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss, ceiling = torch.maximum(plain, bounded), -advantage * dual_clip
    dual_clipped = (advantage < 0) & (loss > ceiling)
    return SurrogateTerms(torch.where(dual_clipped, ceiling, loss), ratio.detach(), bounded > plain, dual_clipped)


def span_gate(
    advantages: Tensor, span_label: Tensor, gate: float, active: Collection[int], literal: bool = False
) -> Tensor:
    """Advantages times ``gate`` on annotated tokens, as they are elsewhere: [...], [...] -> [...].

    A clipped surrogate is positively homogeneous in the advantage, so this weighs the policy term itself (TRACE, arXiv
    2605.10194, eq. 1).

    Args:
        span_label: 0 none, 1 key, 2 error.
        active: labels that have a divergence.
        literal: gate the other labels too, as the equation says word for word; else they count as not annotated.
    """
    if literal:
        annotated = span_label != 0
    else:
        annotated = torch.isin(span_label, span_label.new_tensor(sorted(active)))
    return torch.where(annotated, gate * advantages, advantages)


def prompt_mean_scale(groups: Sequence[str], mask: Tensor, mini_batches: int = 1) -> Tensor:
    """Factors per row that turn a *sum* over tokens into the mean over prompts of token means: [B] float32.

    CISPO's normaliser (arXiv 2506.13585, eq. 4) counts the tokens of one prompt's group: multiply the advantages by
    ``mini_batches / (groups * tokens of the own group)`` and sum. However a batch is cut into mini-batches, every
    prompt then weighs the same. Groups without a trained token do not count.

    Args:
        groups: the prompt of each row.
        mask: trained tokens [B, T].
        mini_batches: optimiser steps that share the batch.
    """
    names = sorted(set(groups))
    owner = torch.tensor([names.index(name) for name in groups], device=mask.device)
    tokens = torch.zeros(len(names), device=mask.device).index_add(0, owner, mask.bool().sum(dim=-1).float())
    counted = (tokens > 0).sum().clamp(min=1)
    return mini_batches / (counted * tokens.clamp(min=1.0))[owner]


def self_distilled_advantage(
    advantage: Tensor, student_logp: Tensor, teacher_logp: Tensor, weight: float, bound: float = 0.2
) -> Tensor:
    """RLSD's advantage (arXiv 2604.03128): the teacher decides how much a token counts, the reward its direction.

    ``A [(1 - weight) + weight clip(exp(sign(A) (log p_T - log p_S)), 1 - bound, 1 + bound)]``, detached: [...].

    Args:
        advantage: of the reward, per token.
        student_logp, teacher_logp: of the sampled tokens.
        weight: 0 leaves the advantages as they are.
    """
    gap = (teacher_logp.detach() - student_logp.detach()).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    factor = torch.exp(advantage.sign() * gap).clamp(1.0 - bound, 1.0 + bound)
    return advantage * ((1.0 - weight) + weight * factor)
