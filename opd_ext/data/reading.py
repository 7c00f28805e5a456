# SPDX-License-Identifier: Apache-2.0
"""Rows of published files, one after another: parquet, JSON, JSON lines or CSV, each of the last three also gzipped."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = ("parquet", "jsonl", "json", "csv")
_BATCH = 1024


def kind_of(path: Path) -> str | None:
    """The format that a file's name tells, one of :data:`FORMATS`, or None."""
    found = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    return found if found in FORMATS and not (found == "parquet" and path.suffix == ".gz") else None


def read_rows(path: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """Every row as {column: value}; of parquet files the ``wanted`` columns alone are read.

    Raises:
        FileNotFoundError, ValueError: one sentence: there is no such file, it cannot be read, or it holds no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file.")
    if (kind := kind_of(path)) is None:
        raise ValueError(f"{path} is none of {', '.join('.' + name for name in FORMATS)}.")
    rows = 0
    try:
        for row in _READERS[kind](path, wanted):
            rows += 1
            yield row
    except (ValueError, OSError, EOFError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {' '.join(str(error).split())}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows.")


def columns_of(path: Path) -> list[str]:
    """The columns of a parquet file or of the first row of another."""
    if kind_of(path) != "parquet" or not path.is_file():
        return list(next(read_rows(path, ())))
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _parquet(path: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name in wanted] or file.schema_arrow.names[:1]
        for batch in file.iter_batches(_BATCH, columns=names):
            yield from batch.to_pylist()


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """Lines end with a line feed alone: JSON text may hold U+2028 and U+0085."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError:
                raise ValueError(f"line {number} is not JSON: repair or remove the line") from None
            yield _object(row, number)


def _json(path: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """A list of objects; many files of that name hold lines instead."""
    with _opened(path) as file:
        is_list = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_list:
        yield from _lines(path, wanted)
        return
    with _opened(path) as file:
        rows = json.loads(file.read().decode("utf-8-sig"))
    for number, row in enumerate(rows, start=1):
        yield _object(row, number)


def _object(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is no object, {{column: value}}")
    return row


def _csv(path: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    with _opened(path) as file:
        yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))


_READERS = {"parquet": _parquet, "jsonl": _lines, "json": _json, "csv": _csv}
