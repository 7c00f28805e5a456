# SPDX-License-Identifier: Apache-2.0
"""Advantages as functions of tensors: weighed on spans, averaged over prompts, shaped by a teacher."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor

from opd_ext.ratios import LOG_RATIO_BOUND


def span_gate(
    advantages: Float[Tensor, "*tokens"],
    span_label: Int[Tensor, "*tokens"],
    gate: float,
    active: Collection[int],
    literal: bool = False,
) -> Float[Tensor, "*tokens"]:
    """Advantages times ``gate`` on annotated tokens, as they are elsewhere.

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


def prompt_mean_scale(
    groups: Sequence[str], mask: Shaped[Tensor, "B T"], mini_batches: int = 1
) -> Float32[Tensor, " B"]:
    """Factors per row that turn a *sum* over tokens into the mean over prompts of token means.

    CISPO's normaliser (arXiv 2506.13585, eq. 4) counts the tokens of one prompt's group: multiply the advantages by
    ``mini_batches / (groups * tokens of the own group)`` and sum. However a batch is cut into mini-batches, every
    prompt then weighs the same. Groups without a trained token do not count.

    Args:
        groups: the prompt of each row.
        mask: trained tokens, 0/1 or bool.
        mini_batches: optimiser steps that share the batch.
    """
    names = sorted(set(groups))
    owner = torch.tensor([names.index(name) for name in groups], device=mask.device)
    tokens = torch.zeros(len(names), device=mask.device).index_add(0, owner, mask.bool().sum(dim=-1).float())
    counted = (tokens > 0).sum().clamp(min=1)
    return mini_batches / (counted * tokens.clamp(min=1.0))[owner]


def self_distilled_advantage(
    advantage: Float[Tensor, "*tokens"],
    student_logp: Float[Tensor, "*tokens"],
    teacher_logp: Float[Tensor, "*tokens"],
    weight: float,
    bound: float = 0.2,
) -> Float[Tensor, "*tokens"]:
    """RLSD's advantage (arXiv 2604.03128): the teacher decides how much a token counts, the reward its direction.

    ``A [(1 - weight) + weight clip(exp(sign(A) (log p_T - log p_S)), 1 - bound, 1 + bound)]``, detached.

    Args:
        advantage: of the reward, per token.
        student_logp, teacher_logp: of the sampled tokens.
        weight: 0 leaves the advantages as they are.
    """
    gap = (teacher_logp.detach() - student_logp.detach()).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    factor = torch.exp(advantage.sign() * gap).clamp(1.0 - bound, 1.0 + bound)
    return advantage * ((1.0 - weight) + weight * factor)
