# SPDX-License-Identifier: Apache-2.0
"""What a cell of a published file says: a question, a reference answer, a level."""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from opd_ext.context import prompts
from opd_ext.rewards.math_dual import last_box

_NO_ANSWER = {"nan", "none", "null", "n/a"}
_SENTENCE = r"(?:(?<![\\{a-zA-Z])[a-zA-Z]{2,}\W+){3}"  # three words in a row that are no LaTeX


def bare_question(question: str) -> str:
    """The question without DAPO's wording, which some files have twice."""
    while (stripped := prompts.strip_student_prompt(question.strip()).strip()) != question:
        question = stripped
    return question


def user_text(prompt: Any) -> str | None:
    """The text of a question: a string, or a chat of one user message (as such or as JSON); None if neither."""
    if isinstance(prompt, str):
        if not prompt.lstrip().startswith("[{"):
            return prompt
        try:
            prompt = json.loads(prompt)
        except json.JSONDecodeError:
            return prompt
    if not isinstance(prompt, list | tuple | np.ndarray) or len(prompt) != 1 or not isinstance(prompt[0], Mapping):
        return None
    message = prompt[0]
    is_request = message.get("role") == "user" and isinstance(message.get("content"), str)
    return message["content"] if is_request else None


def ground_truth(column: str, answer: Any) -> str:
    """The reference as text: a scalar, its box, or a verl ``reward_model`` (as such or as JSON); "" if there is none.

    A ``solution`` without a box is a bare answer in some files and a derivation in others: no sentence is an answer.
    """
    if isinstance(answer, str) and answer.lstrip().startswith('{"'):
        try:
            answer = json.loads(answer)
        except json.JSONDecodeError:
            return answer.strip()
    text = plain(answer.get("ground_truth") if isinstance(answer, Mapping) else answer)
    if inside := boxed(text):
        return inside
    is_prose = column == "solution" and (re.search(_SENTENCE, text) or r"\boxed" in text)
    return "" if is_prose or text.lower() in _NO_ANSWER else text


def boxed(text: str) -> str:
    """The content of the last box, in the three spellings of the MATH data: two with braces, one with a space."""
    start = max(text.rfind(opening) for opening in (r"\boxed", r"\fbox"))
    box = re.sub(r"^\\(?:boxed|fbox)\s*(?=\{)", r"\\boxed", text[max(start, 0) :])
    spaced = re.match(r"\\boxed\s+([^\s$]+)", box)
    return spaced[1].rstrip(".,") if spaced else last_box(box)


def plain(value: Any) -> str:
    """A scalar as text; "" for nothing, a list or a mapping."""
    if isinstance(value, str):
        return value.strip()
    if value is None or not np.isscalar(value) or value != value:
        return ""
    # A column of integers with a gap in it is a column of floats.
    return str(int(value)) if isinstance(value, float | np.floating) and float(value).is_integer() else str(value)


def level(value: Any) -> int | None:
    """The first number in it: ``Level 5`` is 5. None below 0, which no set has."""
    digits = re.search(r"(?<![-\d])\d+", plain(value))
    return int(digits[0]) if digits else None
