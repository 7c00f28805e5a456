# SPDX-License-Identifier: Apache-2.0
"""The fourth place of a method: which tokens count, how much, and for how long (``opd.credit``)."""

from opd_ext.credit.annotate import register_annotator
from opd_ext.credit.config import CreditConfig
from opd_ext.credit.credits import (
    CreditInputs,
    credit_names,
    get_credit,
    known_beforehand,
    position_weights,
    register_credit,
)
from opd_ext.credit.schedule import trace_schedule
from opd_ext.ratios import importance_clip

__all__ = [
    "CreditConfig",
    "CreditInputs",
    "credit_names",
    "get_credit",
    "importance_clip",
    "known_beforehand",
    "position_weights",
    "register_annotator",
    "register_credit",
    "trace_schedule",
]
