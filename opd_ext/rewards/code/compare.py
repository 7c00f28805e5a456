# SPDX-License-Identifier: Apache-2.0
"""Whether an output is the expected one. Both are compared here, in the parent; a program never sees the latter.

Texts are compared as LiveCodeBench does: line by line without the white space around them, and where two lines differ,
number by number. Where an integer is expected the number must be exactly that; else it may differ as with
``numpy.allclose``, LiveCodeBench's first rule, since printed digits of a fraction depend on how it was computed.
"""

import json
import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any

RELATIVE, ABSOLUTE = 1e-5, 1e-8
"""Of numbers that are no integers, as ``numpy.allclose`` has them."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?")
_INTEGER = re.compile(r"[+-]?[0-9]+")


def same_text(got: str, wanted: str) -> bool:
    """Compare what a program printed.

    >>> same_text("3 \\n1.5000001\\n", "3\\n1.5"), same_text("-1\\n998244353", "-1\\n998244352")
    (True, False)
    """
    ours, theirs = (text.strip().split("\n") for text in (got, wanted))
    return len(ours) == len(theirs) and all(_same_line(a.strip(), b.strip()) for a, b in zip(ours, theirs, strict=True))


def _same_line(got: str, wanted: str) -> bool:
    if got == wanted:
        return True
    ours, theirs = got.split(), wanted.split()
    return len(ours) == len(theirs) and all(a == b or _same_number(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_number(got: str, wanted: str) -> bool:
    if not (_NUMBER.fullmatch(got) and _NUMBER.fullmatch(wanted)):
        return False
    try:
        if _INTEGER.fullmatch(wanted):
            return Decimal(got) == Decimal(wanted)
        return _close(float(got), float(wanted))
    except (InvalidOperation, OverflowError, ValueError):
        return False


def same_value(result: str, wanted: Any) -> bool:
    """Compare what a function returned, which JSON has made plain lists, numbers and texts of.

    Args:
        result: JSON text, ``{"result": value}``.
        wanted: the expected value. Integers must be equal, fractions nearly; a list is no number and no other list.

    >>> same_value('{"result": [1, 0.30000000000000004]}', [1, 0.3]), same_value('{"result": 3}', [3])
    (True, False)
    """
    try:
        return _same(json.loads(result)["result"], wanted)
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def _same(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return isinstance(got, list) and len(got) == len(wanted) and all(map(_same, got, wanted))
    if isinstance(wanted, dict):
        return isinstance(got, dict) and got.keys() == wanted.keys() and all(_same(got[k], wanted[k]) for k in wanted)
    if isinstance(wanted, float) and isinstance(got, int | float):
        return got == wanted or _close(float(got), wanted)
    return bool(got == wanted)


def _close(got: float, wanted: float) -> bool:
    return got == wanted or (math.isfinite(wanted) and abs(got - wanted) <= ABSOLUTE + RELATIVE * abs(wanted))
