# SPDX-License-Identifier: Apache-2.0
"""A control for any context: what the teacher is shown of a problem is another problem's.

If the student gains as much, it was not what the teacher knew of this problem that helped (OP2SD, arXiv 2608.09228).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from opd_ext.context.base import TeacherContext

OWN, ANOTHER = "own", "another"


class AnotherProblem(TeacherContext):
    """A context, with what it shows of a sample taken from a sample of another prompt of the same step.

    The request, the student's response and which samples have a teacher stay as they are. A sample whose step has no
    other problem to show has no teacher.

    Args:
        context: the one whose place it takes.
        kind: its name, for messages.

    Raises:
        ValueError: the context shows nothing of a problem, or does not say what.
    """

    def __init__(self, context: TeacherContext, kind: str):
        if not context.shows:
            why = "does not say what it shows" if context.shows is None else "shows the same for every problem"
            raise ValueError(f"problem={ANOTHER} has nothing to replace, because kind={kind} {why}")
        self._context, self._shown = context, context.shows
        self.thinking, self.ending = context.thinking, context.ending
        if context.in_turns:
            raise ValueError(f"problem={ANOTHER} is shown in the prompt, and kind={kind} speaks in later turns, too")

    def messages(self, sample: Mapping[str, Any]) -> list[dict] | None:
        if self._context.messages(sample) is None:
            return None
        shown = self._swapped(sample)
        return None if shown is None else self._context.messages(shown)

    def template_kwargs(self) -> dict[str, Any]:
        return self._context.template_kwargs()

    def metrics(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What the context says of what was shown, and ``another``: the share of samples that another stands for."""
        swapped = [self._swapped(sample) for sample in samples]
        shown = [own if other is None else other for own, other in zip(samples, swapped, strict=True)]
        found = sum(other is not None for other in swapped)
        return self._context.metrics(shown) | ({"another": found / len(samples)} if samples else {})

    def _swapped(self, sample: Mapping[str, Any]) -> dict[str, Any] | None:
        """The sample with what is shown of another: drawn uniformly among those that would have a teacher."""
        others = [
            other
            for other in sample["batch"]
            if other["uid"] != sample["uid"]
            and other["raw_prompt"] != sample["raw_prompt"]  # several rows may hold one problem
            and all(_value(other, key) == _value(sample, key) for key in self._context.agrees)
        ]
        identity = f"{sample['step']}/{sample['uid']}/{sample['session']}"
        for other in random.Random(f"another/{identity}").sample(others, len(others)):
            if self._context.messages(other) is not None:
                return _with_values(sample, other, self._shown)
        return None


def _value(sample: Mapping[str, Any], key: str) -> Any:
    value: Any = sample
    for name in key.split("."):
        value = (value or {}).get(name)
    return value


def _with_values(sample: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """``sample`` with the values of ``other`` under ``keys``; neither is changed."""
    made = dict(sample)
    for key in keys:
        section, _, name = key.rpartition(".")
        if section:
            made[section] = {**(made[section] or {}), name: _value(other, key)}
        else:
            made[name] = other[name]
    return made
