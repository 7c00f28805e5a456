# SPDX-License-Identifier: Apache-2.0
"""What the loss does to every token of a batch of rollouts, read off the objective that trains.

The *push* on a token is ``-d loss / d z``, z being the logit of the token that was sampled: positive where an update
makes that token likelier. It is the one number that a divergence over the vocabulary, a surrogate on the sampled token
and an advantage have in common, in one unit.
"""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_ext.objective.batch import MicroBatch, PolicyTerm, Terms
from opd_ext.objective.objective import Objective
from opd_ext.teacher.kinds import TeacherOutput

SHOWN = 5  # likeliest tokens
OVERLAP = 10  # likeliest tokens of student and teacher that are compared
_ROWS = 256  # of logits held at a time


class Likeliest(NamedTuple):
    """The likeliest tokens, in order, and how likely they are."""

    ids: Int[Tensor, "N K"]
    probabilities: Float[Tensor, "N K"]


class Signals(NamedTuple):
    """One method's signals, per response token; what the teacher says means something where ``distilled``.

    Attributes:
        terms: of the objective; ``terms.weight`` times ``terms.per_token`` adds up to the distillation term.
        push: see the module.
        likeliest: of the teacher.
        overlap: share of the student's :data:`OVERLAP` likeliest tokens that are the teacher's, too.
    """

    terms: Terms
    push: Float[Tensor, " N"]
    likeliest: Likeliest | None
    overlap: Float[Tensor, " N"] | None


def method_signals(
    objective: Objective,
    batch: MicroBatch,
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    teacher: TeacherOutput | None,
    reference: Float[Tensor, "N H"] | None = None,
    policy: PolicyTerm | None = None,
) -> Signals:
    """Signals of one micro-batch.

    Args:
        hidden: rows of the student that predict the response tokens.
        weight: its vocabulary projection.
        teacher: rows of the teacher, one tensor per response, and its head.
        reference: rows of the initial model, for a surrogate that extrapolates; its head is taken to be ``weight``.
        policy: the policy term, where the method has one.
    """
    ids, column = batch.labels.unique(return_inverse=True)
    # A column per sampled token, with an entry of 1 in that token's row: what flows back through it is the gradient of
    # that token's logit, whatever the objective does with the logits.
    entry = torch.zeros(len(weight), len(ids), dtype=weight.dtype, device=weight.device)
    entry[ids, torch.arange(len(ids), device=ids.device)] = 1.0
    probe = hidden.new_zeros(len(hidden), len(ids)).requires_grad_()
    parts = (None, None) if teacher is None else (torch.cat(teacher.rows), teacher.head[: len(weight)])
    if parts[1] is not None:
        batch = dataclasses.replace(batch, known_ids=len(parts[1]))
    if reference is not None:
        reference = torch.cat([reference, torch.zeros_like(probe)], dim=-1)
    terms = objective(
        batch,
        torch.cat([hidden, probe], dim=-1),
        torch.cat([weight, entry], dim=-1),
        *parts,
        policy=policy,
        reference_hidden=reference,
    )
    (gradient,) = torch.autograd.grad(terms.loss, probe)
    push = -gradient.gather(1, column[:, None])[:, 0].float()
    terms = terms._replace(loss=terms.loss.detach())
    if parts[0] is None or parts[1] is None:
        return Signals(terms, push, None, None)
    theirs = likeliest(*parts, objective.temperature, OVERLAP)
    own = likeliest(hidden, weight, objective.temperature, OVERLAP)
    shared = (own.ids[:, :, None] == theirs.ids[:, None]).any(-1).float().mean(-1)
    return Signals(terms, push, Likeliest(*(found[:, :SHOWN] for found in theirs)), shared)


@torch.no_grad()
def likeliest(hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], temperature: float, count: int) -> Likeliest:
    """The ``count`` likeliest tokens of every row, of fewer all."""
    found = []
    for rows in hidden.split(_ROWS):
        log_probs = ((rows @ weight.T).float() / temperature).log_softmax(-1)
        found.append(log_probs.topk(min(count, len(weight)), dim=-1))
    if not found:
        none = hidden.new_zeros(0, min(count, len(weight)))
        return Likeliest(none.long(), none.float())
    return Likeliest(torch.cat([each.indices for each in found]), torch.cat([each.values for each in found]).exp())
