# SPDX-License-Identifier: Apache-2.0
"""Reference numbers of IW-OPD, SDPO and TRACE that the shared objective must meet."""

import pytest
import torch

from opd_ext.objective.credit import CreditInputs, get_credit, importance_clip, position_weights
from opd_ext.objective.divergence import (
    clipped_fraction,
    forward_kl,
    get_divergence,
    log_probs,
    reverse_kl,
    topk_divergence,
)
from opd_ext.objective.objective import batch_counts, token_weights
from opd_ext.objective.schedule import trace_schedule
from opd_ext.teacher.weights import ema_shards


def _garbage_where_untrained(values, mask, precision):
    return torch.where(mask, precision.tensor(values), torch.nan)


@pytest.mark.parametrize("gamma, case", [(0.5, "iw_opd_gamma0.5"), (1.0, "iw_opd_gamma1.0"), (0.0, "opd_gamma0")])
def test_position_weights(vectors, precision, gamma, case):
    batch = vectors("iw_opd")["batch_a"]
    _check_position_weights(batch, batch["cases"][case], gamma, precision)


def test_position_weights_of_edge_rows(vectors, precision):
    """No gap at all, one trained token, interior masked tokens, an empty row."""
    batch = vectors("iw_opd")["batch_b_edges"]
    _check_position_weights(batch, batch["iw_opd_gamma0.5"], 0.5, precision)


def _check_position_weights(batch, expected, gamma, precision):
    mask = torch.tensor(batch["mask"]).bool()
    student = _garbage_where_untrained(batch["student_logp"], mask, precision).requires_grad_()
    teacher = _garbage_where_untrained(batch["teacher_logp"], mask, precision)
    weights = position_weights(student, teacher, mask, gamma)
    assert not weights.requires_grad
    precision.assert_close(weights, expected["weights"], mask)
    assert (weights[~mask] == 1).all()
    named = get_credit("position")(CreditInputs(mask, student.detach(), teacher), gamma=gamma)
    torch.testing.assert_close(named, weights, rtol=0, atol=0)


def test_truncated_importance_weights_between_trainer_and_rollout(vectors, precision):
    data = vectors("iw_opd")
    batch = data["batch_a"]
    trainer, rollout = (precision.tensor(batch[f"{side}_logp"]) for side in ("student", "rollout"))
    weights = importance_clip(trainer, rollout, data["meta"]["tis_cap"])
    precision.assert_close(weights, batch["off_policy"]["tis_weights"], torch.tensor(batch["mask"]).bool())


def test_full_vocabulary_and_top_k_in_iw_opd(vectors, precision):
    batch = vectors("iw_opd")["batch_c_full_vocab"]
    student, teacher = precision.leaf(batch["student_logits"]), precision.tensor(batch["teacher_logits"])
    mask, k = torch.tensor(batch["mask"]).bool(), batch["K"]
    raw = topk_divergence(student, teacher, k, "forward_kl", tail="none")
    for key, values in {
        "reverse_kl_full": reverse_kl(student, teacher),
        "forward_kl_full": forward_kl(student, teacher),
        "jsd_beta0.5": get_divergence("jsd")(student, teacher, beta=0.5),
        "forward_kl_teacher_topk_unnormalised": raw,
        "forward_kl_teacher_topk_clamped_min0": raw.clamp(min=0.0),
        "forward_kl_teacher_topk_tail_bucket": topk_divergence(student, teacher, k, "forward_kl"),
        "reverse_kl_student_topk_tail_bucket": topk_divergence(student, teacher, k, "reverse_kl", "student"),
        "reverse_kl_student_topk_renormalised": topk_divergence(student, teacher, k, "reverse_kl", "student", "renorm"),
    }.items():
        precision.assert_close(values, batch[key], mask)


@pytest.fixture(params=["A_dense_on_policy", "B_ragged_off_policy", "C_peaked_tail_floor"])
def sdpo_case(vectors, request):
    return next(case for case in vectors("sdpo")["cases"] if case["name"] == request.param)


