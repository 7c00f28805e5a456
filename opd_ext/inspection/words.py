# SPDX-License-Identifier: Apache-2.0
"""Tokens as texts, one by one."""

from collections.abc import Iterable
from typing import Any


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """What each token contributes to a text; bytes of an unfinished character as ``\\\\xE2\\\\x80``.

    A token that the tokenizer does not have (padding rows of the head) is named by its id.
    """
    found = {}
    for token in sorted(set(ids)):
        piece = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
        if piece is None:
            found[token] = f"[{token}]"
            continue
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\N{REPLACEMENT CHARACTER}" in text:
            text = _as_bytes(piece)
        elif piece.startswith("▁") and not text.startswith(" "):  # SentencePiece drops the first space of a text
            text = " " + text
        found[token] = text
    return found


def _byte_of() -> dict[str, int]:
    """Byte-level tokenizers write each byte as one printable character (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def _as_bytes(piece: str) -> str:
    if all(letter in _BYTE_OF for letter in piece):
        raw = bytes(_BYTE_OF[letter] for letter in piece)
        return "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02X}" for b in raw)
    return piece
