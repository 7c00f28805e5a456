# SPDX-License-Identifier: Apache-2.0
"""A placement keeps how much credit a response has and changes where it lies; rows do not see each other."""

import pytest
import torch

from opd_ext.credit.placement import get_placement, moved_spans, placement_names
from opd_ext.divergence.config import DivergenceConfig
from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.objective import Objective

LENGTHS = [7, 30, 1, 12]


@pytest.fixture
def rows():
    """Credit, mask with holes, and labels of four responses, padded."""
    draw = torch.Generator().manual_seed(3)
    credit = torch.rand(4, 30, generator=draw)
    mask = torch.arange(30) < torch.tensor(LENGTHS)[:, None]
    mask[1, 4:9] = False  # a tool's output
    labels = torch.randint(0, 50_000, (4, 30), generator=draw)
    return credit, mask, labels


def test_there_are_the_placements_that_the_controls_name():
    assert {"own", "flat", "random", "prefix"} <= set(placement_names())


@pytest.mark.parametrize("name", ["flat", "random", "prefix"])
def test_a_response_keeps_its_sum_and_changes(name, rows):
    credit, mask, labels = rows
    placed = get_placement(name)(credit, mask, labels, 0.3)
    torch.testing.assert_close((placed * mask).sum(-1), (credit * mask).sum(-1))
    assert not torch.equal((placed * mask)[1], (credit * mask)[1])


@pytest.mark.parametrize("name", ["own", "flat", "random", "prefix"])
def test_neither_padding_nor_other_rows_change_a_row(name, rows):
    credit, mask, labels = rows
    together = get_placement(name)(credit, mask, labels, 0.3)
    for row, length in enumerate(LENGTHS):
        alone = (values[row : row + 1, :length] for values in (credit, mask, labels))
        torch.testing.assert_close(get_placement(name)(*alone, 0.3)[0], together[row, :length])


def test_random_places_are_a_permutation_of_the_trained_tokens_alone(rows):
    credit, mask, labels = rows
    placed = get_placement("random")(credit, mask, labels, 0.1)
    assert torch.equal(placed[~mask], credit[~mask])
    for row in range(4):
        assert torch.equal(placed[row][mask[row]].sort().values, credit[row][mask[row]].sort().values)


def test_random_places_are_drawn_uniformly():
    """One marked token of ten, in 4,000 responses: each place about as often as another."""
    labels = torch.arange(4000 * 10).reshape(4000, 10) * 7919 % 32_003
    credit = torch.zeros(4000, 10)
    credit[:, 0] = 1.0
    placed = get_placement("random")(credit, torch.ones_like(credit), labels, 0.1)
    counts = placed.sum(0)
    chi_squared = ((counts - 400) ** 2 / 400).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom, p 0.001


def test_a_prefix_has_its_share_of_the_trained_tokens(rows):
    credit, mask, labels = rows
    placed = get_placement("prefix")(torch.ones_like(credit), mask, labels, 0.1)
    assert (placed * mask > 0).sum(-1).tolist() == [1, 3, 1, 2]  # of 7, 25, 1, 12
    assert placed[1, :3].tolist() == pytest.approx([25 / 3] * 3)


def test_moved_spans_are_as_many_and_as_long_and_do_not_overlap():
    runs = [(2, 5, 1), (9, 10, 2), (12, 18, 1)]
    seen = set()
    for step in range(200):
        moved = moved_spans(runs, 30, f"{step}")
        assert sorted((end - start, label) for start, end, label in moved) == [(1, 2), (3, 1), (6, 1)]
        assert (
            all(a[1] <= b[0] for a, b in zip(moved, moved[1:], strict=False)) and 0 <= moved[0][0] <= moved[-1][1] <= 30
        )
        seen |= {i for start, end, _ in moved for i in range(start, end)}
    assert seen == set(range(30))
    assert moved_spans(runs, 30, "7") == moved_spans(runs, 30, "7")
    assert moved_spans(runs, 9, "7") == runs  # they do not fit: nowhere else to go


def _loss(objective: Objective, chunks: list[list[int]]) -> torch.Tensor:
    """Gradient of the head's weight over micro-batches of the same three responses."""
    draw = torch.Generator().manual_seed(1)
    lengths, hidden, vocabulary = [5, 9, 6], 8, 31
    rows = [torch.randn(n, hidden, generator=draw) for n in lengths]
    shown = [torch.randn(n, hidden, generator=draw) for n in lengths]
    ids = [torch.randint(0, vocabulary, (n,), generator=draw) for n in lengths]
    weight = torch.randn(vocabulary, hidden, generator=draw).requires_grad_()
    teacher = torch.randn(vocabulary, hidden, generator=draw)
    for chunk in chunks:
        sizes = torch.tensor([lengths[i] for i in chunk])
        labels = torch.cat([ids[i] for i in chunk])
        batch = MicroBatch(labels, torch.ones_like(labels), sizes, 20, 3, len(chunks), 1)
        states = (torch.cat([source[i] for i in chunk]) for source in (rows, shown))
        student, other = states
        objective(batch, student.requires_grad_(), weight, other, teacher).loss.backward()
    return weight.grad


@pytest.mark.parametrize("placement", ["flat", "random", "prefix"])
@pytest.mark.parametrize("credit", ["tip", "srpo"])
def test_the_split_into_micro_batches_does_not_change_a_placed_gradient(credit, placement):
    objective = Objective(credit=credit, placement=placement, prefix=0.4)
    whole, split = _loss(objective, [[0, 1, 2]]), _loss(objective, [[2, 0], [1]])
    torch.testing.assert_close(whole, split)
    own = _loss(Objective(credit=credit), [[0, 1, 2]])
    assert not torch.allclose(whole, own)


def test_a_prefix_of_everything_is_the_method_itself():
    torch.testing.assert_close(
        _loss(Objective(placement="prefix", prefix=1.0), [[0, 1, 2]]), _loss(Objective(), [[0, 1, 2]])
    )


def test_a_constant_advantage_leaves_nothing_of_the_teacher():
    """The gradient is that of 1 x the mean log-prob of the sampled tokens, with any teacher."""
    config = DivergenceConfig(kind="reverse_kl", support="sampled", constant_advantage=-1.0)
    gradient = _loss(Objective((), config.surrogate), [[0, 1, 2]])
    draw = torch.Generator().manual_seed(1)
    states = torch.cat([torch.randn(n, 8, generator=draw) for n in (5, 9, 6)])
    _ = [torch.randn(n, 8, generator=draw) for n in (5, 9, 6)]
    labels = torch.cat([torch.randint(0, 31, (n,), generator=draw) for n in (5, 9, 6)])
    weight = torch.randn(31, 8, generator=draw).requires_grad_()
    log_prob = (states @ weight.T).log_softmax(-1).gather(-1, labels[:, None])
    (log_prob.sum() / 20).backward()
    torch.testing.assert_close(gradient, weight.grad)
    with_teacher = _loss(Objective((), Surrogate()), [[0, 1, 2]])
    assert not torch.allclose(gradient, with_teacher)
