# SPDX-License-Identifier: Apache-2.0
"""The tests that a row of a data set holds."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SECONDS = 6.0
"""CPU time of a test, as LiveCodeBench has it."""


@dataclass(frozen=True)
class Test:
    """One test.

    Attributes:
        stdin: of a program; for a function the text that feedback shows as its input.
        arguments: of a function, else None.
        expected: the output as text; of a function the value that JSON makes of it.
        public: feedback may show it.
    """

    __test__ = False  # pytest looks for classes of this name

    stdin: str
    arguments: tuple | None
    expected: Any
    public: bool


@dataclass(frozen=True)
class Tests:
    """All tests of a problem, public ones first."""

    __test__ = False

    function: str | None
    seconds: float
    tests: tuple[Test, ...]


@lru_cache(maxsize=64)
def read_tests(ground_truth: str, name: str = "") -> Tests:
    """Read a reference.

    Args:
        ground_truth: JSON with ``inputs`` and ``outputs``, one text per test (or a list of lines); ``fn_name`` where a
            function is asked for, whose arguments are then one JSON value per line and whose output is one; optionally
            ``time_limit`` in seconds and ``public``: feedback may show so many tests, from the first, by default none.
        name: put before what is wrong.

    Raises:
        ValueError: one sentence: there is no test, or one that cannot be read.
    """
    try:
        found = json.loads(ground_truth)
    except (TypeError, ValueError):
        raise ValueError(f"{name}the ground_truth is no JSON; give it inputs and outputs of tests") from None
    if not isinstance(found, dict) or not isinstance(found.get("inputs"), list):
        raise ValueError(f"{name}the ground_truth has no list of inputs; give it inputs and outputs of tests")
    inputs, outputs = found["inputs"], found.get("outputs")
    if not inputs:
        raise ValueError(f"{name}there are no tests, so that every program would pass; leave the row out")
    if not isinstance(outputs, list) or len(outputs) != len(inputs):
        raise ValueError(f"{name}there are {len(inputs)} inputs and not as many outputs")
    function, seconds, public = found.get("fn_name") or None, found.get("time_limit") or SECONDS, found.get("public", 0)
    if not (isinstance(seconds, int | float) and seconds > 0 and isinstance(public, int) and public >= 0):
        raise ValueError(f"{name}time_limit must be positive seconds and public a number of tests")
    tests = []
    for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=True), start=1):
        try:
            tests.append(_function_test(given, wanted, number <= public) if function else
                         Test(_lines(given), None, _lines(wanted), number <= public))  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{name}test {number} cannot be read ({error})") from None
    return Tests(function, float(seconds), tuple(tests))


def _lines(text: Any) -> str:
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        return "\n".join(text)
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.40} is no text")
    return text


def _function_test(given: Any, wanted: Any, public: bool) -> Test:
    if isinstance(given, list):  # as APPS has it
        arguments, shown = given, "\n".join(map(json.dumps, given))
    else:
        shown = _lines(given)
        arguments = [json.loads(line) for line in shown.strip().split("\n") if line.strip()]
    return Test(shown, tuple(arguments), json.loads(wanted) if isinstance(wanted, str) else wanted, public)
