# SPDX-License-Identifier: Apache-2.0
"""Rows of a micro-batch that several ranks share: whose each is, and what travels between them.

Where ranks share a sequence (Ulysses), each has hidden states of a stretch of the packed tokens. The head is what costs
per row, and what it returns per row are a few scalars. So every response is dealt evenly, a row of hidden states goes
once to the rank that it is dealt to, and the scalars come back to all: from there on each rank knows whole responses,
and credits, policy terms and metrics are computed as if there were one rank.

Everybody in the group knows the lengths, so nobody asks how much will come. The result of a pass is the same on all
ranks, each of which reaches its own rows alone in the backward pass. The mean of gradients that data parallelism takes
over all ranks would divide their sum by the size of the group, too: gathering multiplies by it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor


def piece(length: int, rank: int, ranks: int) -> int:
    """Rows of a response of ``length`` that are dealt to ``rank``: responses are cut evenly, and end to end.

    >>> [piece(7, rank, 4) for rank in range(4)], [piece(1, rank, 2) for rank in range(2)]
    ([1, 2, 2, 2], [0, 1])
    """
    return length * (rank + 1) // ranks - length * rank // ranks


def dealt(lengths: Sequence[int], ranks: int) -> Int64[Tensor, " N"]:
    """The rank of every row of the responses laid end to end, on the host.

    Of a response's length alone, so that two passes that pack it differently deal it alike.

    >>> dealt([3, 1, 4], ranks=2)
    tensor([0, 1, 1, 1, 0, 0, 1, 1])
    """
    counts = [piece(length, rank, ranks) for length in lengths for rank in range(ranks)]
    return torch.arange(ranks).repeat(len(lengths)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


class Share:
    """Whose each of N rows is, seen from one rank of a group.

    Args:
        owner: rank within the group, of every row; on the host, or on any device together with ``counts``.
        group: of processes; every method but :meth:`pick` is collective in it.
        counts: rows of each rank, where the host knows them.
    """

    def __init__(self, owner: Int[Tensor, " N"], group: Any, counts: Sequence[int] | None = None) -> None:
        self.owner, self.group = owner, group
        self.rank, self.ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self.counts = list(counts) if counts is not None else torch.bincount(owner, minlength=self.ranks).tolist()

    def __len__(self) -> int:
        return len(self.owner)

    def to(self, device: Any) -> Share:
        """The same on another device."""
        return Share(self.owner.to(device), self.group, self.counts)

    @functools.cached_property
    def order(self) -> Int64[Tensor, " N"]:
        """All rows: of rank 0 in order, then of rank 1, and so on."""
        return self.owner.argsort(stable=True)

    @functools.cached_property
    def own(self) -> Int64[Tensor, " n"]:
        """The rows of this rank, in order."""
        return self.order[sum(self.counts[: self.rank]) :][: self.counts[self.rank]]

    def pick(self, rows: Int[Tensor, " m"]) -> tuple[Share, Int64[Tensor, " k"]]:
        """Some of the rows, in order, as a share of their own; and which of this rank's rows are among them."""
        among = torch.zeros_like(self.owner, dtype=torch.bool).index_fill_(0, rows, True)
        return Share(self.owner[rows], self.group), among[self.own].nonzero()[:, 0]

    def whole(self, *values: Float[Tensor, " n"]) -> tuple[Float[Tensor, " N"], ...]:
        """Of all rows what every rank has of its own, of one dtype; one collective for all of ``values``.

        Differentiable; a gradient is cut to this rank's rows and multiplied by the number of ranks.
        """
        return _Whole.apply(self, *values)

    def total(self, own: Float[Tensor, ""], value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """``value``, the sum over all rows, whose gradient goes to ``own``, the sum over this rank's, as in `whole`."""
        return _Total.apply(self.ranks, own, value)

    @torch.no_grad()
    def gathered(self, own: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "N ..."]:
        """Rows of all ranks in order; no gradient. A rank that has fewer fills up, so that all send alike."""
        sent = own.new_zeros(max(self.counts), *own.shape[1:])
        sent[: len(own)] = own
        parts = [torch.empty_like(sent) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, sent, group=self.group)
        found = torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])
        return torch.empty_like(found).index_copy_(0, self.order, found)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Share, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.share = share
        found = tuple(share.gathered(torch.stack(values, dim=1)).unbind(1))
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(value for value, needs in zip(found, needed, strict=True) if not needs))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        share = ctx.share
        return None, *(None if grad is None else grad[share.own] * share.ranks for grad in grads)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: int, own: Tensor, value: Tensor) -> Tensor:
        ctx.ranks = ranks
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad * ctx.ranks, None


# ---------------------------------------------------------------------- hidden states


def exchange(
    held: Float[Tensor, "m H"], source: Int[Tensor, " N"], target: Int[Tensor, " N"], group: Any
) -> Float[Tensor, "n H"]:
    """Rows from the ranks that hold them to those that they are dealt to (collective, differentiable).

    Args:
        held: this rank's rows, in order.
        source: of every row the rank that holds it; on the host, as is ``target``.
        target: of every row the rank that it goes to.

    Returns:
        The rows that ``target`` gives this rank, in order.
    """
    return _Exchange.apply(held, source, target, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor, source: Tensor, target: Tensor, group: Any) -> Tensor:
        ctx.source, ctx.target, ctx.group = source, target, group
        return _send(held, source, target, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _send(grad, ctx.target, ctx.source, ctx.group), None, None, None


def _send(held: Tensor, source: Tensor, target: Tensor, group: Any) -> Tensor:
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    goes, comes = target[source == rank], source[target == rank]
    sent = held[goes.argsort(stable=True).to(held.device)]
    received, sizes = (torch.bincount(of, minlength=ranks).tolist() for of in (comes, goes))
    found = held.new_empty(len(comes), *held.shape[1:])
    torch.distributed.all_to_all_single(found, sent.contiguous(), received, sizes, group=group)
    # They lie by sender; of one sender in order.
    return torch.empty_like(found).index_copy_(0, comes.argsort(stable=True).to(held.device), found)
