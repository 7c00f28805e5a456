# SPDX-License-Identifier: Apache-2.0
"""How programs are asked for, in the rows of sets of programs. ``prompts.wording`` of a pipeline replaces all of it."""

from __future__ import annotations

_FUNCTION = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
_COMPLETE = "Complete this function. Write all of it, with what it imports, into one block of Python."
_WRITE = "Write a Python function for this, into one block of Python. It must pass these tests:"


def contest_prompt(question: str, starter_code: str | None) -> str:
    """LiveCodeBench's own words (``lcb_runner/prompts/code_generation.py``), without its system message.

    >>> print(contest_prompt("Add a and b.", "class Solution:\\n    def add(self, a, b):"))
    ### Question:
    Add a and b.
    <BLANKLINE>
    ### Format: You will use the following starter code to write the solution to the problem and enclose your code \
within delimiters.
    ```python
    class Solution:
        def add(self, a, b):
    ```
    <BLANKLINE>
    ### Answer: (use the provided format with backticks)
    <BLANKLINE>
    <BLANKLINE>
    """
    named = bool(starter_code and starter_code.strip())
    words, block = (_FUNCTION, starter_code) if named else (_STDIN, "# YOUR CODE HERE")
    asked = "### Answer: (use the provided format with backticks)\n\n"
    return f"### Question:\n{question}\n\n### Format: {words}\n```python\n{block}\n```\n\n{asked}"


def completion_prompt(signature: str) -> str:
    """A signature with its docstring, to complete."""
    return f"{_COMPLETE}\n\n```python\n{signature.strip()}\n```"


def tested_prompt(task: str, tests: list[str]) -> str:
    """A task in words, and the tests that name its function."""
    return f"{task}\n\n{_WRITE}\n\n{_block(tests)}"


def tested_question(task: str, tests: list[str]) -> str:
    """The same without asking for a program; without the tests nobody would know the function's name."""
    return f"{task}\n\nIt must pass these tests:\n\n{_block(tests)}"


def _block(tests: list[str]) -> str:
    return f"```python\n{chr(10).join(tests)}\n```"
