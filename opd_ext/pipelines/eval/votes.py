# SPDX-License-Identifier: Apache-2.0
"""What a response votes for, where the answer that most samples give is taken (self-consistency, arXiv 2203.11171)."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import TYPE_CHECKING

from opd_ext.rewards.answers import final_answers, spelled

if TYPE_CHECKING:
    from opd_ext.pipelines.settings import RewardConfig


def voted(grader: RewardConfig, responses: Iterable[str]) -> list[str]:
    """The answer of every response, spelled alike; ``""`` for one that states none, which does not vote.

    Programs are not compared as texts, so that none of them votes.

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
    return _alike(spelled(found[-1])[0]) if found else None


_NAMED = re.compile(r"[a-zA-Z]\w?\s*=\s*(?=[^=]*$)")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_RATIONAL = re.compile(r"[-+]?\d{1,30}(?:\.\d{1,30}|\s*/\s*\d{1,30})?")


def _alike(answer: str) -> str:
    """Rational numbers in one form; what else is equal and spelled otherwise votes for itself.

    >>> [_alike(text) for text in ("1/2", "0.50", r"-\\frac12", "x = 5", "5.0", "1,000", "x^2", "1/0")]
    ['1/2', '1/2', '-1/2', '5', '5', '1000', 'x^2', '1/0']
    """
    bare = _NAMED.sub("", answer.strip(), count=1)
    bare = _FRACTION.sub(lambda found: "/".join(filter(None, found.groups())), bare)
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare)
    if not _RATIONAL.fullmatch(bare):
        return answer
    try:
        return str(Fraction("".join(bare.split())))
    except ZeroDivisionError:
        return answer
