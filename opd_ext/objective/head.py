# SPDX-License-Identifier: Apache-2.0
"""Chunked LM head: from last hidden states to per-token terms and their gradients, without an [N, V] tensor.

A dense loss keeps several [N, V] float32 tensors for its backward pass (about 14 GiB for 8k tokens of a 152k
vocabulary); here only a chunk of logits exists at a time. Two modes share the pass in
:mod:`opd_ext.objective.chunks`. ``forward`` forms the gradients at once, which is possible when the weight of
each token is known beforehand; ``recompute`` returns differentiable per-token terms for a loss that is
computed later, and repeats the chunk in the backward pass. Any registered divergence works in both: its
derivative is taken by autograd, one block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_ext.divergence.divergences import get_divergence
from opd_ext.objective.chunks import Inputs, Plan, Terms, run_chunks

_DIFFERENTIABLE = ("divergence", "student_log_prob", "student_entropy")


class HeadOutput(NamedTuple):
    """Per-token terms [N], float32 (float64 for float64 inputs); ``None`` where the inputs do not define one.

    ``loss`` is ``sum(token_weight * divergence)``, a differentiable scalar. In mode ``forward`` the other
    fields are detached; in mode ``recompute`` ``divergence``, ``student_log_prob`` and ``student_entropy``
    are differentiable. Log-probs are those of ``labels``; entropies are in nats. ``clipped`` is the share of
    vocabulary terms that an ``entry_clip`` in mode ``vocab_max`` capped.
    """

    loss: Tensor | None
    divergence: Tensor | None
    student_log_prob: Tensor | None
    student_entropy: Tensor | None
    teacher_log_prob: Tensor | None
    teacher_entropy: Tensor | None
    clipped: Tensor | None


def chunked_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    kind: str = "reverse_kl",
    chunk_size: int = 1024,
    **kind_args: Any,
) -> tuple[Tensor, Tensor]:
    """``sum_n token_weight[n] * D(softmax(W h_n), softmax(W_T h_T,n))``, its gradient formed on the way.

    Args:
        hidden: student's last hidden states [N, H]; the row that predicts response token j.
        weight: student's LM head [V, H]; may be frozen, or tied to the embedding.
        teacher_hidden, teacher_weight: the teacher's [N, Ht] and [V, Ht], constants.
        token_weight: [N], constant; rows with weight 0 add nothing to the loss or to any gradient.
        kind, kind_args: a registered divergence and its keyword arguments.
        chunk_size: upper bound on the rows whose logits exist at once.

    Returns:
        The scalar loss and the detached per-token divergence [N].

    Raises:
        ValueError: for shapes that do not fit together or an unknown ``kind``.
    """
    out = divergence_head(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        token_weight=token_weight,
        kind=kind,
        kind_args=kind_args,
        chunk_size=chunk_size,
        with_entropy=False,
    )
    return out.loss, out.divergence


def divergence_head(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    kind: str | None = "reverse_kl",
    kind_args: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    mode: Literal["forward", "recompute"] = "forward",
    with_entropy: bool = True,
    matmul_dtype: torch.dtype | None = None,
) -> HeadOutput:
    """All per-token terms of one micro-batch; see :class:`HeadOutput` and the module's docstring.

    Args:
        hidden, weight, teacher_hidden, teacher_weight: as in :func:`chunked_divergence`. Without a teacher
            only the policy terms are computed (mode ``recompute``). Mode ``recompute`` reads all four again
            in backward, so they must stay unchanged until then.
        labels: ids of the predicted tokens [N], int64; None for no log-probs.
        token_weight: [N]; None for no loss in mode ``recompute``.
        kind, kind_args: a registered divergence and its keyword arguments (hashable), which may hold a
            ``temperature`` of its own: the loss temperature, independent of the next one. None: log-probs and
            entropies only, for losses on the sampled token.
        temperature: divides the logits for log-probs and entropies only (the rollout temperature).
        chunk_size: upper bound on the rows whose logits exist at once.
        mode: ``forward`` or ``recompute``.
        with_entropy: whether to compute the entropies.
        matmul_dtype: dtype of the products, ``hidden.dtype`` by default; float32 gives an fp32 head at the
            price of one float32 copy of the weights. What follows the product is float32 in any case.

    Raises:
        ValueError: for shapes that do not fit together, an unknown ``kind`` or ``mode``, or a mode that
            cannot be used with what was passed.
    """
    _check(hidden, weight, teacher_hidden, teacher_weight, labels, token_weight, chunk_size, mode)
    if mode == "forward" and kind is None:
        raise ValueError("Mode 'forward' needs a divergence; without one use mode='recompute'.")
    if teacher_hidden is None:
        kind = None
    kind_args = dict(kind_args or {})
    capped = kind_args.get("entry_clip") is not None and kind_args.get("entry_clip_mode", "vocab_max") == "vocab_max"
    terms = Terms(
        outputs=_outputs(kind, teacher_hidden is not None, labels is not None, with_entropy, capped),
        divergence=None if kind is None else get_divergence(kind),
        kind=kind,
        kind_args=tuple(sorted(kind_args.items())),
        temperature=float(temperature),
    )
    plan = Plan(
        chunk_size=chunk_size,
        matmul_dtype=matmul_dtype or hidden.dtype,
        grad_hidden=torch.is_grad_enabled() and hidden.requires_grad,
        grad_weight=torch.is_grad_enabled() and weight.requires_grad,
    )
    token_weight, teacher_hidden, teacher_weight = map(_detached, (token_weight, teacher_hidden, teacher_weight))
    inputs = Inputs(hidden, weight, teacher_hidden, teacher_weight, labels)
    if mode == "forward":
        loss, *values = _GradientInForward.apply(plan, terms, token_weight, *inputs)
        return HeadOutput(loss, **_by_name(terms.outputs, values))
    values = _by_name(terms.outputs, _RecomputeInBackward.apply(plan, terms, *inputs))
    return HeadOutput(_weighted_sum(values["divergence"], token_weight), **values)


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, terms: Terms, token_weight: Tensor, *inputs: Tensor | None):
        ctx.set_materialize_grads(False)
        upstream = {"divergence": token_weight} if plan.grad_hidden or plan.grad_weight else {}
        result = run_chunks(plan, terms, Inputs(*inputs), upstream)
        ctx.save_for_backward(result.d_hidden, result.d_weight)
        values = tuple(result.values[name] for name in terms.outputs)
        ctx.mark_non_differentiable(*values)
        return _weighted_sum(result.values["divergence"], token_weight), *values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor | None, *_):
        d_hidden = d_weight = None
        if grad_loss is not None:
            d_hidden, d_weight = (None if d is None else d * grad_loss.to(d.dtype) for d in ctx.saved_tensors)
        return None, None, None, d_hidden, d_weight, None, None, None


class _RecomputeInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, terms: Terms, *inputs: Tensor | None):
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.terms = plan, terms
        ctx.save_for_backward(*inputs)
        values = run_chunks(plan, terms, Inputs(*inputs), {}).values
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name not in _DIFFERENTIABLE))
        return tuple(values[name] for name in terms.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        upstream = {name: g for name, g in zip(ctx.terms.outputs, grads, strict=True) if g is not None}
        terms = ctx.terms.restricted_to(tuple(upstream))
        result = run_chunks(ctx.plan, terms, Inputs(*ctx.saved_tensors), upstream)
        return None, None, result.d_hidden, result.d_weight, None, None, None


def _weighted_sum(divergence: Tensor | None, token_weight: Tensor | None) -> Tensor | None:
    if divergence is None or token_weight is None:
        return None
    return (token_weight.to(divergence.dtype) * divergence).sum()


def _outputs(kind: str | None, teacher: bool, labels: bool, with_entropy: bool, clipped: bool) -> tuple[str, ...]:
    wanted = {
        "divergence": kind is not None,
        "student_log_prob": labels,
        "student_entropy": with_entropy,
        "teacher_log_prob": teacher and labels,
        "teacher_entropy": teacher and with_entropy,
        "clipped": kind is not None and clipped,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _by_name(outputs: tuple[str, ...], values: Iterable[Tensor]) -> dict[str, Tensor | None]:
    return {name: None for name in HeadOutput._fields[1:]} | dict(zip(outputs, values, strict=True))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    token_weight: Tensor | None,
    chunk_size: int,
    mode: str,
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 but is {chunk_size}.")
    if mode not in ("forward", "recompute"):
        raise ValueError(f"Unknown mode '{mode}'; allowed: forward, recompute.")
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("Pass both teacher_hidden and teacher_weight, or neither.")
    if mode == "forward" and (teacher_hidden is None or token_weight is None):
        raise ValueError("Mode 'forward' needs a teacher and token_weight; policy terms need mode='recompute'.")
    for name, h, w in (("hidden", hidden, weight), ("teacher_hidden", teacher_hidden, teacher_weight)):
        if h is not None and (h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]):
            raise ValueError(f"{name} must be [N, H] and its weight [V, H]; got {tuple(h.shape)} and {tuple(w.shape)}.")
    if teacher_hidden is not None and teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"Student and teacher heads must share one vocabulary but have {weight.shape[0]} and "
            f"{teacher_weight.shape[0]} rows; slice padding rows off the larger one."
        )
    rows = {"teacher_hidden": teacher_hidden, "labels": labels, "token_weight": token_weight}
    for name, per_row in rows.items():
        if per_row is not None and per_row.shape[0] != hidden.shape[0]:
            raise ValueError(f"{name} has {per_row.shape[0]} rows but hidden has {hidden.shape[0]}; align them first.")
