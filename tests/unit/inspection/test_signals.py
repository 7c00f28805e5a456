# SPDX-License-Identifier: Apache-2.0
"""What the map shows of a token is what the loss does to it: against autograd over all logits."""

import pytest
import torch

from opd_ext.divergence.config import Branch
from opd_ext.divergence.sampled import Surrogate
from opd_ext.inspection.signals import likeliest, method_signals
from opd_ext.inspection.survey import forks
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.objective import Objective
from opd_ext.teacher.kinds import TeacherOutput

LENGTHS, V, H = [5, 1, 7], 11, 6
N = sum(LENGTHS)


@pytest.fixture
def made():
    torch.manual_seed(0)
    batch = MicroBatch(
        labels=torch.randint(0, V, (N,)),
        mask=(torch.rand(N) > 0.2).long(),
        lengths=torch.tensor(LENGTHS),
        num_tokens=40,
        num_sequences=6,
        num_micro_batches=1,
        dp_size=1,
        rollout_log_probs=-3.0 * torch.rand(N, dtype=torch.float64),
        sample_mask=torch.ones(3, dtype=torch.bool),
        span_label=torch.randint(0, 3, (N,)),
        distillation_weight=0.7,
    )
    hidden, teacher = (torch.randn(N, H, dtype=torch.float64) for _ in range(2))
    weight, head = (torch.randn(V, H, dtype=torch.float64) for _ in range(2))
    return batch, hidden, weight, TeacherOutput(list(teacher.split(LENGTHS)), head)


OBJECTIVES = {
    "crisp": Objective(),
    "opsd": Objective((Branch("forward_kl", {"entry_clip": 0.05, "temperature": 1.1}),)),
    "sdpo": Objective(
        (Branch("topk_jsd", {"beta": 0.5, "k": 4, "support": "student", "tail": "bucket"}),),
        importance_cap=2.0, rollout_cap=2.0, reduction="seq-mean-token-mean",
    ),
    "opd": Objective((), Surrogate(), rollout_cap=5.0, reduction="seq-mean-token-mean", temperature=0.7),
    "iw_opd": Objective((), Surrogate(), credit="position", reduction="seq-mean-token-mean"),
    "tip": Objective(credit="tip", credit_args={"share": 0.5}),
    "trace": Objective((Branch("forward_kl", label=1),), credit="spans", active_spans=frozenset({1})),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_push_is_the_gradient_of_the_sampled_token_s_logit(made, name):
    batch, hidden, weight, teacher = made
    objective = OBJECTIVES[name]
    logits = (hidden @ weight.T).requires_grad_()
    # Logits as hidden states of a model whose head is the identity: the same loss, and its gradient for every logit.
    terms = objective(batch, logits, torch.eye(V, dtype=torch.float64), torch.cat(teacher.rows), teacher.head)
    (gradient,) = torch.autograd.grad(terms.loss, logits)
    found = method_signals(objective, batch, hidden, weight, teacher)
    expected = -gradient.gather(1, batch.labels[:, None])[:, 0]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.push.double(), expected, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(found.terms.loss, terms.loss.detach(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_times_terms_add_up_to_the_loss(made, name):
    batch, hidden, weight, teacher = made
    terms = method_signals(OBJECTIVES[name], batch, hidden, weight, teacher).terms
    assert terms.loss != 0
    torch.testing.assert_close((terms.weight * terms.per_token).sum().double(), terms.loss, atol=1e-9, rtol=1e-6)
    assert (terms.weight[~terms.distilled] == 0).all()


def test_a_policy_term_pushes_too(made):
    batch, hidden, weight, teacher = made
    plain, pushed = (
        method_signals(Objective(), batch, hidden, weight, teacher, policy=policy)
        for policy in (None, lambda log_prob, entropy, shape: -3.0 * log_prob[2])
    )
    chance = torch.softmax(hidden[2] @ weight.T, -1)[batch.labels[2]]
    difference = (pushed.push - plain.push).double()
    torch.testing.assert_close(difference[2], 3.0 * (1 - chance), atol=1e-6, rtol=1e-5)
    assert difference[torch.arange(N) != 2].abs().max() < 1e-6


def test_a_reference_that_is_extrapolated_from_takes_part(made):
    batch, hidden, weight, teacher = made
    objective = Objective((), Surrogate(extrapolation=1.5))
    reference = hidden + 0.1
    found = method_signals(objective, batch, hidden, weight, teacher, reference)
    expected = objective(batch, hidden, weight, torch.cat(teacher.rows), teacher.head, reference_hidden=reference)
    torch.testing.assert_close(found.terms.loss, expected.loss, atol=1e-12, rtol=1e-9)


def test_the_overlap_of_a_model_with_itself_is_whole(made):
    batch, hidden, weight, _ = made
    itself = TeacherOutput(list(hidden.split(LENGTHS)), weight)
    assert method_signals(Objective(), batch, hidden, weight, itself).overlap.tolist() == [1.0] * N
    opposite = TeacherOutput([-rows for rows in hidden.split(LENGTHS)], weight)
    overlap = method_signals(Objective(), batch, hidden, weight, opposite).overlap
    assert overlap.min() >= 0.9  # ten of eleven tokens share at least nine
    assert (overlap < 1).any()


def test_the_likeliest_tokens_are_in_order_with_their_probabilities():
    weight = torch.eye(4)
    found = likeliest(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), weight, 2.0, 3)
    assert found.ids.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(found.probabilities[0], torch.softmax(torch.tensor([1.0, 3, 2, 0]) / 2, 0)[[1, 2, 0]])
    assert likeliest(torch.zeros(0, 4), weight, 1.0, 9).ids.shape == (0, 4)


def test_forks_are_the_trained_tokens_of_highest_entropy():
    entropy = torch.tensor([0.1, 5.0, 0.3, 0.2, 0.4, 0.0]).numpy()
    assert forks(entropy, [1, 0, 1, 1, 1, 1]).tolist() == [False, False, False, False, True, False]
    assert forks(entropy[:0], []).tolist() == []
