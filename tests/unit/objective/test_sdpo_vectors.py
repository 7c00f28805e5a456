# SPDX-License-Identifier: Apache-2.0
"""Reference numbers of SDPO: divergences, caps, aggregation, gradients, teachers."""

import pytest
import torch

from opd_ext.divergence.config import Branch
from opd_ext.divergence.divergences import forward_kl, get_divergence, log_probs
from opd_ext.divergence.sampled import clipped_surrogate, sampled_advantage
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.head import divergence_head
from opd_ext.objective.objective import Objective
from opd_ext.objective.reduction import batch_counts, token_weights
from opd_ext.ratios import importance_clip
from opd_ext.teacher.weights import ema_shards


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


def _objective_loss(case, precision, name, reduction, caps, masked=None):
    """The configured objective on the logits of a case (identity head), its packed inputs cut from padded ones."""
    inputs = case["inputs"]
    response = torch.tensor(inputs["response_mask"]).bool()
    has_teacher = torch.tensor(inputs["self_distillation_mask"]).bool() if masked is None else masked
    trained = response & has_teacher[:, None]

    def pack(key):
        return precision.tensor(inputs[key])[response]

    student = pack("student_logits").requires_grad_()
    closing, alpha = name.split("_alpha")
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(alpha), "jsd")
    kind_args = {"temperature": case["temperature"]} | ({"beta": float(alpha)} if kind == "jsd" else {})
    if closing != "full":
        kind, tail = f"topk_{kind}", {"tail": "bucket", "renorm": "renorm"}[closing]
        kind_args |= {"k": case["K"], "support": "student", "tail": tail}
    objective = Objective(
        branches=(Branch(kind, kind_args),), reduction=reduction, temperature=case["temperature"], **caps
    )
    batch = MicroBatch(
        labels=torch.tensor(inputs["tokens"])[response],
        mask=torch.ones(int(response.sum()), dtype=precision.dtype),
        lengths=response.sum(-1),
        num_tokens=int(trained.sum()),
        num_sequences=int(trained.any(-1).sum()),
        num_micro_batches=1,
        dp_size=1,
        old_log_probs=pack("old_log_probs"),
        rollout_log_probs=pack("rollout_log_probs"),
        sample_mask=has_teacher,
    )
    eye = torch.eye(case["V"], dtype=precision.dtype)
    return objective(batch, student, eye, pack("teacher_logits"), eye).loss, student


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("caps", ["plain", "is", "is_and_rollout"])
def test_the_configured_objective_gives_every_aggregate(sdpo_case, precision, reduction, caps):
    """With ``opd.denominator=distilled``: a sample without a teacher is in no denominator."""
    given = {"importance_cap": sdpo_case["is_clip"], "rollout_cap": sdpo_case["rollout_is_threshold"]}
    chosen = {"plain": {}, "is": {"importance_cap": sdpo_case["is_clip"]}, "is_and_rollout": given}[caps]
    for name, expected in sdpo_case["expected"]["aggregate"].items():
        loss, _ = _objective_loss(sdpo_case, precision, name, reduction, chosen)
        precision.assert_close(loss, expected[caps][reduction.replace("-", "_")])


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "official"])
def test_a_batch_without_any_teacher_gives_exactly_zero_with_a_graph(sdpo_case, precision, reduction):
    nobody = torch.zeros(sdpo_case["B"], dtype=torch.bool)
    loss, student = _objective_loss(sdpo_case, precision, "full_alpha0.5", reduction, {}, nobody)
    loss.backward()
    assert loss.item() == 0.0 and student.grad.abs().max() == 0.0


