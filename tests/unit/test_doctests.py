# SPDX-License-Identifier: Apache-2.0
"""Every function of the public contract shows what it does, in lines that a reader can type and that hold."""

import doctest
import importlib
import inspect

import pytest

PUBLIC = {
    "opd_ext.divergence": ("reverse_kl", "forward_kl", "jsd", "topk_divergence"),
    "opd_ext.credit": ("position_weights", "importance_clip", "trace_schedule"),
    "opd_ext.teacher": ("teacher_version",),
    "opd_ext.objective.head": ("chunked_divergence",),
    "opd_ext.pipelines.t3s": ("keep_mask",),
    "opd_ext.pipelines.ssd": ("truncated_distribution",),
    "opd_ext.rewards.math_dual": ("compute_score",),
    "opd_ext.rewards.mcq": ("compute_score",),
}


@pytest.mark.parametrize("place, name", [(place, name) for place, names in PUBLIC.items() for name in names])
def test_the_example_of_a_public_function_holds(place, name):
    function = inspect.unwrap(getattr(importlib.import_module(place), name))
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=function.__globals__)
    assert example.examples, f"{place}.{name} has no example in its docstring"
    assert doctest.DocTestRunner().run(example).failed == 0
