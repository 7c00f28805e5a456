# SPDX-License-Identifier: Apache-2.0
"""Reference numbers of TRACE: routed divergences, the gate, the schedule, and what its theory says about them."""

import math

import pytest
import torch

from opd_ext.credit.schedule import trace_schedule
from opd_ext.divergence.config import Branch
from opd_ext.divergence.divergences import clipped_fraction, forward_kl, log_probs, reverse_kl, topk_divergence
from opd_ext.divergence.sampled import clipped_surrogate
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.objective import Objective
from opd_ext.objective.reduction import token_weights
from opd_ext.policy.advantages import self_distilled_advantage, span_gate


@pytest.fixture
def trace(vectors, precision):
    data = vectors("trace")
    logits = [precision.tensor(data["inputs"][f"{side}_logits"]) for side in ("student", "teacher")]
    return data, *logits, torch.tensor(data["inputs"]["response_mask"]).bool()


def test_trace_divergences_with_and_without_the_clip(trace, precision):
    data, student, teacher, mask = trace
    tau, expected = data["meta"]["tau"], data["per_token"]
    for key, divergence in (("fkl", forward_kl), ("rkl", reverse_kl)):
        precision.assert_close(divergence(student, teacher), expected[key], mask)
        precision.assert_close(divergence(student, teacher, tau), expected[f"{key}_clip"], mask)
    for key, kind in (("fkl", "forward_kl"), ("rkl", "reverse_kl")):
        fraction = clipped_fraction(student, teacher, kind, tau)
        precision.assert_close(fraction, expected[f"{key}_clip_fraction"], mask)


@pytest.mark.parametrize("short, kind", [("fkl", "forward_kl"), ("rkl", "reverse_kl")])
@pytest.mark.parametrize("support", ["student", "teacher"])
def test_trace_top_k(trace, precision, short, kind, support):
    data, student, teacher, mask = trace
    for key, tail, clip in (
        ("none", "none", None),
        ("renorm", "renorm", None),
        ("tail", "bucket", None),
        ("renorm_clip", "renorm", data["meta"]["tau"]),
    ):
        values = topk_divergence(student, teacher, 3, kind, support, tail, entry_clip=clip)
        precision.assert_close(values, data["topk"][f"{short}_{support}3_{key}"], mask)


def test_trace_clip_can_invert_the_update_and_token_scale_cannot(trace, precision):
    """Two tokens for which descent on the capped sum lowers the logit of the teacher's choice."""
    example = trace[0]["theory"]["hard_clip_counterexample"]
    tau = trace[0]["meta"]["tau"]
    teacher = precision.tensor(example["q"]).log()
    gradients = {}
    for mode in ("none", "vocab_max", "token_scale"):
        student = precision.leaf(torch.tensor(example["p"]).log().tolist())
        forward_kl(student, teacher, tau, mode).backward()
        gradients[mode] = student.grad
    precision.assert_close(gradients["none"], example["grad_unclipped"])
    precision.assert_close(gradients["vocab_max"], example["grad_hard_clip"])
    assert (gradients["token_scale"].sign() == gradients["none"].sign()).all()


def test_trace_schedule(vectors):
    data = vectors("trace")
    w0, t_start, t_decay = (data["meta"][key] for key in ("w0", "t_start", "t_decay"))
    for row in data["schedule"]:
        weight, gate = trace_schedule(row["k"], w0, t_start, t_decay)
        assert (weight, gate) == pytest.approx((row["lambda"], row["rho"]), abs=1e-12)
        assert (weight > 0) == row["kl_active"]
    weights = [trace_schedule(k, w0, t_start, t_decay)[0] for k in range(300)]
    sums = data["schedule_sums"]["zero_based"]
    assert sum(weight > 0 for weight in weights) == sums["active_steps"]
    assert sum(weights) == pytest.approx(sums["sum_lambda"])
    assert sum(weight**2 for weight in weights) == pytest.approx(sums["sum_lambda_sq"])


KEY, ERROR = 1, 2


