# SPDX-License-Identifier: Apache-2.0
"""Chunked LM head: from last hidden states to per-token terms and their gradients, without an [N, V] tensor.

A dense loss keeps several [N, V] float32 tensors for its backward pass (about 14 GiB for 8k tokens of a 152k
vocabulary); here only a chunk of logits exists at a time. Two modes share the pass in
:mod:`opd_ext.objective.chunks`. ``forward`` forms the gradients at once, which is possible when the weight of
each token is known beforehand; ``recompute`` returns differentiable per-token terms for a loss that is
computed later, and repeats the chunk in the backward pass. Any registered divergence works in both: its
derivative is taken by autograd, one block of rows at a time.

An axis whose name begins with an underscore is compared by the code, which says what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_ext.divergence.divergences import get_divergence
from opd_ext.divergence.known import TopK
from opd_ext.objective.chunks import Comparison, Computation, Inputs, Output, Plan, Side, run_chunks
from opd_ext.objective.shares import Share

Mode = Literal["forward", "recompute"]

_DIFFERENTIABLE = ("divergence", "student_log_prob", "student_entropy")


class HeadOutput(NamedTuple):
    """Per-token terms, float32 (float64 for float64 inputs); ``None`` where the inputs do not define one.

    ``loss`` is ``sum(token_weight * divergence)``, a differentiable scalar. In mode ``forward`` the other
    fields are detached; in mode ``recompute`` ``divergence``, ``student_log_prob`` and ``student_entropy``
    are differentiable. Log-probs are those of ``labels``; entropies are in nats. ``clipped`` is the share of
    vocabulary terms that an ``entry_clip`` in mode ``vocab_max`` capped.
    """

    loss: Float[Tensor, ""] | None
    divergence: Float[Tensor, " N"] | None
    student_log_prob: Float[Tensor, " N"] | None
    student_entropy: Float[Tensor, " N"] | None
    teacher_log_prob: Float[Tensor, " N"] | None
    teacher_entropy: Float[Tensor, " N"] | None
    clipped: Float[Tensor, " N"] | None

    def need(self, *names: str) -> tuple[Tensor, ...]:
        """The named terms; ``ValueError`` if the head was not asked for one of them."""
        if missing := [name for name in names if getattr(self, name) is None]:
            raise ValueError(f"This pass of the head has no {missing[0]}, which the loss is made of.")
        return tuple(getattr(self, name) for name in names)

    def shared(self, share: Share, token_weight: Float[Tensor, " _N"] | None) -> HeadOutput:
        """Of all ranks' rows what this is of one rank's; ``token_weight`` is of all rows (collective)."""
        names = [name for name, value in self._asdict().items() if name != "loss" and value is not None]
        found = dict(zip(names, share.whole(*self.need(*names)), strict=True))
        loss = self.loss
        if loss is not None and token_weight is not None:
            loss = share.total(loss, _weighted_sum(found["divergence"], token_weight))
        return self._replace(loss=loss, **found)


def chunked_divergence(
    hidden: Float[Tensor, "N _H"],
    weight: Float[Tensor, "_V _H"],
    teacher_hidden: Float[Tensor, "_N _Ht"],
    teacher_weight: Float[Tensor, "_VT _Ht"],
    token_weight: Float[Tensor, " _N"],
    kind: str = "reverse_kl",
    chunk_size: int = 1024,
    **kind_args: Any,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """``sum_n token_weight[n] * D(softmax(W h_n), softmax(W_T h_T,n))``, its gradient formed on the way.

    Args:
        hidden: student's last hidden states [N, H]; the row that predicts response token j.
        weight: student's LM head [V, H]; may be frozen, or tied to the embedding.
        teacher_hidden, teacher_weight: the teacher's [N, Ht] and [V, Ht], constants. Models of one tokenizer may pad
            their heads differently: both are cut to the rows that they have in common, since no id names the others.
        token_weight: [N], constant; rows with weight 0 add nothing to the loss or to any gradient.
        kind, kind_args: a registered divergence and its keyword arguments.
        chunk_size: upper bound on the rows whose logits exist at once.

    Returns:
        The scalar loss and the detached per-token divergence [N].

    Raises:
        ValueError: for shapes that do not fit together or an unknown ``kind``.

    >>> import torch
    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> teacher_hidden, teacher_weight = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    >>> loss, per_token = chunked_divergence(hidden, weight, teacher_hidden, teacher_weight, torch.tensor([1.0, 0.0]))
    >>> per_token
    tensor([0.1120, 0.1233])
    >>> loss  # the second token has no weight
    tensor(0.1120, grad_fn=<_GradientInForwardBackward>)
    >>> loss.backward()
    >>> hidden.grad[1]
    tensor([0., 0.])
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
    loss, divergence = out.need("loss", "divergence")
    return loss, divergence


