# SPDX-License-Identifier: Apache-2.0
"""Situations of a divergence: what it pulls towards, and whether it pulls at all."""

import torch

from opd_ext.divergence.config import DivergenceTerm
from opd_ext.objective.head import divergence_head

TOKENS = 6


def towards_the_teacher(start) -> None:
    """Two states, six tokens, the likeliest five and a bucket: what is minimised ends at the teacher, entropy too.

    As an advantage of the sampled token the same quantity pulls nowhere; that combination is refused.
    """
    generator = torch.Generator().manual_seed(1)
    states, teacher = torch.eye(2), 2 * torch.randn(TOKENS, 2, generator=generator)
    student = torch.nn.Parameter(torch.randn(TOKENS, 2, generator=generator))
    optimiser = torch.optim.Adam([student], lr=0.1)
    branch = DivergenceTerm("reverse_kl", "topk", k=TOKENS - 1).branch(None)
    for _ in range(200):
        optimiser.zero_grad()
        _loss(states, student, teacher, branch).backward()
        optimiser.step()
    ours, theirs = student.detach().softmax(0), teacher.softmax(0)
    assert torch.allclose(ours, theirs, atol=1e-3)
    entropies = [-(p * p.log()).sum(0) for p in (ours, theirs)]
    assert torch.allclose(*entropies, atol=1e-2)
    status, said, started, _ = start("opd.divergence={support: topk, k: 2, gradient: policy}")
    assert status == 2 and "zero expected gradient" in said and not started


def truncated_to_the_likeliest(start) -> None:
    """The tail is a bucket unless somebody asks otherwise: 467 pairs, none negative, none without a gradient."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(467, 8, generator=generator)
    teacher, student = (torch.randn(64, 8, generator=generator) for _ in range(2))
    branch = DivergenceTerm("reverse_kl", "topk", k=4).branch(None)
    states.requires_grad_()
    out = _head(states, student, teacher, branch)
    out.loss.backward()
    assert (out.divergence >= 0).all() and (states.grad.norm(dim=1) > 0).all()
    truncated = DivergenceTerm("reverse_kl", "topk", k=4, tail="none").branch(None)
    assert (_head(states, student, teacher, truncated).divergence < 0).any()  # what the bucket is for


def one_token_renormalised(start) -> None:
    status, said, started, _ = start("opd.divergence={support: topk, k: 1, tail: renorm}")
    assert status == 2 and "k=1 with tail=renorm" in said and "gradient 0" in said and not started


def _head(states, student, teacher, branch):
    labels, weights = torch.zeros(len(states), dtype=torch.long), torch.full((len(states),), 1 / len(states))
    return divergence_head(
        states,
        student,
        states.detach(),
        teacher,
        labels=labels,
        token_weight=weights,
        kind=branch.kind,
        kind_args=branch.kind_args,
        mode="forward",
    )


def _loss(states, student, teacher, branch):
    return _head(states, student, teacher, branch).loss