def _loss(data, precision, k, mu_error, mu_key, tau, literal, policy_reduction, rollout_is=False, rows=None):
    """TRACE's loss of a batch, as the engine composes it; returns the loss and the student's logits."""
    rows = list(range(data["meta"]["shape"]["B"])) if rows is None else rows
    inputs, meta = data["inputs"], data["meta"]
    mask = torch.tensor(inputs["response_mask"]).bool()[rows]
    student = precision.tensor(inputs["student_logits"])[rows].requires_grad_()
    weight, gate = trace_schedule(k, meta["w0"], meta["t_start"], meta["t_decay"])
    label = torch.tensor(inputs["span_label"])[rows]
    active = [name for name, on in ((KEY, mu_key), (ERROR, mu_error)) if on]
    whole = torch.tensor(inputs["response_mask"]).bool()
    counts = {"num_tokens": int(whole.sum()), "num_sequences": len(whole)}
    advantage = span_gate(precision.tensor(inputs["advantages"])[rows], label, gate, active, literal)
    old = precision.tensor(inputs["old_log_probs"])[rows]
    extra = precision.tensor(inputs["rollout_is_weights"])[rows] if rollout_is else torch.ones_like(old)

    def policy(log_prob, entropy, shape):
        surrogate = clipped_surrogate(
            log_prob, old[mask], advantage[mask], meta["clip_low"], meta["clip_high"], meta["dual_clip_c"]
        )
        reduction = {"seq": "seq-mean-token-mean", "token": "token-mean"}[policy_reduction]
        return (token_weights(mask.to(precision.dtype), reduction, **counts)[mask] * extra[mask] * surrogate.loss).sum()

    clip = {} if tau is None else {"entry_clip": tau}
    branches = [Branch("forward_kl", clip, KEY)] * mu_key + [Branch("reverse_kl", clip, ERROR)] * mu_error
    batch = MicroBatch(
        labels=torch.tensor(inputs["tokens"])[rows][mask],
        mask=torch.ones(int(mask.sum()), dtype=precision.dtype),
        lengths=mask.sum(-1),
        num_micro_batches=1,
        dp_size=1,
        span_label=label[mask],
        distillation_weight=weight,
        **counts,
    )
    eye = torch.eye(meta["shape"]["V"], dtype=precision.dtype)
    teacher = (precision.tensor(inputs["teacher_logits"])[rows][mask], eye) if weight > 0 else ()
    objective = Objective(tuple(branches), credit="spans", reduction="seq-mean-token-mean")
    return objective(batch, student[mask], eye, *teacher, policy=policy).loss, student


def test_every_loss(vectors, precision):
    data = vectors("trace")
    for case in data["losses"]:
        literal, options = case["inactive_span"] == "literal", (case["grpo_agg"], case["rollout_is"])
        loss, _ = _loss(data, precision, case["k"], case["mu_E"], case["mu_K"], case["tau"], literal, *options)
        precision.assert_close(loss, case["total"])
    assert len(data["losses"]) == 193


def test_every_gradient(vectors, precision):
    data = vectors("trace")
    for case in data["gradients"]:
        literal = case["inactive_span"] == "literal"
        loss, student = _loss(
            data, precision, case["k"], case["mu_E"], case["mu_K"], case["tau"], literal, case["grpo_agg"]
        )
        loss.backward()
        precision.assert_close(student.grad, case["grad"])


def test_micro_batches_add_up(vectors, precision):
    data = vectors("trace")
    parts = [_loss(data, precision, 25, 1, 1, 0.05, False, "seq", rows=[row])[0] for row in range(3)]
    precision.assert_close(sum(parts), data["identities"]["microbatch_total"])


def test_after_the_window_the_loss_is_grpo(vectors, precision):
    data = vectors("trace")
    for k in (40, 299):
        for reduction in ("seq", "token"):
            loss, _ = _loss(data, precision, k, 1, 1, 0.05, False, reduction)
            precision.assert_close(loss, data["identities"][f"plain_grpo_{reduction}"])


