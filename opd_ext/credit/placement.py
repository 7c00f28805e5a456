# SPDX-License-Identifier: Apache-2.0
"""Where the credit of a response lies: controls that keep how much there is and change its place.

Every placement keeps the sum of a response's credits, so that an arm with it takes steps of the same size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from opd_ext.registry import Registry

OWN, RANDOM, PREFIX = "own", "random", "prefix"

Run = tuple[int, int, int]
"""A span: first token, the token behind its last, class."""

_placements: Registry[Callable[..., Tensor]] = Registry("placement")
register_placement = _placements.register
get_placement = _placements.get
placement_names = _placements.names


@register_placement(OWN)
def own(
    credit: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"], labels: Int[Tensor, "B T"], prefix: float
) -> Float[Tensor, "B T"]:
    """As the credit itself has it."""
    return credit


@register_placement("flat")
def flat(
    credit: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"], labels: Int[Tensor, "B T"], prefix: float
) -> Float[Tensor, "B T"]:
    """The mean of the response's credits on each of its trained tokens: a constant weight of the same mean.

    >>> import torch
    >>> flat(torch.tensor([[3.0, 0.0, 9.0]]), torch.tensor([[1, 1, 0]]), torch.zeros(1, 3, dtype=torch.long), 0.1)
    tensor([[1.5000, 1.5000, 9.0000]])
    """
    trained = mask.bool()
    total = torch.where(trained, credit, 0.0).sum(dim=-1, keepdim=True)
    return torch.where(trained, total / trained.sum(dim=-1, keepdim=True).clamp(min=1), credit)


@register_placement(RANDOM)
def shuffled(
    credit: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"], labels: Int[Tensor, "B T"], prefix: float
) -> Float[Tensor, "B T"]:
    """The same credits, each on another trained token of the response, drawn uniformly.

    The response's own tokens decide the draw, so neither micro-batches nor a resumed run change it.
    """
    trained = mask.bool()
    place = torch.arange(labels.shape[-1], device=labels.device)
    content = torch.where(trained, _mix(labels.long() * 0x9E3779B1 + place), 0).sum(dim=-1, keepdim=True)
    drawn = torch.where(trained, _mix(content + place * 0x85EBCA77), torch.iinfo(torch.int64).max)
    # Tokens that are not trained come last in both orders, and so keep what they have.
    natural = (~trained).long().argsort(dim=-1, stable=True)
    return credit.scatter(-1, natural, credit.gather(-1, drawn.argsort(dim=-1, stable=True)))


@register_placement(PREFIX)
def beginning(
    credit: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"], labels: Int[Tensor, "B T"], prefix: float
) -> Float[Tensor, "B T"]:
    """The credits of the first ``ceil(prefix * n)`` trained tokens, scaled to the sum of all; 0 behind them.

    >>> import torch
    >>> beginning(torch.ones(1, 4), torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.long), 0.5)
    tensor([[2., 2., 0., 0.]])
    """
    trained = mask.bool()
    count = trained.sum(dim=-1, keepdim=True)
    inside = trained & (trained.long().cumsum(dim=-1) <= (prefix * count.double() - 1e-9).ceil())
    total = torch.where(trained, credit, 0.0).sum(dim=-1, keepdim=True)
    kept = torch.where(inside, credit, 0.0)
    return kept * total / kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)


def moved_spans(runs: Iterable[Run], length: int, seed: str) -> list[Run]:
    """The same spans, as many and as long, at places drawn uniformly: what changes is where they lie.

    Args:
        runs: spans that do not overlap.
        length: tokens of the response.
        seed: decides the draw.

    Returns:
        Spans that do not overlap, in the order of their places; as they were if they do not fit.
    """
    found = sorted(runs)
    free = length - sum(end - start for start, end, _ in found)
    if not found or free < 0:
        return found
    draw = random.Random(seed)
    draw.shuffle(found)
    gaps = sorted(draw.randint(0, free) for _ in found)
    moved, taken = [], 0
    for (start, end, label), gap in zip(found, gaps, strict=True):
        moved.append((gap + taken, gap + taken + end - start, label))
        taken += end - start
    return moved


def _mix(values: Tensor) -> Tensor:
    """A hash of 64-bit integers (the last steps of MurmurHash3); products wrap around, on every device alike."""
    values = (values ^ (values >> 33)) * -0x00AE502812AA7333
    values = (values ^ (values >> 33)) * -0x3B314601E57A13AD
    return values ^ (values >> 33)
