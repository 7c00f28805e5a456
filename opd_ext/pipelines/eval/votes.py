# SPDX-License-Identifier: Apache-2.0
"""What a response votes for, where the answer that most samples give is taken (self-consistency, arXiv 2203.11171)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from opd_ext.rewards.answers import final_answers, spelled

if TYPE_CHECKING:
    from opd_ext.pipelines.settings import RewardConfig


def voted(grader: RewardConfig, responses: Iterable[str]) -> list[str]:
    """The answer of every response, spelled alike; ``""`` for one that states none, which does not vote.

    A grader's module may offer ``final_answer(response)``, text or None, where its answers stand elsewhere than in an
    answer line or a box.
    """
    answer = _reader(grader)
    return [" ".join((answer(response) or "").split()) for response in responses]


def _reader(grader: RewardConfig) -> Callable[[str], str | None]:
    if grader.path and grader.path.startswith("pkg://"):
        own = getattr(importlib.import_module(grader.path.removeprefix("pkg://")), "final_answer", None)
        if own is not None:
            return own
    return stated


def stated(response: str) -> str | None:
    """The last answer that a response commits itself to, by line or box.

    >>> stated("It is \\\\boxed{0.50}."), stated("No idea.")
    ('0.50', None)
    """
    found = final_answers(response)
    return spelled(found[-1])[0] if found else None
