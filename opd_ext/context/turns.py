# SPDX-License-Identifier: Apache-2.0
"""What a teacher is told in later turns of a rollout: messages in front of a turn, which the student does not read.

The rollout's own ids stay as they are, in their order; the teacher's sequence has the messages between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_ext.context.sequence import render

Told = tuple[list[int], list[int]]
"""Ids of a response as its teacher reads it, and 1 where an id is the response's own, 0 where it was told."""


def beginnings(mask: Sequence[int]) -> list[int]:
    """Where later turns of a response begin: at a trained token behind one that is not.

    >>> beginnings([1, 1, 0, 0, 1, 0, 1])
    [4, 6]
    """
    return [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]


def tell(
    tokenizer: Any,
    response: Sequence[int],
    mask: Sequence[int],
    said: Callable[[int], str | None],
    template_kwargs: Mapping[str, Any],
) -> Told:
    """A response with a message of the user in front of those turns about which ``said`` says something.

    Args:
        response, mask: of the rollout, ids and 1 where the model wrote.
        said: number of a later turn, from 2 on -> what its teacher is told, or None.
        template_kwargs: of the chat template.

    Raises:
        ValueError: the template does not open later turns as it opens the first, so that there is no place between what
            a tool said and what the model writes.
    """
    found: list[int] = []
    own: list[int] = []
    done = 0
    opening: list[int] = []
    written: dict[str, list[int]] = {}
    for number, begin in enumerate(beginnings(mask), start=2):
        text = said(number)
        if text is None:
            continue
        opening = opening or opened(tokenizer, template_kwargs)
        if text not in written:
            written[text] = message(tokenizer, text, template_kwargs)
        place = begin - len(opening)
        if place < done or list(response[place:begin]) != opening:
            raise ValueError(
                "the chat template opens the turn behind a tool's answer in another way than the first, so that "
                "nothing can be said in front of it"
            )
        found += [*response[done:place], *written[text]]
        own += [1] * (place - done) + [0] * len(written[text])
        done = place
    return [*found, *response[done:]], [*own, *([1] * (len(response) - done))]


_ASKED = ({"role": "user", "content": "And?"},)


def opened(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> list[int]:
    """Ids with which the template opens an answer.

    Raises:
        ValueError: it opens none, or changes what stands before.
    """
    return _behind(tokenizer, _ASKED, _ASKED, template_kwargs, opened=True)


def message(tokenizer: Any, text: str, template_kwargs: Mapping[str, Any]) -> list[int]:
    """Ids of a further message of the user behind others.

    Raises:
        ValueError: the template has no place for one.
    """
    return _behind(tokenizer, _ASKED, (*_ASKED, {"role": "user", "content": text}), template_kwargs, opened=False)


def _behind(
    tokenizer: Any, first: Sequence[Mapping], more: Sequence[Mapping], kwargs: Mapping[str, Any], opened: bool
) -> list[int]:
    before = render(tokenizer, first, {**kwargs, "add_generation_prompt": False})
    after = render(tokenizer, more, {**kwargs, "add_generation_prompt": opened})
    if len(after) <= len(before) or after[: len(before)] != before:
        raise ValueError("the chat template has no place for a further message of the user")
    return after[len(before) :]
