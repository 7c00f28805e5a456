# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the tools' level; mechanics and published prompts are those of the first."""

from __future__ import annotations

from opd_ext.tinymath.tokenizer import prompt_phrases, words_of
from opd_ext.tinymath.tools import grader, problems, writing


def phrases() -> list[str]:
    """The fixed strings that are one token each."""
    marks = (problems.SHOP_OPENING, problems.TOTAL_OPENING, problems.ANSWER_OPENING)
    return [*prompt_phrases(), *marks, *calls()]


def calls() -> tuple[str, ...]:
    """The pieces of a call."""
    return writing.CALL_LOOK_UP, writing.CALL_ITEM, writing.CALL_CALCULATE, writing.CALL_END


def words() -> list[str]:
    """The words of the world (a leading blank belongs to the word), sorted."""
    remarks = [writing.NEXT, writing.CHECK, writing.RESTATE, *writing.MUSINGS, *grader.FEEDBACK.values()]
    failures = "Error executing tool 'look_up': there is no thing shop. this is no sum calculate"
    return words_of([*remarks, *problems.ITEMS, *(f" {item}" for item in problems.ITEMS), failures, "tool"])