def divergence_head(
    hidden: Float[Tensor, "_N _H"],
    weight: Float[Tensor, "_V _H"],
    teacher_hidden: Float[Tensor, "_N _Ht"] | None = None,
    teacher_weight: Float[Tensor, "_VT _Ht"] | None = None,
    *,
    labels: Int[Tensor, " _N"] | None = None,
    token_weight: Float[Tensor, " _N"] | None = None,
    kind: str | None = "reverse_kl",
    kind_args: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    mode: Mode = "forward",
    with_entropy: bool = True,
    matmul_dtype: torch.dtype | None = None,
    total: GradientSum | None = None,
    known: TopK | None = None,
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
            price of one float32 copy of the weights (on CUDA and from bfloat16 the student's alone, for its gradient;
            see :mod:`opd_ext.objective.products`). What follows the product is float32 in any case.
        total: in mode ``forward``, what this pass shares the gradient of ``weight`` with; see :class:`GradientSum`.
        known: in the place of a teacher's hidden states, its likeliest tokens [N, K], of which a ``topk_`` divergence
            on the teacher's support reads the first ``k``. Its entropy and its log-probs of the labels then remain
            unknown.

    Raises:
        ValueError: for shapes that do not fit together, an unknown ``kind`` or ``mode``, or a mode that
            cannot be used with what was passed.
    """
    student, teacher = Side(hidden, weight), Side.given(teacher_hidden, teacher_weight)
    _check(student, teacher or known, labels, token_weight, chunk_size, mode)
    if known is not None:
        _check_known(student, teacher, known, kind, kind_args or {})
    if mode == "forward" and kind is None:
        raise ValueError("Mode 'forward' needs a divergence; without one use mode='recompute'.")
    compared = teacher is not None or known is not None
    comparison = _comparison(kind, kind_args or {}) if kind is not None and compared else None
    terms = Computation(
        outputs=_outputs(comparison, teacher is not None, labels is not None, with_entropy),
        comparison=comparison,
        temperature=float(temperature),
    )
    plan = Plan(
        chunk_size=chunk_size,
        matmul_dtype=matmul_dtype or hidden.dtype,
        grad_hidden=torch.is_grad_enabled() and hidden.requires_grad,
        grad_weight=torch.is_grad_enabled() and weight.requires_grad,
    )
    teacher = None if teacher is None else Side(*(tensor.detach() for tensor in teacher))
    token_weight = None if token_weight is None else token_weight.detach()
    inputs = Inputs(student, teacher, labels, known).flat()
    if mode == "forward":
        loss, *values = _GradientInForward.apply(plan, terms, token_weight, total, *inputs)
        return HeadOutput(loss, **_by_name(terms.outputs, values))
    found = _by_name(terms.outputs, _RecomputeInBackward.apply(plan, terms, *inputs))
    divergence = found["divergence"]
    loss = None if divergence is None or token_weight is None else _weighted_sum(divergence, token_weight)
    return HeadOutput(loss, **found)


class GradientSum:
    """The gradient of one weight from several passes, in memory once, however many they are.

    For passes of mode ``forward`` whose losses are added up, so that all of them get the same gradient from above: the
    first returns the sum in backward, the others nothing.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        terms: Computation,
        token_weight: Float[Tensor, " N"],
        total: GradientSum | None,
        *inputs: Any,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        upstream: dict[Output, Tensor] = {"divergence": token_weight} if plan.grad_hidden or plan.grad_weight else {}
        mine = total or GradientSum()
        ctx.total, ctx.dtype = (mine if mine.value is None else None), inputs[1].dtype
        result = run_chunks(plan, terms, Inputs.of(*inputs), upstream, mine.value)
        mine.value = result.d_weight
        if total is None and result.d_weight is not None:  # nothing will be added, so it need not be wide
            mine.value = result.d_weight.to(ctx.dtype)
        ctx.save_for_backward(result.d_hidden)
        values = tuple(result.values[name] for name in terms.outputs)
        ctx.mark_non_differentiable(*values)
        return _weighted_sum(result.values["divergence"], token_weight), *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        d_hidden = d_weight = None
        if grad_loss is not None:
            (d_hidden,) = (None if d is None else d * grad_loss.to(d.dtype) for d in ctx.saved_tensors)
            if ctx.total is not None and ctx.total.value is not None:
                d_weight = ctx.total.value.to(ctx.dtype) * grad_loss.to(ctx.dtype)
        return None, None, None, None, d_hidden, d_weight, None, None, None, None, None


class _RecomputeInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, terms: Computation, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.terms = plan, terms
        ctx.save_for_backward(*inputs)
        values = run_chunks(plan, terms, Inputs.of(*inputs), {}).values
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name not in _DIFFERENTIABLE))
        return tuple(values[name] for name in terms.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = {name: g for name, g in zip(ctx.terms.outputs, grads, strict=True) if g is not None}
        terms = ctx.terms.restricted_to(tuple(upstream))
        inputs = Inputs.of(*ctx.saved_tensors)
        _, d_hidden, d_weight = run_chunks(ctx.plan, terms, inputs, upstream)
        d_weight = None if d_weight is None else d_weight.to(inputs.student.weight.dtype)
        return None, None, d_hidden, d_weight, None, None, None, None, None


def _weighted_sum(divergence: Float[Tensor, " N"], token_weight: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    return (token_weight.to(divergence.dtype) * divergence).sum()


def _comparison(kind: str, kind_args: Mapping[str, Any]) -> Comparison:
    return Comparison(kind, get_divergence(kind), tuple(sorted(kind_args.items())))


def _outputs(comparison: Comparison | None, teacher: bool, labels: bool, with_entropy: bool) -> tuple[Output, ...]:
    wanted: dict[Output, bool] = {
        "divergence": comparison is not None,
        "student_log_prob": labels,
        "student_entropy": with_entropy,
        "teacher_log_prob": teacher and labels,
        "teacher_entropy": teacher and with_entropy,
        "clipped": comparison is not None and comparison.caps_entries,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _by_name(outputs: tuple[Output, ...], values: Iterable[Tensor]) -> dict[str, Tensor | None]:
    found = dict(zip(outputs, values, strict=True))
    return {name: found.get(name) for name in get_args(Output)}


def _check_known(
    student: Side, teacher: Side | None, known: TopK, kind: str | None, kind_args: Mapping[str, Any]
) -> None:
    if teacher is not None:
        raise ValueError("Pass the teacher's hidden states, or what is known of it, not both.")
    if known.ids.ndim != 2 or known.ids.shape != known.log_probs.shape or len(known.ids) != len(student.hidden):
        raise ValueError(
            f"known must be ids and log-probs [{len(student.hidden)}, K] but is {tuple(known.ids.shape)} and "
            f"{tuple(known.log_probs.shape)}."
        )
    if kind is None or not kind.startswith("topk_") or kind_args.get("support", "teacher") != "teacher":
        raise ValueError("What is known of a teacher is for a topk_ divergence on support='teacher'.")
    k = kind_args.get("k", 0)
    if not 1 <= k <= known.ids.shape[1]:
        raise ValueError(f"k={k} must lie between 1 and the {known.ids.shape[1]} tokens that are known.")


def _check(
    student: Side,
    teacher: Side | TopK | None,
    labels: Tensor | None,
    token_weight: Tensor | None,
    chunk_size: int,
    mode: str,
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 but is {chunk_size}.")
    if mode not in ("forward", "recompute"):
        raise ValueError(f"Unknown mode '{mode}'; allowed: forward, recompute.")
    if mode == "forward" and (teacher is None or token_weight is None):
        raise ValueError("Mode 'forward' needs a teacher and token_weight; policy terms need mode='recompute'.")
    _check_side("hidden", student)
    rows = {"labels": labels, "token_weight": token_weight}
    if isinstance(teacher, Side):
        _check_side("teacher_hidden", teacher)
        rows["teacher_hidden"] = teacher.hidden
    for name, per_row in rows.items():
        if per_row is not None and len(per_row) != len(student.hidden):
            raise ValueError(f"{name} has {len(per_row)} rows but hidden has {len(student.hidden)}; align them first.")


def _check_side(name: str, side: Side) -> None:
    h, w = side
    if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
        raise ValueError(f"{name} must be [N, H] and its weight [V, H]; got {tuple(h.shape)} and {tuple(w.shape)}.")
