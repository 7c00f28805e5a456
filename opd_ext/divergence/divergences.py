# SPDX-License-Identifier: Apache-2.0
"""Per-token divergences between student and teacher next-token distributions, as functions of their logits.

Notation: ``q`` is the student's distribution and ``p`` the teacher's, both softmax over the last dimension, ``V``;
``*tokens`` are any number of axes in front of it, the same on both sides. Each divergence is defined once, by its
terms over the vocabulary (``_*_terms``); the full-vocabulary, top-K and clipped forms, and the chunked head, all sum
those terms. Gradients come from autograd, so a divergence registered by a user needs no hand-written backward. Teacher
logits are constants: they never receive a gradient.

Half-precision logits are upcast to float32 before the softmax; float32 and float64 stay what they are. Logits
must be finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_ext.registry import Registry

ClipMode = Literal["vocab_max", "token_scale", "none"]
SupportSide = Literal["student", "teacher"]
Tail = Literal["bucket", "renorm", "none"]

_divergences: Registry[Callable[..., Tensor]] = Registry("divergence")
register_divergence = _divergences.register
get_divergence = _divergences.get
divergence_names = _divergences.names

# Smallest tail mass that top-K divergences tell apart from none (SDPO, arXiv 2601.20802, released loss).
LOG_TAIL_FLOOR = math.log(-math.expm1(-1e-7))


def scaled(logits: Float[Tensor, "*tokens V"], temperature: float) -> Float[Tensor, "*tokens V"]:
    """``logits / temperature`` in float32 or wider."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def log_probs(logits: Float[Tensor, "*tokens V"], temperature: float = 1.0) -> Float[Tensor, "*tokens V"]:
    """Log-softmax of ``logits / temperature`` in float32 or wider."""
    return torch.log_softmax(scaled(logits, temperature), dim=-1)


def entropy(logits: Float[Tensor, "*tokens V"], temperature: float = 1.0) -> Float[Tensor, "*tokens"]:
    """Entropy of softmax(logits / temperature) in nats."""
    logq = log_probs(logits, temperature)
    return -(logq.exp() * logq).sum(dim=-1)


def _reverse_kl_terms(logq: Tensor, logp: Tensor) -> Tensor:
    return logq.exp() * (logq - logp)


def _forward_kl_terms(logq: Tensor, logp: Tensor) -> Tensor:
    return logp.exp() * (logp - logq)


def _jsd_terms(logq: Tensor, logp: Tensor, beta: float | None) -> Tensor:
    if beta is None or not 0.0 < beta < 1.0:
        raise ValueError(f"jsd needs 0 < beta < 1 but got {beta}; for the ends use reverse_kl or forward_kl.")
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
    return beta * logp.exp() * (logp - logm) + (1.0 - beta) * logq.exp() * (logq - logm)


def terms_of(
    kind: str, beta: float | None
) -> Callable[[Float[Tensor, "*tokens V"], Float[Tensor, "*tokens V"]], Float[Tensor, "*tokens V"]]:
    """(log q, log p) -> the terms that ``kind`` sums; ``ValueError`` for another kind, or a ``beta`` out of place."""
    if kind == "jsd":
        return functools.partial(_jsd_terms, beta=beta)
    terms = {"reverse_kl": _reverse_kl_terms, "forward_kl": _forward_kl_terms}
    if kind not in terms:
        raise ValueError(f"Unknown divergence kind '{kind}'; allowed: forward_kl, jsd, reverse_kl.")
    if beta is not None:
        raise ValueError(f"beta belongs to jsd only; remove beta={beta} from {kind}.")
    return terms[kind]


def sum_terms(
    terms: Float[Tensor, "*tokens V"], entry_clip: float | None, entry_clip_mode: ClipMode
) -> Float[Tensor, "*tokens"]:
    """The sum of the terms, bounded as :func:`forward_kl` says; ``ValueError`` as there."""
    if entry_clip_mode not in ("vocab_max", "token_scale", "none"):
        raise ValueError(f"Unknown entry_clip_mode '{entry_clip_mode}'; allowed: vocab_max, token_scale, none.")
    if entry_clip is None or entry_clip_mode == "none":
        return terms.sum(dim=-1)
    if not entry_clip > 0.0:
        raise ValueError(f"entry_clip must be positive but is {entry_clip}; use None for no clipping.")
    if entry_clip_mode == "vocab_max":
        return terms.clamp(max=entry_clip).sum(dim=-1)
    total = terms.sum(dim=-1)
    return total * (entry_clip / total.detach().clamp(min=entry_clip))


