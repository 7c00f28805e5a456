# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's graders, and of the device that it settles on."""

from opd_ext.bridge import graders, validation

from .seams import seam


@seam(
    "bridge/graders.py",
    pins={
        "verl.utils.reward_score.sandbox_fusion.utils:call_sandbox_api": "sandbox_fusion_url code stdin "
        "compile_timeout run_timeout memory_limit_mb language="
    },
)
def programs():
    """``call_sandbox_api`` answers ``(the server's JSON, None)``, and ``(None, a sentence)`` where no server is."""
    try:
        graders.run_code("http://127.0.0.1:9/run_code", "print(3)", "", 1, 64)
    except ConnectionError:
        return
    raise AssertionError("nobody has run a program, and nothing is said")


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
