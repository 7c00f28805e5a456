# SPDX-License-Identifier: Apache-2.0
"""The chunked head equals a dense head under autograd, for any chunking, and keeps no [N, V] tensor."""

import functools
import itertools
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd_ext.divergence.divergences import entropy, get_divergence, log_probs, register_divergence
from opd_ext.objective import chunks
from opd_ext.objective.head import chunked_divergence, divergence_head

N, V, H, HT = 33, 47, 8, 5
KINDS = {
    "reverse_kl": {},
    "forward_kl": {"entry_clip": 0.05},
    "jsd": {"beta": 0.3, "temperature": 1.3},
    "topk_reverse_kl": {"k": 7},
}
# float64 differs by summation order alone. float32 adds the rounding of products of 8 to 47 terms. In
# bfloat16 the logits and their gradient are rounded to 8 bits on both paths, and the dense path rounds
# d_weight once, ours per chunk.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Problem:
    """Random hidden states and heads; a third of the token weights is zero."""

    def __init__(self, dtype=torch.float64, n=N):
        generator = torch.Generator().manual_seed(17)
        normal = functools.partial(torch.randn, generator=generator)
        self.hidden = normal(n, H).to(dtype).requires_grad_()
        self.weight = normal(V, H).to(dtype).requires_grad_()
        self.teacher_hidden = normal(n, HT).to(dtype)
        self.teacher_weight = normal(V, HT).to(dtype)
        self.labels = torch.randint(V, (n,), generator=generator)
        self.token_weight = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) > 1 / 3)
        if dtype == torch.float64:
            self.token_weight = self.token_weight.double()
        self.tolerance = TOLERANCE[dtype]

    @property
    def sides(self):
        return self.hidden, self.weight, self.teacher_hidden, self.teacher_weight

    def logits(self):
        return self.hidden @ self.weight.T, self.teacher_hidden @ self.teacher_weight.T

    def dense(self, kind, kind_args) -> tuple[Tensor, Tensor]:
        per_token = get_divergence(kind)(*self.logits(), **kind_args)
        return (self.token_weight * per_token).sum(), per_token

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def assert_close(self, actual, expected):
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(
            actual, expected, atol=self.tolerance * scale, rtol=self.tolerance, check_dtype=False
        )


@pytest.fixture(params=TOLERANCE, ids=str)
def problem(request):
    return Problem(request.param)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 7, N, 3 * N])
def test_value_and_gradients_equal_the_dense_head(problem, kind, chunk_size, mode):
    loss, per_token = problem.dense(kind, KINDS[kind])
    out = divergence_head(
        *problem.sides,
        token_weight=problem.token_weight,
        kind=kind,
        kind_args=KINDS[kind],
        chunk_size=chunk_size,
        mode=mode,
    )
    problem.assert_close(out.loss, loss)
    problem.assert_close(out.divergence, per_token)
    for ours, dense in zip(problem.gradients(2.0 * out.loss), problem.gradients(2.0 * loss), strict=True):
        assert ours.dtype == dense.dtype
        problem.assert_close(ours, dense)


def test_the_contract_function_is_the_head_without_diagnostics():
    problem = Problem()
    loss, per_token = chunked_divergence(*problem.sides, problem.token_weight, "jsd", chunk_size=5, beta=0.3)
    dense_loss, dense_per_token = problem.dense("jsd", {"beta": 0.3})
    problem.assert_close(loss, dense_loss)
    problem.assert_close(per_token, dense_per_token)
    assert loss.requires_grad and not per_token.requires_grad


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_diagnostics_have_their_own_temperature(problem, mode):
    out = divergence_head(
        *problem.sides,
        labels=problem.labels,
        token_weight=problem.token_weight,
        temperature=0.7,
        chunk_size=7,
        mode=mode,
    )
    problem.assert_close(out.divergence, problem.dense("reverse_kl", {})[1])
    for side, logits in zip(("student", "teacher"), problem.logits(), strict=True):
        chosen = log_probs(logits, 0.7).gather(-1, problem.labels[:, None])[:, 0]
        problem.assert_close(getattr(out, f"{side}_log_prob"), chosen)
        problem.assert_close(getattr(out, f"{side}_entropy"), entropy(logits, 0.7))
    assert out.student_log_prob.requires_grad == (mode == "recompute")
    assert not out.teacher_log_prob.requires_grad and not out.teacher_entropy.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 7, 3 * N])
