# SPDX-License-Identifier: Apache-2.0
"""Which tokens count: spans, forks, TIP's and SRPO's weights, places. Rows never influence each other."""

import pytest
import torch

from opd_ext.credit.credits import CreditInputs, credit_names, get_credit, keep_highest


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)

    def draw():
        return torch.rand(4, 12, generator=generator)

    mask = torch.ones(4, 12)
    mask[1, 7:] = 0
    mask[2, 3:5] = 0  # a tool's output
    mask[3] = 0
    label = torch.randint(0, 3, (4, 12), generator=generator)
    return CreditInputs(mask, -draw(), -draw(), draw(), draw(), draw(), label)


RANKED = ["entropy", "tip"]
MEAN_ONE = [*RANKED, "srpo"]


def test_the_credits_of_the_specifications_exist():
    assert {"uniform", "spans", "position", "position_linear", "position_part", "entropy", "tip", "srpo"} <= set(
        credit_names()
    )


@pytest.mark.parametrize("name", MEAN_ONE)
def test_selections_do_not_change_the_size_of_a_step(inputs, name):
    weights, trained = get_credit(name)(inputs), inputs.mask.bool()
    for row, kept in zip(weights[:3], trained[:3], strict=True):
        # Sums of a dozen float32 numbers.
        assert row[kept].mean().item() == pytest.approx(1.0, abs=1e-5)
    assert weights.isfinite().all()


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_share_is_of_each_response_and_rounds_down(inputs, name, share):
    chosen = (get_credit(name)(inputs, share=share) > 0) & inputs.mask.bool()
    for row, mask in zip(chosen, inputs.mask, strict=True):
        n = int(mask.sum())
        assert int(row.sum()) == (max(1, int(share * n)) if n else 0)


def test_forks_are_the_tokens_of_highest_entropy(inputs):
    weights = get_credit("entropy")(inputs, share=0.5)
    kept = inputs.mask[0].bool()
    chosen = weights[0] > 0
    assert inputs.student_entropy[0][chosen].min() >= inputs.student_entropy[0][kept & ~chosen].max()


def test_tip_keeps_confident_disagreement_and_uncertainty_alike():
    """Soft-OR: either a high entropy or a high divergence suffices."""
    entropy = torch.tensor([[0.0, 1.0, 0.0, 0.1]])
    divergence = torch.tensor([[1.0, 0.0, 0.0, 0.1]])
    weights = get_credit("tip")(
        CreditInputs(torch.ones(1, 4), student_entropy=entropy, divergence=divergence), share=0.5
    )
    assert (weights > 0).tolist() == [[True, True, False, False]]


def test_srpo_trusts_a_sure_teacher_more():
    weights = get_credit("srpo")(CreditInputs(torch.ones(1, 2), teacher_entropy=torch.tensor([[0.0, 1.0]])), beta=2.0)
    assert (weights[0, 0] / weights[0, 1]).item() == pytest.approx(torch.e**2, rel=1e-5)


@pytest.mark.parametrize(
    "name", sorted({"uniform", "spans", "position", "position_linear", "position_part", *MEAN_ONE})
)
def test_the_rest_of_the_batch_does_not_matter(inputs, name):
    whole = get_credit(name)(inputs)
    for row in range(len(inputs.mask)):
        alone = get_credit(name)(CreditInputs(*(value[row : row + 1] for value in inputs)))
        torch.testing.assert_close(alone[0], whole[row], atol=0, rtol=0)


@pytest.mark.parametrize("name", sorted({"position", "position_linear", "position_part", *MEAN_ONE}))
def test_padding_does_not_matter(inputs, name):
    padded = CreditInputs(*(torch.nn.functional.pad(value, (0, 5), value=0) for value in inputs))
    trained = inputs.mask.bool()
    torch.testing.assert_close(get_credit(name)(padded)[:, :12][trained], get_credit(name)(inputs)[trained])


def test_equal_scores_keep_the_earlier_token():
    assert keep_highest(torch.zeros(1, 4), torch.ones(1, 4), 0.5).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda i: get_credit("entropy")(i, share=0.0), "share must be in"),
        (lambda i: get_credit("position_part")(i, side="middle"), "prefix or suffix"),
        (lambda i: get_credit("tip")(CreditInputs(i.mask)), "'tip' needs student_entropy"),
        (lambda i: get_credit("spans")(CreditInputs(i.mask)), "'spans' needs span_label"),
        (lambda i: get_credit("position")(i, deadzone=-1.0), "deadzone"),
    ],
)
def test_what_cannot_work_is_named(inputs, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(inputs)
