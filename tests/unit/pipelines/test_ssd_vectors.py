# SPDX-License-Identifier: Apache-2.0
"""SSD's target and loss against the reference numbers, and the properties that the method rests on."""

import itertools

import numpy as np
import pytest
import torch

from opd_ext.estimators import pass_at_k
from opd_ext.pipelines.problems import statement_key
from opd_ext.pipelines.ssd.target import are_short, is_stub, kept_mass, split_loss, truncated_distribution

# The numbers were made in float64; float32 carries 24 bits through a softmax over at most 32 entries.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
DTYPES = list(TOLERANCE)


@pytest.fixture(scope="module")
def golden(vectors):
    return vectors("ssd")


def _logits(golden, name, dtype):
    return torch.tensor(golden["logits"][name], dtype=dtype)


def _close(found, expected, dtype):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


def _support(q):
    return (q > 0).nonzero().squeeze(-1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_distribution(golden, dtype):
    for case in golden["distributions"]:
        logits = _logits(golden, case["logits"], dtype)
        q = truncated_distribution(logits, case["T"], case["top_k"], case["top_p"])
        assert _support(q) == case["support"], case
        _close(q, case["q"], dtype)
        _close(kept_mass(logits, q), case["base_kept_mass_T1"], dtype)
        if case["T"] > 0:
            _close(kept_mass(logits / case["T"], q), case["base_kept_mass_tempered"], dtype)
        # Inverting the distribution function is what a sampler does with a uniform number.
        draws = torch.searchsorted(q.double().cumsum(-1), torch.tensor(golden["uniforms"], dtype=torch.float64))
        assert draws.tolist() == case["draws"]


def test_ties_survive_top_k(golden):
    case = golden["tie_case"]
    q = truncated_distribution(_logits(golden, case["logits"], torch.float64), case["T"], case["top_k"], case["top_p"])
    assert q.tolist() == pytest.approx(case["q"], abs=1e-12)


def test_top_p_sees_what_top_k_left(golden):
    case = golden["filter_order_case"]
    logits = _logits(golden, case["logits"], torch.float64)
    both = truncated_distribution(logits, case["T"], case["top_k"], case["top_p"])
    alone = truncated_distribution(logits, case["T"], 0, case["top_p"]) * truncated_distribution(
        logits, case["T"], case["top_k"]
    )
    assert _support(both) == case["support_top_k_then_top_p"]
    assert _support(alone) == case["support_independent_filters"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_of_the_loss_and_its_gradient(golden, dtype):
    for case in golden["loss_split"]:
        target = truncated_distribution(_logits(golden, case["logits"], dtype), case["T"], case["top_k"], case["top_p"])
        student = torch.tensor(case["student_logits"], dtype=dtype, requires_grad=True)
        split = split_loss(student, target, case["T"])
        for name, value in zip(
            case["parts"], (split.support, split.shape, split.alignment, split.constant), strict=True
        ):
            assert value.item() == pytest.approx(case["parts"][name], abs=10 * TOLERANCE[dtype]), name
        assert split.total.item() == pytest.approx(case["cross_entropy"], abs=10 * TOLERANCE[dtype])
        _close(kept_mass(student.detach(), target), case["kept_mass"], dtype)
        split.total.backward()
        # The identity holds for any student, so the gradient of the sum is that of the cross entropy.
        torch.testing.assert_close(
            student.grad.double(),
            torch.tensor(case["grad_logits"], dtype=torch.float64),
            atol=10 * TOLERANCE[dtype],
            rtol=0,
        )


def test_temperatures_multiply(golden):
    for case in golden["composition"]:
        logits = _logits(golden, case["logits"], torch.float64)
        fitted = truncated_distribution(logits, case["T_train"], case["top_k"], case["top_p"]).log()
        assert _support(fitted.exp()) == case["support"]
        _close(truncated_distribution(fitted, case["T_eval"]), case["student_at_T_eval"], torch.float64)
        on_support = (logits / case["T_eff"]).softmax(-1)[case["support"]].sum()
        _close(on_support, case["base_mass_on_support_at_T_eff"], torch.float64)


def test_plain_sampling_is_a_fixed_point(golden):
    logits = _logits(golden, "random32", torch.float64).requires_grad_()
    target = truncated_distribution(logits.detach(), 1.0)
    split = split_loss(logits, target, 1.0)
    split.total.backward()
    assert split.total.item() == pytest.approx(golden["fixed_point"]["cross_entropy"], abs=1e-12)
    assert logits.grad.abs().max() <= golden["fixed_point"]["max_abs_grad"] + 1e-16  # the rounding of one softmax


def test_lock_and_fork(golden):
    case = golden["lock_fork"]
    good = case["good_fork_tokens"]
    lock, fork = (_logits(golden, name, torch.float64) for name in ("lock", "fork"))
    targets = [truncated_distribution(x, case["T_train"], case["top_k"], case["top_p"]).log() for x in (lock, fork)]
    assert [_support(target.exp()) for target in targets] == [case["lock_support"], case["fork_support"]]
    for row in case["rows"]:
        for name, (at_lock, at_fork) in (("base", (lock, fork)), ("ideal_student", targets)):
            q_lock, q_fork = (truncated_distribution(x, row["T_eval"]) for x in (at_lock, at_fork))
            q_good = q_fork[good] / q_fork[good].sum()
            found = {
                "lock_correct": q_lock.max(),
                "fork_good_mass": q_fork[good].sum(),
                "fork_entropy": -torch.special.xlogy(q_good, q_good).sum(),
            }
            for key, value in found.items():
                assert value.item() == pytest.approx(row[name][key], abs=1e-12), (row["T_eval"], name, key)


def test_filter_and_duplicates(golden):
    for case in golden["filter"]:
        assert is_stub(case["text"]) == case["drop"], case
    for case in golden["dedup"]:
        assert statement_key(case["text"]) == case["key"]


# As generate.py of apple/ml-ssd has it: of the n sorted lengths of what is not empty, that at int(n * percent / 100) is
# the least that stays.
@pytest.mark.parametrize(
    ("lengths", "share", "dropped"),
    [
        (range(1, 21), 0.1, [1, 2]),
        (range(1, 20), 0.1, [1]),
        ([5, 5, 5, 9], 0.5, []),
        ([0, 0, 3, 4, 5, 6], 0.25, [0, 0, 3]),
        ([3, 4], 0.0, []),
        ([0, 0], 0.5, []),
        (range(100), 0.29, range(29)),
    ],
)
def test_the_shortest_responses_are_those_that_the_release_drops(lengths, share, dropped):
    texts = [f" {'x' * length}\n" for length in lengths]
    assert [n for n, short in zip(lengths, are_short(texts, share), strict=True) if short] == list(dropped)


def test_pass_at_k(golden):
    for case in golden["pass_at_k"]:
        assert pass_at_k(case["n"], case["c"], case["k"]) == pytest.approx(case["value"], abs=1e-12)


@pytest.mark.parametrize("kind", ["instruct", "thinking"])
def test_learning_rate_of_verl_is_the_published_one(golden, kind):
    from verl.utils.torch_functional import get_cosine_schedule_with_warmup

    case = golden["lr"][kind]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=case["peak"])
    schedule = get_cosine_schedule_with_warmup(
        optimizer, case["warmup"], case["total"], min_lr_ratio=case["floor"] / case["peak"]
    )
    for step, expected in case["values"].items():
        assert case["peak"] * schedule.lr_lambdas[0](int(step)) == pytest.approx(expected, rel=1e-9), step


def test_batched_equals_single():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 50, generator=generator)
    batched = truncated_distribution(logits, 1.6, 20, 0.8)
    for i, j in itertools.product(range(3), range(4)):
        assert torch.equal(batched[i, j], truncated_distribution(logits[i, j], 1.6, 20, 0.8))


@pytest.mark.parametrize("setting", [{"temperature": -0.5}, {"temperature": 1.0, "top_p": 0.0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match="temperature is -0.5|top_p is 0"):
        truncated_distribution(torch.zeros(4), **setting)


def test_vllm_cuts_where_the_formula_says():
    """The support of the served sampler's own filter, not of a formula that resembles it."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    for temperature, k, p in ((1.6, 20, 0.8), (0.7, 5, 0.95), (1.0, 0, 0.9), (2.0, 10, 1.0)):
        ours = truncated_distribution(logits, temperature, k, p) > 0
        ks = torch.full((64,), k or 40)
        theirs = apply_top_k_top_p(logits.clone() / temperature, ks, torch.full((64,), p)) > -np.inf
        assert torch.equal(ours, theirs)