def test_the_gate_on_advantages_is_a_gate_on_the_loss(vectors, precision):
    data = vectors("trace")
    inputs, identities = data["inputs"], data["identities"]
    mask = torch.tensor(inputs["response_mask"]).bool()
    advantage, label = precision.tensor(inputs["advantages"]), torch.tensor(inputs["span_label"])
    gate = span_gate(torch.ones_like(advantage), label, 0.5, [KEY, ERROR])
    precision.assert_close(gate, identities["gate"], mask)
    scaled = span_gate(advantage, label, 0.5, [KEY, ERROR])
    precision.assert_close(scaled, identities["scaled_advantages_k25_joint"], mask)
    logp = precision.tensor(data["per_token"]["log_probs"])
    old = precision.tensor(inputs["old_log_probs"])
    gated = clipped_surrogate(logp, old, scaled, 0.2, 0.28).loss
    precision.assert_close(gated, gate * clipped_surrogate(logp, old, advantage, 0.2, 0.28).loss, mask)


def test_span_and_other_gradients_are_disjoint_and_add_up(vectors, precision):
    data = vectors("trace")
    inputs, expected = data["inputs"], data["identities"]["decomposition"]
    marked = (torch.tensor(inputs["span_label"]) != 0) & torch.tensor(inputs["response_mask"]).bool()
    loss, student = _loss(data, precision, 25, 1, 1, None, False, "seq")
    loss.backward()
    norms = [student.grad[where].norm() for where in (marked, ~marked)]
    precision.assert_close(torch.stack(norms), [expected["span_grad_l2"], expected["nonspan_grad_l2"]])


def test_a_group_without_advantage_still_learns_from_its_key_spans(vectors, precision):
    """Proposition 19: with all advantages 0 the gradient lives on key tokens, and ends with the window."""
    data = vectors("trace")
    inputs = {**data["inputs"], "advantages": [[0.0] * 6] * 3}
    silent = {**data, "inputs": inputs}
    for k in (0, 40):
        loss, student = _loss(silent, precision, k, 0, 1, None, False, "seq")
        loss.backward()
        expected = data["identities"][f"dead_zone_k{k}"]
        precision.assert_close(loss, expected["total"])
        precision.assert_close(student.grad.norm(), expected["grad_l2"])
        rows = (student.grad.abs().sum(-1) > 0).int().tolist()
        assert rows == expected["grad_rows_nonzero"]


def test_a_label_on_padding_changes_nothing(vectors, precision):
    data = vectors("trace")
    labels = [row[:] for row in data["inputs"]["span_label"]]
    mask = data["inputs"]["response_mask"]
    assert any(
        label and not trained
        for row, kept in zip(labels, mask, strict=True)
        for label, trained in zip(row, kept, strict=True)
    )
    cleared = [
        [label * int(trained) for label, trained in zip(row, kept, strict=True)]
        for row, kept in zip(labels, mask, strict=True)
    ]
    other = {**data, "inputs": {**data["inputs"], "span_label": cleared}}
    first, second = (_loss(d, precision, 11, 1, 1, 0.05, False, "seq")[0] for d in (data, other))
    assert first.item() == second.item()


def test_lemma_1(vectors, precision):
    data = vectors("trace")
    lemma = data["theory"]["lemma1"]
    row, column = lemma["position"]
    teacher = precision.tensor(data["inputs"]["teacher_logits"])[row][column]
    for name, divergence in (("fkl_grad", forward_kl), ("rkl_grad", reverse_kl)):
        student = precision.tensor(data["inputs"]["student_logits"])[row][column].requires_grad_()
        divergence(student, teacher).backward()
        precision.assert_close(student.grad, lemma[name])


def _pair(p, precision):
    return torch.stack([torch.tensor(x, dtype=precision.dtype) for x in (p, (1 - p))]).log()


def test_the_forward_lift_does_not_vanish_and_the_reverse_one_does(vectors, precision):
    """Corollary 2, and what the published clip makes of it."""
    for case in vectors("trace")["theory"]["under_allocated_sweep"]:
        for key, divergence, clip in (
            ("lift_fkl", forward_kl, None),
            ("lift_rkl", reverse_kl, None),
            ("lift_fkl_hard_clip", forward_kl, 0.05),
        ):
            student = _pair(case["p"], precision).requires_grad_()
            divergence(student, _pair(case["q"], precision), clip).backward()
            precision.assert_close(-student.grad[0], case[key])


