# SPDX-License-Identifier: Apache-2.0
"""CRISP's and OPSD's reference numbers: divergences, gradients, reductions, clipping, top-K, alignment,
schedule."""

import pytest
import torch

from opd_ext.divergence.divergences import (
    clipped_fraction,
    entropy,
    forward_kl,
    get_divergence,
    jsd,
    log_probs,
    reverse_kl,
    topk_divergence,
)
from opd_ext.divergence.sampled import sampled_kl
from opd_ext.objective.alignment import packed_response_rows, response_rows
from opd_ext.objective.head import chunked_divergence
from opd_ext.objective.reduction import batch_counts, token_weights
from opd_ext.teacher.kinds import teacher_version
from opd_ext.teacher.weights import ema_shards

DIVERGENCES = {
    "reverse_kl": ("reverse_kl", {}),
    "forward_kl": ("forward_kl", {}),
    "jsd_0.25": ("jsd", {"beta": 0.25}),
    "jsd_0.5": ("jsd", {"beta": 0.5}),
    "jsd_0.75": ("jsd", {"beta": 0.75}),
}
OPSD_VARIANTS = {
    "beta_0": forward_kl,
    "beta_0.5": lambda *a, **k: jsd(*a, beta=0.5, **k),
    "beta_1": reverse_kl,
}
KIND_AND_BETA = {"beta_0": ("forward_kl", None), "beta_0.5": ("jsd", 0.5), "beta_1": ("reverse_kl", None)}


@pytest.fixture(scope="module")
def crisp(vectors):
    return vectors("crisp")


@pytest.fixture(params=["A_dense", "B_ragged"])
def case(crisp, request):
    return _case(crisp, request.param)


def _case(crisp, name):
    return next(case for case in crisp["cases"] if case["name"] == name)


class Batch:
    """Inputs of a case as tensors [B, T, V], with the divergence of a name at a temperature."""

    def __init__(self, case, precision):
        self.student = precision.leaf(case["inputs"]["student_logits"])
        self.teacher = precision.leaf(case["inputs"]["teacher_logits"])
        self.mask = precision.tensor(case["inputs"]["response_mask"])
        self.trained = self.mask.bool()
        self.ids = torch.tensor(case["inputs"].get("response_token_ids", []))
        self.token_mean = token_weights(self.mask, "token-mean", num_tokens=batch_counts(self.mask).tokens)

    def divergence(self, name, temperature):
        kind, kind_args = DIVERGENCES[name]
        return get_divergence(kind)(self.student, self.teacher, temperature=temperature, **kind_args)


@pytest.fixture
def batch(case, precision):
    return Batch(case, precision)


def _temperatures(case):
    blocks = (block for name, block in case["expected"].items() if name.startswith("tau_"))
    return [(block["temperature"], block) for block in blocks]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_divergence_has_the_reference_value_at_every_trained_token(case, batch, precision, name):
    for temperature, expected in _temperatures(case):
        precision.assert_close(batch.divergence(name, temperature), expected["per_token"][name], batch.trained)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd_0.5"])
def test_the_token_mean_has_the_reference_gradient_and_the_teacher_has_none(case, batch, precision, name):
    for temperature, expected in _temperatures(case):
        batch.student.grad = None
        (batch.token_mean * batch.divergence(name, temperature)).sum().backward()
        precision.assert_close(batch.student.grad, expected["grad_student_logits_token_mean"][name])
        assert batch.teacher.grad is None


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd_0.5"])
def test_the_chunked_head_has_the_reference_value_and_gradient(case, batch, precision, name):
    """With the identity as LM head, hidden states are logits."""
    vocabulary = batch.student.shape[-1]
    head = torch.eye(vocabulary, dtype=precision.dtype)
    for temperature, expected in _temperatures(case):
        hidden = batch.student.detach().flatten(0, 1).requires_grad_()
        kind, kind_args = DIVERGENCES[name]
        loss, per_token = chunked_divergence(
            hidden,
            head,
            batch.teacher.detach().flatten(0, 1),
            head,
            batch.token_mean.flatten(),
            kind,
            chunk_size=3,
            temperature=temperature,
            **kind_args,
        )
        loss.backward()
        precision.assert_close(loss, expected["reductions"][name]["token_mean"])
        precision.assert_close(per_token.view_as(batch.mask), expected["per_token"][name], batch.trained)
        precision.assert_close(hidden.grad.view_as(batch.student), expected["grad_student_logits_token_mean"][name])


