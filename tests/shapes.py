# SPDX-License-Identifier: Apache-2.0
"""The shapes in the signatures of the objective and its places, checked at every call while tests run."""

from typing import Literal, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype

CHECKED = (
    "opd_ext.credit",
    "opd_ext.divergence",
    "opd_ext.objective",
    "opd_ext.pipelines.ssd.target",
    "opd_ext.pipelines.t3s.selection",
    "opd_ext.policy",
    "opd_ext.ratios",
    "opd_ext.teacher.weights",
)


def checked(function):
    """``beartype``, for which any text is a choice of words: what a wrong one is told, the code says itself."""
    for name, hint in function.__annotations__.items():
        if get_origin(hint) is Literal:
            function.__annotations__[name] = str
    return beartype(function, conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too


def check_shapes() -> None:
    """Must come before ``opd_ext`` is imported: functions are wrapped at import."""
    jaxtyping.install_import_hook(CHECKED, f"{checked.__module__}.{checked.__qualname__}")
