# SPDX-License-Identifier: Apache-2.0
"""Per-token credit: how much each response token counts in the distillation term.

Credits are constants of the loss. They multiply the weights of :mod:`opd_ext.objective.reduction`; the
denominators stay plain token or sequence counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from opd_ext.registry import Registry

_credits: Registry[Callable[..., Tensor]] = Registry("credit")
register_credit = _credits.register
get_credit = _credits.get
credit_names = _credits.names


class CreditInputs(NamedTuple):
    """What a registered credit may look at, detached; ``None`` where a run does not have it.

    A credit sees whole responses and must not let rows influence each other: which rows are here together is an
    accident of the micro-batch.
    """

    mask: Shaped[Tensor, "B T"]
    student_log_prob: Float[Tensor, "B T"] | None = None
    teacher_log_prob: Float[Tensor, "B T"] | None = None
    student_entropy: Float[Tensor, "B T"] | None = None
    teacher_entropy: Float[Tensor, "B T"] | None = None
    divergence: Float[Tensor, "B T"] | None = None
    span_label: Int[Tensor, "B T"] | None = None

    def need(self, credit: str, *names: str) -> tuple[Tensor, ...]:
        """The named inputs; ``ValueError`` if this run lacks one that ``credit`` is made of."""
        if missing := [name for name in names if getattr(self, name) is None]:
            raise ValueError(f"Credit '{credit}' needs {missing[0]}, which this combination does not have.")
        return tuple(getattr(self, name) for name in names)


C = TypeVar("C", bound=Callable[..., Tensor])


def known_beforehand(credit: C) -> C:
    """Mark a credit that looks at ``mask`` and ``span_label`` alone, neither at log-probs nor entropies.

    Where the whole weight of a token is known before the forward pass, the head forms its gradient within that pass,
    which saves a second one over the vocabulary.
    """
    marked: Any = credit
    marked.known_beforehand = True
    return credit


def position_weights(
    student_logp: Float[Tensor, "B T"],
    teacher_logp: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    gamma: float = 0.5,
    signed: bool = False,
    exclude_last: bool = False,
    deadzone: float = 0.0,
) -> Float[Tensor, "B T"]:
    """IW-OPD's weights: early tokens, before student and teacher have drifted apart, count more.

    ``w_t = 1 + gamma * (1 - sum_{k<t} d_k / (sum_k d_k + 1e-8))`` with ``d = |teacher_logp - student_logp|``
    on trained tokens (arXiv 2606.22600, eq. 17). The sum before t is exclusive and unsigned, and everything
    is per row: the first trained token has weight ``1 + gamma``, weights never increase, and rows do not
    influence each other. Where the mask is 0 the weight is 1.

    Args:
        student_logp, teacher_logp: log-probs of the sampled tokens; ignored where the mask is 0.
        mask: trained tokens, 0/1 or bool. Interior zeros (tool output) keep the running sum.
        gamma: strength, >= 0; 0 gives uniform weights.
        signed: the paper's ablation with ``d = teacher_logp - student_logp``, whose share may fall again.
        exclude_last: the sum below the fraction bar leaves out the last trained token, as the equation is printed;
            the published code does not.
        deadzone: nats taken off every ``d``, for noise between two engines.

    Returns:
        Detached weights, float32 (float64 for float64 input).

    Raises:
        ValueError: for a negative gamma or deadzone.

    >>> import torch
    >>> student, teacher = torch.tensor([[-1.0, -1.0, -1.0, -1.0]]), torch.tensor([[-3.0, -2.0, -2.0, -1.0]])
    >>> position_weights(student, teacher, torch.ones(1, 4))  # gaps 2, 1, 1, 0: half of them lie before token 1
    tensor([[1.5000, 1.2500, 1.1250, 1.0000]])
    """
    if gamma < 0 or deadzone < 0:
        raise ValueError(f"gamma and deadzone must be >= 0 but are {gamma} and {deadzone}.")
    trained = mask.bool()
    gap = teacher_logp.detach() - student_logp.detach()
    gap = gap if gap.dtype == torch.float64 else gap.float()
    gap = gap.sign() * (gap.abs() - deadzone).clamp(min=0.0)
    gap = torch.where(trained, gap if signed else gap.abs(), 0.0)
    counted = gap
    if exclude_last:
        behind = trained.flip(-1).cumsum(dim=-1).flip(-1)
        counted = torch.where(behind == 1, 0.0, gap)
    before = gap.cumsum(dim=-1) - gap
    remaining = (1.0 - before / (counted.sum(dim=-1, keepdim=True) + 1e-8)).clamp(0.0, 1.0)
    return 1.0 + gamma * remaining * trained


def keep_highest(scores: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"], share: float) -> Bool[Tensor, "B T"]:
    """True on the ``floor(share * n)`` trained tokens of each row with the highest score, at least one.

    Of equal scores the earlier token is kept.

    Raises:
        ValueError: for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1] but is {share}.")
    trained = mask.bool()
    # The small number keeps 0.1 * 30 from becoming 2.
    budget = (share * trained.sum(dim=-1, keepdim=True).double() + 1e-9).floor().clamp(min=1)
    order = torch.where(trained, scores.detach(), -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return trained & (rank < budget)


def _mean_one(weights: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Scaled so that the trained tokens of each row have mean 1."""
    trained = mask.bool()
    total = torch.where(trained, weights, 0.0).sum(dim=-1, keepdim=True)
    return weights * trained.sum(dim=-1, keepdim=True) / total.clamp(min=torch.finfo(weights.dtype).tiny)


def _trained_index(mask: Shaped[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B 1"]]:
    """Place of each token among the trained ones of its row, from 0, and their number."""
    trained = mask.bool().long()
    return trained.cumsum(dim=-1) - trained, trained.sum(dim=-1, keepdim=True)


@register_credit("uniform")
@known_beforehand
def uniform(inputs: CreditInputs) -> Float[Tensor, "B T"]:
    """1 on every token. With ``opd.credit.weight`` the control of a constant weight."""
    return torch.ones_like(inputs.mask, dtype=torch.float32)


@register_credit("spans")
@known_beforehand
def spans(inputs: CreditInputs) -> Float[Tensor, "B T"]:
    """1 on annotated tokens, 0 elsewhere (TRACE, arXiv 2605.10194, eq. 1)."""
    (label,) = inputs.need("spans", "span_label")
    return (label != 0).float()


@register_credit("position")
def position(
    inputs: CreditInputs, gamma: float = 0.5, signed: bool = False, exclude_last: bool = False, deadzone: float = 0.0
) -> Float[Tensor, "B T"]:
    """:func:`position_weights` of the run's log-probs."""
    student, teacher = inputs.need("position", "student_log_prob", "teacher_log_prob")
    return position_weights(student, teacher, inputs.mask, gamma, signed, exclude_last, deadzone)


@register_credit("position_linear")
def position_linear(inputs: CreditInputs, gamma: float = 0.5) -> Float[Tensor, "B T"]:
    """IW-OPD's ablation that falls with the place alone: ``1 + gamma * (1 - i / n)``, i = 0 ... n - 1."""
    index, count = _trained_index(inputs.mask)
    dtype = inputs.mask.dtype if inputs.mask.is_floating_point() else torch.float32
    return 1.0 + gamma * (1.0 - index.to(dtype) / count.clamp(min=1)) * inputs.mask.bool()


@register_credit("position_part")
def position_part(
    inputs: CreditInputs,
    share: float = 0.3,
    side: Literal["prefix", "suffix"] = "prefix",
    inside: float = 1.0,
    outside: float = 0.0,
) -> Float[Tensor, "B T"]:
    """IW-OPD's ablations: ``inside`` on the first (``suffix``: last) ``ceil(share * n)`` tokens.

    A hard prefix is (1, 0), the fixed amplification (1.5, 1).

    Raises:
        ValueError: for another side.
    """
    if side not in ("prefix", "suffix"):
        raise ValueError(f"side must be prefix or suffix but is {side!r}.")
    index, count = _trained_index(inputs.mask)
    keep = (share * count.double() - 1e-9).ceil()
    within = index < keep if side == "prefix" else index >= count - keep
    return torch.where(within, inside, outside).float()


@register_credit("entropy")
def entropy(inputs: CreditInputs, share: float = 0.2) -> Float[Tensor, "B T"]:
    """The forks: 1 on the share of a response's tokens at which the student is least sure, 0 elsewhere.

    High-entropy minority tokens (arXiv 2506.01939) rank over a batch; here each response is ranked by itself, and kept
    tokens are scaled to mean 1, as in TIP (arXiv 2604.14084), so that the share does not change the size of a step.
    """
    (uncertain,) = inputs.need("entropy", "student_entropy")
    return _mean_one(keep_highest(uncertain, inputs.mask, share).float(), inputs.mask)


@register_credit("tip")
def tip(inputs: CreditInputs, share: float = 0.5) -> Float[Tensor, "B T"]:
    """TIP's Soft-OR of the student's entropy and the divergence (arXiv 2604.14084): ``h + d - h d``.

    Both are scaled to [0, 1] over the response (the paper: over the batch, which would let micro-batches decide), h is
    clipped at its 98th percentile; the highest ``floor(share * n)`` tokens count, with mean 1.
    """
    uncertain, divergence = inputs.need("tip", "student_entropy", "divergence")
    h, d = _unit(uncertain, inputs.mask, quantile=0.98), _unit(divergence, inputs.mask)
    return _mean_one(keep_highest(h + d - h * d, inputs.mask, share).float(), inputs.mask)


@register_credit("srpo")
def srpo(inputs: CreditInputs, beta: float = 1.0) -> Float[Tensor, "B T"]:
    """SRPO's ``exp(-beta H(teacher))``, with mean 1 over the response (the paper: over the batch).

    Source: arXiv 2604.02288. Tokens at which the teacher itself is unsure teach less.
    """
    (uncertain,) = inputs.need("srpo", "teacher_entropy")
    return _mean_one(torch.exp(-beta * uncertain), inputs.mask)


def _unit(
    values: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"], quantile: float | None = None
) -> Float[Tensor, "B T"]:
    """Min-max scaled over the trained tokens of each row; a constant row becomes 0."""
    trained = mask.bool()
    if quantile is not None:
        ceiling = torch.where(trained, values, torch.nan).nanquantile(quantile, dim=-1, keepdim=True)
        values = torch.minimum(values, torch.where(ceiling.isnan(), torch.inf, ceiling))
    low = torch.where(trained, values, torch.inf).amin(dim=-1, keepdim=True)
    high = torch.where(trained, values, -torch.inf).amax(dim=-1, keepdim=True)
    return torch.where(trained & (high > low), (values - low) / (high - low), 0.0)
