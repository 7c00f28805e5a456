# SPDX-License-Identifier: Apache-2.0
"""The published prompts, as data.

A self-distillation run is decided by the exact bytes that student and teacher are shown, so every
string lives here once and everything else (teacher contexts, data sets, tests) takes it from here.

Sources: CRISP (arXiv 2603.05433) for the DAPO student prompt and the conciseness instructions; OPSD
(arXiv 2601.18734) and SDPO (arXiv 2601.20802) for the teachers that see a solution or feedback. TRACE
published what its private note contains and the closed lists of types, but not the wording: those sentences
are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from opd_ext.spans import ERROR_TYPES, STEP_TYPES

STUDENT_OPENING = "Solve the following math problem step by step."
ANSWER_CLAUSE = (
    "The last line of your response should be of the form Answer: $Answer (without quotes) "
    "where $Answer is the answer to the problem."
)
STUDENT_HEADER = f"{STUDENT_OPENING} {ANSWER_CLAUSE}\n\n"
REMINDER = '\n\nRemember to put your answer on its own line after "Answer:".'

INSTRUCTIONS: dict[str, str] = {
    "v1": (
        "Solve the following math problem concisely and correctly. Be direct — avoid unnecessary "
        "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps "
        "needed to reach the answer."
    ),
    "v2": (
        "Solve the following math problem concisely and correctly. Prioritize a correct final answer above "
        "brevity. For straightforward problems, be direct: avoid unnecessary elaboration, redundant steps, "
        "or restating the problem. For difficult or multi-step problems, do NOT over-compress: keep every "
        "reasoning step needed for correctness, including case analysis, edge cases, and a brief check of "
        "the final answer. Never omit a step that the answer depends on."
    ),
    "v3": (
        "Write only what is needed: omit restatements, narration, and obvious arithmetic; keep every "
        "logically necessary step (case splits, key idea, a one-line check)."
    ),
    "v4": (
        "Write for an expert who wants only the essential reasoning: state the key steps and decisive "
        "computation, skip standard-fact explanations and narration; include required case analysis/checks."
    ),
    "v5": (
        "Present the solution as a minimal numbered list---each step one short line, no prose, no "
        "restatement; keep required cases and end with a one-line verification."
    ),
}
"""CRISP's fixed instructions. The paper prints v3, v4 and v5 abridged; no longer form was published."""

PCT_TEMPLATE = (
    "Solve the following math problem correctly using {p}% fewer tokens than you normally would. "
    "Be more concise — cut unnecessary elaboration, redundant steps, and verbose explanations while "
    "preserving correctness."
)
WORDS_TEMPLATE = (
    "Solve the following math problem correctly in at most {n} words. Be concise — state only the "
    "essential reasoning steps and skip any unnecessary elaboration."
)
TEXT_PREFIX = "text:"

OPSD_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
OPSD_SOLUTION_OPENING = "\n\nHere is a reference solution to this problem:\n=== Reference Solution Begin ===\n"
OPSD_SOLUTION_CLOSING = "\n=== Reference Solution End ===\n"
OPSD_GUARD = (
    "\n\nAfter reading the reference solution above, make sure you truly understand the reasoning behind "
    "each step — do not copy or paraphrase it. Now, using your own words and independent reasoning, derive "
    "the same final answer to the problem above. Think step by step, explore different approaches, and "
    "don't be afraid to backtrack or reconsider if something doesn't work out:\n"
)

SDPO_SOLUTION_OPENING = "\nCorrect solution:\n\n"
SDPO_FEEDBACK_OPENING = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
SDPO_CLOSING = "\n\nCorrectly solve the original question."


LABEL_ERROR_OPENING = "\n\n[Private note]\nAn earlier attempt had a local issue of this kind:\n"
LABEL_ERROR_CLOSING = (
    "\nBe careful there. Never reveal, quote or locate this note. Solve the problem on your own and finish with "
    "the final answer in the required form."
)
LABEL_STEP_OPENING = "\n\n[Private note]\nA working solution relies on steps of this kind:\n"
LABEL_STEP_CLOSING = (
    "\nMake that reasoning explicit where it is needed, without a checklist. Never refer to this note. Finish "
    "with the final answer in the required form."
)


