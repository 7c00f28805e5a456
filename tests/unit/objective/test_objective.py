# SPDX-License-Identifier: Apache-2.0
"""Reductions and metrics do not depend on how a batch is split; alignment, credit and schedules refuse bad
input."""

import pytest
import torch

from opd_ext.credit.credits import CreditInputs, get_credit, position_weights
from opd_ext.credit.schedule import trace_schedule
from opd_ext.objective.alignment import packed_response_rows, response_rows
from opd_ext.objective.metrics import masked_sums, position_buckets, token_class_masks
from opd_ext.objective.reduction import batch_counts, token_weights
from opd_ext.ratios import importance_clip
from opd_ext.teacher.kinds import teacher_version

MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
VALUES = torch.arange(16, dtype=torch.float64).view(4, 4).square()
GLOBAL_REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
COUNTS = {"num_tokens": batch_counts(MASK).tokens, "num_sequences": batch_counts(MASK).nonempty_sequences}


@pytest.mark.parametrize("reduction", GLOBAL_REDUCTIONS)
@pytest.mark.parametrize("ranks", [[[0, 1, 2, 3]], [[0, 2], [1, 3]], [[3], [0, 1, 2]], [[2], [0], [1], [3]]])
def test_mean_over_ranks_of_micro_batch_sums_is_the_loss_of_the_whole_batch(reduction, ranks):
    whole = (token_weights(MASK, reduction, **COUNTS) * VALUES).sum()
    weights = [token_weights(row, reduction, dp_size=len(ranks), **COUNTS) for row in MASK.split(1)]
    per_rank = [sum((weights[r] * VALUES[[r]]).sum() for r in rows) for rows in ranks]
    torch.testing.assert_close(sum(per_rank) / len(ranks), whole)


@pytest.mark.parametrize("reduction", [*GLOBAL_REDUCTIONS, "official"])
def test_packed_rows_have_the_weights_of_padded_ones(reduction):
    lens = torch.tensor([4, 1, 0, 3])
    padded = torch.arange(4) < lens[:, None]
    mask = MASK.bool() & padded
    packed = token_weights(mask[padded].double(), reduction, sequence_lens=lens, **COUNTS)
    torch.testing.assert_close(packed, token_weights(mask.double(), reduction, **COUNTS)[padded])


@pytest.mark.parametrize("reduction", [*GLOBAL_REDUCTIONS, "official"])
def test_no_trained_token_means_zero_and_not_nan(reduction):
    weights = token_weights(torch.zeros(2, 3), reduction, num_tokens=0, num_sequences=0)
    assert weights.dtype == torch.float32 and not weights.any() and not weights.isnan().any()


def test_weights_of_a_mean_sum_to_one():
    for reduction in ("token-mean", "seq-mean-token-mean", "official"):
        assert token_weights(MASK, reduction, **COUNTS).sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((MASK, "mean"), "allowed: token-mean"),
        ((MASK, "token-mean"), "needs num_tokens"),
        ((MASK, "seq-mean-token-sum"), "needs num_sequences"),
    ],
)
def test_missing_counts_and_unknown_reductions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_weights(*arguments)


def test_a_packed_mask_needs_its_sequence_lengths():
    with pytest.raises(ValueError, match="sequence_lens"):
        token_weights(torch.ones(3), "seq-mean-token-mean", num_sequences=1)


@pytest.mark.parametrize(
    "length, sizes", [(250, (100, 50, 100)), (150, (100, 0, 50)), (60, (60, 0, 0)), (0, (0, 0, 0))]
)
def test_position_buckets_cover_every_token_once(length, sizes):
    buckets = position_buckets(torch.arange(length), torch.tensor(length))
    assert tuple(int(buckets[name].sum()) for name in ("first", "middle", "last")) == sizes
    assert (sum(mask.int() for mask in buckets.values()) == 1).all()


def test_metric_sums_add_up_over_micro_batches():
    labels = torch.tensor([5, 9, 7, 1, 1, 9, 2, 7])
    values, mask = torch.linspace(0, 1, 8), torch.tensor([1, 1, 1, 1, 0, 1, 1, 1])
    groups = token_class_masks(labels, {"think": [5, 7], "eos": [9], "absent": [100]})

    def sums(rows):
        return masked_sums(values[rows], mask[rows], {name: group[rows] for name, group in groups.items()})

    whole, left, right = sums(slice(0, 8)), sums(slice(0, 3)), sums(slice(3, 8))
    for name, (total, count) in whole.items():
        assert total.item() == pytest.approx((left[name][0] + right[name][0]).item())
        assert count == left[name][1] + right[name][1]
    assert whole["think"][1] == 3 and whole["eos"][1] == 2 and whole["absent"] == (0, 0)
    assert whole["eos"][0].item() == pytest.approx((values[1] + values[5]).item())


