# SPDX-License-Identifier: Apache-2.0
"""The interface of a teacher context and the registry of their names.

Apart from the contexts themselves, so that a longer one can live in a file of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

from opd_ext.registry import Registry

STUDENT, TEXT = "student", "text:"  # what an `ending` may be, or begin with


class TeacherContext:
    """Turns a sample into the teacher's messages.

    Subclasses are frozen dataclasses; their fields are the options that stand beside ``kind`` in the config. A
    field ``tokenizer`` is no option: it receives the tokenizer of the run.

    Attributes:
        thinking: what the chat template's ``enable_thinking`` is for the teacher; None: as for the student.
        ending: what the teacher's prompt ends with, in front of the response. None: what its template opens an answer
            with; ``student``: what the student's does, so that the first token is taught no difference of templates;
            ``text:...``: these characters behind the template's own, say ``text:<think>``.
        shows: the keys of a sample, dotted, that hold what the teacher is shown of *this* problem beyond the student's
            messages; empty if it is shown the same for all. None: the class does not say, and then no control can
            replace it.
        agrees: keys in which another sample must agree before its ``shows`` can stand for this one's.
    """

    thinking: bool | None = None
    ending: str | None = None
    shows: ClassVar[tuple[str, ...] | None] = None
    agrees: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.thinking is not None and not isinstance(self.thinking, bool):
            raise ValueError(f"thinking={self.thinking!r} must be true, false or null (as the student)")
        if self.ending not in (None, STUDENT) and not re.match(rf"{TEXT}.", self.ending, re.DOTALL):
            raise ValueError(f"ending={self.ending!r} must be null, student or text:... (characters to add)")

    def messages(self, sample: Mapping[str, Any]) -> list[dict] | None:
        """The teacher's chat for one sample.

        Args:
            sample: It is left untouched. Every context may read

                * ``raw_prompt``: the student's messages;
                * ``extra_info``: the data set's mapping, with ``index``, ``question``, ``solution``;
                * ``uid``, ``session``, ``step``: the prompt, the place in its group, the training step;
                * ``score``, ``feedback``, ``response``: the grader's number and text, and the decoded response
                  without special tokens;
                * ``group``: all samples of the prompt, this one included, each with ``session``, ``score`` and
                  ``response``;
                * ``batch``: the samples of the step, this one included;
                * ``types``, ``correct``: the annotator's diagnostic types and the outcome they belong to.

        Returns:
            New messages; changing them does not change the sample. None if this sample has no teacher, which
            takes it out of the distillation loss.

        Raises:
            ValueError: the sample lacks what the context shows; the message names the sample's index.
        """
        raise NotImplementedError

    @property
    def in_turns(self) -> bool:
        """Whether :meth:`told` may say something."""
        return False

    def told(self, sample: Mapping[str, Any], turn: int) -> str | None:
        """What the teacher is told in front of a later turn of a rollout with tools, beyond what stands in its prompt.

        Args:
            sample: as :meth:`messages` has it.
            turn: of the model, 2 or more.

        Returns:
            A message of the user, or None. It stands behind what the tools said, and the student does not read it.
        """
        return None

    def template_kwargs(self) -> dict[str, Any]:
        """What to change in verl's ``data.apply_chat_template_kwargs`` when the teacher's chat is rendered."""
        return {} if self.thinking is None else {"enable_thinking": self.thinking}

    def describe(self, sample: Mapping[str, Any]) -> dict[str, float]:
        """Numbers about what the teacher is shown for one sample, under the names of :meth:`metrics`."""
        return {}

    def metrics(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What a batch of samples was shown: the means of :meth:`describe`."""
        described = [self.describe(sample) for sample in samples]
        return {name: fmean(numbers[name] for numbers in described) for name in (described[0] if described else ())}


class NoContext(TeacherContext):
    """There is no teacher to show anything."""

    def messages(self, sample: Mapping[str, Any]) -> list[dict] | None:
        return None


_contexts: Registry[Any] = Registry("teacher context")
register_context = _contexts.register
get_context = _contexts.get
context_names = _contexts.names


def copy_messages(sample: Mapping[str, Any]) -> list[dict]:
    """The student's messages, to be changed."""
    # Deep, because the content of a multimodal message is a list; through list(), because verl keeps object
    # arrays.
    return [copy.deepcopy(dict(message)) for message in list(sample["raw_prompt"])]


def last_user_message(messages: list[dict], sample: Mapping[str, Any]) -> dict:
    """The request that the response answers.

    Raises:
        ValueError: there is none, or it is not plain text; the message names the index of ``sample``.
    """
    last = next((message for message in reversed(messages) if message["role"] == "user"), None)
    if last is None or not isinstance(last["content"], str):
        raise ValueError(
            f"sample {sample_index(sample)} has no plain-text user message, which this teacher context rewrites: "
            "use context.kind=same or give the data set a text prompt"
        )
    return last


def sample_index(sample: Mapping[str, Any]) -> Any:
    """The sample's index in its data set, for error messages."""
    return (sample.get("extra_info") or {}).get("index", sample.get("index", "without index"))
