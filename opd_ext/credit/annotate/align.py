# SPDX-License-Identifier: Apache-2.0
"""From characters to tokens, byte by byte.

Decoding token by token breaks characters that span tokens, and encoding the text again may give other tokens than
those that were sampled. The bytes of a byte-level vocabulary have neither problem.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from opd_ext.credit.annotate.segments import Interval

_TAG = re.compile(r"</?[A-Za-z_|][^<>\s]*>")


class AlignmentError(ValueError):
    """Tokens and text do not belong together."""


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE (Radford et al. 2019): printable Latin-1 stands for itself."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """The bytes of every token of a byte-level vocabulary.

    Special tokens and tags such as ``<think>`` have none: they are no text that an annotator could mark.

    Raises:
        ValueError: the tokenizer is not a byte-level one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        state = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}
        if '"ByteLevel"' not in json.dumps(state.get("decoder")):
            raise ValueError(
                f"annotators need a byte-level tokenizer (GPT-2's, Llama 3's, Qwen's), which "
                f"{type(tokenizer).__name__} of this model is not: choose another model, or a credit other than spans"
            )
        alphabet = _byte_of_character()
        added = {entry["id"]: entry for entry in state["added_tokens"]}
        self._bytes = {}
        for token, index in tokenizer.get_vocab().items():
            if entry := added.get(index):
                silent = entry["special"] or index in tokenizer.all_special_ids or _TAG.fullmatch(token)
                self._bytes[index] = b"" if silent else token.encode()
            else:
                self._bytes[index] = bytes(alphabet[character] for character in token)

    def text(self, ids: Sequence[int]) -> tuple[str, list[Interval]]:
        """The text of a response and the character interval of each of its tokens.

        Raises:
            AlignmentError: an id without an entry, or the tokenizer itself decodes to another text.
        """
        if missing := [index for index in ids if index not in self._bytes]:
            raise AlignmentError(f"token {missing[0]} is not in the vocabulary")
        pieces = [self._bytes[index] for index in ids]
        text, offsets = intervals(pieces)
        shown = [index for index, piece in zip(ids, pieces, strict=True) if piece]
        decoded = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded != text:
            raise AlignmentError("the bytes of the tokens are not the text that the tokenizer decodes")
        return text, offsets


def intervals(pieces: Sequence[bytes]) -> tuple[str, list[Interval]]:
    """Bytes of each token -> text (UTF-8 with replacement) and the characters that each token's bytes touch."""
    joined = b"".join(pieces)
    text = joined.decode("utf-8", "replace")
    starts = _character_starts(joined, text)
    offsets, position = [], 0
    for piece in pieces:
        first, position = bisect_right(starts, position) - 1, position + len(piece)
        after = bisect_right(starts, position - 1)
        offsets.append((first, after) if piece else (after, after))
    return text, offsets


def _character_starts(joined: bytes, text: str) -> list[int]:
    """Byte at which each character begins; a replaced sequence begins at its first byte."""
    starts, position = [], 0
    while position < len(joined):
        starts.append(position)
        position += _width(joined, position)
    if len(starts) != len(text):
        raise AlignmentError("the bytes do not decode character by character")
    return starts


def _width(joined: bytes, position: int) -> int:
    """Bytes of the next character, or of the invalid sequence that one replacement character stands for."""
    for width in range(1, 5):
        try:
            joined[position : position + width].decode("utf-8")
            return width
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data" or position + width >= len(joined):
                return max(1, error.end - error.start)
    return 1


def align(spans: Iterable[Iterable[Interval]], offsets: Sequence[Interval]) -> list[list[int]]:
    """Tokens that intersect each span, left to right; a token belongs to the first span that it meets.

    Args:
        spans: each a list of character intervals.
        offsets: character interval of every token; empty ones are never marked.
    """
    taken: set[int] = set()
    groups = []
    for span in spans:
        ranges = list(span)
        group = [
            index
            for index, (start, end) in enumerate(offsets)
            if index not in taken and any(start < stop and begin < end and end > start for begin, stop in ranges)
        ]
        taken.update(group)
        groups.append(group)
    return groups


def cap(groups: Sequence[Sequence[int]], length: int, coverage: float) -> list[int]:
    """At most ``floor(coverage * length)`` tokens, in the annotator's order, left to right inside a span; sorted.

    Marks are binary, so "the tokens of highest weight" (TRACE, appendix C.4) is settled by order.
    """
    # The small number keeps 0.1 * 30 from becoming 2.
    budget = int(coverage * length + 1e-9)
    return sorted([index for group in groups for index in group][:budget])


def runs(tokens: Sequence[int], label: int) -> list[tuple[int, int, int]]:
    """Sorted token indices -> half-open (start, end, label) runs."""
    found: list[tuple[int, int, int]] = []
    for index in tokens:
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1, label)
        else:
            found.append((index, index + 1, label))
    return found
