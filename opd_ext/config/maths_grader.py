# SPDX-License-Identifier: Apache-2.0
"""Which rule grades maths: a strict one wherever the verdict is trained on, CRISP's where it only measures.

CRISP's rule also reads an answer out of the response as a whole. As a reward that would pay for two guesses.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

_READ_THE_VERDICT = {"feedback", "label", "spans"}  # kinds of context and of credit


def trains_on_verdict(opd: DictConfig) -> bool:
    """Whether a grade decides what is learned: by a term of reward, what a teacher reads, or the places that count."""
    parts: list[Any] = [opd.get("context"), opd.get("credit")]
    parts += [teacher.get("context") for teacher in (opd.get("teachers") or {}).values() if teacher]
    return opd.get("policy") is not None or any(part and part.get("kind") in _READ_THE_VERDICT for part in parts)


# Of world=math, whatever method and overrides make of `opd`.
OmegaConf.register_new_resolver(
    "maths_grader", lambda *, _root_: "math_strict" if trains_on_verdict(_root_.opd) else "math_dual", replace=True
)