def test_recompute_honours_the_upstream_gradient_of_every_term(problem, chunk_size):
    def objective(divergence, log_prob, entropies):
        weight = problem.token_weight
        return (weight * (log_prob.exp() + divergence.square())).sum() - 0.1 * entropies.mean()

    out = divergence_head(*problem.sides, labels=problem.labels, chunk_size=chunk_size, mode="recompute")
    ours = problem.gradients(objective(out.divergence, out.student_log_prob, out.student_entropy))
    student, teacher = problem.logits()
    chosen = log_probs(student).gather(-1, problem.labels[:, None])[:, 0]
    dense = problem.gradients(objective(get_divergence("reverse_kl")(student, teacher), chosen, entropy(student)))
    for a, b in zip(ours, dense, strict=True):
        problem.assert_close(a, b)


def test_policy_terms_need_no_teacher():
    problem = Problem()
    student = problem.hidden, problem.weight
    out = divergence_head(*student, labels=problem.labels, chunk_size=4, mode="recompute")
    assert out.loss is out.divergence is out.teacher_entropy is None
    dense = log_probs(problem.logits()[0]).gather(-1, problem.labels[:, None])[:, 0]
    advantage = torch.linspace(-1, 1, N, dtype=torch.float64)
    for a, b in zip(
        problem.gradients((advantage * out.student_log_prob).sum()),
        problem.gradients((advantage * dense).sum()),
        strict=True,
    ):
        problem.assert_close(a, b)


def test_tied_embedding_collects_both_gradients():
    problem, ids = Problem(), torch.arange(N) % V
    gradients = []
    for loss_of in (
        lambda h: chunked_divergence(h, *problem.sides[1:], problem.token_weight, chunk_size=5)[0],
        lambda h: (
            problem.token_weight
            * get_divergence("reverse_kl")(h @ problem.weight.T, problem.teacher_hidden @ problem.teacher_weight.T)
        ).sum(),
    ):
        embedded = torch.tanh(problem.weight[ids])
        gradients += torch.autograd.grad(loss_of(embedded), problem.weight)
    problem.assert_close(*gradients)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("hidden_grad, weight_grad", itertools.product([True, False], repeat=2))
def test_only_what_requires_a_gradient_gets_one(mode, hidden_grad, weight_grad, monkeypatch):
    problem = Problem()
    dense, _ = problem.dense("reverse_kl", {})
    expected = dict(zip(("hidden", "weight"), problem.gradients(dense), strict=True))
    problem.hidden.requires_grad_(hidden_grad)
    problem.weight.requires_grad_(weight_grad)
    products = []
    monkeypatch.setattr(chunks, "_accumulate", lambda *args, f=chunks._accumulate: (products.append(1), f(*args)))
    out = divergence_head(*problem.sides, token_weight=problem.token_weight, mode=mode)
    assert out.loss.requires_grad == (hidden_grad or weight_grad)
    if out.loss.requires_grad:
        out.loss.backward()
    for name, wanted in (("hidden", hidden_grad), ("weight", weight_grad)):
        gradient = getattr(problem, name).grad
        assert (gradient is not None) == wanted
        if wanted:
            problem.assert_close(gradient, expected[name])
    assert bool(products) == weight_grad, "a frozen head must not cost the product that forms its gradient"


