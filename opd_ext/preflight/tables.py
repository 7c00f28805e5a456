# SPDX-License-Identifier: Apache-2.0
"""A file of samples, opened: how many rows it has, which columns, and the first of its rows."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ext.errors import ConfigError
from opd_ext.preflight.findings import refuse

SUFFIXES = (".parquet", ".json", ".jsonl")  # what verl's data set opens
ROWS = 2000  # rows of a file that are read
_LFS = b"version https://git-lfs"


@dataclass
class Samples:
    """One file; ``sample`` are its first rows, at most ``ROWS``."""

    name: str  # key and path, as a sentence begins with them
    rows: int
    columns: list[str]
    sample: list[dict[str, Any]] = field(repr=False)
    path: Path | None = None

    def values(self, column: str, name: str | None = None) -> list[Any]:
        """Of every row, not of the first ones alone: a column, or the field ``name`` in it; None where it is absent."""
        if self.path is None or self.rows == len(self.sample):
            found = [row.get(column) for row in self.sample]
        elif self.path.suffix == ".parquet":
            import pyarrow.parquet as pq

            wanted = column if name is None else f"{column}.{name}"
            table = pq.ParquetFile(self.path).read(columns=[wanted])
            found = table.column(column).to_pylist() if column in table.column_names else [None] * self.rows
        else:
            found = [row.get(column) for row in _rows(self.path)]
        return found if name is None else [(value or {}).get(name) for value in found]

    @property
    def answered(self) -> bool:
        """Whether there are reference answers, by which rollouts can be graded."""
        return "reward_model" in self.columns and any(row.get("reward_model") for row in self.sample)


def open_samples(key: str, path: Path, columns: Iterable[str]) -> Samples:
    """The file behind ``key``; of a parquet file, ``columns`` alone are read.

    Raises:
        ConfigError: it cannot be opened, or has no rows.
    """
    name = f"{key}={path}"
    if path.is_dir():
        raise ConfigError(f"{name} is a folder: name the files in it.")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{name} has the suffix '{path.suffix}', and verl opens {', '.join(SUFFIXES)}: convert it.")
    if path.stat().st_size == 0:
        raise ConfigError(f"{name} is an empty file: make or copy it again.")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ConfigError(f"{name} is a pointer of Git LFS, not the data: run `git lfs pull` where it comes from.")
    found = _parquet(name, path, columns) if path.suffix == ".parquet" else _json(name, path)
    found.path = path
    if found.rows == 0:
        raise ConfigError(f"{name} has no rows: fill it, or name another file.")
    return found


def _parquet(name: str, path: Path, columns: Iterable[str]) -> Samples:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        there = file.schema_arrow.names
        wanted = [column for column in columns if column in there]
        batches = file.iter_batches(batch_size=ROWS, columns=wanted)
        first = next(batches, None)
        return Samples(name, file.metadata.num_rows, there, [] if first is None else first.to_pylist())
    except Exception as error:
        raise refuse(f"{name} is no parquet file that can be read: make or copy it again", error) from None


def _json(name: str, path: Path) -> Samples:
    """A list of objects, or one object per line; every line counts, the first ones are read."""
    sample, rows = [], 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            if file.read(1) == "[":
                content = json.loads("[" + file.read())
                sample, rows = content[:ROWS], len(content)
            else:
                file.seek(0)
                for number, line in enumerate(file, 1):
                    if line.strip():
                        rows += 1
                        if rows <= ROWS:
                            sample.append(_line(name, number, line))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise refuse(f"{name} is no JSON that can be read: write one object per line, in UTF-8", error) from None
    wrong = next((i for i, row in enumerate(sample) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise ConfigError(f"{name}: row {wrong} is no object: write one object with columns per line.")
    return Samples(name, rows, sorted({column for row in sample for column in row}), sample)


def _rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file of JSON that :func:`open_samples` has looked at."""
    text = path.read_text(encoding="utf-8-sig")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]


def _line(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(f"{name}: line {number} is no JSON object", error) from None
