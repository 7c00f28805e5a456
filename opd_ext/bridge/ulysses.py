# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism (Ulysses, arXiv 2309.14509) as verl runs it: its attention beyond flash, and rows for the head.

verl cuts the packed tokens of a micro-batch into stretches, one per rank of a group, and lets attention trade stretches
of all heads for whole sequences of some. It patches flash attention alone; transformers' interface for attention
functions takes ours for ``sdpa``, so that the same happens on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_group,
    set_ulysses_sequence_parallel_group,
)

from opd_ext.objective.shares import Share, dealt, exchange

ATTENTION = "sdpa_ulysses"
"""Name of our attention among those of transformers."""


def share_attention(module: PreTrainedModel) -> None:
    """Let ranks share the sequences of a model; what flash attention does of itself, as verl patches it.

    Raises:
        ValueError: for another attention than flash attention or ``sdpa``.
    """
    name = str(module.config._attn_implementation)
    if name.startswith("flash_attention"):
        return
    if name == "sdpa":
        AttentionInterface.register(ATTENTION, _attend)
        module.set_attn_implementation(ATTENTION)
    if module.config._attn_implementation != ATTENTION:  # what has a class of its own per attention stays as it is
        raise ValueError(f"Ranks cannot share a sequence of {module.config.model_type} under attention {name}.")


@contextmanager
def alone() -> Iterator[None]:
    """Every rank attends to whole sequences by itself."""
    group = get_ulysses_sequence_parallel_group()
    set_ulysses_sequence_parallel_group(None)
    try:
        yield
    finally:
        set_ulysses_sequence_parallel_group(group)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within the sequences of a pack, whose stretches the ranks of the group hold.

    Args:
        query, key, value: [1, heads, stretch, d].
        attention_mask: None; transformers makes none for a function that it does not know.
        position_ids: [1, stretch]; a sequence begins where they do not go on.
        sliding_window: tokens that one sees, itself included.

    Returns:
        [1, stretch, heads, d], and no weights.
    """
    if position_ids is None or softcap is not None or s_aux is not None:
        raise ValueError("Ranks cannot share a sequence under this model's sdpa: set ulysses_sequence_parallel_size=1.")
    group = get_ulysses_sequence_parallel_group()
    if group is not None:
        ranks = torch.distributed.get_world_size(group)
        # As in verl: fewer heads of keys than ranks are repeated until each rank has one.
        key, value = (x.repeat_interleave(max(ranks // x.shape[1], 1), dim=1) for x in (key, value))
        query, key, value = (gather_seq_scatter_heads(x, seq_dim=2, head_dim=1) for x in (query, key, value))
        stretches = [torch.empty_like(position_ids) for _ in range(ranks)]
        torch.distributed.all_gather(stretches, position_ids.contiguous(), group=group)
        position_ids = torch.cat(stretches, dim=-1)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    mask = seen(position_ids[0], sliding_window)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    if group is not None:
        out = gather_heads_scatter_seq(out, head_dim=1, seq_dim=2)
    return out.transpose(1, 2).contiguous(), None


def seen(positions: Tensor, window: int | None = None) -> Tensor:
    """Which tokens of a pack a token sees, [T, T] bool: its own sequence's, up to itself, ``window`` of them at most.

    >>> seen(torch.tensor([0, 1, 2, 0]), window=2).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 0, 1]], dtype=torch.int32)
    """
    sequence = torch.nn.functional.pad(positions.diff() != 1, (1, 0)).cumsum(0)
    place = torch.arange(len(positions), device=positions.device)
    back = place[:, None] - place
    mask = (sequence[:, None] == sequence) & (back >= 0)
    return mask if window is None else mask & (back < window)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a packed pass that predict response tokens, and their way to the head.

    Attributes:
        packed: where they are in the whole pack, [R], on the device.
        share: whose they are, where ranks share sequences.
        held: of this rank's stretch those among them, [m].
        source: the rank that holds each, [R], on the host.
    """

    packed: Tensor
    share: Share | None = None
    held: Tensor | None = None
    source: Tensor | None = None
    target: Tensor | None = None

    @classmethod
    def of(cls, packed: Tensor, lengths: Sequence[int], stretch: int, device: Any, group: Any = None) -> Rows:
        """Rows of a pass.

        Args:
            packed: on the host, ascending.
            lengths: of the responses.
            stretch: tokens of a rank.
            group: of the ranks that share the pack; None: there is one.
        """
        if group is None:
            return cls(packed.to(device))
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        source, target = packed // stretch, dealt(lengths, ranks)
        held = packed[source == rank] - rank * stretch
        return cls(packed.to(device), Share(target, group).to(device), held.to(device), source, target)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Of a pass's hidden states [1, stretch, H] the rows that are this rank's for the head, [1, n, H]."""
        if self.share is None:
            return hidden[:, self.packed]
        return exchange(hidden[0, self.held], self.source, self.target, self.share.group)[None]