def test_rows_with_zero_weight_change_nothing():
    problem, other = Problem(), Problem()
    masked = problem.token_weight == 0
    with torch.no_grad():
        other.hidden[masked] = 1e4
        other.teacher_hidden[masked] = -1e4
    for a, b in zip(
        (loss := chunked_divergence(*problem.sides, problem.token_weight)[0], *problem.gradients(loss)),
        (loss := chunked_divergence(*other.sides, other.token_weight)[0], *other.gradients(loss)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_blocks_without_weight_are_not_differentiated(monkeypatch):
    problem = Problem()
    problem.token_weight = torch.zeros(N, dtype=torch.float64)
    problem.token_weight[:3] = 1.0
    differentiated = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: (differentiated.append(1), original(*a))[1])
    loss, _ = chunked_divergence(*problem.sides, problem.token_weight, chunk_size=3)
    monkeypatch.undo()
    assert len(differentiated) == 1
    for a, b in zip(problem.gradients(loss), problem.gradients(problem.dense("reverse_kl", {})[0]), strict=True):
        problem.assert_close(a, b)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("empty", ["no rows", "no weight"])
def test_an_empty_batch_gives_zero_and_keeps_the_graph(mode, empty):
    """Every rank must run the same backward collectives, also one without a single response token."""
    problem = Problem(n=0 if empty == "no rows" else N)
    problem.token_weight.zero_()
    out = divergence_head(*problem.sides, labels=problem.labels, token_weight=problem.token_weight, mode=mode)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert not problem.hidden.grad.any() and not problem.weight.grad.any()
    assert problem.hidden.grad.shape == problem.hidden.shape


def test_a_user_divergence_needs_no_gradient_of_its_own():
    @register_divergence("half_squared_logit_gap")
    def half_squared_logit_gap(student_logits, teacher_logits, scale):
        return 0.5 * scale * (student_logits - teacher_logits).square().mean(dim=-1)

    problem = Problem()
    loss, _ = chunked_divergence(
        *problem.sides, problem.token_weight, "half_squared_logit_gap", chunk_size=4, scale=3.0
    )
    dense, _ = problem.dense("half_squared_logit_gap", {"scale": 3.0})
    for a, b in zip(problem.gradients(loss), problem.gradients(dense), strict=True):
        problem.assert_close(a, b)


def test_half_precision_products_do_not_halve_the_softmax():
    """Values of a bfloat16 head are those of its bfloat16 logits in float32 arithmetic, autocast or not."""
    problem = Problem(torch.bfloat16)
    student, teacher = (logits.detach().float() for logits in problem.logits())
    expected = get_divergence("reverse_kl")(student, teacher)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, per_token = chunked_divergence(*problem.sides, problem.token_weight)
        # Same logits and same arithmetic up to the order of sums in float32.
        torch.testing.assert_close(per_token, expected, rtol=1e-5, atol=1e-6)


def test_float32_products_on_request():
    problem, exact = Problem(torch.bfloat16), Problem(torch.float64)
    out = divergence_head(*problem.sides, token_weight=problem.token_weight, matmul_dtype=torch.float32)
    with torch.no_grad():
        for mine, theirs in zip(exact.sides, problem.sides, strict=True):
            mine.copy_(theirs)
    expected = get_divergence("reverse_kl")(*exact.logits())
    torch.testing.assert_close(out.divergence.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert problem.gradients(out.loss)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_nothing_of_size_n_times_v_is_saved(mode):
    problem, n = Problem(torch.float32), 400
    problem.hidden = problem.hidden.detach().repeat(n // N + 1, 1)[:n].requires_grad_()
    problem.teacher_hidden = problem.teacher_hidden.repeat(n // N + 1, 1)[:n]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(weakref.ref(t)), t)[1], lambda t: t):
        loss = divergence_head(*problem.sides, token_weight=torch.full((n,), 1.0 / n), mode=mode).loss
    kept = [tensor for reference in saved if (tensor := reference()) is not None]
    inputs_and_gradients = n * H + V * H + n * HT + V * HT + 10 * n
    assert 0 < sum(tensor.numel() for tensor in kept) <= inputs_and_gradients < n * V
    loss.backward()


def test_no_single_tensor_is_larger_than_a_chunk():
    class LargestTensor(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return out

    n, v, h = 256, 512, 4
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    with LargestTensor() as seen:
        teacher = torch.randn(n, h), torch.randn(v, h)
        loss, _ = chunked_divergence(hidden, weight, *teacher, torch.ones(n), chunk_size=16)
        loss.backward()
    assert seen.largest <= 16 * v


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"mode": "backward"}, "forward, recompute"),
        ({"kind": "kl"}, "allowed: .*reverse_kl"),
        ({"token_weight": None}, "recompute"),
        ({"token_weight": torch.ones(2)}, "align"),
        ({"teacher_weight": None}, "both"),
        ({"hidden": torch.randn(N, H + 1)}, r"\[N, H\]"),
    ],
)
def test_wrong_input_is_named(change, message):
    problem = Problem(torch.float32)
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    arguments = dict(zip(names, problem.sides, strict=True)) | {"token_weight": problem.token_weight} | change
    with pytest.raises(ValueError, match=message):
        divergence_head(**arguments)


@pytest.mark.parametrize("higher", ["student", "teacher"])
def test_heads_of_different_height_are_cut_to_the_common_rows(higher):
    """One tokenizer, other padding: the value and the gradients are those of the rows that both have."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4)
    teacher_hidden, teacher_weight, ones = torch.randn(5, 3), torch.randn(11, 3), torch.ones(5)
    short = 9
    cut = [weight[:short], teacher_weight] if higher == "teacher" else [weight, teacher_weight[:short]]
    own, theirs = cut[0].clone().requires_grad_(), cut[1]
    loss, per_token = chunked_divergence(hidden, own, teacher_hidden, theirs, ones, chunk_size=2)
    (gradient,) = torch.autograd.grad(loss, own)
    same = weight[:short].clone().requires_grad_()
    expected, each = chunked_divergence(hidden, same, teacher_hidden, teacher_weight[:short], ones, chunk_size=2)
    (wanted,) = torch.autograd.grad(expected, same)
    assert torch.equal(per_token, each) and torch.equal(gradient[:short], wanted)
    assert not gradient[short:].any(), "rows that only one has do not train"
