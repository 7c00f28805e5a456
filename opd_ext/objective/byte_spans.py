# SPDX-License-Identifier: Apache-2.0
"""What a teacher of another tokenizer says of a student's tokens: the log-prob of the span of text that each is in.

Spans are made by :mod:`opd_ext.tokens.byte_spans`. The reverse KL of a text is the expectation of the sum of
``log p_S(g) - log p_T(g)`` over its spans g, and its score-function gradient, each span for itself, gives every token
of a span the *whole* span's ``log p_T(g) - log p_S(g)`` as its advantage. Where each span is one
token that is the advantage of a teacher of the same tokenizer. What is reported, and what a credit sees, is the span's
in equal parts to its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SpanScores:
    """Per student's token, packed over the responses of a micro-batch.

    Attributes:
        number: of the token's span, none of which is in two responses; -1: in no span.
        log_prob: the teacher's log-prob of the whole span, in nats.
        entropy: the teacher's, in nats, the mean over its tokens of the span.
    """

    number: Int[Tensor, " N"]
    log_prob: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]

    @property
    def covered(self) -> Bool[Tensor, " N"]:
        """Tokens that are in a span."""
        return self.number >= 0

    def total(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Of every token the sum of ``values`` over its span; 0 in none."""
        return totals(values, self.number)[self.number + 1] * self.covered

    def shared(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """``values`` of whole spans, in equal parts to their tokens: the sum over all tokens is that over all spans."""
        return values / self.total(torch.ones_like(values)).clamp(min=1.0)

    def as_tokens(self, old: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Log-probs of a teacher whose ratio to ``old`` is, at every token, that of the span.

        Args:
            old: the student's log-probs of its tokens, before the update.
        """
        return old + self.log_prob - self.total(old)


def totals(values: Float[Tensor, " N"], number: Int[Tensor, " N"]) -> Float[Tensor, " _spans"]:
    """Sums of ``values`` over spans 0, 1, ...; in front of them the sum over what is in none (-1).

    There are never more spans than tokens, so there is room for as many, and the device need not be asked.

    >>> totals(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, -1, 1])).tolist()
    [3.0, 3.0, 4.0, 0.0, 0.0]
    """
    return values.new_zeros(len(values) + 1).index_add(0, number.long() + 1, values)


def score(
    log_prob: Float[Tensor, " T"],
    entropy: Float[Tensor, " T"],
    teacher: Int[Tensor, " T"],
    student: Int[Tensor, " S"],
) -> SpanScores:
    """What a teacher says of one response, per token of the student's.

    Args:
        log_prob, entropy: of the teacher's tokens.
        teacher, student: number of the span of every token on either side, -1: none. A span that the student has
            and the teacher has not is in none.
    """
    sums, counts = totals(log_prob, teacher), totals(torch.ones_like(log_prob), teacher)
    means = totals(entropy, teacher) / counts.clamp(min=1.0)
    known = torch.where(student < len(sums) - 1, student, -1)
    covered = (known >= 0) & (counts[known + 1] > 0)
    number = torch.where(covered, known, -1)
    return SpanScores(number, sums[number + 1] * covered, means[number + 1] * covered)


def joined(parts: list[SpanScores]) -> SpanScores:
    """The scores of several responses end to end, their spans numbered through."""
    numbers, first = [], 0
    for part in parts:
        numbers.append(torch.where(part.covered, part.number + first, -1))
        first += len(part.number)
    log_probs, entropies = ([part.log_prob for part in parts], [part.entropy for part in parts])
    return SpanScores(torch.cat(numbers), torch.cat(log_probs), torch.cat(entropies))


def unspoken(length: int, device: torch.device | str | int | None = None) -> SpanScores:
    """Of a response that has no teacher."""
    zeros = torch.zeros(length, device=device)
    return SpanScores(torch.full((length,), -1, device=device), zeros, zeros)