def test_entropies(case, batch, precision):
    for temperature, expected in _temperatures(case):
        for side, logits in (("student", batch.student), ("teacher", batch.teacher)):
            values = entropy(logits, temperature)
            precision.assert_close(values, expected["per_token"][f"{side}_entropy"], batch.trained)
            mean = (batch.token_mean * values).sum()
            precision.assert_close(mean, expected[f"{side}_entropy_token_mean"])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd_0.25", "jsd_0.5", "jsd_0.75"])
def test_reductions(case, batch, precision, name):
    counts = batch_counts(batch.mask)
    for temperature, expected in _temperatures(case):
        reference = expected["reductions"].get(name)
        if reference is None:
            continue
        values = batch.divergence(name, temperature)

        def reduced(reduction, values=values, **counted):
            return (token_weights(batch.mask, reduction, **counted) * values).sum()

        precision.assert_close(reduced("token-mean", num_tokens=counts.tokens), reference["token_mean"])
        for suffix, sequences in (("all", counts.sequences), ("nonempty", counts.nonempty_sequences)):
            for reduction in ("seq-mean-token-mean", "seq-mean-token-sum"):
                key = f"{reduction.replace('-', '_')}_{suffix}"
                precision.assert_close(reduced(reduction, num_sequences=sequences), reference[key])
        assert counts.tokens == reference["num_tokens"]
        assert counts.sequences == reference["num_sequences"]
        assert counts.nonempty_sequences == reference["num_nonempty_sequences"]


@pytest.mark.parametrize("rows_per_micro_batch", [1, 2])
def test_the_official_reduction_is_a_mean_of_micro_batch_means(case, batch, precision, rows_per_micro_batch):
    for temperature, expected in _temperatures(case):
        values = batch.divergence("reverse_kl", temperature)
        micro_batches = list(
            zip(batch.mask.split(rows_per_micro_batch), values.split(rows_per_micro_batch), strict=True)
        )
        loss = sum(
            (token_weights(mask, "official", num_micro_batches=len(micro_batches)) * value).sum()
            for mask, value in micro_batches
        )
        key = f"official_microbatch_mean_mb{rows_per_micro_batch}"
        precision.assert_close(loss, expected["reductions"]["reverse_kl"][key])


def test_every_split_of_the_batch_gives_the_same_token_mean(crisp, precision):
    case = _case(crisp, "B_ragged")
    batch = Batch(case, precision)
    values = batch.divergence("reverse_kl", 1.0)
    tokens = batch_counts(batch.mask).tokens
    for split in crisp["meta"]["splits_that_must_agree_on_token_mean"]:
        loss = sum(
            (token_weights(batch.mask[rows], "token-mean", num_tokens=tokens) * values[rows]).sum() for rows in split
        )
        precision.assert_close(loss, case["expected"]["tau_1.0"]["reductions"]["reverse_kl"]["token_mean"])


def test_sampled_token_estimators_and_their_policy_gradient(case, batch, precision):
    expected = case["expected"]["sampled_token"]
    student = log_probs(batch.student).gather(-1, batch.ids[..., None])[..., 0]
    teacher = log_probs(batch.teacher).gather(-1, batch.ids[..., None])[..., 0]
    precision.assert_close(student, expected["student_logprob"], batch.trained)
    precision.assert_close(teacher, expected["teacher_logprob"], batch.trained)
    for estimator in ("k1", "k2", "k3"):
        precision.assert_close(sampled_kl(student, teacher, estimator), expected[estimator], batch.trained)
    k1 = sampled_kl(student, teacher, "k1").detach()
    precision.assert_close(-k1, expected["implicit_reward"], batch.trained)
    loss = (batch.token_mean * k1 * student).sum()
    loss.backward()
    precision.assert_close(loss, expected["pg_loss_token_mean"])
    precision.assert_close(batch.student.grad, expected["grad_student_logits_pg_token_mean"])


