# SPDX-License-Identifier: Apache-2.0
"""From per-token terms to the loss and its metrics, independent of how a batch is split.

The loss is ``sum(token_weights * credit * divergence)``. The weights are known before the forward pass,
because their denominators are counts over the *global* batch: sums over micro-batches and means over
data-parallel ranks then give the same loss and gradient for every split. Metrics leave here as sums and
counts for the same reason.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "official"]
REDUCTIONS: tuple[Reduction, ...] = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "official")


class BatchCounts(NamedTuple):
    """Denominators of the reductions; add them over micro-batches and ranks to get the global ones."""

    tokens: int
    sequences: int
    nonempty_sequences: int


def batch_counts(mask: Shaped[Tensor, "B T"]) -> BatchCounts:
    """Trained tokens, rows, and rows with at least one trained token of a mask."""
    per_sequence = mask.bool().sum(dim=-1)
    return BatchCounts(int(per_sequence.sum()), mask.shape[0], int((per_sequence > 0).sum()))


def token_weights(
    mask: Shaped[Tensor, "*tokens"],
    reduction: Reduction,
    *,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    num_micro_batches: int = 1,
    dp_size: int = 1,
    sequence_lens: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "*tokens"]:
    """Weight of each token's divergence in the loss of this micro-batch.

    Args:
        mask: trained tokens, 0/1 or bool: [B, T], or [N] for packed response rows with ``sequence_lens``.
        reduction:
            ``token-mean``: 1 / ``num_tokens``.
            ``seq-mean-token-mean``: 1 / (trained tokens of the sequence * ``num_sequences``).
            ``seq-mean-token-sum``: 1 / ``num_sequences``.
            ``official``: 1 / (trained tokens of this micro-batch * ``num_micro_batches``), the reduction of
            CRISP's released code. It depends on which sequences share a micro-batch; for parity runs only.
        num_tokens: trained tokens of the global batch (``token-mean``).
        num_sequences: sequences of the global batch; the caller decides whether those without a trained token
            count (``BatchCounts.sequences`` or ``.nonempty_sequences``).
        num_micro_batches: micro-batches per rank (``official``).
        dp_size: data-parallel ranks whose gradients are averaged; undoes that mean, as the denominators are
            global already (``official`` keeps it).
        sequence_lens: rows of each sequence in a packed mask.

    Returns:
        Weights in the dtype of ``mask`` if that is floating, else float32; zero, not NaN, if
        nothing is trained.

    Raises:
        ValueError: for an unknown reduction or a missing count.
    """
    trained = mask.bool().to(mask.dtype if mask.is_floating_point() else torch.float32)
    if reduction == "official":
        return trained / (trained.sum().clamp(min=1.0) * num_micro_batches)
    if reduction == "token-mean":
        return trained * (dp_size / max(_required(num_tokens, "num_tokens", reduction), 1))
    if reduction not in REDUCTIONS:
        raise ValueError(f"Unknown reduction '{reduction}'; allowed: {', '.join(REDUCTIONS)}.")
    weights = trained * (dp_size / max(_required(num_sequences, "num_sequences", reduction), 1))
    if reduction == "seq-mean-token-sum":
        return weights
    return weights / _tokens_of_own_sequence(trained, sequence_lens).clamp(min=1.0)


def _required(count: int | None, name: str, reduction: str) -> int:
    if count is None:
        raise ValueError(f"Reduction '{reduction}' needs {name}, counted over the global batch.")
    return count


def _tokens_of_own_sequence(
    trained: Float[Tensor, " ..."], sequence_lens: Int[Tensor, " B"] | None
) -> Float[Tensor, " ..."]:
    """Broadcastable to ``trained``."""
    if trained.ndim == 2:
        return trained.sum(dim=-1, keepdim=True)
    if sequence_lens is None:
        raise ValueError("A packed mask [N] needs sequence_lens [B] to know where sequences end.")
    lens = sequence_lens.to(trained.device)
    owner = torch.repeat_interleave(torch.arange(len(lens), device=trained.device), lens, output_size=len(trained))
    return trained.new_zeros(len(lens)).index_add(0, owner, trained)[owner]
