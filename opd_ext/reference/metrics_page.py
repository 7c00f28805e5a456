# SPDX-License-Identifier: Apache-2.0
"""``docs/reference/metrics.md``: every number that a run or a report writes."""

from collections.abc import Iterator

from opd_ext.reference.text import names, wrap
from opd_ext.report.metrics import SECTIONS, Metric
from opd_ext.report.metrics.entries import LOG

_INTRO = """\
# Metrics

Made by `python -m opd_ext.reference` from `opd_ext/report/metrics/table.py`; do not edit.

`metrics.jsonl` in a run folder has one line per step (`phase` train) and per validation (`phase` val),
with `step`, `time` in unix seconds, and the metrics below; TensorBoard has them under the same names.
A metric without *There* is on every line of its phase. Logarithms are natural; means are over the
tokens or rollouts of the whole batch, whatever the number of ranks and micro-batches. `<k>` stands
for a number, `<source>` for a data source, other angle brackets for a word.
"""


def page() -> str:
    """The whole page."""
    lines, file = [_INTRO], ""
    for section in SECTIONS:
        if section.file != file:
            file = section.file
            lines += [f"## `{file}`" + (" and TensorBoard" if file == LOG else ""), ""]
        lines += [f"### {section.title}", "", f"From `{section.source}`.", ""]
        for metric in section.metrics:
            lines += _entry(metric)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _entry(metric: Metric) -> Iterator[str]:
    unit = f" ({metric.unit})" if metric.unit else ""
    yield wrap(f"{names(metric.names.split())}{unit}: {metric.meaning}.", "- ")
    said = [f"*{word}:* {text}." for word, text in (("There", metric.when), ("Healthy", metric.healthy)) if text]
    if said:
        yield wrap(" ".join(said), "  ")
