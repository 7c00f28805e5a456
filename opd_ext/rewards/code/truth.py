# SPDX-License-Identifier: Apache-2.0
"""The tests that a row of a data set holds."""

import ast
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
        stdin: of a program; for a function, and a check, the text that feedback shows as its input.
        arguments: of a function, else None.
        expected: the output as text; of a function the value that JSON makes of it.
        public: feedback may show it.
        check: Python that is run behind the program, in its process, and passes unless it raises; else empty.
    """

    __test__ = False  # pytest looks for classes of this name

    stdin: str
    arguments: tuple | None
    expected: Any
    public: bool
    check: str = ""


@dataclass(frozen=True)
class Tests:
    """All tests of a problem, public ones first; ``prelude`` is Python that is run before the program of a check."""

    __test__ = False

    function: str | None
    seconds: float
    tests: tuple[Test, ...]
    prelude: str = ""


@lru_cache(maxsize=64)
def read_tests(ground_truth: str, name: str = "") -> Tests:
    """Read a reference.

    Args:
        ground_truth: JSON with ``inputs`` and ``outputs``, one text per test (or a list of lines); ``fn_name`` where a
            function is asked for, whose arguments are then one JSON value per line and whose output is one; optionally
            ``time_limit`` in seconds and ``public``: feedback may show so many tests, from the first, by default none.
            Or, instead of inputs and outputs, ``checks``: Python texts, each a test, as HumanEval and MBPP publish
            them, and ``prelude``; ``fn_name`` then says which block of a response is its program.
        name: put before what is wrong.

    Raises:
        ValueError: one sentence: there is no test, or one that cannot be read.
    """
    try:
        found = json.loads(ground_truth)
    except (TypeError, ValueError):
        raise ValueError(f"{name}the ground_truth is no JSON; give it inputs and outputs of tests") from None
    if isinstance(found, dict) and "checks" in found:
        return _checks(found, name)
    if not isinstance(found, dict) or not isinstance(found.get("inputs"), list):
        raise ValueError(f"{name}the ground_truth has no list of inputs; give it inputs and outputs of tests")
    inputs, outputs = found["inputs"], found.get("outputs")
    if not inputs:
        raise ValueError(f"{name}there are no tests, so that every program would pass; leave the row out")
    if not isinstance(outputs, list) or len(outputs) != len(inputs):
        raise ValueError(f"{name}there are {len(inputs)} inputs and not as many outputs")
    function, (seconds, public) = found.get("fn_name") or None, _limits(found, name)
    tests = []
    for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=True), start=1):
        try:
            tests.append(_function_test(given, wanted, number <= public) if function else
                         Test(_lines(given), None, _lines(wanted), number <= public))  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{name}test {number} cannot be read ({error})") from None
    return Tests(function, seconds, tuple(tests))


def _limits(found: dict[str, Any], name: str) -> tuple[float, int]:
    seconds, public = found.get("time_limit") or SECONDS, found.get("public", 0)
    if not (isinstance(seconds, int | float) and seconds > 0 and isinstance(public, int) and public >= 0):
        raise ValueError(f"{name}time_limit must be positive seconds and public a number of tests")
    return float(seconds), public


def _checks(found: dict[str, Any], name: str) -> Tests:
    checks, prelude, (seconds, public) = found["checks"], found.get("prelude") or "", _limits(found, name)
    if not isinstance(checks, list) or not checks or not isinstance(prelude, str):
        raise ValueError(f"{name}checks must be a list of Python texts, not empty, and prelude a text")
    for number, text in enumerate((prelude, *checks)):
        try:
            ast.parse(text)
        except (SyntaxError, TypeError, ValueError) as error:
            raise ValueError(f"{name}test {number} is no Python ({' '.join(str(error).split())})") from None
    tests = (Test(text, None, "", number <= public, text) for number, text in enumerate(checks, start=1))
    return Tests(found.get("fn_name") or None, seconds, tuple(tests), prelude)


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
