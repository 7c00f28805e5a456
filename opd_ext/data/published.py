# SPDX-License-Identifier: Apache-2.0
"""What ``opd data`` knows of a published data set: where it is, what of it papers use, and which column is what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

HUB = "https://huggingface.co/datasets/"


@dataclass(frozen=True)
class Origin:
    """Files of one repository.

    Attributes:
        repository: ``owner/name`` on the hub, or the web address of what is not there.
        files: patterns of file names in it.
        revision: the commit that was looked at; empty: the newest.
        sha256: of the file, if there is one and its digest is known.
        local: patterns of ``folder/name`` that tell a local file from those of other splits, in small letters.
        difficulty: of all its rows, where no column has one.
    """

    repository: str
    files: tuple[str, ...]
    revision: str = ""
    sha256: str = ""
    local: tuple[str, ...] = ()
    difficulty: str | None = None

    @property
    def on_hub(self) -> bool:
        return "://" not in self.repository

    @property
    def address(self) -> str:
        return f"{HUB}{self.repository}" if self.on_hub else self.repository

    def is_called(self, name: str) -> bool:
        """Whether a local file, ``folder/name``, looks like one of these."""
        patterns = self.local or tuple(f"*{pattern.rpartition('/')[2].lower()}" for pattern in self.files)
        return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


@dataclass(frozen=True)
class Keep:
    """A condition on a cell; ``column`` may be ``outer.inner``. A row without the cell does not meet it."""

    column: str
    one_of: tuple[Any, ...] = ()
    at_least: float | None = None
    dates: tuple[str, str] | None = None  # from the first day on, before the second

    @property
    def words(self) -> str:
        if self.dates:
            return f"{self.column} from {self.dates[0]}, before {self.dates[1]}"
        if self.at_least is not None:
            return f"{self.column} >= {self.at_least:g}"
        return f"{self.column} is {' or '.join(map(str, self.one_of))}"

    def holds(self, cells: Mapping[str, Any]) -> bool:
        value: Any = cells
        for name in self.column.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if self.dates:
            return isinstance(value, str) and self.dates[0] <= value < self.dates[1]
        if self.at_least is not None:
            return isinstance(value, int | float) and value >= self.at_least
        return value in self.one_of


@dataclass(frozen=True)
class Split:
    """One file of rows.

    Attributes:
        keeps: the published filter.
        rows: that are published to be left; 0 if nobody says.
        usual: made unless others are asked for.
        asks: training prompts, which end with the reminder of the wording; evaluation prompts do not.
    """

    name: str
    origins: tuple[Origin, ...]
    keeps: tuple[Keep, ...] = ()
    rows: int = 0
    usual: bool = True
    asks: bool = False


@dataclass(frozen=True)
class Published:
    """A data set.

    Attributes:
        name: of the command, and of the folder in ``$OPD_HOME/data``.
        kind: how a row is read, a key of :data:`opd_ext.data.rows.KINDS`.
        data_source: of its rows; graders and reports know a set by it.
        columns: field of a row -> columns that may hold it, the first that is there counts.
        recipes: that use it.
        wording: how a question is asked, a key of :data:`opd_ext.data.rows.PROMPTS`; empty: as it is published.
        distinct: ``exact`` or ``spaces`` (white space normalised): of copies of a question the first stays.
        held_out: share of the questions that the second split gets, by the published shuffle; 0: files make splits.
        longest_answer: longer answers (characters) are texts, and their rows are dropped; 0: they stay.
        thinking: the trace gets tags around its ``thoughts``.
        evaluated: the split that an evaluation takes which names the set alone, if the set has it.
        note: what else a reader must know.
    """

    name: str
    title: str
    licence: str
    kind: str
    data_source: str
    grader: str
    splits: tuple[Split, ...]
    columns: Mapping[str, tuple[str, ...]]
    recipes: tuple[str, ...]
    ability: str = "math"
    wording: str = ""
    distinct: str = ""
    held_out: float = 0.0
    longest_answer: int = 0
    thinking: bool = False
    evaluated: str = "test"
    note: str = ""

    @property
    def has_traces(self) -> bool:
        return "trace" in self.columns


def one(repository: str, file: str, **known: str) -> tuple[Origin, ...]:
    """The origins of what lies in one place."""
    return (Origin(repository, (file,), **known),)  # type: ignore[arg-type]
