# SPDX-License-Identifier: Apache-2.0
"""How a metric is described, and how a name is matched with its description."""

import re
from dataclasses import dataclass

LOG = "metrics.jsonl"
SFT_LOG = "metrics-from-*.jsonl"
SUMMARY = "report/summary.json"
COMPARISON = "comparison.json"
MODELS = "report.json"

_PLACEHOLDERS = {
    "k": r"\d+",
    "source": r".+",
    "statistic": r"(accuracy|tokens|truncated|change|area)\w*",
}


@dataclass(frozen=True)
class Metric:
    """One entry.

    Attributes:
        names: with one meaning, separated by spaces. They are literal but for placeholders: ``<k>`` is a number,
            ``<source>`` a data source (any text), ``<statistic>`` one that the same file has, all others a word.
        unit: empty for a pure number.
        when: it is there; empty: always.
        healthy: what a run that goes well shows, in a few words; empty: nothing to look for.
    """

    names: str
    unit: str
    meaning: str
    when: str = ""
    healthy: str = ""

    def matches(self, name: str) -> bool:
        """Whether this entry describes the metric."""
        return any(re.fullmatch(_pattern(own), name) for own in self.names.split())


@dataclass(frozen=True)
class Section:
    """Metrics that one place emits.

    Attributes:
        source: file that does, relative to the package; ``verl/...`` is verl's.
        file: in which they are found; :data:`LOG` stands for TensorBoard as well.
    """

    title: str
    source: str
    metrics: tuple[Metric, ...]
    file: str = LOG


def _pattern(name: str) -> str:
    parts = re.split(r"<(\w+)>", name)
    return "".join(_PLACEHOLDERS.get(part, r"\w+") if i % 2 else re.escape(part) for i, part in enumerate(parts))
