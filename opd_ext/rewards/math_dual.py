# SPDX-License-Identifier: Apache-2.0
"""The maths grader, with two policies: CRISP's dual rule for evaluation, and a strict rule for rewards.

``dual`` (arXiv 2603.05433, July 2026 revision): a response is correct if its last ``Answer:`` line, put into a box,
equals the reference under math-verify, or if math-verify finds the reference in the response as a whole. The published
accuracies move by tens of points with the choice of grader, so the two narrow readings (answer line only, last box
only) are reported beside the verdict.

As a reward that rule pays for two guesses, for contradictions and for cut responses whose last number happens to fit.
``strict`` pays for a final answer: stated after the thinking in the last answer line or the last box, both right where
there are both, in a response that came to its end.
"""

from opd_ext.rewards.answers import answer_line, check_reference, final_answers, last_box, never_evaluates
from opd_ext.rewards.verifier import HURRIED_SECONDS, RIGHT, WRONG, verifier_of_this_process

__all__ = ["answer_line", "check_reference", "compute_score", "last_box"]

MAX_RESPONSE_CHARS = 100_000
"""Longer responses are graded by their end, about 30,000 tokens, where the answer stands."""

POLICIES = ("dual", "strict")

_NO_ANSWER = (
    "No final answer was found. End with a line of the form 'Answer: ...' or put the final answer within \\boxed{...}."
)
_NOT_CHECKED = "The final answer could not be checked in time. Give it in a simpler form."
_NOT_ONE = "No single final answer was found. After the thinking, state one answer, once, and end there."


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, *, policy: str = "dual", **kwargs
) -> dict[str, float | str]:
    """Grade one response; the signature is that of verl's custom reward functions.

    Args:
        data_source: named in the error only; the grader is the same for every math set. ``kwargs`` are ignored.
        solution_str: the decoded response.
        ground_truth: the reference answer in LaTeX without a box, e.g. ``\\frac{1}{2}``.
        extra_info: ``truncated``, if it is there and true, says that the response was cut at its token limit.
        policy: what ``score`` follows, ``dual`` or ``strict``; set it with
            ``reward.custom_reward_function.reward_kwargs.policy``.

    Returns:
        ``acc`` (dual) and ``acc_strict``, of which ``policy`` makes one the ``score``; ``acc_answer_only``,
        ``acc_boxed_only``, ``format_ok`` (the response has a non-empty answer line or a box), all floats 0 or 1, and
        ``feedback``, which never contains the reference.

    Raises:
        ValueError: the reference is none, see :func:`check_reference`, or there is no such policy.
        RuntimeError: math-verify cannot be started, e.g. because it is not installed.

    >>> graded = compute_score("math", "It is one half. Answer: 0.5", "1/2")
    >>> graded["score"], graded["acc_answer_only"], graded["format_ok"]
    (1.0, 1.0, 1.0)
    >>> graded = compute_score("math", "\\\\boxed{42}, or not? Answer: 17", "42")  # found in the response as a whole
    >>> graded["acc"], graded["acc_answer_only"], graded["acc_strict"]
    (1.0, 0.0, 0.0)
    """
    if policy not in POLICIES:
        key = "reward.custom_reward_function.reward_kwargs.policy"
        raise ValueError(f"{key}={policy} does not exist: choose {' or '.join(POLICIES)}")
    gold = check_reference(ground_truth, f"data source {data_source!r}: ")
    response = (solution_str or "")[-MAX_RESPONSE_CHARS:]
    line, box = answer_line(response), last_box(response)
    by_line = _verdict(gold, line)
    # Nothing but a metric, or a contradiction, waits for the box of a response whose line is right: a box that would
    # take all of its time is not asked about.
    by_box = _verdict(gold, box, limit=None if by_line == WRONG else HURRIED_SECONDS, hopeless=bool(by_line))
    late = None in (by_line, by_box)
    # What could not be read in its own place would be tried first in the whole response, and fail there again.
    correct = bool(by_line or by_box) or (not late and bool(_verdict(gold, response, whole=True)))
    finals = [] if (extra_info or {}).get("truncated") else final_answers(response)
    strict = bool(finals) and all(
        _verdict(gold, text, limit=HURRIED_SECONDS, hopeless=bool(by_line)) == RIGHT for text in finals
    )
    score, format_ok = strict if policy == "strict" else correct, bool(line or box)
    hint = _NO_ANSWER if not format_ok else _NOT_CHECKED if late else _NOT_ONE if policy == "strict" and correct else ""
    return {
        "score": float(score),
        "acc": float(correct),
        "acc_strict": float(strict),
        "acc_answer_only": float(bool(by_line)),
        "acc_boxed_only": float(bool(by_box)),
        "format_ok": float(format_ok),
        "feedback": "" if score else hint,
    }


def _verdict(gold: str, text: str, *, hopeless: bool = False, **how) -> int | None:
    """As :meth:`Verifier.verdict`; nothing is a wrong answer.

    Args:
        hopeless: what never evaluates has no verdict, and is not tried.
    """
    if hopeless and never_evaluates(text):
        return None
    return verifier_of_this_process().verdict(gold, text, **how) if text.strip() else WRONG
