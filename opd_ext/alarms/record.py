# SPDX-License-Identifier: Apache-2.0
"""What a run raised, when, why, and what was done about it: ``alarms.jsonl`` in its folder."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ext.files import read_jsonl, write_jsonl

FILE = "alarms.jsonl"
PREFIX = "alarm/"


@dataclass(frozen=True)
class Record:
    """A line of ``alarms.jsonl``: what was raised when, why, and what was done.

    Attributes:
        done: ``warn``, ``stop`` or ``rollback``.
        to: the step of the checkpoint that a rollback goes back to.
        pending: that is yet to be done.
    """

    step: int
    alarm: str
    why: str
    done: str
    to: int | None = None
    pending: bool = False

    def __str__(self) -> str:
        more = {"warn": "", "stop": "; the run stops", "rollback": f"; back to the checkpoint of step {self.to}"}
        return f"step {self.step}: {self.why} ({self.alarm}){more[self.done]}"


def read(run_dir: Path) -> list[Record]:
    """The alarms of a run, in the order of their steps; none is an empty list."""
    path = Path(run_dir) / FILE
    known = {entry.name for entry in dataclasses.fields(Record)}
    lines: list[Any] = read_jsonl(path, cut_off_end=True) if path.is_file() else []
    return [Record(**{name: value for name, value in line.items() if name in known}) for line in lines]


def append(run_dir: Path, records: Sequence[Record]) -> None:
    """Add to the record."""
    with (Path(run_dir) / FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)


def forget_after(run_dir: Path, step: int) -> None:
    """Take out what a resumed run will find again; that it was rolled back stays on record.

    A run that begins anew begins without alarms.
    """
    if records := read(run_dir):
        kept = [record for record in records if step and (record.step <= step or record.done == "rollback")]
        write_jsonl(Path(run_dir) / FILE, map(dataclasses.asdict, kept))


def rollbacks(run_dir: Path) -> int:
    """How often the run has gone back so far."""
    return sum(record.done == "rollback" for record in read(run_dir))
