# SPDX-License-Identifier: Apache-2.0
"""What every number in a run folder means: the table behind ``docs/reference/metrics.md``."""

from collections.abc import Iterable, Iterator

from opd_ext.report.metrics.entries import LOG, Metric, Section
from opd_ext.report.metrics.table import SECTIONS

__all__ = ["SECTIONS", "Metric", "Section", "described", "undescribed"]

_COLUMNS = {"step", "phase", "time"}
"""What a line of the log has besides metrics."""


def described(file: str = LOG) -> Iterator[Metric]:
    """The entries for one file."""
    for section in SECTIONS:
        if section.file == file:
            yield from section.metrics


def undescribed(names: Iterable[str], file: str = LOG) -> list[str]:
    """Those of ``names`` that no entry describes, sorted."""
    entries = list(described(file))
    return sorted(name for name in set(names) - _COLUMNS if not any(entry.matches(name) for entry in entries))
