# SPDX-License-Identifier: Apache-2.0
"""Text that spells control tokens stays text: a rollout with ``<|im_end|>`` in it ends no turn of a prompt about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_CONTROL = r"<[|｜][\w▁ ]+[|｜]>"


def as_text(tokenizer: Any, foreign: bool = False) -> Callable[[str], str]:
    """What to do to a body before a chat template is put around it.

    The first character of every control token that the body spells is set apart by a space, ``< |im_end|>``: no
    tokenizer reads that as a control token, and a model still reads what was written. Every other text comes back as
    it is. Control tokens are a tokenizer's special tokens and those added tokens of the form ``<|...|>`` that are not
    marked as special (DeepSeek's ``<｜User｜>``). Tags such as ``<think>`` and ``<tool_call>`` are added tokens, too,
    but a model samples them in ordinary responses, and a teacher is to read them as they were sampled.

    Args:
        tokenizer: a ``transformers`` tokenizer.
        foreign: the text goes to a model with another tokenizer: whatever has the form ``<|...|>`` counts.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    spelled = {str(token) for token in added if token.special or re.fullmatch(_CONTROL, str(token))}
    # The longest first, since one token may begin another. A single character cannot be taken apart.
    patterns = [re.escape(token) for token in sorted(spelled, key=len, reverse=True) if len(token) > 1]
    if foreign:
        patterns.append(_CONTROL)
    if not patterns:
        return str
    pattern = re.compile("|".join(patterns))
    return lambda text: pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
