# SPDX-License-Identifier: Apache-2.0
"""T3S's selection against the reference numbers."""

import numpy as np
import pytest
import torch

from opd_ext.pipelines.t3s import selection as t3s
from opd_ext.tokens.tables import content_key


@pytest.fixture(scope="module")
def golden(vectors):
    return vectors("t3s")


def _rows(golden, step):
    return [np.array(row) for row in golden["inputs"]["log_prob_by_step"][str(step)]]


def _keep(base, other, **options):
    return [
        t3s.keep_mask(torch.tensor(b), torch.tensor(o), torch.ones(len(b)), **options).numpy()
        for b, o in zip(base, other, strict=True)
    ]


def test_content_keys(golden):
    inputs = golden["inputs"]
    keys = [content_key(p, r) for p, r in zip(inputs["prompt_ids"], inputs["response_ids"], strict=True)]
    assert keys == golden["content_keys"]


def test_bottleneck(golden):
    inputs = golden["inputs"]
    found = t3s.pick_bottleneck(inputs["steps"], inputs["train_accuracy"])
    assert (found.step, found.has_dip) == (golden["bottleneck"]["step"], golden["bottleneck"]["has_dip"])
    for case in golden["bottleneck_edge_cases"]:
        found = t3s.pick_bottleneck(case["steps"], case["acc"], case.get("min_dip", 0.0))
        assert (found.step, found.has_dip) == (case["step"], case["has_dip"]), case["why"]
        assert found.at_end == ("minimum at the end" in case["why"])


@pytest.mark.parametrize("steps", [[5, 10], [0], [0, 10, 5], [0, 5, 5]])
def test_bottleneck_needs_the_base_and_increasing_steps(steps):
    with pytest.raises(ValueError, match="step 0"):
        t3s.pick_bottleneck(steps, [0.5] * len(steps))


def test_masks(golden):
    base, selection = _rows(golden, 0), golden["selection"]
    keep = _keep(base, _rows(golden, golden["bottleneck"]["step"]))
    assert [row.astype(int).tolist() for row in keep] == selection["keep"]
    assert [(~row).astype(int).tolist() for row in keep] == selection["anchor"]
    for step, expected in selection["keep_if_bottleneck_were"].items():
        assert [row.astype(int).tolist() for row in _keep(base, _rows(golden, step))] == expected


def test_an_unchanged_token_is_no_anchor():
    logp = torch.tensor([-1.0, -2.0])
    assert t3s.keep_mask(logp, logp, torch.tensor([1, 1])).tolist() == [True, True]
    assert t3s.keep_mask(logp, logp, torch.tensor([1, 0])).tolist() == [True, False]


def test_statistics(golden):
    base, bottleneck = _rows(golden, 0), _rows(golden, golden["bottleneck"]["step"])
    found = t3s.selection_statistics(_keep(base, bottleneck), base, bottleneck)
    expected = golden["selection"]["stats"]
    below = expected["fraction_below_base_by_step"]
    for name in expected.keys() - {"fraction_below_base_by_step"}:
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name
    for step, fraction in below.items():
        assert t3s.fraction_below_base(base, _rows(golden, step)) == pytest.approx(fraction)


def test_positions_a_diffusion_model_restores(golden):
    base, bottleneck = _rows(golden, 0), _rows(golden, golden["bottleneck"]["step"])
    for tau, expected in golden["dllm"]["tau_sweep_selected"].items():
        chosen = [
            t3s.restore_mask(torch.tensor(b), torch.tensor(o), torch.ones(len(b)), float(tau)).int().tolist()
            for b, o in zip(base, bottleneck, strict=True)
        ]
        assert chosen == expected, tau


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_residual_transfer(golden, dtype):
    case = golden["rrt"]
    thetas = [torch.tensor(case[f"theta_{name}"], dtype=dtype) for name in ("base", "bottleneck", "final")]
    expected = torch.tensor(case["theta_rrt"], dtype=dtype)
    # float32 rounds a difference and a sum of numbers near 1
    torch.testing.assert_close(t3s.residual_transfer(*thetas), expected, atol=1e-6, rtol=0)


def test_residual_transfer_adds_in_float32():
    """In bfloat16 the small residual of a fine-tuning would be rounded away before it is added."""
    base, bottleneck, final = (torch.tensor([x], dtype=torch.bfloat16) for x in (1.0, 0.0078125, 0.01171875))
    assert t3s.residual_transfer(base, bottleneck, final).dtype == torch.bfloat16
    ids = torch.tensor([3])
    assert torch.equal(t3s.residual_transfer(ids, ids + 1, ids + 2), ids)


def test_controls_keep_the_budget_of_every_response():
    rng = np.random.default_rng(0)
    keep = [rng.random(size) < 0.6 for size in (1, 7, 40)]
    logp = [-rng.random(size) for size in (1, 7, 40)]
    drawn, again, other = (t3s.random_keep(keep, seed) for seed in (3, 3, 4))
    lowest = t3s.lowest_confidence_keep(keep, logp)
    for row, a, b, low, confidence in zip(keep, drawn, again, lowest, logp, strict=True):
        assert a.sum() == row.sum() == low.sum()
        assert np.array_equal(a, b)
        if low.any() and not low.all():
            assert confidence[low].max() <= confidence[~low].min()
    assert not np.array_equal(drawn[2], other[2]) and not np.array_equal(drawn[2], keep[2])
