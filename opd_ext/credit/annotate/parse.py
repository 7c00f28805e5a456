# SPDX-License-Identifier: Apache-2.0
"""Reading an annotator's answer: strict about its form, forgiving about its details."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from opd_ext.spans import ERROR_TYPES, STEP_TYPES

MAX_SPANS = 3
MAX_SEGMENTS_PER_SPAN = 3


class Span(NamedTuple):
    """Consecutive segments and what is decisive in them, or wrong with them."""

    segment_ids: tuple[int, ...]
    type: str


def parse(answer: str, n_segments: int, correct: bool) -> tuple[str, list[Span]]:
    """The spans that an annotator names, in its order.

    Everything outside the outermost braces is ignored. Ids may be strings; ids out of range or used by an earlier
    span are dropped; a span of several runs becomes several spans; a run keeps its first three ids; a type is read in
    lower snake case and a span of an unknown one is dropped; the first three spans count.

    Args:
        answer: whatever the annotator wrote.
        n_segments: how many segments it was shown.
        correct: outcome of the rollout: key spans of a right one, error spans of a wrong one.

    Returns:
        ``ok`` and the spans, or no spans and ``empty``, ``wrong_schema`` (JSON of another form, or for the other
        outcome) or ``parse_error`` (no JSON).
    """
    opening, closing = answer.find("{"), answer.rfind("}")
    try:
        content = json.loads(answer[opening : closing + 1])
    except ValueError:
        return "parse_error", []
    field, type_field, types = (
        ("key_spans", "step_type", STEP_TYPES) if correct else ("error_spans", "error_type", ERROR_TYPES)
    )
    entries = content.get(field) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return "wrong_schema", []
    spans: list[Span] = []
    used: set[int] = set()
    for entry in entries:
        name = re.sub(r"[^a-z0-9]+", "_", str(entry.get(type_field)).lower()).strip("_")
        if name not in types:
            continue
        ids = sorted({found for found in map(_integer, _listed(entry.get("segment_ids"))) if found is not None})
        fresh = [found for found in ids if 0 <= found < n_segments and found not in used]
        for run in _runs(fresh):
            kept = tuple(run[:MAX_SEGMENTS_PER_SPAN])
            used.update(kept)
            spans.append(Span(kept, name))
    return ("ok" if spans else "empty"), spans[:MAX_SPANS]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*\d{1,6}\s*", value) else None


def _runs(ids: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in ids:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
