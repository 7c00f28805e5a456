# SPDX-License-Identifier: Apache-2.0
"""A teacher of whom K tokens are known is compared as one whose logits are at hand, and as a dense sum by hand."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from opd_ext.divergence import TopK, known_topk_divergence
from opd_ext.divergence.config import Branch
from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.chunks import Side
from opd_ext.objective.head import divergence_head
from opd_ext.objective.lessons import Lesson, taught
from opd_ext.objective.objective import Objective

N, V, H, K = 29, 53, 8, 6
KINDS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}}
TAILS = ("bucket", "renorm", "none")
CASES = [*itertools.product(KINDS, TAILS)]


def dense(z: Tensor, w: Tensor, ids: Tensor, kind: str, tail: str, beta: float = 0.0, clip=None, temperature=1.0):
    """The divergence from whole logits, one token after the other, in plain float64 probabilities."""
    values = []
    for row in range(len(z)):
        q, p = ((logits[row].double() / temperature).softmax(-1) for logits in (z, w))
        inside = ids[row].tolist()
        outside = [v for v in range(z.shape[1]) if v not in inside]
        q_in, p_in = q[inside], p[inside]
        if tail == "renorm":
            q_in, p_in = q_in / q_in.sum(), p_in / p_in.sum()
        elif tail == "bucket":
            q_in, p_in = (torch.cat([each[inside], each[outside].sum()[None]]) for each in (q, p))
        m = beta * p_in + (1 - beta) * q_in
        terms = {
            "forward_kl": p_in * (p_in / q_in).log(),
            "reverse_kl": q_in * (q_in / p_in).log(),
            "jsd": beta * p_in * (p_in / m).log() + (1 - beta) * q_in * (q_in / m).log(),
        }[kind]
        values.append((terms if clip is None else terms.clamp(max=clip)).sum())
    return torch.stack(values)


class Problem:
    """Random hidden states; the teacher's logits are its alone, and what it tells of them is its K likeliest."""

    def __init__(self, dtype=torch.float64, k=K, sharpness=1.0, seed=5):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.teacher_weight = (torch.randn(V, H, generator=generator, dtype=torch.float64) * sharpness).to(dtype)
        self.teacher_hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(V, (N,), generator=generator)
        self.token_weight = torch.rand(N, generator=generator, dtype=torch.float64).to(dtype)
        self.token_weight[::4] = 0
        self.known = self.told(k)

    def told(self, k: int) -> TopK:
        log_probs, ids = self.teacher_logits.log_softmax(-1).topk(k)
        return TopK(ids, log_probs)

    @property
    def teacher_logits(self):
        return self.teacher_hidden @ self.teacher_weight.T

    def expected(self, kind: str, tail: str, **options):
        """Value and gradients in float64, from the numbers that the problem has in its own dtype."""
        hidden, weight = (each.detach().double().requires_grad_() for each in (self.hidden, self.weight))
        teacher = self.teacher_hidden.double() @ self.teacher_weight.double().T
        per_token = dense(hidden @ weight.T, teacher, self.known.ids, kind, tail, **options)
        return per_token, *torch.autograd.grad((self.token_weight.double() * per_token).sum(), (hidden, weight))


