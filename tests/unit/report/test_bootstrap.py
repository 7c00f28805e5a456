# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap: it must find the spread of the difference, not of the problems."""

import numpy as np

from opd_ext.report.bootstrap import estimate, resampled_means


def difference(means):
    return means[..., 1] - means[..., 0]


def test_interval_of_a_mean_agrees_with_the_normal_one_for_many_problems():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 1))
    value, low, high = estimate(values, resampled_means(values), lambda means: means[..., 0])
    half = 1.96 * values.std(ddof=1) / 20
    assert value == values.mean()
    # 10,000 resamples place a 2.5 % quantile to about 3 % of the half width.
    assert np.allclose([low, high], [value - half, value + half], atol=0.06 * half)


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 100, size=200)
    values = np.stack([difficulty, difficulty + 1 + rng.normal(0, 0.1, size=200)], axis=1)
    value, low, high = estimate(values, resampled_means(values), difference)
    assert abs(value - 1) < 0.03 and high - low < 0.04
    _, one_side_low, one_side_high = estimate(values, resampled_means(values), lambda means: means[..., 0])
    assert one_side_high - one_side_low > 20


def intervals(datasets):
    """``[2, datasets]``; the data sets are the columns, so one set of resamples serves them all."""
    return np.percentile(resampled_means(datasets, resamples=2000), [2.5, 97.5], axis=0)


def test_95_percent_intervals_hold_the_truth_that_often():
    low, high = intervals(np.random.default_rng(2).normal(size=(60, 2000)))
    # Percentiles are normal quantiles of the biased deviation: P(|t_59| < 1.96 sqrt(59 / 60)) = 0.941; the
    # tolerance is three binomial standard errors of 2,000 data sets.
    assert abs(((low < 0) & (high > 0)).mean() - 0.941) < 0.016


def test_an_unchanged_accuracy_is_rarely_called_lower():
    changes = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=(100, 2000))
    _, high = intervals(changes)
    # 2.5 % by construction, plus three binomial standard errors of 2,000 data sets; ties at 0 are no change.
    assert (high < -1e-9).mean() < 0.025 + 0.0105


def test_the_same_input_gives_the_same_numbers():
    values = np.arange(12.0).reshape(6, 2)
    assert np.array_equal(resampled_means(values), resampled_means(values))


def test_one_problem_has_no_interval():
    values = np.array([[1.0, 2.0]])
    value, low, high = estimate(values, resampled_means(values), difference)
    assert value == 1 and np.isnan(low) and np.isnan(high)
