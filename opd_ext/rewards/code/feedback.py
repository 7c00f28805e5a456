# SPDX-License-Identifier: Apache-2.0
"""What a teacher may read about an attempt, in the words of LeetCode's judge (SDPO, arXiv 2601.20802, table of
environment feedback).

Only public tests are shown, with what they expect; of any other one, that it fails and how. The texts depend on the
program and the tests alone.
"""

import json
from collections.abc import Sequence
from typing import Any

from opd_ext.rewards.code.sandbox import Outcome
from opd_ext.rewards.code.truth import Test

LONGEST = 2000  # characters
_LINES, _WIDTH = 8, 250
_WRONG = 2  # wrong answers that are shown, the shortest first

NO_CODE = "Incorrect Format: Put your code inside a ```python ... ``` block."
CUT = (
    "Incorrect Format: Your attempt reached the maximum length before its code was complete. Be shorter, and put your "
    "code inside a ```python ... ``` block."
)

_TITLES = {
    "time": "Time Limit Exceeded",
    "memory": "Memory Limit Exceeded",
    "output": "Output Limit Exceeded",
    "error": "Runtime Error",
    "finished": "Wrong Answer",
}


def describe(failures: Sequence[tuple[int, Test, Outcome]], count: int) -> str:
    """Feedback on a program that fails.

    Args:
        failures: number, test and outcome of the tests that fail, of which at least one.
        count: of all tests.

    Returns:
        At most ``LONGEST`` characters: of the public tests that fail the first runtime error, else the first that runs
        out of time or memory, else up to two wrong answers; where all public tests pass, which other test fails.
    """
    shown = [failure for failure in failures if failure[1].public]
    if not shown:
        number, _, outcome = failures[0]
        return f"Test Case {number} of {count}, which is hidden: {_TITLES[outcome.end]}"
    for ends in (("error",), ("time", "memory", "output")):
        for _, test, outcome in shown:
            if outcome.end in ends:
                return _stopped(test, outcome)[:LONGEST]
    texts = sorted((_wrong(*failure) for failure in shown), key=len)
    text = texts[0]
    for further in texts[1:_WRONG]:
        if len(text) + len(further) + 2 <= LONGEST:
            text += f"\n\n{further}"
    return text[:LONGEST]


def _stopped(test: Test, outcome: Outcome) -> str:
    lines = [_TITLES[outcome.end]]
    if outcome.end == "error":
        lines += [outcome.error, *outcome.frames]
    return "\n".join([*lines, "", "Last Executed Input", _few(test.stdin)])


def _wrong(number: int, test: Test, outcome: Outcome) -> str:
    function = test.arguments is not None
    got = _returned(outcome.result) if function else outcome.output
    wanted = json.dumps(test.expected) if function else test.expected
    parts = [f"Test Case {number}: Wrong Answer", "", "Input", _few(test.stdin)]
    parts += ["", "Output", _cut(got), "", "Expected", _cut(wanted)]
    if function and outcome.output.strip():
        parts += ["", "Debug Output", _cut(outcome.output)]
    return "\n".join(parts)


def _returned(result: str | None) -> str:
    try:
        value: Any = json.loads(result or "null")
        return json.dumps(value["result"] if value else None)
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _few(text: str) -> str:
    lines = text.strip("\n").split("\n")
    more = len(lines) - _LINES
    shown = [_cut(line) for line in lines[:_LINES]]
    return "\n".join([*shown, f"... ({more} more line{'s' if more > 1 else ''})"] if more > 0 else shown)


def _cut(text: str) -> str:
    text = text.strip("\n")
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
