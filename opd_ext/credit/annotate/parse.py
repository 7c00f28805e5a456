# SPDX-License-Identifier: Apache-2.0
"""Reading an annotator's answer: strict about its form, forgiving about its details."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from opd_ext.spans import ERROR_TYPES, STEP_TYPES

MAX_SPANS = 3
MAX_SEGMENTS_PER_SPAN = 3

_JSON = json.JSONDecoder()


class Span(NamedTuple):
    """Consecutive segments and what is decisive in them, or wrong with them."""

    segment_ids: tuple[int, ...]
    type: str


def parse(answer: str, n_segments: int, correct: bool) -> tuple[str, list[Span]]:
    """The spans that an annotator names, in its order.

    The answer is the last JSON object with the spans' field, whatever stands around it: LaTeX, thoughts, the format
    repeated, an earlier draft. Ids may be strings, a range ("2-3") among them, or whole floats; ids out of range or
    used by an earlier span are dropped; a span of several runs becomes several spans; a run keeps its first three ids;
    a type is read in lower snake case and a span of an unknown one is dropped; the first three spans count.

    Args:
        answer: whatever the annotator wrote.
        n_segments: how many segments it was shown.
        correct: outcome of the rollout: key spans of a right one, error spans of a wrong one.

    Returns:
        ``ok`` and the spans, or no spans and ``empty``, ``wrong_schema`` (JSON of another form, or for the other
        outcome) or ``parse_error`` (no JSON).
    """
    field, type_field, types = (
        ("key_spans", "step_type", STEP_TYPES) if correct else ("error_spans", "error_type", ERROR_TYPES)
    )
    objects = list(_objects(answer))
    if not objects:
        return "parse_error", []
    entries = next((found[field] for found in reversed(objects) if field in found), None)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return "wrong_schema", []
    spans: list[Span] = []
    used: set[int] = set()
    for entry in entries:
        name = re.sub(r"[^a-z0-9]+", "_", str(entry.get(type_field)).lower()).strip("_")
        if name not in types:
            continue
        ids = {number for value in _listed(entry.get("segment_ids")) for number in _integers(value, n_segments)}
        fresh = sorted(ids - used)
        for run in _runs(fresh):
            kept = tuple(run[:MAX_SEGMENTS_PER_SPAN])
            used.update(kept)
            spans.append(Span(kept, name))
    return ("ok" if spans else "empty"), spans[:MAX_SPANS]


def _objects(answer: str) -> Iterator[dict]:
    """Every JSON object in the text that is not part of another one; a comma too many is forgiven."""
    text, position = re.sub(r",(\s*[}\]])", r"\1", answer), 0
    while (position := text.find("{", position)) >= 0:
        try:
            found, position = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError):  # a brace of LaTeX, or of a set
            position += 1
            continue
        yield found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _integers(value: Any, below: int) -> list[int]:
    """The segments in [0, below) that a value names: 2, 2.0, "2", "[2]", "2, 3" or "2-3"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return []
    numbers: list[int] = []
    for part in re.sub(r"[\[\]\s]", "", str(value)).split(","):
        if named := re.fullmatch(r"(\d{1,6})(?:[-–](\d{1,6}))?", part):
            first, last = int(named[1]), int(named[2] or named[1])
            numbers += range(first, min(last + 1, below))
    return numbers


def _runs(ids: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in ids:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
