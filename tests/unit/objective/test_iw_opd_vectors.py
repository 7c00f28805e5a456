# SPDX-License-Identifier: Apache-2.0
"""Reference numbers of OPD, IW-OPD and ExOPD: weights, surrogate, aggregation, gradients."""

import pytest
import torch

from opd_ext.credit.credits import CreditInputs, get_credit, position_weights
from opd_ext.divergence.divergences import forward_kl, get_divergence, reverse_kl, topk_divergence
from opd_ext.divergence.sampled import Surrogate, clipped_surrogate, sampled_advantage
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.objective import Objective
from opd_ext.objective.reduction import token_weights
from opd_ext.ratios import importance_clip


def _garbage_where_untrained(values, mask, precision):
    return torch.where(mask, precision.tensor(values), torch.nan)


@pytest.mark.parametrize("gamma, case", [(0.5, "iw_opd_gamma0.5"), (1.0, "iw_opd_gamma1.0"), (0.0, "opd_gamma0")])
def test_position_weights(vectors, precision, gamma, case):
    batch = vectors("iw_opd")["batch_a"]
    weights, mask = _position_weights(batch, gamma, precision)
    precision.assert_close(weights, batch["cases"][case]["weights"], mask)


def test_position_weights_of_edge_rows(vectors, precision):
    """No gap at all, one trained token, interior masked tokens, an empty row."""
    batch = vectors("iw_opd")["batch_b_edges"]
    weights, mask = _position_weights(batch, 0.5, precision)
    precision.assert_close(weights, batch["iw_opd_gamma0.5"]["weights"], mask)


def _position_weights(batch, gamma, precision):
    """Weights and mask of a batch; in any batch they are constants, 1 where nothing trains, and the credit's own."""
    mask = torch.tensor(batch["mask"]).bool()
    student = _garbage_where_untrained(batch["student_logp"], mask, precision).requires_grad_()
    teacher = _garbage_where_untrained(batch["teacher_logp"], mask, precision)
    weights = position_weights(student, teacher, mask, gamma)
    assert not weights.requires_grad
    assert (weights[~mask] == 1).all()
    named = get_credit("position")(CreditInputs(mask, student.detach(), teacher), gamma=gamma)
    torch.testing.assert_close(named, weights, rtol=0, atol=0)
    return weights, mask


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


@pytest.mark.parametrize(
    "case, credit, options",
    [
        ("iw_opd_gamma0.5_paper_literal_denominator", "position", {"exclude_last": True}),
        ("iw_opd_gamma0.5_signed_ablation", "position", {"signed": True}),
        ("linear_decay_gamma0.5_ablation", "position_linear", {}),
        ("fixed_prefix30_x1.5_ablation", "position_part", {"inside": 1.5, "outside": 1.0}),
        ("prefix30_only", "position_part", {}),
        ("suffix30_only", "position_part", {"side": "suffix"}),
    ],
)
def test_ablations_of_the_position_weight(vectors, precision, case, credit, options):
    batch = vectors("iw_opd")["batch_a"]
    mask = torch.tensor(batch["mask"]).bool()
    student, teacher = (
        _garbage_where_untrained(batch[f"{side}_logp"], mask, precision) for side in ("student", "teacher")
    )
    weights = get_credit(credit)(CreditInputs(precision.tensor(batch["mask"]), student, teacher), **options)
    precision.assert_close(weights, batch["cases"][case]["weights"], mask)


def test_a_deadzone_forgets_gaps_up_to_its_size():
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.05, -0.3, 0.2]])
    weights = position_weights(student, teacher, torch.ones(1, 3), gamma=1.0, deadzone=0.1)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 2.0, 1.0 + 1.0 / 3]]))


def test_extrapolated_advantages(vectors, precision):
    """G-OPD: scale 1 is OPD whatever the reference; ExOPD's drift may be measured on either gap."""
    batch = vectors("iw_opd")["batch_a"]
    mask, cases = torch.tensor(batch["mask"]).bool(), batch["cases"]
    student, teacher, reference = (
        precision.tensor(batch[f"{side}_logp"]) for side in ("student", "teacher", "reference")
    )
    for case, scale in (("exopd_lambda1.0", 1.0), ("exopd_lambda1.25", 1.25)):
        precision.assert_close(sampled_advantage(student, teacher, reference, scale), cases[case]["advantage"], mask)
    extrapolated = sampled_advantage(student, teacher, reference, 1.25)
    for gap, weights in (
        ("raw", position_weights(student, teacher, mask)),
        ("adv", position_weights(torch.zeros_like(student), extrapolated, mask)),
    ):
        expected = cases[f"iw_exopd_lambda1.25_gamma0.5_{gap}_gap"]
        precision.assert_close(weights, expected["weights"], mask)
        precision.assert_close(weights * extrapolated, expected["weighted_advantages"], mask)


REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def _counts(mask):
    return {"num_tokens": int(mask.sum()), "num_sequences": int(mask.any(-1).sum())}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["opd_gamma0", "iw_opd_gamma0.5", "iw_opd_gamma1.0", "constant_mean_matched_control"])
