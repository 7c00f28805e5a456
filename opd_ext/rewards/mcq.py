# SPDX-License-Identifier: Apache-2.0
"""Grader and prompts for multiple-choice questions, as SDPO (arXiv 2601.20802) trains on SciKnowEval.

The feedback is always empty: every true sentence about a wrong letter narrows the choice among the rest.
"""

from collections.abc import Sequence
from string import ascii_uppercase

SYSTEM_PROMPT = (
    "\nGiven a question and four options, please select the right answer. Respond in the following format:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n"
    "For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing else. "
    'Do not restate the answer text. For example, if the answer is "A", just output:\n<answer>\nA\n</answer>\n'
)
"""As released, line feeds at both ends included: a chat template that does not strip makes tokens of them."""

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


def compute_score(
    data_source,
    solution_str,
    ground_truth,
    extra_info=None,
    *,
    choices: int = 4,
    closed: bool = False,
    reward_router_address=None,
    reward_model_tokenizer=None,
) -> dict:
    """Grade one response; the signature is that of verl's custom reward functions.

    Args:
        data_source: named in the error only; ``extra_info`` is ignored, as is what verl adds beside a reward model. No
            other keyword is taken, so that a misspelt one is refused.
        solution_str: the decoded response. Its answer, see :func:`stated_answer`, must equal the reference exactly.
        ground_truth: the letter of the right option.
        choices: number of options; the reference is one of so many letters. Set it, and ``closed``, with
            ``reward.custom_reward_function.reward_kwargs``.
        closed: only an ``<answer>`` that is closed counts. The release also takes one that is not, and a response
            without any as a whole.

    Returns:
        ``score`` = ``acc`` (1.0 right, 0.0 wrong), ``format_ok`` (1.0 if the last ``<answer>`` is closed and holds the
        letter of an option; the released metric ``incorrect_format`` is inverted and not followed), ``feedback``
        (always empty).

    Raises:
        ValueError: the reference is missing, or no letter of an option.

    >>> compute_score("mcq", "<answer>B</answer> No, wait. <answer>C", "C")
    {'score': 1.0, 'acc': 1.0, 'feedback': '', 'format_ok': 0.0}
    >>> compute_score("mcq", "<answer>B</answer> No, wait. <answer>C", "C", closed=True)["score"]
    0.0
    """
    letters, letter = ascii_uppercase[:choices], "" if ground_truth is None else str(ground_truth).strip()
    if not letter:
        raise ValueError(f"data source {data_source!r} has a sample with an empty ground_truth; give it a letter")
    if len(letter) != 1 or letter not in letters:
        raise ValueError(
            f"data source {data_source!r} has the ground_truth {letter!r}, which is none of {', '.join(letters)}: "
            "give it the letter of an option, or set reward.custom_reward_function.reward_kwargs.choices to the number "
            "of options"
        )
    answer = stated_answer(solution_str or "", closed=True)
    format_ok = answer is not None and len(answer) == 1 and answer in letters
    correct = letter == (answer if closed else stated_answer(solution_str or ""))
    return {"score": float(correct), "acc": float(correct), "feedback": "", "format_ok": float(format_ok)}


def final_answer(response: str) -> str | None:
    """The letter that a response chooses, which is its vote; None for what is no letter.

    >>> final_answer("<answer>\\nB\\n</answer>"), final_answer("I do not know")
    ('B', None)
    """
    answer = stated_answer(response)
    return answer if answer in {*ascii_uppercase} else None


def stated_answer(response: str, closed: bool = False) -> str | None:
    """What stands between the last ``<answer>`` and the ``</answer>`` after it, without the white space around it.

    Args:
        closed: None where there is no such element. If false, the released rule (``feedback/mcq.py`` of lasgroup/SDPO):
            a missing tag is the beginning or the end of the response.
    """
    _, opened, rest = response.rpartition(_OPEN)
    answer, ended, _ = rest.partition(_CLOSE)
    return answer.strip() if opened and ended or not closed else None
