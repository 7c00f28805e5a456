# SPDX-License-Identifier: Apache-2.0
"""Top-K divergences of a teacher that does not show its logits: of its K likeliest tokens the log-probs are known."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_ext.divergence.divergences import (
    LOG_TAIL_FLOOR,
    ClipMode,
    Tail,
    check_tail,
    restrict,
    scaled,
    sum_terms,
    terms_of,
)


class TopK(NamedTuple):
    """All that is known of a teacher that does not show its logits: its K likeliest tokens, the likeliest first.

    ``log_probs`` are of its softmax over the whole vocabulary at temperature 1, in nats; constants.
    """

    ids: Int[Tensor, "*tokens K"]
    log_probs: Float[Tensor, "*tokens K"]


def _restrict_known(known: TopK, tail: Tail, temperature: float) -> Float[Tensor, "*tokens R"]:
    """What `restrict` makes of the teacher's logits, from the log-probs of its support alone."""
    log_probs = scaled(known.log_probs.detach(), 1.0)
    if tail == "renorm":
        return torch.log_softmax(log_probs / temperature, dim=-1)
    if temperature != 1.0:
        raise ValueError(
            f"The log-probs of K tokens do not say what all others add up to at temperature={temperature}: set it to "
            "1, or tail='renorm'."
        )
    if tail == "none":
        return log_probs
    # In float64, so that what is lost of a small tail is what the rounding of the log-probs has lost already.
    mass = -torch.expm1(torch.logsumexp(log_probs.double(), dim=-1, keepdim=True))
    log_tail = mass.clamp(min=math.exp(LOG_TAIL_FLOOR)).log().to(log_probs.dtype)
    return torch.cat([log_probs, log_tail], dim=-1)


def known_topk_divergence(
    student_logits: Float[Tensor, "*tokens V"],
    teacher: TopK,
    kind: str,
    tail: Tail = "bucket",
    beta: float | None = None,
    entry_clip: float | None = None,
    entry_clip_mode: ClipMode = "vocab_max",
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """:func:`topk_divergence` on the teacher's K likeliest tokens, of a teacher that shows nothing but these.

    Every kind and tail is defined: the bucket of the teacher has the mass ``1 - sum(exp(log_probs))``, ``renorm``
    needs the support alone, and ``none`` the log-probs as they are. Float32 log-probs say the mass of the bucket to
    some 1e-7. ``reverse_kl`` divides by it: where the teacher leaves the bucket less than 1e-2, its value is off by up
    to ``1e-7 * q / p`` of the buckets of student and teacher; ``forward_kl`` and ``jsd`` are not.

    Args:
        student_logits: of any floating dtype.
        teacher: ids [..., K] int64 within 0..V - 1, distinct, and their log-probs [..., K]; constants.
        kind, tail, beta, entry_clip, entry_clip_mode: as in :func:`topk_divergence`.
        temperature: divides both logits; another than 1 needs ``tail="renorm"``, since what all other tokens add up to
            is known at 1 alone.

    Raises:
        ValueError: for an unknown choice, or a temperature that is not defined.

    >>> import torch
    >>> student = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    >>> teacher = torch.tensor([0.6, 0.2, 0.15, 0.05]).log()
    >>> known = TopK(torch.tensor([0, 1]), teacher[:2])
    >>> known_topk_divergence(student, known, "forward_kl")  # 0.6 ln(0.6 / 0.4) + 0.2 ln(0.2 / 0.3) + 0.2 ln(0.2 / 0.3)
    tensor(0.0811)
    """
    terms = terms_of(kind, beta)
    logq, logp = _restricted_to(student_logits, teacher, tail, temperature)
    return sum_terms(terms(logq, logp), entry_clip, entry_clip_mode)


def _restricted_to(
    student_logits: Float[Tensor, "*tokens V"], teacher: TopK, tail: Tail, temperature: float
) -> tuple[Float[Tensor, "*tokens R"], Float[Tensor, "*tokens R"]]:
    check_tail(tail)
    logp = _restrict_known(teacher, tail, temperature)
    return restrict(scaled(student_logits, temperature), teacher.ids, tail), logp


def known_clipped_fraction(
    student_logits: Float[Tensor, "*tokens V"],
    teacher: TopK,
    kind: str,
    entry_clip: float,
    tail: Tail = "bucket",
    beta: float | None = None,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """Share of the terms of :func:`known_topk_divergence` above ``entry_clip``, to log beside ``vocab_max``."""
    with torch.no_grad():
        logq, logp = _restricted_to(student_logits, teacher, tail, temperature)
        return (terms_of(kind, beta)(logq, logp) > entry_clip).to(logq.dtype).mean(dim=-1)
