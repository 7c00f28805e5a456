# SPDX-License-Identifier: Apache-2.0
"""Files of samples in verl's format: one schema for all of them, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from opd_ext.files import whole


def schema(difficulty: pa.DataType, **extra: pa.DataType) -> pa.Schema:
    """The columns of a file, given its type of difficulty and what else ``extra_info`` holds.

    Every file of a source has the same schema: those whose difficulties are all null, and others, must concatenate.
    """
    info = {"index": pa.int64(), "split": pa.string(), "question": pa.string(), "difficulty": difficulty, **extra}
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", pa.struct(list(info.items()))),
        ]
    )


def write_tables(tables: Mapping[Path, pa.Table], force: bool) -> dict[Path, str]:
    """Write every table or, if a file stands in the way, none; returns what happened to each file.

    Raises:
        FileExistsError: files exist with other content, and not ``force``.
    """
    status = {path: _status(path, table) for path, table in tables.items()}
    blocked = [str(path) for path, what in status.items() if what == "replaced"]
    if blocked and not force:
        raise FileExistsError(
            f"{', '.join(blocked)} exists with other content: use --force to replace it or choose another --out."
        )
    for path, table in tables.items():
        if status[path] != "unchanged":
            with whole(path) as scratch:
                pq.write_table(table, scratch)
    return status


def _status(path: Path, table: pa.Table) -> str:
    if not path.exists():
        return "written"
    try:
        return "unchanged" if pq.read_table(path).equals(table) else "replaced"
    except (pa.ArrowException, OSError):
        return "replaced"