def _full(
    kind: str,
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    beta: float | None,
    entry_clip: float | None,
    entry_clip_mode: ClipMode,
    temperature: float,
) -> Float[Tensor, "*tokens"]:
    logq = log_probs(student_logits, temperature)
    logp = log_probs(teacher_logits.detach(), temperature)
    return sum_terms(terms_of(kind, beta)(logq, logp), entry_clip, entry_clip_mode)


@register_divergence("reverse_kl")
def reverse_kl(
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    entry_clip: float | None = None,
    entry_clip_mode: ClipMode = "vocab_max",
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """KL(q || p) = sum_v q (log q - log p) in nats per token.

    Mode-seeking; the loss of CRISP (arXiv 2603.05433). ``temperature`` divides both logits and the result is
    not multiplied by its square. Clipping as in :func:`forward_kl`.

    >>> import torch
    >>> student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> reverse_kl(student, teacher)  # 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1)
    tensor(0.5108)
    >>> forward_kl(student, teacher)  # the weights are the teacher's
    tensor(0.3681)
    """
    return _full("reverse_kl", student_logits, teacher_logits, None, entry_clip, entry_clip_mode, temperature)


@register_divergence("forward_kl")
def forward_kl(
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    entry_clip: float | None = None,
    entry_clip_mode: ClipMode = "vocab_max",
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """KL(p || q) = sum_v p (log p - log q) in nats per token.

    Args:
        student_logits, teacher_logits: of any floating dtype; the teacher's are constants.
        entry_clip: bound ``c > 0`` in nats, or None for no clipping.
        entry_clip_mode: what the bound applies to.
            ``vocab_max``: each signed vocabulary term becomes ``min(term, c)`` before the sum (OPSD, arXiv
            2601.18734; TRACE, arXiv 2605.10194). Capped terms lose their gradient, so the sum can be negative
            and the logit of a strongly under-allocated token is pushed *down*.
            ``token_scale``: the token's divergence is multiplied by the constant ``min(1, c / divergence)``,
            which bounds its size and keeps the direction of its gradient.
            ``none``: the bound is ignored.
        temperature: divides both logits; the result is not multiplied by its square.

    Raises:
        ValueError: for a bound that is not positive or an unknown mode.

    >>> import torch
    >>> student, teacher = torch.tensor([0.01, 0.99]).log(), torch.tensor([0.9, 0.1]).log()
    >>> forward_kl(student, teacher)
    tensor(3.8206)
    >>> forward_kl(student, teacher, entry_clip=0.05)  # the large term is capped, the negative one is not
    tensor(-0.1793)
    >>> forward_kl(student, teacher, entry_clip=0.05, entry_clip_mode="token_scale")
    tensor(0.0500)
    """
    return _full("forward_kl", student_logits, teacher_logits, None, entry_clip, entry_clip_mode, temperature)


@register_divergence("jsd")
def jsd(
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    beta: float,
    entry_clip: float | None = None,
    entry_clip_mode: ClipMode = "vocab_max",
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    ``beta`` is the teacher's share of the mixture, as in CRISP and as ``alpha`` in SDPO (arXiv 2601.20802).
    Published code disagrees on what 0 and 1 mean (zero loss, or one of the KLs), so both ends raise
    ``ValueError``.

    >>> import torch
    >>> student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> jsd(student, teacher, beta=0.5) == jsd(teacher, student, beta=0.5)  # only then is it symmetric
    tensor(True)
    >>> jsd(torch.tensor([100.0, 0.0]), torch.tensor([0.0, 100.0]), beta=0.5)  # at most ln 2
    tensor(0.6931)
    """
    return _full("jsd", student_logits, teacher_logits, beta, entry_clip, entry_clip_mode, temperature)


def _log_tail(
    logits: Float[Tensor, "*tokens V"], logz: Float[Tensor, "*tokens 1"], support: Int[Tensor, "*tokens K"]
) -> Float[Tensor, "*tokens 1"]:
    """Log mass outside ``support``, summed over the complement: 1 - sum cancels in float32."""
    outside = logits.scatter(-1, support, torch.finfo(logits.dtype).min)
    return (torch.logsumexp(outside, dim=-1, keepdim=True) - logz).clamp(min=LOG_TAIL_FLOOR)


def restrict(
    logits: Float[Tensor, "*tokens V"], support: Int[Tensor, "*tokens K"], tail: Tail
) -> Float[Tensor, "*tokens R"]:
    """Log-probs on ``support``, closed as ``tail`` says; R is K, or K + 1 with a bucket."""
    logz = torch.logsumexp(logits, dim=-1, keepdim=True)
    head = logits.gather(-1, support) - logz
    if tail == "renorm":
        return torch.log_softmax(head, dim=-1)
    if tail == "bucket":
        return torch.cat([head, _log_tail(logits, logz, support)], dim=-1)
    return head


def check_tail(tail: str) -> None:
    """``ValueError`` for a tail that there is not."""
    if tail not in ("bucket", "renorm", "none"):
        raise ValueError(f"Unknown tail '{tail}'; allowed: bucket, renorm, none.")


def _restricted(
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    k: int,
    support: SupportSide,
    tail: Tail,
    temperature: float,
) -> tuple[Float[Tensor, "*tokens R"], Float[Tensor, "*tokens R"]]:
    """Log-probs of both sides on the K likeliest tokens of one; R is K, or K + 1 with a bucket."""
    vocabulary = student_logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k={k} must lie between 1 and the vocabulary size {vocabulary}.")
    if support not in ("student", "teacher"):
        raise ValueError(f"Unknown support '{support}'; allowed: student, teacher.")
    check_tail(tail)
    student = scaled(student_logits, temperature)
    teacher = scaled(teacher_logits.detach(), temperature)
    ids = (student if support == "student" else teacher).detach().topk(k, dim=-1).indices
    return restrict(student, ids, tail), restrict(teacher, ids, tail)


def topk_divergence(
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    k: int,
    kind: str,
    support: SupportSide = "teacher",
    tail: Tail = "bucket",
    beta: float | None = None,
    entry_clip: float | None = None,
    entry_clip_mode: ClipMode = "vocab_max",
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """A divergence on the K likeliest tokens of one side.

    Args:
        k: size of the support, 1 <= k <= V. The choice of the support is not differentiated.
        kind: ``reverse_kl``, ``forward_kl`` or ``jsd``.
        support: whose K likeliest tokens.
        tail: ``bucket`` adds one category with all remaining mass, so that the value is a lower bound of the
            full divergence, monotone in k and exact at k = V; tail masses below 1e-7 count as 1e-7 and carry
            no gradient (SDPO, arXiv 2601.20802, eq. 11). ``renorm`` renormalises both sides over the support.
            ``none`` sums the K terms of the full softmax as they are: it can be negative and pushes mass out
            of the support.
        beta: mixture share, for ``jsd`` only.

    Raises:
        ValueError: for k outside 1..V or an unknown choice.

    >>> import torch
    >>> student = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    >>> teacher = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
    >>> forward_kl(student, teacher)
    tensor(0.2126)
    >>> def at(tail):
    ...     return [round(topk_divergence(student, teacher, k, "forward_kl", tail=tail).item(), 3) for k in (1, 3, 4)]
    >>> at("bucket"), at("renorm"), at("none")  # a lower bound; another quantity; not even a divergence
    ([0.184, 0.213, 0.213], [0.0, 0.107, 0.213], [0.392, 0.322, 0.213])
    """
    terms = terms_of(kind, beta)
    logq, logp = _restricted(student_logits, teacher_logits, k, support, tail, temperature)
    return sum_terms(terms(logq, logp), entry_clip, entry_clip_mode)


def clipped_fraction(
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    kind: str,
    entry_clip: float,
    beta: float | None = None,
    *,
    temperature: float = 1.0,
    k: int | None = None,
    support: SupportSide = "teacher",
    tail: Tail = "bucket",
) -> Float[Tensor, "*tokens"]:
    """Share of vocabulary terms above ``entry_clip``, to log beside ``vocab_max``.

    With ``k``, the share among the terms of :func:`topk_divergence` with these arguments.
    """
    with torch.no_grad():
        if k is None:
            logq, logp = log_probs(student_logits, temperature), log_probs(teacher_logits, temperature)
        else:
            logq, logp = _restricted(student_logits, teacher_logits, k, support, tail, temperature)
        return (terms_of(kind, beta)(logq, logp) > entry_clip).to(logq.dtype).mean(dim=-1)


for _kind in ("reverse_kl", "forward_kl", "jsd"):
    register_divergence(f"topk_{_kind}")(functools.partial(topk_divergence, kind=_kind))
