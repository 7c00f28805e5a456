# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the second level; mechanics and published prompts are those of the first."""

from __future__ import annotations

from opd_ext.tinymath.long import grader, problems, writing
from opd_ext.tinymath.tokenizer import prompt_phrases, words_of


def phrases() -> list[str]:
    """The fixed strings that are one token each."""
    marks = (problems.OPENING, problems.IF, problems.THEN, problems.ELSE, problems.YES, problems.NO)
    return [*prompt_phrases(), *marks, problems.ANSWER_OPENING, *(f"{label}: " for label in problems.LABELS)]


def words() -> list[str]:
    """The words of the world (a leading blank belongs to the word), sorted."""
    return words_of([writing.LOOK_AGAIN, writing.RESTATE, *writing.MUSINGS, *grader.FEEDBACK.values()])
