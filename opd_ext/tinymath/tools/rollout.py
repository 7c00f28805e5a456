# SPDX-License-Identifier: Apache-2.0
"""Rollouts of several turns in this process, for the card of the world: the model writes, the tools answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from opd_ext.tinymath.tools.problems import MAX_TURNS
from opd_ext.tinymath.tools.writing import tool_says

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

_CALL = re.compile(r"<tool_call>.*?</tool_call>", re.DOTALL)


def play(
    tokenizer: PreTrainedTokenizerFast,
    shown: list[list[int]],
    write: Callable[[list[list[int]], int], list[list[int]]],
) -> list[tuple[list[int], int]]:
    """Let a model work through prompts with the tools, for :data:`MAX_TURNS` at most.

    Args:
        shown: prompts.
        write: the next turn behind each of some token ids, with its end where it has one; it is told the turn.

    Returns:
        For each prompt the ids behind it, the tools' included, and how many of them the model wrote.
    """
    found: list[tuple[list[int], int]] = [([], 0) for _ in shown]
    going = list(range(len(shown)))
    for turn in range(MAX_TURNS):
        if not going:
            break
        replies = write([shown[i] + found[i][0] for i in going], turn)
        still = []
        for i, reply in zip(going, replies, strict=True):
            ids, written = found[i]
            found[i] = ids + reply, written + len(reply)
            call = _CALL.search(tokenizer.decode(reply))
            if call and reply[-1] == tokenizer.eos_token_id and turn + 1 < MAX_TURNS:
                found[i][0].extend(answered(tokenizer, _says(call[0])))
                still.append(i)
        going = still
    return found


def _says(call: str) -> str:
    try:
        return tool_says(call)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, no such tool
        return f"Error: {error}"


def answered(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of a tool's answer and of the next turn's opening, behind the end of the call."""
    return tokenizer(f"\n<|im_start|>tool\n{text}<|im_end|>\n<|im_start|>assistant\n").input_ids
