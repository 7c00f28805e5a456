# SPDX-License-Identifier: Apache-2.0
"""Grader and prompts for multiple-choice questions, as SDPO (arXiv 2601.20802) trains on SciKnowEval.

The feedback is always empty: every true sentence about a wrong letter narrows the choice among the rest.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

SYSTEM_PROMPT = (
    "Given a question and four options, please select the right answer. Respond in the following format:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n"
    "For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing else. "
    'Do not restate the answer text. For example, if the answer is "A", just output:\n<answer>\nA\n</answer>'
)
STEP_BY_STEP = "\nPlease reason step by step."

_OPEN, _CLOSE = "<answer>", "</answer>"


def user_prompt(question: str, options: Sequence[str]) -> str:
    """The published user message: the question, a blank line, the options as ``A: ...``, the closing request.

    Raises:
        ValueError: there are no options, or more than there are letters.
    """
    if not 1 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"a question has {len(options)} options: give between 1 and {len(ascii_uppercase)}")
    lines = [f"{letter}: {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return question + "\n\n" + "\n".join(lines) + STEP_BY_STEP


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """Grade one response; the signature is that of verl's custom reward functions.

    Args:
        data_source: named in the error only; ``extra_info`` and ``kwargs`` are ignored.
        solution_str: the decoded response. What stands between the *last* ``<answer>`` and the ``</answer>`` after
            it counts, without the white space around it, and must equal the reference exactly.
        ground_truth: the letter of the right option.

    Returns:
        ``score`` = ``acc`` (1.0 right, 0.0 wrong), ``format_ok`` (1.0 if the answer is one capital letter; the
        released metric ``incorrect_format`` is inverted and not followed), ``feedback`` (always empty).

    Raises:
        ValueError: the reference is missing or blank.

    >>> compute_score("mcq", "<answer>B</answer> No, wait. <answer>C</answer>", "C")
    {'score': 1.0, 'acc': 1.0, 'feedback': '', 'format_ok': 1.0}
    >>> compute_score("mcq", "The answer is C.", "C")["score"]
    0.0
    """
    letter = "" if ground_truth is None else str(ground_truth).strip()
    if not letter:
        raise ValueError(f"data source {data_source!r} has a sample with an empty ground_truth; give it a letter")
    answer = stated_answer(solution_str or "")
    correct = answer == letter
    return {
        "score": float(correct),
        "acc": float(correct),
        "feedback": "",
        "format_ok": float(answer is not None and re.fullmatch("[A-Z]", answer) is not None),
    }


def stated_answer(response: str) -> str | None:
    """The text of the last ``<answer>`` element; None if there is no such element or it is never closed."""
    _, opened, rest = response.rpartition(_OPEN)
    answer, closed, _ = rest.partition(_CLOSE)
    return answer.strip() if opened and closed else None