@pytest.mark.parametrize("variant", OPSD_VARIANTS)
def test_opsd_clipping(case, batch, precision, variant):
    opsd = case["expected"]["opsd"]
    expected, clip = opsd["variants"][variant], opsd["clip"]

    def divergence(**clipping):
        return OPSD_VARIANTS[variant](batch.student, batch.teacher, temperature=opsd["temperature"], **clipping)

    for prefix, values in (
        ("unclipped", divergence()),
        ("unclipped", divergence(entry_clip=clip, entry_clip_mode="none")),
        ("pointwise_clip", divergence(entry_clip=clip)),
        ("token_level_clip", divergence(entry_clip=clip, entry_clip_mode="token_scale")),
    ):
        precision.assert_close(values, expected[f"{prefix}_per_token"], batch.trained)
        precision.assert_close((batch.token_mean * values).sum(), expected[f"{prefix}_loss"])
    kind, beta = KIND_AND_BETA[variant]
    fraction = clipped_fraction(batch.student, batch.teacher, kind, clip, beta, temperature=opsd["temperature"])
    precision.assert_close((batch.token_mean * fraction).sum(), expected["pointwise_clipped_fraction"])


def test_opsd_pointwise_clip_has_the_reference_gradient(case, batch, precision):
    opsd = case["expected"]["opsd"]
    values = forward_kl(batch.student, batch.teacher, opsd["clip"], temperature=opsd["temperature"])
    (batch.token_mean * values).sum().backward()
    precision.assert_close(batch.student.grad, opsd["grad_student_logits_pointwise_clip_forward"])


def test_opsd_teacher_top3_renormalised(case, batch, precision):
    opsd = case["expected"]["opsd"]
    values = topk_divergence(
        batch.student, batch.teacher, 3, "forward_kl", tail="renorm", temperature=opsd["temperature"]
    )
    precision.assert_close(values, opsd["teacher_top3_renormalised_forward_per_token"], batch.trained)


def test_bucketed_top_k(case, batch, precision):
    for name, expected in case["expected"]["top_k"].items():
        if not name.startswith("K_"):
            continue
        k = int(name.removeprefix("K_"))
        batch.student.grad = None
        values = topk_divergence(batch.student, batch.teacher, k, "reverse_kl")
        (batch.token_mean * values).sum().backward()
        precision.assert_close(values, expected["bucketed_reverse_kl_per_token"], batch.trained)
        precision.assert_close((batch.token_mean * values).sum(), expected["token_mean"])
        precision.assert_close(batch.student.grad, expected["grad_student_logits_token_mean"])


def test_top_k_without_a_tail_is_the_raw_sum(case, batch, precision):
    expected = case["expected"]["top_k"]
    raw = topk_divergence(batch.student, batch.teacher, 2, "forward_kl", tail="none")
    floored = raw.clamp(min=0.0)
    native = expected["verl_forward_kl_topk_K_2"]
    precision.assert_close(raw, native["raw_per_token"], batch.trained)
    precision.assert_close(floored, native["floored_per_token"], batch.trained)
    precision.assert_close((batch.token_mean * floored).sum(), native["token_mean_floored"])
    reverse = topk_divergence(batch.student, batch.teacher, 2, "reverse_kl", tail="none")
    precision.assert_close(reverse, expected["no_tail_reverse_K_2_per_token"], batch.trained)