def close(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize(("kind", "tail"), CASES)
# In float32 a term is rounded to some 1e-7 of values up to 10.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradient_are_those_of_the_dense_sum(kind, tail, mode, dtype, tolerance):
    # Of a bucket that the teacher leaves almost empty float32 does not know the mass; see the test of that below.
    problem = Problem(dtype, sharpness=0.3 if dtype == torch.float32 else 1.0)
    out = divergence_head(
        problem.hidden,
        problem.weight,
        labels=problem.labels,
        token_weight=problem.token_weight,
        kind=f"topk_{kind}",
        kind_args={"k": K, "tail": tail, "support": "teacher", **KINDS[kind]},
        known=problem.known,
        chunk_size=7,
        mode=mode,
    )
    per_token, *gradients = problem.expected(kind, tail, **KINDS[kind])
    close(out.divergence, per_token, tolerance)
    found = torch.autograd.grad(out.loss, (problem.hidden, problem.weight))
    for ours, theirs in zip(found, gradients, strict=True):
        close(ours, theirs, tolerance)
    assert out.teacher_entropy is None and out.teacher_log_prob is None


def test_a_temperature_is_exact_on_the_renormalised_support_and_refused_elsewhere():
    problem = Problem()
    student = problem.hidden @ problem.weight.T
    per_token, *_ = problem.expected("forward_kl", "renorm", temperature=1.7)
    close(known_topk_divergence(student, problem.known, "forward_kl", "renorm", temperature=1.7), per_token, 1e-10)
    for tail in ("bucket", "none"):
        with pytest.raises(ValueError, match="temperature=1.7: set it to 1, or tail='renorm'"):
            known_topk_divergence(student, problem.known, "forward_kl", tail, temperature=1.7)
    with pytest.raises(ValueError, match="Unknown tail 'rest'"):
        known_topk_divergence(student, problem.known, "forward_kl", "rest")


@pytest.mark.parametrize(("kind", "tail"), CASES)
def test_a_clip_bounds_the_terms_of_the_support(kind, tail):
    problem = Problem()
    options = {"k": K, "tail": tail, "support": "teacher", "entry_clip": 0.02, **KINDS[kind]}
    heads = [
        divergence_head(
            problem.hidden, problem.weight, *teacher, labels=problem.labels, token_weight=problem.token_weight,
            kind=f"topk_{kind}", kind_args=options, known=known,
        )
        for teacher, known in (((), problem.known), ((problem.teacher_hidden, problem.teacher_weight), None))
    ]  # fmt: skip
    per_token, *_ = problem.expected(kind, tail, clip=0.02, **KINDS[kind])
    close(heads[0].divergence, per_token, 1e-10)
    torch.testing.assert_close(heads[0].clipped, heads[1].clipped)
    assert heads[0].clipped.max() > 0


def test_more_tokens_than_a_divergence_asks_for_change_nothing():
    """Several spans may ask for several k, and the servers are asked once, for the largest."""
    problem = Problem()
    student = problem.hidden @ problem.weight.T
    expected = known_topk_divergence(student, problem.known, "forward_kl")
    out = divergence_head(
        problem.hidden, problem.weight, token_weight=problem.token_weight, kind="topk_forward_kl",
        kind_args={"k": K}, known=problem.told(2 * K),
    )  # fmt: skip
    torch.testing.assert_close(out.divergence, expected.detach())


@pytest.mark.parametrize("sharpness", [3.0, 30.0])
def test_in_float32_a_small_tail_costs_reverse_kl_alone_its_last_digits(sharpness):
    """The mass of the bucket is what float32 log-probs leave of 1: reverse KL divides by it, the others do not."""
    problem = Problem(torch.float32, sharpness=sharpness)
    student = (problem.hidden @ problem.weight.T).detach()
    teacher = problem.teacher_hidden.double() @ problem.teacher_weight.double().T
    told = TopK(problem.known.ids, teacher.log_softmax(-1).gather(-1, problem.known.ids).float())
    tails = [1 - logits.double().softmax(-1).gather(-1, told.ids).sum(-1) for logits in (student, teacher)]
    assert tails[1].min() < 1e-4
    kept = tails[1] > 2e-7  # below, both sides count 1e-7, SDPO's floor
    for kind in KINDS:
        found = known_topk_divergence(student, told, kind, **KINDS[kind]).double()
        error = (found - dense(student, teacher, told.ids, kind, "bucket", **KINDS[kind])).abs()[kept]
        allowed = 1e-5 * torch.ones_like(error)
        if kind == "reverse_kl":
            allowed += 2.5e-7 * (tails[0] / tails[1])[kept]
        assert (error <= allowed).all(), (kind, error.max())


def micro_batch(problem: Problem, **more) -> MicroBatch:
    lengths = torch.tensor([9, 8, 12])
    mask = torch.ones(N, dtype=torch.bool)
    mask[::5] = False
    return MicroBatch(problem.labels, mask, lengths, int(mask.sum()), 3, 1, 1, **more)


def gradients(problem, terms):
    return torch.autograd.grad(terms.loss, (problem.hidden, problem.weight))


def same(mine, other, problem, names=("divergence", "weight", "per_token", "distilled")):
    torch.testing.assert_close(mine.loss, other.loss)
    for ours, theirs in zip(gradients(problem, mine), gradients(problem, other), strict=True):
        torch.testing.assert_close(ours, theirs)
    for name in names:
        torch.testing.assert_close(getattr(mine, name), getattr(other, name))


@pytest.mark.parametrize("credit", ["uniform", "tip"])
@pytest.mark.parametrize(("kind", "tail"), CASES)
def test_the_loss_is_that_of_the_same_teacher_beside_the_student(kind, tail, credit):
    """Both ways through the head: weights that are known beforehand, and a credit that reads the divergence."""
    problem, options = Problem(), {"k": K, "tail": tail, "support": "teacher", **KINDS[kind]}
    objective = Objective((Branch(f"topk_{kind}", options),), credit=credit)
    apart = objective(micro_batch(problem, teacher_topk=problem.known), problem.hidden, problem.weight)
    beside = objective(
        micro_batch(problem), problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight
    )
    same(apart, beside, problem)
    sums = objective.sums(micro_batch(problem), apart)
    assert not {name for name in sums if name.startswith("teacher")}, "what is not known is not reported"
    assert "divergence:sum" in sums and "distilled_student_entropy:sum" in sums


def test_spans_have_divergences_of_their_own():
    problem = Problem()
    labels = torch.arange(N) % 3
    objective = Objective(
        (Branch("topk_forward_kl", {"k": K}, 1), Branch("topk_reverse_kl", {"k": 3, "tail": "renorm"}, 2)),
        credit="spans",
    )
    sides = problem.hidden, problem.weight
    apart = objective(micro_batch(problem, teacher_topk=problem.known, span_label=labels), *sides)
    beside = objective(micro_batch(problem, span_label=labels), *sides, problem.teacher_hidden, problem.teacher_weight)
    same(apart, beside, problem)
    assert apart.teacher_entropy is None and beside.teacher_entropy is not None


@pytest.mark.parametrize("surrogate", [None, Surrogate()])
def test_one_of_several_teachers_may_tell_no_more(surrogate):
    """What not every teacher has is reported of none: a mean over some of the tokens would pass for that of all."""
    problem = Problem()
    topk = Objective((Branch("topk_jsd", {"k": K, "beta": 0.3}),))
    other = Objective((Branch("reverse_kl"),), surrogate=surrogate)
    side, rows = Side(problem.teacher_hidden, problem.teacher_weight), torch.arange(9, 17)
    own = Lesson(other, [1], Side(side.hidden[rows], side.weight))
    told = [Lesson(topk, [0, 2], weight=0.5, served=True), own]
    rest = torch.cat([torch.arange(9), torch.arange(17, N)])
    shown = [Lesson(topk, [0, 2], Side(side.hidden[rest], side.weight), weight=0.5), own]
    apart = taught(micro_batch(problem, teacher_topk=problem.known), problem.hidden, problem.weight, told)
    beside = taught(micro_batch(problem), problem.hidden, problem.weight, shown)
    same(apart, beside, problem)
    assert apart.teacher_log_prob is None and apart.teacher_entropy is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "reverse_kl", "kind_args": {}}, "topk_ divergence"),
        ({"kind_args": {"k": K, "support": "student"}}, "support='teacher'"),
        ({"kind_args": {"k": K + 1}}, "k=7 must lie between 1 and the 6"),
        ({"teacher": True}, "not both"),
        ({"rows": N - 1}, rf"\[{N}, K\]"),
    ],
)
def test_what_cannot_be_computed_of_it_is_refused(change, said):
    problem = Problem()
    change = {"kind": "topk_forward_kl", "kind_args": {"k": K}, "teacher": False, "rows": N} | change
    sides = (problem.teacher_hidden, problem.teacher_weight) if change.pop("teacher") else ()
    rows = change.pop("rows")
    known = TopK(problem.known.ids[:rows], problem.known.log_probs[:rows])
    with pytest.raises(ValueError, match=said):
        divergence_head(
            problem.hidden, problem.weight, *sides, token_weight=problem.token_weight, known=known, **change
        )


def test_rows_that_nobody_trains_may_hold_anything():
    """verl fills a batch up with rows of zeros: K log-probs of 0 are no distribution, and change no loss."""
    problem = Problem()
    objective = Objective((Branch("topk_reverse_kl", {"k": K}),))
    batch = micro_batch(problem, teacher_topk=problem.known)
    untrained = ~batch.mask
    filled = TopK(*(each.clone() for each in problem.known))
    filled.ids[untrained], filled.log_probs[untrained] = 0, 0.0
    sides = problem.hidden, problem.weight
    same(
        objective(dataclasses.replace(batch, teacher_topk=filled), *sides),
        objective(batch, *sides),
        problem,
        ("weight",),
    )
