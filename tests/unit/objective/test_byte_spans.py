# SPDX-License-Identifier: Apache-2.0
"""A teacher of another tokenizer: spans of text in the place of tokens, in value and gradient."""

import dataclasses
import itertools

import pytest
import torch

from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.byte_spans import SpanScores, joined, score, unspoken
from opd_ext.objective.chunks import Side
from opd_ext.objective.lessons import Lesson, taught
from opd_ext.objective.metrics import means
from opd_ext.objective.objective import Objective

LENGTHS = [3, 5, 2, 4]
N, V, H = sum(LENGTHS), 11, 6
# Spans of one, two and three tokens; the last response is read no further than its second token.
NUMBERS = [[0, 0, 1], [0, 1, 1, 1, 2], [0, 1], [0, 1, -1, -1]]


def _tensor(*shape, seed):
    return 0.4 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _batch(**changes) -> MicroBatch:
    random = torch.Generator().manual_seed(7)
    batch = MicroBatch(
        labels=torch.randint(0, V, (N,), generator=random),
        mask=torch.tensor([1.0] * 4 + [0.0] + [1.0] * (N - 5), dtype=torch.float64),
        lengths=torch.tensor(LENGTHS),
        num_tokens=N,
        num_sequences=len(LENGTHS),
        num_micro_batches=1,
        dp_size=1,
        old_log_probs=-2.4 - 0.1 * torch.rand(N, generator=random, dtype=torch.float64),
        sample_mask=torch.tensor([True, True, False, True]),
    )
    return dataclasses.replace(batch, **changes)


def _spans(samples=(0, 1, 2, 3)) -> SpanScores:
    parts = []
    for i in samples:
        number = NUMBERS[i]
        count = max(number) + 1
        said = -3.0 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(20 + i))
        own = torch.tensor(number)
        covered = own >= 0
        parts.append(SpanScores(own, said[own] * covered, 0.5 * covered.double()))
    return joined(parts)


def _computed(objective, batch, lessons):
    hidden, weight = (_tensor(*shape, seed=s).requires_grad_() for s, shape in ((0, (N, H)), (1, (V, H))))
    terms = taught(batch, hidden, weight, lessons)
    terms.loss.backward()
    return terms, hidden.grad, weight.grad


def test_spans_of_one_token_are_a_teacher_of_the_same_tokenizer():
    """In value, gradient and metrics: to rounding in float64, since the sums of one number are that number."""
    objective, said = (
        Objective(surrogate=Surrogate(), credit="position", credit_args={"gamma": 0.5}),
        _tensor(N, seed=5),
    )
    samples = list(range(len(LENGTHS)))
    alike = _batch(teacher_log_prob=said - 2.0)
    expected, *grads = _computed(objective, alike, [Lesson(objective, samples, served=True)])
    alone = SpanScores(torch.arange(N), said - 2.0, torch.zeros(N, dtype=torch.float64))
    found, *mine = _computed(objective, _batch(), [Lesson(objective, samples, byte_spans=alone)])
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for ours, theirs in zip(mine, grads, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    said = [means(objective.sums(_batch(), terms)) for terms in (found, expected)]
    assert {k: v for k, v in said[0].items() if k in said[1]} == pytest.approx(said[1], rel=1e-12)


def test_every_token_has_the_ratio_of_its_whole_span_as_its_advantage():
    """Written out per token: -A r, r the ratio to the old policy (no clip is reached), A of whole spans."""
    objective, batch, spans = Objective(surrogate=Surrogate(clip=50.0, dual_clip=1e9)), _batch(), _spans()
    found, *grads = _computed(objective, batch, [Lesson(objective, [0, 1, 2, 3], byte_spans=spans)])
    hidden, weight = (_tensor(*shape, seed=s).requires_grad_() for s, shape in ((0, (N, H)), (1, (V, H))))
    log_prob = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), batch.labels]
    loss, first, divergences, distilled = 0.0, 0, [], 0
    for sample, numbers in enumerate(NUMBERS):
        for j, number in enumerate(numbers):
            if number < 0 or not batch.sample_mask[sample] or not batch.mask[first + j]:
                continue
            mates = [first + k for k, other in enumerate(numbers) if other == number]
            advantage = spans.log_prob[first + j] - sum(batch.old_log_probs[k] for k in mates)
            loss = loss - advantage * (log_prob[first + j] - batch.old_log_probs[first + j]).exp() / N
            apart = sum(log_prob[k] for k in mates).item() - spans.log_prob[first + j].item()
            divergences.append(apart / len(mates))
            distilled += 1
        first += len(numbers)
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for mine, expected in zip(grads, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-12)
    assert found.distilled.sum() == distilled == 9
    said = means(objective.sums(batch, found))
    assert said["divergence"] == pytest.approx(sum(divergences) / distilled, rel=1e-12)
    assert said["teacher_entropy"] == pytest.approx(0.5)