def test_response_rows_of_both_sides_line_up(crisp, precision):
    case = _case(crisp, "C_alignment")
    per_token = []
    for sequence in case["sequences"]:
        student_rows = response_rows(sequence["student_prompt_len"], sequence["response_len"])
        teacher_rows = response_rows(sequence["teacher_prompt_len"], sequence["response_len"])
        assert student_rows.tolist() == sequence["expected_student_gather"]
        assert teacher_rows.tolist() == sequence["expected_teacher_gather"]
        student = precision.tensor(sequence["student_logits_full"])
        teacher = precision.tensor(sequence["teacher_logits_full"])
        aligned = reverse_kl(student[student_rows], teacher[teacher_rows])
        precision.assert_close(aligned, sequence["expected_reverse_kl_per_token"])
        shifted = reverse_kl(student[student_rows + 1], teacher[teacher_rows + 1])
        precision.assert_close(shifted, sequence["off_by_one_reverse_kl_per_token"])
        per_token.append(aligned)
    precision.assert_close(torch.cat(per_token).mean(), case["expected_token_mean"])
    lens = torch.tensor([len(values) for values in per_token])
    weights = token_weights(
        precision.tensor([1.0] * int(lens.sum())),
        "seq-mean-token-mean",
        num_sequences=len(lens),
        sequence_lens=lens,
    )
    precision.assert_close((weights * torch.cat(per_token)).sum(), case["expected_seq_mean_token_mean"])


def test_packed_response_rows(crisp):
    case = _case(crisp, "C_alignment")
    packed, sequences = case["packed"], case["sequences"]
    response_lens = torch.tensor([sequence["response_len"] for sequence in sequences])
    for side in ("student", "teacher"):
        rows = packed_response_rows(
            torch.tensor(packed[f"{side}_cu_seqlens"]),
            torch.tensor([sequence[f"{side}_prompt_len"] for sequence in sequences]),
            response_lens,
        )
        assert rows.tolist() == packed[f"expected_{side}_gather_packed"]
        # Row i predicts token i + 1, so the tokens after these rows are the response itself.
        ids = torch.tensor(packed[f"{side}_packed_ids"])[rows + 1].tolist()
        assert ids == [
            token
            for sequence in sequences
            for token in sequence["student_ids"][sequence["student_prompt_len"] :][: sequence["response_len"]]
        ]


def test_extreme_logits(crisp, precision):
    case = _case(crisp, "D_extreme")
    batch, expected = Batch(case, precision), case["expected"]
    reverse = reverse_kl(batch.student, batch.teacher)
    precision.assert_close(reverse, expected["reverse_kl_per_token"])
    precision.assert_close(forward_kl(batch.student, batch.teacher), expected["forward_kl_per_token"])
    precision.assert_close(jsd(batch.student, batch.teacher, 0.5), expected["jsd_0.5_per_token"])
    precision.assert_close(entropy(batch.student), expected["student_entropy"])
    precision.assert_close(entropy(batch.teacher), expected["teacher_entropy"])
    reverse.sum().backward()
    precision.assert_close(batch.student.grad, expected["grad_reverse_kl_per_token"])


def test_the_teacher_is_the_version_that_the_released_code_uses(crisp):
    for schedule in crisp["teacher_schedule"]["hard_copy"]:
        used = [teacher_version(step, schedule["M"]) for step in range(1, schedule["steps"] + 1)]
        if "teacher_version_used_at_step_1_based" in schedule:
            assert used == schedule["teacher_version_used_at_step_1_based"]
        else:
            changes = [[i + 1, v] for i, v in enumerate(used) if i == 0 or v != used[i - 1]]
            assert changes == schedule["teacher_version_change_steps"]
        assert len(set(used)) - 1 == schedule["refreshes_before_last_step"]


def test_the_moving_average_teacher(crisp):
    teacher = {"w": torch.zeros(1, dtype=torch.float64)}
    path = []
    for step in range(1, 1 + len(crisp["teacher_schedule"]["ema_0.9_scalar_student_equals_step"])):
        ema_shards({"w": torch.full((1,), step, dtype=torch.float64)}, teacher, rate=0.1)
        path.append(teacher["w"].item())
    assert path == pytest.approx(crisp["teacher_schedule"]["ema_0.9_scalar_student_equals_step"], abs=1e-9)