def test_masked_sums_ignore_what_stands_at_untrained_positions():
    total, count = masked_sums(
        torch.tensor([1.0, torch.nan]), torch.tensor([1, 0]), {"all": torch.ones(2, dtype=torch.bool)}
    )["all"]
    assert (total, count) == (1.0, 1.0)


def test_rows_of_an_empty_response():
    assert response_rows(3, 0).tolist() == []
    rows = packed_response_rows(torch.tensor([0, 3, 5]), torch.tensor([3, 1]), torch.tensor([0, 1]))
    assert rows.tolist() == [3]


def test_packed_rows_equal_single_rows_plus_offset():
    generator = torch.Generator().manual_seed(3)
    prompts, responses = (torch.randint(low, 9, (20,), generator=generator) for low in (1, 0))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), (prompts + responses).cumsum(0)])
    expected = torch.cat(
        [start + response_rows(int(p), int(r)) for start, p, r in zip(cu_seqlens[:-1], prompts, responses, strict=True)]
    )
    assert packed_response_rows(cu_seqlens, prompts, responses).equal(expected)
    assert packed_response_rows(cu_seqlens.int(), prompts.int(), responses.int()).equal(expected)


def test_one_sided_truncation_is_named_by_sample_even_if_totals_agree():
    """Sample 0 lost a token and sample 1 gained one: totals match, rows would cross the boundary."""
    with pytest.raises(ValueError, match="Sample 0 has 4 packed tokens but prompt 2 . response 3"):
        packed_response_rows(torch.tensor([0, 4, 10]), torch.tensor([2, 2]), torch.tensor([3, 3]))


def test_an_empty_prompt_and_missing_lengths_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        response_rows(0, 3)
    with pytest.raises(ValueError, match="at least one token"):
        packed_response_rows(torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([3]))
    with pytest.raises(ValueError, match="2 sequences but there are 1"):
        packed_response_rows(torch.tensor([0, 3, 6]), torch.tensor([1]), torch.tensor([2]))


def test_position_weights_fall_from_one_plus_gamma_and_never_rise():
    generator = torch.Generator().manual_seed(4)
    student, teacher = (-torch.rand(8, 30, generator=generator) for _ in range(2))
    weights = position_weights(student, teacher, torch.ones(8, 30), gamma=0.5)
    torch.testing.assert_close(weights[:, 0], torch.full((8,), 1.5))
    # float32 cumulative sums may wobble in the last digit.
    assert (weights.diff(dim=-1) <= 1e-6).all() and (weights >= 1).all()


def test_a_row_does_not_see_the_rest_of_the_batch():
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.ones(4, 6)
    together = position_weights(student, teacher, mask)
    alone = torch.cat([position_weights(student[[i]], teacher[[i]], mask[[i]]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_importance_clip_is_one_sided_detached_and_survives_broken_log_probs():
    logp = torch.tensor([0.0, -5.0, 0.0], requires_grad=True)
    weights = importance_clip(logp, torch.tensor([-5.0, 0.0, -torch.inf]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, torch.tensor(-5.0).exp(), 2.0]))
    assert not weights.requires_grad


def test_uniform_credit_is_one_everywhere():
    assert get_credit("uniform")(CreditInputs(mask=torch.zeros(2, 3, dtype=torch.bool))).eq(1).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: position_weights(*torch.zeros(2, 1, 1), torch.ones(1, 1), gamma=-1.0), "gamma"),
        (lambda: importance_clip(torch.zeros(1), torch.zeros(1), cap=0.0), "cap"),
        (
            lambda: get_credit("position")(CreditInputs(mask=torch.ones(1, 1))),
            "needs student_log_prob",
        ),
        (lambda: get_credit("postion"), "allowed: entropy, position"),
        (lambda: teacher_version(0, 5), "count from 1"),
        (lambda: teacher_version(1, -5), "interval"),
        (lambda: trace_schedule(-1, 0.5, 10, 30), "trace_schedule needs"),
        (lambda: trace_schedule(1, 0.5, 10, 0), "t_decay >= 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_weight_the_trace_policy_term_is_ungated():
    assert trace_schedule(3, 0.0, 10, 30) == (0.0, 1.0)