def test_the_gradient_is_that_of_the_kl_between_texts():
    """Two tokens of the student's are one of the teacher's: over all texts, the mean gradient is the exact KL's."""
    size, objective = 4, Objective(surrogate=Surrogate())
    teacher = torch.randn(size * size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(-1)

    def log_probs(first, second):  # of the first token, and of the second behind each first one
        return first.log_softmax(-1), second.log_softmax(-1)

    weights = [_tensor(*shape, seed=s).requires_grad_() for s, shape in ((3, (size,)), (4, (size, size)))]
    begin, after = log_probs(*weights)
    texts = list(itertools.product(range(size), repeat=2))
    joint = torch.stack([begin[a] + after[a, b] for a, b in texts])
    (joint.exp() * (joint - teacher)).sum().backward()
    exact = [weight.grad.clone() for weight in weights]
    found = [torch.zeros_like(weight) for weight in weights]
    for text, (a, b) in enumerate(texts):
        leaves = [weight.detach().clone().requires_grad_() for weight in weights]
        rows = torch.stack([leaves[0], leaves[1][a]])  # the head is the identity, so hidden states are logits
        spans = SpanScores(torch.tensor([0, 0]), teacher[text].expand(2), torch.zeros(2, dtype=torch.float64))
        batch = MicroBatch(torch.tensor([a, b]), torch.ones(2), torch.tensor([2]), 1, 1, 1, 1)
        lesson = Lesson(objective, [0], byte_spans=spans)
        taught(batch, rows, torch.eye(size, dtype=torch.float64), [lesson]).loss.backward()
        for total, leaf in zip(found, leaves, strict=True):
            total += joint[text].exp().detach() * leaf.grad
    for mine, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-10)


def test_a_teacher_s_tokens_are_summed_by_span():
    log_prob, entropy = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0.2, 0.4, 1.0])
    found = score(log_prob, entropy, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1, 2, -1]))
    assert found.number.tolist() == [0, 1, 1, -1, -1]  # a span that the teacher has not is in none
    assert found.log_prob.tolist() == pytest.approx([-3.0, -4.0, -4.0, 0.0, 0.0])
    assert found.entropy.tolist() == pytest.approx([0.3, 1.0, 1.0, 0.0, 0.0])


def test_responses_keep_their_spans_apart():
    one = score(torch.tensor([-1.0]), torch.tensor([0.1]), torch.tensor([0]), torch.tensor([0, 0]))
    both = joined([one, unspoken(2), one])
    assert both.covered.tolist() == [True, True, False, False, True, True]
    assert len({*both.number.tolist()}) == 3 and both.number[0] != both.number[4]
    assert both.total(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])).tolist() == [3.0, 3.0, 0.0, 0.0, 48.0, 48.0]


def test_beside_a_teacher_of_the_same_tokenizer_each_keeps_its_samples():
    objective, batch = Objective(surrogate=Surrogate()), _batch()
    rows, head = _tensor(N, H, seed=8), _tensor(V, H, seed=9)
    there = [*range(3, 10)]
    lessons = [
        Lesson(objective, [0, 3], byte_spans=_spans((0, 3))),
        Lesson(objective, [1, 2], Side(rows[there], head)),
    ]
    found, *grads = _computed(objective, batch, lessons)
    apart = [
        _computed(objective, dataclasses.replace(batch, sample_mask=batch.sample_mask & keep), [lesson])
        for keep, lesson in (
            (torch.tensor([True, False, False, True]), Lesson(objective, [0, 1, 2, 3], byte_spans=_spans())),
            (torch.tensor([False, True, True, False]), Lesson(objective, [0, 1, 2, 3], Side(rows, head))),
        )
    ]
    assert found.loss.item() == pytest.approx(sum(terms.loss.item() for terms, *_ in apart), rel=1e-12)
    for mine, *others in zip(grads, *(own for _, *own in apart), strict=True):
        torch.testing.assert_close(mine, sum(others), atol=1e-12, rtol=1e-12)
