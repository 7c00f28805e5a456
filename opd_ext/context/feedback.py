# SPDX-License-Identifier: Apache-2.0
"""The teacher of SDPO (arXiv 2601.20802): what a group of rollouts has to tell its members.

Which demonstration, how much of it, with or without feedback: every choice is a pure function of texts, scores
and seeds, so that a rerun shows the teacher the same.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

from opd_ext.context import prompts
from opd_ext.context.base import TeacherContext, copy_messages, last_user_message, register_context

DEMONSTRATIONS = ("random", "first")

# A block is opened by its tag, or by the template, at the very beginning: then the tag is in the prompt.
_THINKING = re.compile(r"(?:<think>.*?|\A(?:(?!<think>).)*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Decision:
    """What one sample's teacher is shown.

    Attributes:
        group_succeeded: some rollout of the group, the sample included, reached the threshold.
        demonstration: the rollout that is shown as a correct solution, or None.
        feedback_available: feedback is wanted and this sample has some.
        uses_feedback: it is shown.
    """

    group_succeeded: bool
    demonstration: Mapping[str, Any] | None
    feedback_available: bool
    uses_feedback: bool

    @property
    def has_teacher(self) -> bool:
        """Anything to show? If not, the sample is masked out of the distillation loss."""
        return self.demonstration is not None or self.uses_feedback


@register_context("feedback")
@dataclass(frozen=True)
class FeedbackContext(TeacherContext):
    """SDPO (arXiv 2601.20802): the teacher is shown a rollout of the same group that succeeded, or what the
    environment said about the student's attempt.

    The student's last user message is continued by SDPO's sections; system messages and earlier turns stay, byte
    for byte. The attempt itself is not shown: it is the response that the teacher scores. A sample without
    demonstration and without feedback has no teacher.

    Attributes:
        success_threshold: score from which a rollout is a success.
        failures_only: a sample that succeeded has no teacher (SRPO, arXiv 2604.02288: its policy term teaches it).
        include_solution: show a demonstration where there is one.
        exclude_own_success: never show a sample its own response.
        demonstration: ``random``, or ``first`` of the group by session, see :func:`choose_demonstration`.
        seed: of ``random``.
        remove_thinking: show the demonstration without its ``<think>`` blocks.
        include_feedback: show feedback that is not blank.
        feedback_only_without_solution: ... but only where there is no demonstration.
        max_body_tokens: demonstration and feedback are each cut to this many tokens before the message is
            written, so that the request after them and the assistant's header are never lost.
    """

    shows: ClassVar = ("group", "feedback")
    success_threshold: float = 0.5
    failures_only: bool = False
    include_solution: bool = True
    exclude_own_success: bool = True
    demonstration: str = "random"
    seed: int = 1
    remove_thinking: bool = True
    include_feedback: bool = True
    feedback_only_without_solution: bool = True
    max_body_tokens: int | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.demonstration not in DEMONSTRATIONS:
            allowed = " or ".join(DEMONSTRATIONS)
            raise ValueError(f"demonstration={self.demonstration!r} does not exist: use {allowed}")
        if not (self.include_solution or self.include_feedback):
            raise ValueError("include_solution and include_feedback are both false: the teacher would be shown nothing")
        if self.max_body_tokens is not None and self.max_body_tokens < 1:
            raise ValueError(f"max_body_tokens={self.max_body_tokens} must be positive, or null for no limit")

    def decide(self, sample: Mapping[str, Any]) -> Decision:
        """What this sample's teacher is shown, as a function of the sample and the options alone."""
        session = int(sample["session"])
        if self.failures_only and sample["score"] >= self.success_threshold:
            return Decision(True, None, False, False)
        successes = [rollout for rollout in sample["group"] if rollout["score"] >= self.success_threshold]
        shown = None
        if self.include_solution:
            others = [rollout for rollout in successes if int(rollout["session"]) != session]
            shown = choose_demonstration(
                others if self.exclude_own_success else successes,
                self.demonstration,
                seed=self.seed,
                step=int(sample["step"]),
                uid=str(sample["uid"]),
                session=session,
            )
        available = self.include_feedback and bool((sample["feedback"] or "").strip())
        uses_feedback = available and not (self.feedback_only_without_solution and shown is not None)
        return Decision(bool(successes), shown, available, uses_feedback)

    def messages(self, sample: Mapping[str, Any]) -> list[dict] | None:
        solution, heard = (self._cut(body) for body in self._bodies(sample, self.decide(sample)))
        if solution is None and heard is None:
            return None
        messages = copy_messages(sample)
        request = last_user_message(messages, sample)
        request["content"] = prompts.sdpo_prompt(request["content"], solution, heard)
        return messages

    def describe(self, sample: Mapping[str, Any]) -> dict[str, float]:
        decision = self.decide(sample)
        cut = [body is not None and self._cut(body) != body for body in self._bodies(sample, decision)]
        return {
            "success_group_fraction": float(decision.group_succeeded),
            "success_sample_fraction": float(decision.demonstration is not None),
            "feedback_available_fraction": float(decision.feedback_available),
            "feedback_used_fraction": float(decision.uses_feedback),
            "reprompt_sample_fraction": float(decision.has_teacher),
            "truncated_sample_fraction": float(any(cut)),
        }

    def metrics(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Means over samples, except that ``success_group_fraction`` counts every group once."""
        succeeded = {str(sample["uid"]): float(self.decide(sample).group_succeeded) for sample in samples}
        return super().metrics(samples) | ({"success_group_fraction": fmean(succeeded.values())} if succeeded else {})

    def _bodies(self, sample: Mapping[str, Any], decision: Decision) -> tuple[str | None, str | None]:
        solution = None
        if decision.demonstration is not None:
            solution = decision.demonstration["response"]
            solution = remove_thinking(solution) if self.remove_thinking else solution
        return solution, sample["feedback"] if decision.uses_feedback else None

    def _cut(self, body: str | None) -> str | None:
        if body is None or self.max_body_tokens is None:
            return body
        if self.tokenizer is None:
            raise ValueError("max_body_tokens counts tokens: build the feedback context with a tokenizer")
        return truncate(self.tokenizer, body, self.max_body_tokens)


def choose_demonstration(
    candidates: Sequence[Mapping[str, Any]], how: str, *, seed: int, step: int, uid: str, session: int
) -> Mapping[str, Any] | None:
    """One of the successful rollouts that a sample may be shown.

    Args:
        candidates: rollouts with a ``session``, in any order.
        how: ``random`` draws uniformly and independently for every sample; the draw depends on ``seed``,
            ``step``, ``uid`` and ``session``. ``first`` is the success of the lowest session, which the whole group
            shares. The release shares one, too, but the first of a batch that verl has reordered by length and number
            of GPUs, so that it depends on lengths; that order is not reproduced.
        seed, step, uid, session: the run, the training step, the prompt, and the sample's place in its group.

    Returns:
        A candidate; None if there is none.
    """
    if not candidates:
        return None
    ordered = sorted(candidates, key=lambda rollout: int(rollout["session"]))
    if how == "first":
        return ordered[0]
    return random.Random(f"{seed}/{step}/{uid}/{session}").choice(ordered)


def remove_thinking(text: str) -> str:
    """``text`` without its ``<think>...</think>`` blocks and the white space behind each of them.

    A first block may lack its opening tag, which the chat templates of DeepSeek-R1 and Qwen3-Thinking write into the
    prompt. A block that is never closed stays: nothing says where the answer would begin.
    """
    return _THINKING.sub("", text)


def truncate(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The longest beginning of ``text`` that ends between two of its tokens and takes at most ``max_tokens``.

    A character that several tokens share (byte-level vocabularies) is kept whole or left out.

    Args:
        tokenizer: a fast ``transformers`` tokenizer; the positions of tokens in the text come from it.
    """
    while True:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= max_tokens:
            return text
        # Where the first token begins that is left out: in front of a character that it shares with the last one
        # kept. Some tokenizers report a blank as empty, so at least one character goes each time. The shorter text
        # is encoded again because it may split differently at its end.
        text = text[: min(offsets[max_tokens][0], len(text) - 1)]