def test_pressure_on_a_confident_mistake(vectors, precision):
    for case in vectors("trace")["theory"]["confident_wrong_sweep"]:
        for key, divergence, clip in (
            ("down_fkl", forward_kl, None),
            ("down_rkl", reverse_kl, None),
            ("down_rkl_hard_clip", reverse_kl, 0.05),
        ):
            student = _pair(case["p"], precision).requires_grad_()
            divergence(student, _pair(case["q"], precision), clip).backward()
            precision.assert_close(student.grad[0], case[key])


def test_reverse_kl_lowers_a_logit_by_its_place_in_the_mean_and_not_by_p_above_q():
    """Remark 7: log(p/q) must exceed its mean under p; there are tokens with p > q whose logit is raised."""
    generator = torch.Generator().manual_seed(7)
    raised = 0
    for _ in range(50):
        student = torch.randn(7, dtype=torch.float64, generator=generator).requires_grad_()
        teacher = torch.randn(7, dtype=torch.float64, generator=generator)
        reverse_kl(student, teacher).backward()
        ratio = (log_probs(student) - log_probs(teacher)).detach()
        mean = (log_probs(student).exp().detach() * ratio).sum()
        assert ((student.grad > 0) == (ratio > mean)).all()
        raised += int(((ratio > 0) & (student.grad < 0)).sum())
    assert raised > 10


def test_the_largest_gap_that_escapes_the_clip(vectors):
    tau = vectors("trace")["meta"]["tau"]
    for case in vectors("trace")["theory"]["hard_clip_largest_gap_still_unclipped"]:
        q = case["q"]
        assert q * math.exp(-tau / q) == pytest.approx(case["min_p_without_clipping"], rel=1e-9)
        for factor, clipped in ((1.001, 0.0), (0.999, 1.0)):
            p = case["min_p_without_clipping"] * factor
            # The other entries share the rest so that only this one can exceed the bound.
            student, teacher = (torch.tensor([x, 1 - x], dtype=torch.float64).log() for x in (p, q))
            found = clipped_fraction(student, teacher, "forward_kl", tau) * 2
            other = (1 - q) * math.log((1 - q) / (1 - p)) > tau
            assert found == clipped + other


def test_exposure_to_the_teacher_ends_with_the_schedule(vectors):
    """Proposition 3: the variance of the teacher over contexts, summed with lambda squared."""
    theory = vectors("trace")["theory"]["exposure"]
    q = torch.tensor(theory["teacher_probs_by_context"], dtype=torch.float64)
    variance = q.var(dim=0, unbiased=False).sum(-1)
    torch.testing.assert_close(variance, torch.tensor(theory["V_t"], dtype=torch.float64), atol=1e-9, rtol=0)
    mask = torch.tensor(theory["mask"], dtype=torch.float64)
    per_step = float((mask * variance).sum() / len(mask))
    assert per_step == pytest.approx(theory["per_step_masked"], abs=1e-9)
    for steps in (40, 300):
        total = sum(trace_schedule(k, 0.5, 10, 30)[0] ** 2 for k in range(steps)) * per_step
        assert total == pytest.approx(theory[f"E_K_after_{steps}"], abs=1e-9)


def test_top_k_with_a_tail_loses_divergence_and_never_gains(trace):
    _, student, teacher, mask = trace
    for kind, full in (("forward_kl", forward_kl), ("reverse_kl", reverse_kl)):
        for support in ("student", "teacher"):
            bucket = topk_divergence(student, teacher, 3, kind, support)
            # One rounding of float32.
            assert (bucket <= full(student, teacher) + 1e-6)[mask].all()


def test_rlsd_multiplies_advantages_within_its_bounds(vectors, precision):
    for case in vectors("trace")["theory"]["rlsd"]:
        student, teacher, advantage = (precision.tensor([case[key]]) for key in ("logp_S", "logp_T", "A"))
        shaped = self_distilled_advantage(advantage, student, teacher, weight=1.0, bound=0.2)
        precision.assert_close(shaped, [case["A_hat_clip_0.2"]])
        half = self_distilled_advantage(advantage, student, teacher, weight=0.5, bound=0.2)
        precision.assert_close(half, (advantage + shaped) / 2)
