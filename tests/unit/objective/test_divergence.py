# SPDX-License-Identifier: Apache-2.0
"""What must hold for divergences on any logits, beside the reference numbers."""

import math

import pytest
import torch

from opd_ext.divergence.divergences import (
    clipped_fraction,
    divergence_names,
    entropy,
    forward_kl,
    get_divergence,
    jsd,
    log_probs,
    register_divergence,
    reverse_kl,
    topk_divergence,
)
from opd_ext.divergence.sampled import sampled_kl

FULL = {"reverse_kl": {}, "forward_kl": {}, "jsd": {"beta": 0.3}}


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(5)
    return [3.0 * torch.randn(50, 100, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def language_model_like():
    """Peaked teacher rows and a student close to them: the regime of self-distillation."""
    generator = torch.Generator().manual_seed(6)
    teacher = 12.0 * torch.randn(64, 200, generator=generator, dtype=torch.float64)
    return teacher + 0.3 * torch.randn(64, 200, generator=generator, dtype=torch.float64), teacher


@pytest.mark.parametrize("kind", FULL)
def test_non_negative_zero_only_between_equals_and_blind_to_shifts(logits, kind):
    student, teacher = logits
    divergence = get_divergence(kind)
    assert (divergence(student, teacher, **FULL[kind]) > 1e-3).all()
    shifted = student + torch.randn(50, 1, dtype=torch.float64)
    # A shifted softmax is the same distribution up to the rounding of the shift.
    torch.testing.assert_close(
        divergence(student, shifted, **FULL[kind]), torch.zeros(50, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_jsd_is_symmetric_under_exchange_of_sides_and_shares(logits):
    student, teacher = logits
    torch.testing.assert_close(jsd(student, teacher, 0.5), jsd(teacher, student, 0.5))
    torch.testing.assert_close(jsd(student, teacher, 0.3), jsd(teacher, student, 0.7))
    assert (jsd(student, teacher, 0.5) <= math.log(2)).all()


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5])
def test_jsd_refuses_the_ends_on_which_published_code_disagrees(logits, beta):
    with pytest.raises(ValueError, match="use reverse_kl or forward_kl"):
        jsd(*logits, beta)


@pytest.mark.parametrize("kind", FULL)
def test_gradients_are_the_published_formulas_and_sum_to_zero(logits, kind):
    student, teacher = logits
    student.requires_grad_()
    teacher.requires_grad_()
    (gradient,) = torch.autograd.grad(get_divergence(kind)(student, teacher, **FULL[kind]).sum(), student)
    logq, logp = log_probs(student).detach(), log_probs(teacher).detach()
    q, p, beta = logq.exp(), logp.exp(), 0.3
    logm = (beta * p + (1 - beta) * q).log()
    expected = {
        "reverse_kl": q * (logq - logp - (q * (logq - logp)).sum(-1, keepdim=True)),
        "forward_kl": q - p,
        "jsd": (1 - beta) * q * (logq - logm - (q * (logq - logm)).sum(-1, keepdim=True)),
    }[kind]
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(50, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [*FULL, "topk_forward_kl"])
def test_the_teacher_is_a_constant(logits, kind):
    student, teacher = (side.requires_grad_() for side in logits)
    kind_args = FULL.get(kind, {"k": 5})
    get_divergence(kind)(student, teacher, **kind_args).sum().backward()
    assert student.grad.any() and teacher.grad is None


@pytest.mark.parametrize("kind", FULL)
def test_temperature_divides_both_logits_and_nothing_else(logits, kind):
    student, teacher = logits
    tempered = get_divergence(kind)(student, teacher, temperature=1.7, **FULL[kind])
    torch.testing.assert_close(tempered, get_divergence(kind)(student / 1.7, teacher / 1.7, **FULL[kind]))


def test_the_expected_sampled_token_gradient_is_that_of_reverse_kl(logits):
    """REINFORCE with reward log p - log q, averaged over all tokens instead of one draw."""
    student, teacher = logits
    student.requires_grad_()
    logq, logp = log_probs(student), log_probs(teacher)
    surrogate = (logq.exp().detach() * sampled_kl(logq, logp, "k1").detach() * logq).sum()
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, student)[0] for loss in (surrogate, reverse_kl(student, teacher).sum()))
    )