def test_values_and_gradients_of_the_surrogate_on_policy(vectors, precision, reduction, case):
    batch = vectors("iw_opd")["batch_a"]
    mask, expected = torch.tensor(batch["mask"]).bool(), batch["cases"][case]
    student = precision.leaf(batch["student_logp"])
    advantage = sampled_advantage(student, precision.tensor(batch["teacher_logp"]))
    loss = clipped_surrogate(student, student.detach(), advantage).loss
    weights = token_weights(precision.tensor(batch["mask"]), reduction, **_counts(mask)) * precision.tensor(
        expected["weights"]
    )
    total = (weights * torch.where(mask, loss, 0.0)).sum()
    total.backward()
    precision.assert_close(total, expected["ppo_value_on_policy"][reduction])
    precision.assert_close(student.grad, expected["grad_wrt_logp_on_policy"][reduction])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["opd", "opd_tis", "iw_opd_gamma0.5", "iw_opd_gamma0.5_tis"])
def test_values_and_gradients_of_the_surrogate_off_policy(vectors, precision, reduction, case):
    """The advantage is that of the old policy; the clips take the gradient of some tokens."""
    data = vectors("iw_opd")
    batch = data["batch_a"]
    mask, expected = torch.tensor(batch["mask"]).bool(), batch["off_policy"][case]
    old, teacher, rollout = (precision.tensor(batch[f"{side}_logp"]) for side in ("student", "teacher", "rollout"))
    current = precision.leaf(batch["current_logp"])
    credit = position_weights(old, teacher, mask) if case.startswith("iw") else torch.ones_like(old)
    if case.endswith("tis"):
        credit = credit * importance_clip(old, rollout, data["meta"]["tis_cap"])
    per_token = credit * clipped_surrogate(current, old, sampled_advantage(old, teacher)).loss
    precision.assert_close(per_token, expected["token_loss"], mask)
    total = (
        token_weights(precision.tensor(batch["mask"]), reduction, **_counts(mask)) * torch.where(mask, per_token, 0.0)
    ).sum()
    total.backward()
    precision.assert_close(total, expected["value"][reduction])
    precision.assert_close(current.grad, expected["grad_wrt_current_logp"][reduction])


def test_the_configured_objective_gives_the_same_numbers(vectors, precision):
    """The whole loss, its inputs packed as the engine packs them: on policy, position credit, cap of the rollouts."""
    batch = vectors("iw_opd")["batch_a"]
    mask = torch.tensor(batch["mask"]).bool()
    lengths = torch.tensor(batch["lengths"])
    student, teacher, rollout = (
        precision.tensor(batch[f"{side}_logp"])[mask] for side in ("student", "teacher", "rollout")
    )
    # Two entries suffice for a token to have a given log-prob; the head's weight is the identity.
    hidden = torch.stack([student, torch.log1p(-student.exp())], -1).requires_grad_()
    micro_batch = MicroBatch(
        labels=torch.zeros(len(student), dtype=torch.long),
        mask=torch.ones_like(student),
        lengths=lengths,
        num_micro_batches=1,
        dp_size=1,
        rollout_log_probs=rollout,
        teacher_log_prob=teacher,
        **_counts(mask),
    )
    objective = Objective(surrogate=Surrogate(), credit="position", rollout_cap=5.0, reduction="seq-mean-token-mean")
    terms = objective(micro_batch, hidden, torch.eye(2, dtype=hidden.dtype))
    expected = batch["off_policy"]["iw_opd_gamma0.5_tis_on_policy"]["value"]["seq-mean-token-mean"]
    precision.assert_close(terms.loss, expected)


@pytest.mark.parametrize("scale, credit", [(1.0, "uniform"), (1.25, "uniform"), (1.25, "position")])
def test_the_objective_extrapolates_from_a_reference(vectors, precision, scale, credit):
    """ExOPD and IW-ExOPD through the whole loss; the drift is that of teacher and student."""
    batch = vectors("iw_opd")["batch_a"]
    mask = torch.tensor(batch["mask"]).bool()
    student, teacher, reference = (
        precision.tensor(batch[f"{side}_logp"])[mask] for side in ("student", "teacher", "reference")
    )

    def head_input(logp):
        return torch.stack([logp, torch.log1p(-logp.exp())], -1)

    hidden = head_input(student).requires_grad_()
    micro_batch = MicroBatch(
        labels=torch.zeros(len(student), dtype=torch.long),
        mask=torch.ones_like(student),
        lengths=torch.tensor(batch["lengths"]),
        num_micro_batches=1,
        dp_size=1,
        teacher_log_prob=teacher,
        **_counts(mask),
    )
    objective = Objective(surrogate=Surrogate(extrapolation=scale), credit=credit)
    eye = torch.eye(2, dtype=hidden.dtype)
    terms = objective(micro_batch, hidden, eye, reference_hidden=head_input(reference))
    name = "iw_exopd_lambda1.25_gamma0.5_raw_gap" if credit == "position" else f"exopd_lambda{scale}"
    precision.assert_close(terms.loss, batch["cases"][name]["ppo_value_on_policy"]["token-mean"])


def test_sampled_estimators(vectors, precision):
    """What the metrics call the sampled KL is k1, whose mean is that of the vectors."""
    batch = vectors("iw_opd")["batch_a"]
    mask = torch.tensor(batch["mask"]).bool()
    advantage = sampled_advantage(precision.tensor(batch["current_logp"]), precision.tensor(batch["teacher_logp"]))
    expected = batch["estimators_current_vs_teacher"]
    precision.assert_close(-advantage, expected["k1"], mask)
    precision.assert_close(-advantage[mask].mean(), expected["mean_over_tokens"]["k1"])
