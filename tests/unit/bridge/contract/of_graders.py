# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's graders, and of the device that it settles on."""

from opd_ext.bridge import graders, validation

from .seams import seam

SUM = "n = int(input())\nprint(n + n)\n"
TEST = {"inputs": ["21\n"], "outputs": ["42\n"]}


@seam(
    "bridge/graders.py",
    pins={"verl.utils.reward_score.prime_code.utils:check_correctness": "in_outs generation timeout= debug="},
)
def programs():
    """``check_correctness`` answers ``([True], ...)`` for a test that passes, and no True for one that fails."""
    assert graders.passes(SUM, TEST, 6)
    assert not graders.passes(SUM, {**TEST, "outputs": ["43\n"]}, 6)
    assert not graders.passes("raise ValueError", TEST, 6)


@seam("bridge/graders.py", pins={"verl.utils.reward_score:default_compute_score": None})
def default_grader():
    """``default_compute_score`` grades by the data source, and refuses one that it does not know."""
    assert float(graders.default_compute_score("openai/gsm8k", "#### 42", "42")) == 1.0
    try:
        graders.default_compute_score("nowhere/nothing", "42", "42")
    except NotImplementedError:
        return
    raise AssertionError("an unknown data source is graded")


@seam("bridge/validation.py", pins={"verl.plugin.platform.platform_manager:get_platform": ""})
def platform():
    """``get_platform().device_name`` is what verl trains on."""
    assert validation.device_name() in ("cpu", "cuda")
