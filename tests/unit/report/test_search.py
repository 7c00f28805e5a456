# SPDX-License-Identifier: Apache-2.0
"""pass@k and discovery@k against the reference numbers and against plain counting."""

import itertools

import pytest

from opd_ext.estimators import discovery_at_k, pass_at_k


def test_reference_numbers(vectors):
    data = vectors("sdpo")["search_metrics"]
    for case in data["pass_at_k"]:
        assert pass_at_k(case["n"], case["c"], case["k"]) == pytest.approx(case["value"], abs=1e-12)
    for k, value in data["discovery_at_k"].items():
        assert discovery_at_k(data["discovery_times"], int(k)) == pytest.approx(value)


def test_pass_at_k_counts_subsets():
    for n, c, k in ((5, 2, 3), (6, 0, 2), (4, 4, 1), (7, 3, 7)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="n=3, c=4, k=1"):
        pass_at_k(3, 4, 1)
    with pytest.raises(ValueError, match="at least one search"):
        discovery_at_k([], 1)