def test_sampled_estimators_in_expectation(logits):
    logq, logp = (log_probs(side) for side in logits)
    exact = reverse_kl(*logits)
    torch.testing.assert_close((logq.exp() * sampled_kl(logq, logp, "k1")).sum(-1), exact)
    torch.testing.assert_close((logq.exp() * sampled_kl(logq, logp, "k3")).sum(-1), exact)
    assert (sampled_kl(logq, logp, "k3") >= 0).all()
    with pytest.raises(ValueError, match="k1, k2, k3"):
        sampled_kl(logq, logp, "k4")


def test_entropy_of_uniform_peaked_and_absent_rows():
    torch.testing.assert_close(entropy(torch.zeros(3, 64)), torch.full((3,), math.log(64)))
    peaked = torch.full((2, 64), -100.0)
    peaked[:, 7] = 100.0
    assert (entropy(peaked) < 0.01).all() and (entropy(peaked) >= 0).all()
    assert entropy(torch.zeros(0, 64)).shape == (0,)


@pytest.mark.parametrize("kind", FULL)
def test_no_rows_give_no_values_and_a_zero_sum(kind):
    assert get_divergence(kind)(torch.zeros(0, 9), torch.zeros(0, 9), **FULL[kind]).sum() == 0


@pytest.mark.parametrize("kind", FULL)
def test_half_precision_logits_are_upcast_before_the_softmax(logits, kind):
    student, teacher = (side.bfloat16() for side in logits)
    values = get_divergence(kind)(student, teacher, **FULL[kind])
    assert values.dtype == torch.float32
    # Against float64 arithmetic on the very same rounded logits, float32 keeps about six digits.
    exact = get_divergence(kind)(student.double(), teacher.double(), **FULL[kind])
    torch.testing.assert_close(values.double(), exact, rtol=2e-5, atol=2e-5)
    assert get_divergence(kind)(student, student, **FULL[kind]).abs().max() < 1e-6


def test_rounding_logits_to_half_precision_stays_within_five_hundredths(language_model_like):
    student, teacher = (side / 4 for side in language_model_like)
    rounded = reverse_kl(student.bfloat16(), teacher.bfloat16())
    # 8 bits of logits up to about 10: the tolerance that the reference numbers name for bfloat16 logits.
    torch.testing.assert_close(rounded.double(), reverse_kl(student, teacher), atol=5e-2, rtol=0)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("support", ["student", "teacher"])
def test_the_bucketed_divergence_grows_with_k_up_to_the_full_one(logits, kind, support):
    kind_args = FULL[kind]
    values = torch.stack([topk_divergence(*logits, k, kind, support, **kind_args) for k in (1, 2, 5, 20, 50, 100)])
    assert (values >= -1e-12).all() and (values.diff(dim=0) >= -1e-9).all()
    full = get_divergence(kind)(*logits, **kind_args)
    # Below 1e-7 the tail is not resolved (SDPO's floor), and k = V has no tail at all.
    torch.testing.assert_close(values[-1], full, atol=1e-9, rtol=0)
    assert (values <= full + 1e-9).all()


def test_a_small_support_is_enough_for_self_distillation(language_model_like):
    student, teacher = language_model_like
    full, bucketed = reverse_kl(student, teacher), topk_divergence(student, teacher, 4, "reverse_kl")
    assert full.mean() > 0
    assert (full - bucketed).mean() < max(5e-3, 0.05 * full.mean())


def test_a_diffuse_student_is_still_bounded_from_below(language_model_like):
    _, teacher = language_model_like
    student = teacher / 12.0
    assert (topk_divergence(student, teacher, 4, "reverse_kl") <= reverse_kl(student, teacher)).all()


