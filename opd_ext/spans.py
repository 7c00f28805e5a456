# SPDX-License-Identifier: Apache-2.0
"""Annotated spans: the labels that tokens carry, and the types that TRACE (arXiv 2605.10194) gives them."""

KEY, ERROR = 1, 2
SPAN_LABELS = {"key": KEY, "error": ERROR}
"""Label of a token whose class has a name in the configuration; 0: the token is in no span."""

ERROR_TYPES: dict[str, str] = {
    "missed_case": "A case that can occur may be left out.",
    "illegal_step": "A step may break a rule that it relies on.",
    "wrong_constraint": "A condition may be misread or misapplied.",
    "wrong_equivalence": "Two things that differ may be treated as equal.",
    "premature_conclusion": "A conclusion may come before it is justified.",
    "format_error": "The answer may miss the required form.",
    "arithmetic_slip": "A calculation may contain a slip.",
    "sign_error": "A sign may be wrong.",
    "off_by_one": "A count or an index may be off by one.",
}
"""TRACE's closed list of error types, in published order, each with the sentence that the teacher reads."""

STEP_TYPES: dict[str, str] = {
    "case_split": "The problem is split into cases.",
    "boundary_check": "Boundary values are checked.",
    "invariant": "Something that stays unchanged is used.",
    "substitution": "An expression is replaced by another one.",
    "constraint_use": "A given condition narrows what is possible.",
    "symmetry": "A symmetry is used.",
    "construction_step": "An object with the needed properties is built.",
    "final_verification": "The result is checked against the problem.",
    "key_formula": "A central formula is applied.",
    "insight": "An observation makes the problem simpler.",
}
"""TRACE's closed list of decisive steps, likewise."""