def test_the_sampled_token_surrogate_has_the_published_gradient(sdpo_case, precision):
    inputs, expected = sdpo_case["inputs"], sdpo_case["expected"]
    mask = torch.tensor(expected["loss_mask"]).bool()
    tokens = torch.tensor(inputs["tokens"])[..., None]
    student = precision.leaf(inputs["student_logits"])
    ours = log_probs(student, sdpo_case["temperature"]).gather(-1, tokens)[..., 0]
    theirs = log_probs(precision.tensor(inputs["teacher_logits"]), sdpo_case["temperature"]).gather(-1, tokens)[..., 0]
    advantage = sampled_advantage(ours, theirs)
    sampled = expected["sampled_token"]
    precision.assert_close(advantage, sampled["advantage"], mask)
    loss = clipped_surrogate(ours, ours.detach(), advantage, dual_clip=torch.inf).loss
    (
        token_weights(precision.tensor(expected["loss_mask"]), "token-mean", num_tokens=int(mask.sum())) * loss
    ).sum().backward()
    precision.assert_close(student.grad, sampled["grad_student_logits_token_mean"])
    means = (advantage * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    precision.assert_close(means[mask.any(-1)], precision.tensor(sampled["sequence_level_advantage"])[mask.any(-1)])


def test_the_mixture_with_grpo_is_a_mixture_of_advantages(sdpo_case, precision):
    """Weight lambda on the policy term and 1 - lambda on the divergence: seen from the logits, one advantage."""
    inputs, view = sdpo_case["inputs"], sdpo_case["expected"]["advantage_view"]
    mask = torch.tensor(sdpo_case["expected"]["loss_mask"]).bool()
    weight, temperature = view["lambda"], sdpo_case["temperature"]
    teacher, tokens = precision.tensor(inputs["teacher_logits"]), torch.tensor(inputs["tokens"])
    grpo = precision.tensor(view["grpo_advantage"])[:, None].expand(mask.shape)
    student = precision.leaf(inputs["student_logits"])
    logp = log_probs(student, temperature)
    sampled = logp.gather(-1, tokens[..., None])[..., 0]
    rkl = get_divergence("reverse_kl")(student, teacher, temperature=temperature)
    policy = clipped_surrogate(sampled, sampled.detach(), grpo, dual_clip=torch.inf).loss
    ((weight * policy + (1 - weight) * rkl) * mask).sum().backward()
    p = logp.detach().exp()
    distilled = precision.tensor(view["sdpo_logit_advantage"])
    precision.assert_close(log_probs(teacher, temperature) - logp.detach(), distilled, mask)
    onehot = torch.nn.functional.one_hot(tokens, p.shape[-1]).to(p)
    mixed = weight * onehot * grpo[..., None] + (1 - weight) * distilled
    precision.assert_close(mixed, view["mixed_logit_advantage"], mask)
    centred = distilled - (p * distilled).sum(-1, keepdim=True)
    expected = -weight * grpo[..., None] * (onehot - p) - (1 - weight) * p * centred
    precision.assert_close(student.grad, expected * mask[..., None] / temperature)


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_the_trust_region_teacher_is_one_head_of_two_models(sdpo_case, precision, rate):
    """[W0, W] on [(1 - a) h0, a h] has the logits that interpolate both, which is how the engine asks it."""
    inputs, temperature = sdpo_case["inputs"], sdpo_case["temperature"]
    first, live = (precision.tensor(inputs[f"{name}_logits"]).flatten(0, 1) for name in ("initial_teacher", "teacher"))
    expected = precision.tensor(sdpo_case["expected"]["trust_region_teacher"][f"mix{rate:g}"]).flatten(0, 1)
    student = precision.tensor(inputs["student_logits"]).flatten(0, 1)
    eye = torch.eye(first.shape[-1], dtype=precision.dtype)
    out = divergence_head(
        student,
        eye,
        torch.cat([(1 - rate) * first, rate * live], -1),
        torch.cat([eye, eye], -1),
        labels=torch.tensor(inputs["tokens"]).flatten(),
        kind="forward_kl",
        kind_args={"temperature": temperature},
        temperature=temperature,
        mode="recompute",
    )
    precision.assert_close(out.divergence, forward_kl(student, expected * temperature, temperature=temperature))
