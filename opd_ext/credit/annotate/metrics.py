# SPDX-License-Identifier: Apache-2.0
"""What annotation cost and found in one step, as numbers for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from opd_ext.credit.annotate.base import FAILURES, STATUSES
from opd_ext.spans import ERROR, KEY


def annotation_metrics(annotations: Sequence[Mapping[str, Any] | None], lengths: Sequence[int]) -> dict[str, float]:
    """Metrics of a batch of rollouts.

    Args:
        annotations: :meth:`Annotation.as_dict` of each rollout; None where none was wanted.
        lengths: response tokens of each.

    Returns:
        ``annotation/``: rollouts asked about (``calls``), share of each status among them (``failures``: all that are
        not the annotator's own verdict), seconds (median and 95th percentile), tokens read and written.
        ``spans/``: share of rollouts with spans, marked tokens by class, coverage of the marked rollouts after and
        before the cap, share of them that were capped, centre of the spans relative to the response.
    """
    wanted = [(entry, length) for entry, length in zip(annotations, lengths, strict=True) if entry is not None]
    if not wanted:
        return {"annotation/calls": 0.0}
    entries = [entry for entry, _ in wanted]
    waits = sorted(entry["latency_s"] for entry in entries if entry["called"])
    metrics = {
        "annotation/calls": float(len(waits)),
        "annotation/failures": fmean(entry["status"] in FAILURES for entry in entries),
        "annotation/latency_p50_s": median(waits) if waits else 0.0,
        "annotation/latency_p95_s": waits[int(0.95 * (len(waits) - 1))] if waits else 0.0,
        "annotation/tokens_in": float(sum(entry["tokens_in"] for entry in entries)),
        "annotation/tokens_out": float(sum(entry["tokens_out"] for entry in entries)),
    }
    metrics |= {f"annotation/{status}": fmean(entry["status"] == status for entry in entries) for status in STATUSES}
    marked = [(entry, length) for entry, length in wanted if entry["runs"]]
    metrics["spans/rollouts"] = len(marked) / len(annotations)
    for name, label in (("key", KEY), ("error", ERROR)):
        metrics[f"spans/tokens_{name}"] = float(
            sum(end - start for entry, _ in marked for start, end, found in entry["runs"] if found == label)
        )
    if marked:
        covered = [sum(end - start for start, end, _ in entry["runs"]) / length for entry, length in marked]
        centres = [(start + end) / 2 / length for entry, length in marked for start, end, _ in entry["runs"]]
        metrics |= {
            "spans/coverage": fmean(covered),
            "spans/coverage_precap": fmean(entry["coverage_precap"] for entry, _ in marked),
            "spans/capped": fmean(entry["capped"] for entry, _ in marked),
            "spans/centre": fmean(centres),
        }
    return metrics