def _sdpo_divergence(name, case):
    """``full_alpha0.5`` -> a function of logits; alpha is the teacher's share, its ends are the two KLs."""
    closing, alpha = name.split("_alpha")
    alpha = float(alpha)
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(alpha, "jsd")
    kind_args = {"temperature": case["temperature"]} | ({"beta": alpha} if kind == "jsd" else {})
    if closing != "full":
        kind = f"topk_{kind}"
        tail = {"tail": "bucket", "renorm": "renorm"}[closing]
        kind_args |= {"k": case["K"], "support": "student", "tail": tail}
    return lambda student, teacher: get_divergence(kind)(student, teacher, **kind_args)


def test_sdpo_divergences_on_every_support(sdpo_case, precision):
    inputs, expected = sdpo_case["inputs"], sdpo_case["expected"]
    student, teacher = precision.tensor(inputs["student_logits"]), precision.tensor(inputs["teacher_logits"])
    mask = torch.tensor(expected["loss_mask"]).bool()
    for name, values in expected["per_token"].items():
        precision.assert_close(_sdpo_divergence(name, sdpo_case)(student, teacher), values, mask)


def test_sdpo_gradients_with_and_without_importance_weights(sdpo_case, precision):
    inputs, expected = sdpo_case["inputs"], sdpo_case["expected"]
    teacher, mask = precision.tensor(inputs["teacher_logits"]), precision.tensor(expected["loss_mask"])
    weights = token_weights(mask, "token-mean", num_tokens=batch_counts(mask).tokens)
    credit = {"plain": torch.ones_like(weights), "is": precision.tensor(expected["is_weight"])}
    for name, gradients in expected["grad_student_logits"].items():
        for correction in ("plain", "is"):
            student = precision.leaf(inputs["student_logits"])
            values = _sdpo_divergence(name, sdpo_case)(student, teacher)
            (weights * credit[correction] * values).sum().backward()
            precision.assert_close(student.grad, gradients[f"{correction}_token_mean"])


def test_sdpo_importance_weights(sdpo_case, precision):
    inputs, expected = sdpo_case["inputs"], sdpo_case["expected"]
    mask = torch.tensor(expected["loss_mask"]).bool()
    logp = log_probs(precision.tensor(inputs["student_logits"]), sdpo_case["temperature"])
    logp = logp.gather(-1, torch.tensor(inputs["tokens"])[..., None])[..., 0]
    precision.assert_close(logp, expected["student_token_log_probs"], mask)
    weights = importance_clip(logp, precision.tensor(inputs["old_log_probs"]), sdpo_case["is_clip"])
    precision.assert_close(weights, expected["is_weight"], mask)


def test_sdpo_aggregations_keep_samples_without_teacher_context_in_the_denominator(sdpo_case, precision):
    expected = sdpo_case["expected"]
    mask = precision.tensor(expected["loss_mask"])
    counts = batch_counts(mask)
    for name, corrections in expected["aggregate"].items():
        values = precision.tensor(expected["per_token"][name])
        micro_batch_means = [
            (token_weights(row, "official", num_micro_batches=len(mask)) * value).sum()
            for row, value in zip(mask.split(1), values.split(1), strict=True)
        ]
        by_token = (token_weights(mask, "token-mean", num_tokens=counts.tokens) * values).sum()
        precision.assert_close(by_token, corrections["plain"]["token_mean"])
        precision.assert_close(sum(micro_batch_means), corrections["plain"]["microbatch1_mean"])
        by_sequence = token_weights(mask, "seq-mean-token-mean", num_sequences=counts.sequences)
        precision.assert_close((by_sequence * values).sum(), corrections["plain"]["microbatch1_mean"])


@pytest.mark.parametrize("rate", ["0.05", "0.01", "1", "0"])
def test_sdpo_moving_average_teacher(vectors, rate):
    ema = vectors("sdpo")["ema"]
    teacher = {"w": torch.tensor(ema["teacher_init"], dtype=torch.float64)}
    for student, expected in zip(ema["student_path"], ema["teacher_path"][f"rate{rate}"], strict=True):
        ema_shards({"w": torch.tensor(student, dtype=torch.float64)}, teacher, float(rate))
        # One product and one sum in float64.
        assert teacher["w"].tolist() == pytest.approx(expected, abs=1e-12)


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
