# SPDX-License-Identifier: Apache-2.0
"""What the objective is given of a micro-batch, what it gives back, and what it calls in between."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opd_ext.divergence.known import TopK
from opd_ext.objective.byte_spans import SpanScores
from opd_ext.objective.shares import Share


def chosen(known: TopK | None, rows: Int[Tensor, " n"]) -> TopK | None:
    """What is known of a teacher on some of the tokens."""
    return None if known is None else TopK(known.ids[rows], known.log_probs[rows])


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What the loss must know of a micro-batch besides its hidden states.

    Per-token tensors are packed over the responses: [N], N = sum(lengths). The counts are denominators over the global
    mini-batch.

    Attributes:
        labels: sampled token ids.
        mask: trained tokens, 0/1 or bool.
        lengths: response lengths.
        sample_mask: samples that have a teacher; None: all.
        span_label: class of each token: 0 none, 1 key, 2 error; None: no annotation.
        rollout_log_probs, old_log_probs: log-probs of the labels when they were sampled and before the update.
        teacher_log_prob: the teacher's log-probs of the labels, where its hidden states are not at hand.
        teacher_topk: ids and log-probs [N, K] of the teacher's likeliest tokens, where these are all it says.
        reference_log_prob: the reference's log-probs of the labels, for a surrogate that extrapolates.
        distillation_weight: of the distillation term at this step (`opd.credit.weight`, annealed).
        gate: what the annealing leaves to the policy term on annotated spans.
        known_ids: ids below this have a row in the teacher's head; a token beyond is not distilled. None: all have.
        reduced: what the reduction says of each token, where that is known already: of a part of a micro-batch.
        byte_spans: what a teacher of another tokenizer says; tokens in no span are not distilled.
        share: whose row each token is, where ranks share the batch. Hidden states are then this rank's rows alone;
            everything here is of all tokens, and so are the terms that come out.
    """

    labels: Int[Tensor, " N"]
    mask: Shaped[Tensor, " N"]
    lengths: Int[Tensor, " B"]
    num_tokens: int
    num_sequences: int
    num_micro_batches: int
    dp_size: int
    rollout_log_probs: Float[Tensor, " N"] | None = None
    old_log_probs: Float[Tensor, " N"] | None = None
    sample_mask: Shaped[Tensor, " B"] | None = None
    span_label: Int[Tensor, " N"] | None = None
    teacher_log_prob: Float[Tensor, " N"] | None = None
    teacher_topk: TopK | None = None
    reference_log_prob: Float[Tensor, " N"] | None = None
    distillation_weight: float = 1.0
    gate: float = 1.0
    known_ids: int | None = None
    reduced: Float[Tensor, " N"] | None = None
    byte_spans: SpanScores | None = None
    share: Share | None = None

    @property
    def is_answered(self) -> bool:
        """Whether a teacher's hidden states are not needed, because what it says is here."""
        return any(each is not None for each in (self.teacher_log_prob, self.teacher_topk, self.byte_spans))

    @functools.cached_property
    def sizes(self) -> list[int]:
        """``lengths`` on the host, which waits for the device: once per micro-batch."""
        return self.lengths.tolist()

    @functools.cached_property
    def sample(self) -> Int[Tensor, " N"]:
        """Of every token the place of its response in the batch."""
        places = torch.arange(len(self.lengths), device=self.lengths.device)
        return places.repeat_interleave(self.lengths, output_size=len(self.mask))  # else the device would be asked

    def padded(self, values: Shaped[Tensor, " N"]) -> Shaped[Tensor, "B T"]:
        """One row per response, zeros behind it."""
        return pad_sequence(values.split(self.sizes), batch_first=True)

    def packed(self, values: Shaped[Tensor, "B T"]) -> Shaped[Tensor, " N"]:
        """The responses end to end."""
        return torch.cat([row[:length] for row, length in zip(values, self.sizes, strict=True)])

    def distilled(self) -> Bool[Tensor, " N"]:
        """Trained tokens of samples that have a teacher."""
        mask = self.mask.bool() if self.known_ids is None else self.mask.bool() & (self.labels < self.known_ids)
        if self.byte_spans is not None:
            mask = mask & self.byte_spans.covered
        return mask if self.sample_mask is None else mask & self.sample_mask.bool()[self.sample]


Shape = Callable[[Float[Tensor, " N"]], Float[Tensor, " N"]]
"""Advantages -> advantages."""

PolicyTerm = Callable[[Float[Tensor, " N"], Float[Tensor, " N"], Shape | None], Float[Tensor, ""]]
"""(log_prob, entropy, shape of the advantages) -> the policy loss of this micro-batch, scaled like ours.

Without a shape the advantages stay as they are.
"""


class Terms(NamedTuple):
    """The loss, which is differentiable, and what its metrics are made of, detached.

    ``divergence``, ``teacher_log_prob``, ``teacher_entropy`` and ``credit`` mean something where ``distilled`` is true.
    The distillation term is the sum of ``weight`` (reduction, annealing, credit, caps; 0 where nothing is distilled)
    times ``per_token`` (the divergence, or the surrogate's loss).
    """

    loss: Float[Tensor, ""]
    student_log_prob: Float[Tensor, " N"]
    student_entropy: Float[Tensor, " N"]
    distilled: Bool[Tensor, " N"]
    divergence: Float[Tensor, " N"] | None = None
    teacher_log_prob: Float[Tensor, " N"] | None = None
    teacher_entropy: Float[Tensor, " N"] | None = None
    credit: Float[Tensor, " N"] | None = None
    clipped: Float[Tensor, " N"] | None = None
    weight: Float[Tensor, " N"] | None = None
    per_token: Float[Tensor, " N"] | None = None
