# SPDX-License-Identifier: Apache-2.0
"""The contexts of one screen each; a longer one has a file of its own.

In self-distillation the prompt is the teacher: with equal weights, everything the student learns comes from
the difference between two token sequences that end in the same response.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from opd_ext.context import prompts
from opd_ext.context.base import TeacherContext, copy_messages, last_user_message, register_context, sample_index


@register_context("same")
@dataclass(frozen=True)
class SameContext(TeacherContext):
    """The student's own messages: distillation from other weights, or the zero-loss check with equal ones."""

    shows: ClassVar = ()

    def messages(self, sample: Mapping[str, Any]) -> list[dict] | None:
        return copy_messages(sample)


@register_context("instruction")
@dataclass(frozen=True)
class InstructionContext(TeacherContext):
    """CRISP (arXiv 2603.05433): the teacher is asked to be concise.

    The instruction takes the place of the DAPO header in the *last user message*, the request that the
    response answers; system messages and earlier turns stay, byte for byte.

    Attributes:
        text: instruction id, see :func:`opd_ext.context.prompts.instruction`.
        strip_suffix: remove the reminder of the student's prompt before the teacher's is appended. False
            repeats it, as the released code does.
        template: the teacher's request where prompts are not DAPO's, with ``{instruction}`` and ``{question}``; the
            question is then ``extra_info["question"]``, without what the student's prompt asks for besides.
        every_turn: of a rollout with tools; the instruction is repeated in front of every later turn.
    """

    shows: ClassVar = ()
    text: str = "v2"
    strip_suffix: bool = True
    template: str | None = None
    every_turn: bool = False

    @property
    def in_turns(self) -> bool:
        return self.every_turn

    def told(self, sample: Mapping[str, Any], turn: int) -> str | None:
        return prompts.instruction(self.text) if self.every_turn else None

    def __post_init__(self) -> None:
        prompts.instruction(self.text)  # an unknown id is an error of the config, not of the first step
        for name in ("{instruction}", "{question}"):
            if self.template is not None and name not in self.template:
                raise ValueError(f"template={self.template!r} has no {name}: write it where that belongs")

    def messages(self, sample: Mapping[str, Any]) -> list[dict] | None:
        messages = copy_messages(sample)
        request = last_user_message(messages, sample)
        if self.template is None:
            question = prompts.strip_student_prompt(request["content"], self.strip_suffix)
            request["content"] = prompts.teacher_prompt(question, self.text)
        else:
            instructed = self.template.replace("{instruction}", prompts.instruction(self.text))
            request["content"] = instructed.replace("{question}", _required_text(sample, "question"))
        return messages


@register_context("solution")
@dataclass(frozen=True)
class SolutionContext(TeacherContext):
    """OPSD (arXiv 2601.18734): the teacher is shown a reference solution and asked to derive the answer on
    its own.

    The last user message becomes OPSD's teacher prompt for ``extra_info["question"]`` and
    ``extra_info["solution"]``; system messages and earlier turns stay, byte for byte.

    Attributes:
        thinking: the published recipe has it on for the teacher and off for the student.
        ending: of the teacher's prompt: what its template opens an answer with (null, as published: the student
            answers behind an empty think block, the teacher before one), the student's (``student``), or the former
            and more characters (``text:...``, say ``text:<think>``).
    """

    shows: ClassVar = ("extra_info.solution",)
    thinking: bool | None = None
    ending: str | None = None

    def messages(self, sample: Mapping[str, Any]) -> list[dict] | None:
        messages = copy_messages(sample)
        question, solution = (_required_text(sample, key) for key in ("question", "solution"))
        last_user_message(messages, sample)["content"] = prompts.opsd_teacher_prompt(question, solution)
        return messages


@register_context("label")
@dataclass(frozen=True)
class LabelContext(TeacherContext):
    """TRACE: the teacher is told of which kinds an attempt's errors, or a working solution's decisive steps, are.

    The note stands behind the problem in the last user message. It is a function of the student's messages, the
    outcome and the types alone: neither the response, nor where its spans lie, nor the reference answer can reach
    the teacher. A rollout without types has no teacher.

    Attributes:
        thinking: the published recipe has it on.
        ending: of the teacher's prompt: null, ``student`` or ``text:...``, as in ``solution``.
    """

    shows: ClassVar = ("types",)
    agrees: ClassVar = ("correct",)
    thinking: bool | None = None
    ending: str | None = None

    def messages(self, sample: Mapping[str, Any]) -> list[dict] | None:
        types = list(sample["types"])
        if not types:
            return None
        messages = copy_messages(sample)
        request = last_user_message(messages, sample)
        request["content"] = prompts.label_prompt(request["content"], types, bool(sample["correct"]))
        return messages


def _required_text(sample: Mapping[str, Any], key: str) -> str:
    value = (sample.get("extra_info") or {}).get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"sample {sample_index(sample)} has no extra_info[{key!r}], which the teacher is to be shown: "
            "add it to the data set or drop the sample"
        )
    return value