def instruction(text_id: str) -> str:
    """CRISP's conciseness instruction for an id.

    Args:
        text_id: ``v1`` ... ``v5``; ``pct-P`` with a whole number P from 1 to 99 (20, 50 and 80 are the
            published ones); ``words-N`` with a whole number N of at least 1; or ``text:`` followed by an
            instruction of your own, which is used as it stands.

    Returns:
        The instruction without trailing newline.

    Raises:
        ValueError: the id is none of these; the message lists the allowed ones.
    """
    if text_id in INSTRUCTIONS:
        return INSTRUCTIONS[text_id]
    if text_id.startswith(TEXT_PREFIX) and text_id[len(TEXT_PREFIX) :].strip():
        return text_id[len(TEXT_PREFIX) :]
    budget = re.fullmatch(r"(pct|words)-([1-9][0-9]{0,5})", text_id)
    if budget and budget[1] == "words":
        return WORDS_TEMPLATE.format(n=budget[2])
    if budget and int(budget[2]) < 100:
        return PCT_TEMPLATE.format(p=budget[2])
    allowed = ", ".join(INSTRUCTIONS)
    raise ValueError(
        f"unknown instruction {text_id!r}: use one of {allowed}, pct-P (P from 1 to 99), words-N, "
        f"or '{TEXT_PREFIX}' followed by your own instruction"
    )


def student_prompt(question: str) -> str:
    """The unchanged DAPO user message: header, bare question, reminder."""
    return STUDENT_HEADER + question + REMINDER


def boxed_prompt(question: str) -> str:
    """The question and, once, a request for a boxed answer as in IW-OPD's evaluation (``math_eval/eval_math.py``)."""
    return question.removesuffix(f"\n{OPSD_BOXED}") + f"\n{OPSD_BOXED}"


def teacher_prompt(question: str, text_id: str) -> str:
    """CRISP's teacher message: the instruction *replaces* the DAPO header in front of the question.

    Raises:
        ValueError: unknown ``text_id``, see :func:`instruction`.
    """
    return f"{instruction(text_id)}\n\n{ANSWER_CLAUSE}\n\n{question}{REMINDER}"


def strip_student_prompt(user_text: str, strip_suffix: bool = True) -> str:
    """Recover the bare question from a student message.

    The DAPO header is removed wherever it opens the text; a text without it (a data set with bare
    questions) is taken as the question itself. The reminder is removed only if ``strip_suffix``: the
    released CRISP preparation left it in place, so its teacher prompts carry the reminder twice, and
    ``strip_suffix=False`` reproduces them byte for byte.
    """
    question = user_text.removeprefix(STUDENT_HEADER)
    return question.removesuffix(REMINDER) if strip_suffix else question


def opsd_student_prompt(problem: str) -> str:
    """OPSD's student message."""
    return f"Problem: {problem}\n\n{OPSD_BOXED}"


def opsd_teacher_prompt(problem: str, solution: str) -> str:
    """OPSD's teacher message (current release): problem, reference solution, guard, answer format."""
    reference = OPSD_SOLUTION_OPENING + solution + OPSD_SOLUTION_CLOSING
    return f"Problem: {problem}{reference}{OPSD_GUARD}\n{OPSD_BOXED}"


def sdpo_prompt(prompt: str, solution: str | None = None, feedback: str | None = None) -> str:
    """SDPO's re-prompt: the student's own message, then a correct solution and/or feedback.

    Plain concatenation, so braces in a solution or in feedback are just text. With neither, the message
    is the original prompt (such samples are masked out of the loss).
    """
    if solution is None and feedback is None:
        return prompt
    shown_solution = "" if solution is None else SDPO_SOLUTION_OPENING + solution
    shown_feedback = "" if feedback is None else SDPO_FEEDBACK_OPENING + feedback
    return prompt + shown_solution + shown_feedback + SDPO_CLOSING


def label_prompt(question_message: str, types: Sequence[str], correct: bool) -> str:
    """TRACE's teacher message: the student's own message, then a private note that names only types.

    Args:
        question_message: the student's user message; it stays as it is, in front of the note.
        types: diagnostic types of one rollout, of :data:`STEP_TYPES` if it was correct and of
            :data:`ERROR_TYPES` otherwise. Each distinct type gets one bullet, in the order given.
        correct: the outcome of that rollout.

    Raises:
        ValueError: no type, or a type that is not in the list of this outcome.
    """
    sentences = STEP_TYPES if correct else ERROR_TYPES
    if not len(types):
        raise ValueError("a private note needs at least one type: a rollout without types has no teacher")
    if unknown := [name for name in types if name not in sentences]:
        raise ValueError(f"unknown {'step' if correct else 'error'} type {unknown[0]!r}: use {', '.join(sentences)}")
    bullets = "\n".join(f"- {sentences[name]}" for name in dict.fromkeys(types))
    opening = LABEL_STEP_OPENING if correct else LABEL_ERROR_OPENING
    closing = LABEL_STEP_CLOSING if correct else LABEL_ERROR_CLOSING
    return question_message + opening + bullets + closing
