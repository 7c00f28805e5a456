# SPDX-License-Identifier: Apache-2.0
"""Cutting a response into the numbered segments that an annotator points at."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

MAX_SEGMENTS = 256

_BREAKS = {"blank": re.compile(r"\n[^\S\n]*\n\s*"), "line": re.compile(r"\n")}
# Chinese and Japanese put no white space behind a full stop.
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*\s+|[。｡！？]+[\"'”’」』）)】\]]*\s*|\n")

Interval = tuple[int, int]
"""A half-open range of characters."""


def segment(
    text: str,
    offsets: Sequence[Interval],
    paragraph: str = "blank",
    min_tokens: int = 8,
    max_tokens: int = 96,
    max_segments: int = MAX_SEGMENTS,
) -> list[Interval]:
    """Contiguous segments that together are the whole text.

    Cuts at paragraph ends (the separator stays with the left segment), splits what is longer than ``max_tokens`` at
    sentence ends, merges neighbours while one is shorter than ``min_tokens``, then the shortest neighbours until there
    are at most ``max_segments``. TRACE (arXiv 2605.10194) numbers segments without saying how it cuts them.

    Args:
        text: the response.
        offsets: character interval of each token, monotone; a token counts where it begins.
        paragraph: ``blank`` (blank lines end a segment) or ``line`` (every line does).

    Raises:
        ValueError: unknown ``paragraph``.
    """
    if paragraph not in _BREAKS:
        raise ValueError(f"paragraph={paragraph!r} does not exist: use {' or '.join(_BREAKS)}")
    if not text:
        return []
    starts = [start for start, end in offsets if end > start]

    def tokens(start: int, end: int) -> int:
        return bisect_left(starts, end) - bisect_left(starts, start)

    cuts = [0, *(found.end() for found in _BREAKS[paragraph].finditer(text) if found.end() < len(text)), len(text)]
    pieces = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        pieces += _split(text, start, end, tokens, max_tokens)
    lengths = [tokens(*piece) for piece in pieces]
    pieces, lengths = _merge_short(pieces, lengths, min_tokens)
    while len(pieces) > max_segments:
        pairs = [a + b for a, b in zip(lengths, lengths[1:], strict=False)]
        _merge(pieces, lengths, pairs.index(min(pairs)))
    return pieces


def _split(text: str, start: int, end: int, tokens: Callable[[int, int], int], limit: int) -> list[Interval]:
    """Greedy pieces of whole sentences within the limit; a longer sentence stays whole."""
    if tokens(start, end) <= limit:
        return [(start, end)]
    ends = [found.end() for found in _SENTENCE_END.finditer(text, start, end) if found.end() < end] + [end]
    pieces, begin, last = [], start, start
    for stop in ends:
        if last > begin and tokens(begin, stop) > limit:
            pieces.append((begin, last))
            begin = last
        last = stop
    return [*pieces, (begin, end)]


def _merge_short(pieces: list[Interval], lengths: list[int], least: int) -> tuple[list[Interval], list[int]]:
    """Left to right: what follows a short segment joins it; a short last one joins the one before it."""
    merged: list[Interval] = []
    sizes: list[int] = []
    for piece, size in zip(pieces, lengths, strict=True):
        merged.append(piece)
        sizes.append(size)
        if len(merged) > 1 and sizes[-2] < least:
            _merge(merged, sizes, len(merged) - 2)
    if len(merged) > 1 and sizes[-1] < least:
        _merge(merged, sizes, len(merged) - 2)
    return merged, sizes


def _merge(pieces: list[Interval], lengths: list[int], left: int) -> None:
    pieces[left : left + 2] = [(pieces[left][0], pieces[left + 1][1])]
    lengths[left : left + 2] = [lengths[left] + lengths[left + 1]]
