# SPDX-License-Identifier: Apache-2.0
"""Which block of a response is its program: the forms in which models write fences, around one right program."""

import pytest

from opd_ext.rewards.code.blocks import program_of

PROGRAM = "n = int(input())\nprint(n)\n"
LAST = PROGRAM.rstrip("\n")
FORMS = {
    "a fence behind words": f"Code: ```python\n{PROGRAM}```",
    "words behind the closing fence": f"```python\n{PROGRAM}``` That's it.",
    "words behind it, and a sample": f"```python\n{PROGRAM}``` It prints:\n```\n5\n```",
    "closed at the end of the last line": f"```python\n{LAST}```",
    "closed by a marked fence": f"```python\n{PROGRAM}```python\nThat prints it.",
    "opened again before it was closed": f"```python\nimport sys\n```python\n{PROGRAM}```",
    "a sample without a mark behind": f"```python\n{PROGRAM}```\nOutput:\n```\nprint(5)\n```",
    "a fence named in words": f"Put it within ```\nand then:\n```python\n{PROGRAM}```",
    "a longer fence around a shorter one": f"````python\n{PROGRAM}````\n",
    "tildes": f"~~~py\n{PROGRAM}~~~",
    "a list's indentation": "1. Here:\n   ```python\n   n = int(input())\n   print(n)\n   ```",
    "behind the thinking": f"<think>```python\nprint(1)\n```</think>\n```python\n{PROGRAM}```",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_program_is_found_in_every_form(form):
    assert program_of(FORMS[form]) == PROGRAM


@pytest.mark.parametrize("text", [f"```python\n{PROGRAM}", PROGRAM, "Use ```print``` for it."])
def test_what_is_not_closed_or_not_in_a_block_is_no_program(text):
    assert program_of(text) is None


def test_a_fence_within_a_docstring_stays_in_its_program():
    body = 'def f():\n    """Use:\n        ```python\n        f()\n    """\n' + PROGRAM
    assert program_of(f"```python\n{body}```") == body


def test_the_last_program_is_meant_and_of_functions_the_one_that_is_asked_for():
    assert program_of(f"```python\n{PROGRAM}```\nBetter:\n```python\nprint(0)\n```") == "print(0)\n"
    function, example = "def f(x):\n    return x\n", "print(f(int(input())))\n"
    assert program_of(f"```python\n{function}```\n```python\n{example}```", "f") == function
