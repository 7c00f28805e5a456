# SPDX-License-Identifier: Apache-2.0
"""The distillation loss of one micro-batch, and the sums from which a step's metrics are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from opd_ext.objective.head import HeadOutput, divergence_head
from opd_ext.objective.objective import Reduction, masked_sums, position_buckets, token_class_masks, token_weights

_SUM, _COUNT = ":sum", ":count"


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What the loss must know of a micro-batch besides its hidden states.

    ``labels``, ``mask`` and ``rollout_log_probs`` are packed over the responses: [N], N = sum(lengths).
    ``num_tokens``, ``num_sequences`` count the global mini-batch (sequences without a trained token left out).
    """

    labels: Tensor
    mask: Tensor
    lengths: Tensor
    num_tokens: int
    num_sequences: int
    num_micro_batches: int
    dp_size: int
    rollout_log_probs: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """``sum_t weight_t * D(student_t, teacher_t)`` over the response tokens, uniform credit.

    Attributes:
        kind, kind_args: a registered divergence and its keyword arguments.
        reduction: see :func:`opd_ext.objective.objective.token_weights`.
        chunk_size: rows of logits held at a time.
        fp32: vocabulary projection in float32.
        token_classes: token ids whose divergence is reported apart, by label.
    """

    kind: str = "reverse_kl"
    kind_args: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reduction: Reduction = "token-mean"
    chunk_size: int = 1024
    fp32: bool = False
    token_classes: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)

    def __call__(
        self, batch: BatchShape, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> HeadOutput:
        """Loss (differentiable scalar) and detached per-token terms [N] of one micro-batch.

        Args:
            hidden, teacher_hidden: rows that predict the response tokens, [N, H] and [N, Ht].
            weight, teacher_weight: vocabulary projections [V, H] and [V, Ht].
        """
        weights = token_weights(
            batch.mask,
            self.reduction,
            num_tokens=batch.num_tokens,
            num_sequences=batch.num_sequences,
            num_micro_batches=batch.num_micro_batches,
            dp_size=batch.dp_size,
            sequence_lens=batch.lengths,
        )
        return divergence_head(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            labels=batch.labels,
            token_weight=weights,
            kind=self.kind,
            kind_args=self.kind_args,
            chunk_size=self.chunk_size,
            matmul_dtype=torch.float32 if self.fp32 else None,
        )

    def sums(self, batch: BatchShape, terms: HeadOutput) -> dict[str, float]:
        """Sums and counts over the trained tokens; add them over micro-batches and ranks, then :func:`means`."""
        everywhere = {"": torch.ones_like(batch.mask, dtype=torch.bool)}
        classes = token_class_masks(batch.labels, self.token_classes)
        groups = everywhere | {f"_{name}": mask for name, mask in (self._buckets(batch) | classes).items()}
        parts = {"divergence": (terms.divergence, groups)}
        for name in ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob"):
            parts[name] = (getattr(terms, name), everywhere)
        if batch.rollout_log_probs is not None:
            parts["rollout_gap"] = ((terms.student_log_prob - batch.rollout_log_probs).abs(), everywhere)
        result = {}
        for name, (values, where) in parts.items():
            for suffix, (total, count) in masked_sums(values, batch.mask, where).items():
                result[f"{name}{suffix}{_SUM}"] = total.item()
                result[f"{name}{suffix}{_COUNT}"] = count.item()
        return result

    @staticmethod
    def _buckets(batch: BatchShape) -> dict[str, Tensor]:
        start = torch.cumsum(batch.lengths, dim=0) - batch.lengths
        position = torch.arange(len(batch.mask), device=batch.mask.device) - start.repeat_interleave(batch.lengths)
        return position_buckets(position, batch.lengths.repeat_interleave(batch.lengths))


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """``name -> sum / count`` for every pair of :meth:`Objective.sums`; groups without a token are left out."""
    names = [key[: -len(_SUM)] for key in sums if key.endswith(_SUM)]
    return {name: sums[name + _SUM] / sums[name + _COUNT] for name in names if sums[name + _COUNT] > 0}