def test_the_tail_bucket_pulls_mass_into_the_support_and_no_tail_pushes_it_out():
    """Student flat, teacher certain: descent must raise the teacher's choice."""
    teacher = torch.tensor([[8.0, 7.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    gradients = {}
    for tail in ("bucket", "none"):
        student = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
        topk_divergence(student, teacher, 2, "reverse_kl", tail=tail).sum().backward()
        gradients[tail] = student.grad[0]
    assert (gradients["bucket"][:2] < 0).all() and (gradients["bucket"][2:] > 0).all()
    raw = topk_divergence(torch.zeros(1, 6), teacher.float(), 2, "reverse_kl", tail="none")
    assert raw < 0, "the sum over the support alone is no divergence"


def test_renormalised_top_k_ignores_everything_outside_the_support(logits):
    student, teacher = logits
    outside = student.clone()
    ids = teacher.topk(5).indices
    outside += 4.0
    outside.scatter_(-1, ids, student.gather(-1, ids))
    same = [topk_divergence(side, teacher, 5, "forward_kl", tail="renorm") for side in (student, outside)]
    torch.testing.assert_close(*same)


def test_vocab_max_can_go_below_zero_and_token_scale_cannot(logits):
    assert (forward_kl(*logits, 1e-3) < 0).any()
    scaled = forward_kl(*logits, 0.05, "token_scale")
    torch.testing.assert_close(scaled, forward_kl(*logits).clamp(max=0.05))


def test_token_scale_keeps_the_direction_of_the_gradient(logits):
    student, teacher = logits
    student.requires_grad_()
    plain, scaled = (
        torch.autograd.grad(forward_kl(student, teacher, 0.05, mode).sum(), student)[0]
        for mode in ("none", "token_scale")
    )
    cosine = torch.nn.functional.cosine_similarity(plain, scaled, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(50, dtype=torch.float64))
    assert (scaled.norm(dim=-1) <= plain.norm(dim=-1)).all() and scaled.any()


def test_clipped_fraction_counts_terms_above_the_bound():
    student = torch.zeros(1, 4)
    teacher = torch.tensor([[5.0, 0.0, 0.0, 0.0]])
    assert clipped_fraction(student, teacher, "forward_kl", 0.05).item() == 0.25


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, t: topk_divergence(s, t, 0, "reverse_kl"), "vocabulary size 100"),
        (lambda s, t: topk_divergence(s, t, 101, "reverse_kl"), "vocabulary size 100"),
        (lambda s, t: topk_divergence(s, t, 3, "kl"), "forward_kl, jsd, reverse_kl"),
        (lambda s, t: topk_divergence(s, t, 3, "jsd"), "0 < beta < 1"),
        (lambda s, t: topk_divergence(s, t, 3, "reverse_kl", beta=0.5), "jsd only"),
        (lambda s, t: topk_divergence(s, t, 3, "reverse_kl", support="both"), "student, teacher"),
        (lambda s, t: topk_divergence(s, t, 3, "reverse_kl", tail="drop"), "bucket, renorm, none"),
        (lambda s, t: forward_kl(s, t, 0.05, "hard"), "vocab_max, token_scale, none"),
        (lambda s, t: forward_kl(s, t, 0.0), "positive"),
        (lambda s, t: get_divergence("forwrad_kl"), "allowed: .*forward_kl.*reverse_kl"),
        (lambda s, t: register_divergence("jsd")(forward_kl), "registered already"),
    ],
)
def test_wrong_choices_are_named_with_the_allowed_ones(logits, call, message):
    with pytest.raises(ValueError, match=message):
        call(*logits)


def test_registered_divergences_are_found_by_name():
    @register_divergence("test_total_variation")
    def total_variation(student_logits, teacher_logits):
        return 0.5 * (log_probs(student_logits).exp() - log_probs(teacher_logits).exp()).abs().sum(-1)

    assert get_divergence("test_total_variation") is total_variation
    assert "test_total_variation" in divergence_names()
